"""Customization: the training that all methods share, and the delta in which a trained model is kept.

What a method trains is in `attrdb.ingest.customizers`. Exemplars and prompts are encoded once, before the first step; of the
text encoder one row a step is left where the new token is trained, and nothing where it is not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from attrdb.errors import InvalidValue
from attrdb.ingest.base_model import BaseModel
from attrdb.ingest.customizers import DEFAULT_METHOD, Customizer, load_customizer
from attrdb.ingest.devices import enough_memory, is_cpu
from attrdb.ingest.options import CustomizeSettings
from attrdb.ingest.views import Latents, encode_views

TOKEN_KEY = "text_encoder.token_embedding"

LOOKED_AT = 10  # steps between two looks at the losses: on a GPU a look waits for all that was asked of it

Delta = dict[str, torch.Tensor]
Report = Callable[[int, int], None]  # steps done, steps in all


class Diverged(InvalidValue):
    """Training whose loss or weights are no longer finite.

    delta:   of the last step that is known to be good
    n_steps: how many steps that delta has taken
    losses:  finite ones, of each step until then
    """

    def __init__(self, problem: str, losses: list[float], n_steps: int):
        super().__init__(problem)
        self.delta: Delta = {}
        self.n_steps, self.losses = n_steps, losses


@dataclass(frozen=True)
class Regularization:
    """Images that keep the base model's idea of a category (prior preservation): what they are, and a prompt for each.

    names: image ids of the corpus, or sha256 of the pixels of those that the base model has drawn
    """

    images: Sequence[Image.Image]
    prompts: Sequence[str]
    names: Sequence[str]


def check_prompts(pipeline: StableDiffusionPipeline, prompts: Sequence[str], token: str) -> None:
    """raises: InvalidValue for a prompt whose token lies beyond what the text encoder reads"""
    tokenizer = pipeline.tokenizer
    token_id, longest = tokenizer.convert_tokens_to_ids(token), tokenizer.model_max_length
    for prompt in prompts:
        if token_id not in tokenizer(prompt, truncation=True, max_length=longest).input_ids:
            raise InvalidValue(f"the base model reads {longest} tokens, and {token} lies beyond them in {prompt!r}")


def token_ids(base: BaseModel, prompts: Sequence[str]) -> torch.Tensor:
    """(n, length) int64, padded."""
    tokenizer = base.pipeline.tokenizer
    padding = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
    return tokenizer(list(prompts), return_tensors="pt", **padding).input_ids.to(base.device)


@torch.no_grad()
def encode_prompts(base: BaseModel, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """(length, width) float32 of every distinct prompt; one at a time, so that none depends on its company."""
    encoder = base.pipeline.text_encoder
    return {prompt: encoder(token_ids(base, [prompt])).last_hidden_state[0] for prompt in dict.fromkeys(prompts)}


def customize(
    base: BaseModel,
    exemplars: Sequence[Image.Image],
    prompt: str | Sequence[str],
    token: str | None,
    category: str,
    settings: CustomizeSettings,
    report: Report = lambda done, total: None,
    *,
    method: str = DEFAULT_METHOD,
    regularization: Regularization | None = None,
    gradient_checkpointing: bool = False,
) -> tuple[Delta, dict]:
    """Train a customized model; the delta to the base model in float32, and figures (loss, seconds).

    prompt: of all exemplars, or a list with one for each
    token:  the new token that the prompt names the concept by; None: there is none, and none is trained
    gradient_checkpointing: for small cards: activations are computed again in the backward pass, the delta is the same
    The base model, a fresh one, is left customized, as by `apply_delta`; `base.restore()` takes that back. If training fails
    it is as it was.
    raises: InvalidValue for no such method or augmentation, or a prompt that is cut before its token; Diverged; OutOfMemory
    """
    started = time.monotonic()
    customizer = load_customizer(method)
    prompts = [prompt] * len(exemplars) if isinstance(prompt, str) else list(prompt)
    like = settings.like(category)
    token_id = base.add_token(token, like) if token else None
    try:
        if token:
            check_prompts(base.pipeline, list(dict.fromkeys(prompts)), token)
        with (
            enough_memory(base.device, _doing(base, settings), _advice(gradient_checkpointing)),
            _attached(customizer, base, settings.seed) as trained,
            _checkpointed(base, gradient_checkpointing),
        ):
            vector = None
            if customizer.trains_token and token_id is not None:
                table = base.pipeline.text_encoder.get_input_embeddings().weight.data
                vector = table[token_id].clone().requires_grad_(True)
            parameters = {} if vector is None else {TOKEN_KEY: vector}
            parameters |= {f"unet.{name}": weight for name, weight in trained.items()}
            if not parameters:
                raise InvalidValue(f"method {method!r} trains a token alone, and there is none; choose another method")
            training = _Training(base, exemplars, prompts, settings, regularization, token_id, vector, report)
            try:
                with base.lowered():
                    losses = training.run(list(parameters.values()), report)
            except Diverged as error:
                error.delta = _taken(parameters)
                raise
            delta = _taken(parameters)
    finally:
        base.restore()
    apply_delta(base, delta, token, like, method)
    last = losses[-max(1, len(losses) // 10) :]
    figures = {"customize_seconds": time.monotonic() - started, "loss": sum(last) / len(last), "losses": losses}
    return delta, figures


def _taken(parameters: dict[str, torch.Tensor]) -> Delta:
    return {name: weight.detach().cpu().clone() for name, weight in parameters.items()}


def _doing(base: BaseModel, settings: CustomizeSettings) -> str:
    n_pictures = settings.batch * (2 if settings.prior_images else 1)
    return f"training {n_pictures} pictures of {base.resolution} pixels a side at a time"


def _advice(gradient_checkpointing: bool) -> str:
    """What to give instead where memory is full, by the names that options and keys of a spec share."""
    first = "" if gradient_checkpointing else "turn gradient checkpointing on (gradient_checkpointing), or "
    return f"{first}give a smaller batch (batch), which makes another model"


@contextmanager
def _checkpointed(base: BaseModel, wanted: bool) -> Iterator[None]:
    """In it the U-Net keeps few activations for the backward pass, if that is wanted."""
    if not wanted:
        yield
        return
    base.pipeline.unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        base.pipeline.unet.disable_gradient_checkpointing()


@contextmanager
def _attached(customizer: Customizer, base: BaseModel, seed: int) -> Iterator[dict[str, torch.nn.Parameter]]:
    """What the method trains in the U-Net; afterwards the U-Net is as it was, bit for bit."""
    unet = base.pipeline.unet
    devices = [] if is_cpu(base.device) else [base.device]
    trained: dict[str, torch.nn.Parameter] = {}
    before: dict[str, torch.Tensor] = {}
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            trained = customizer.attach(unet)
        unet.requires_grad_(False)
        before = {name: weight.detach().clone() for name, weight in trained.items()}
        for weight in trained.values():
            weight.requires_grad_(True)
        yield trained
    finally:
        for name, weight in trained.items():
            weight.requires_grad_(False)
            weight.grad = None
            if name in before:  # memory may have been full while they were copied, before anything was trained
                weight.data.copy_(before[name])
        customizer.detach(unet)


class _Watch:
    """Looks at the losses every LOOKED_AT steps, and keeps the parameters that the last finite one was computed with."""

    def __init__(self, parameters: list[torch.Tensor], settings: CustomizeSettings):
        self.parameters, self.settings = parameters, settings
        self.good, self.n_good = [one.detach().clone() for one in parameters], 0
        self.losses: list[float] = []
        self.unseen: list[torch.Tensor] = []

    def see(self, loss: torch.Tensor) -> None:
        """Note the loss of a step that is still to be taken."""
        self.unseen.append(loss)
        if len(self.unseen) == LOOKED_AT:
            self._look()
            self.good, self.n_good = [one.detach().clone() for one in self.parameters], len(self.losses) - 1

    def end(self) -> list[float]:
        """All losses, after the last step."""
        if self.unseen:
            self._look()
        if not all(one.isfinite().all() for one in self.parameters):
            self._stop("in the last step (weights that are not finite)")
        return self.losses

    def _look(self) -> None:
        for loss in torch.stack(self.unseen).tolist():
            if not math.isfinite(loss):
                self._stop(f"at step {len(self.losses) + 1} (loss {loss})")
            self.losses.append(loss)
        self.unseen.clear()

    def _stop(self, where: str) -> NoReturn:
        for one, good in zip(self.parameters, self.good, strict=True):
            one.data.copy_(good)
        problem = f"training diverged {where}; lower the learning rate ({self.settings.lr:g} now)"
        raise Diverged(problem, self.losses[: self.n_good], self.n_good)


class _Training:
    """The steps of one customization, on latents and prompts that were encoded when it was made."""

    def __init__(
        self,
        base: BaseModel,
        exemplars: Sequence[Image.Image],
        prompts: Sequence[str],
        settings: CustomizeSettings,
        regularization: Regularization | None,
        token_id: int | None,
        vector: torch.Tensor | None,
        report: Report,
    ):
        self.base, self.settings, self.token_id, self.vector = base, settings, token_id, vector
        self.noise = DDPMScheduler.from_config(base.pipeline.scheduler.config)

        def alive(_done: int, _total: int) -> None:
            report(0, settings.steps)

        self.own = encode_views(base, exemplars, settings.augment, settings.seed, alive)
        self.own_states = self._states(prompts) if vector is None else None
        distinct = list(dict.fromkeys(prompts))
        self.own_ids = token_ids(base, distinct)  # (n_distinct, length), encoded in every step where a token is trained
        self.own_prompt = torch.tensor([distinct.index(prompt) for prompt in prompts])
        self.prior = self.prior_states = None
        if regularization:
            self.prior = encode_views(base, regularization.images, "none", settings.seed, alive)
            self.prior_states = self._states(regularization.prompts)

    def _states(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(n_distinct, length, width), and of every prompt which of them is its own."""
        encoded = encode_prompts(self.base, prompts)
        row = {prompt: number for number, prompt in enumerate(encoded)}
        return torch.stack(list(encoded.values())), torch.tensor([row[prompt] for prompt in prompts])

    def run(self, parameters: list[torch.Tensor], report: Report) -> list[float]:
        """Take the steps; the loss of each.

        raises: Diverged, with the parameters put back to the last that are known to be good
        """
        optimizer = torch.optim.AdamW(parameters, lr=self.settings.lr, weight_decay=0.01, fused=True)
        generator = torch.Generator().manual_seed(self.settings.seed)
        watch = _Watch(parameters, self.settings)
        embedding = self.base.pipeline.text_encoder.get_input_embeddings()
        hook = embedding.register_forward_hook(self._with_vector)
        try:
            for step in range(self.settings.steps):
                loss = self._loss(generator)
                loss.backward()
                watch.see(loss.detach())
                optimizer.step()
                optimizer.zero_grad()
                report(step + 1, self.settings.steps)
        finally:
            hook.remove()
        return watch.end()

    def _with_vector(self, _module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        # Only the new token's row is trained: the table itself never gets a gradient.
        if self.vector is None:
            return output
        return torch.where((inputs[0] == self.token_id).unsqueeze(-1), self.vector.to(output.dtype), output)

    def _loss(self, generator: torch.Generator) -> torch.Tensor:
        batch = self.settings.batch
        draws = [self._draw(self.own, self.own_states, generator)]
        if self.prior:
            draws.append(self._draw(self.prior, self.prior_states, generator))
        noisy, times, states, target = (torch.cat(parts) for parts in zip(*(one[:4] for one in draws), strict=True))
        predicted = self.base.predict(noisy, times, states)
        seen = draws[0][4]
        if seen is None:
            loss = F.mse_loss(predicted[:batch], target[:batch])
        else:
            error = ((predicted[:batch] - target[:batch]) ** 2).mean(dim=1, keepdim=True)
            loss = ((error * seen).sum(dim=(1, 2, 3)) / seen.sum(dim=(1, 2, 3))).mean()
        if self.prior:
            loss = loss + self.settings.prior_weight * F.mse_loss(predicted[batch:], target[batch:])
        return loss

    def _draw(
        self, latents: Latents, states: tuple[torch.Tensor, torch.Tensor] | None, generator: torch.Generator
    ) -> tuple:
        """A batch: noisy latents, times, prompt states (batch or 1, length, width), target, and what of it is seen."""
        batch, device = self.settings.batch, self.base.device
        picks = torch.randint(len(latents.mean), (batch,), generator=generator)
        shape = (batch, *latents.mean.shape[1:])
        draw, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
        times = torch.randint(self.noise.config.num_train_timesteps, (batch,), generator=generator).to(device)
        x = latents.mean[picks] + latents.deviation[picks] * draw
        noisy = self.noise.add_noise(x, noise, times)
        is_v = self.noise.config.prediction_type == "v_prediction"
        target = self.noise.get_velocity(x, noise, times) if is_v else noise
        if states is None:
            wanted, row_of = self.own_prompt[picks // latents.n_views].unique(return_inverse=True)
            rows = self.base.pipeline.text_encoder(self.own_ids[wanted]).last_hidden_state
            if len(self.own_ids) > 1:
                rows = rows[row_of]
            elif self.prior:  # whose prompts stand beside it
                rows = rows.expand(batch, -1, -1)
        else:
            rows = states[0][states[1][picks // latents.n_views]]
        return noisy, times, rows, target, None if latents.seen is None else latents.seen[picks]


def save_delta(delta: Delta, path: Path, token: str | None, base_hash: str, method: str = DEFAULT_METHOD) -> None:
    """Write the delta as safetensors, with what it belongs to in the file's metadata."""
    made = {"method": method, "token": token, "base_model_hash": base_hash}
    # One entry: safetensors writes several in any order, and equal weights would have different hashes.
    save_file(delta, path, metadata={"attrdb": json.dumps(made)})


def load_delta(path: Path, method: str = DEFAULT_METHOD) -> Delta:
    """raises: InvalidValue for a file that is no delta, or was trained by another method"""
    try:
        with safe_open(path, framework="pt") as file:
            made = json.loads((file.metadata() or {}).get("attrdb", "{}"))
            delta = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise InvalidValue(f"customized weights {path} cannot be read: {error}") from error
    if made.get("method") != method:
        raise InvalidValue(f"customized weights {path} are of method {made.get('method')!r}; needed is {method!r}")
    return delta


def apply_delta(base: BaseModel, delta: Delta, token: str | None, like: str, method: str = DEFAULT_METHOD) -> None:
    """Turn a fresh base model into the customized one; `base.restore()` takes it back.

    like: what the new token starts from, see `CustomizeSettings.like`; methods that train no token leave it there

    raises: InvalidValue if the delta was made for another architecture or is not of this method
    """
    customizer = load_customizer(method)
    weights = dict(base.pipeline.unet.named_parameters())
    given = {name.removeprefix("unet."): value for name, value in delta.items() if name != TOKEN_KEY}
    table = base.pipeline.text_encoder.get_input_embeddings().weight
    try:
        values = customizer.changed(base.pipeline.unet, given)
        fits = all(values[name].shape == weights[name].shape for name in values)
        if customizer.trains_token and token:
            fits = fits and delta[TOKEN_KEY].shape == table.shape[1:]
    except (KeyError, RuntimeError):
        fits = False
    if not fits:
        raise InvalidValue(
            f"the customized weights do not fit base model {base.name!r}; name the one they were made from"
        )
    base.replace(values)
    if token:
        token_id = base.add_token(token, like)
        if TOKEN_KEY in delta:
            base.pipeline.text_encoder.get_input_embeddings().weight.data[token_id] = delta[TOKEN_KEY].to(base.device)
