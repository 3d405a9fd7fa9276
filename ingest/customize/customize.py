"""Customization: the training that all methods share, and the delta in which a trained model is kept.

What a method trains is in `attrdb.ingest.customize.customizers`; the steps are in `attrdb.ingest.customize.steps`.
Exemplars and prompts are encoded once, before the first step; only prompts with a token that is trained are encoded in every
step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from attrdb.errors import InvalidValue
from attrdb.ingest.blends import parts_of
from attrdb.ingest.customize.augmentation import SIZES, SPOTS, Words, encode_views, view_prompts
from attrdb.ingest.customize.base_model import BaseModel
from attrdb.ingest.customize.customizers import DEFAULT_METHOD, Customizer, load_customizer
from attrdb.ingest.customize.observer import Observer, Run, observing
from attrdb.ingest.customize.steps import (
    Batches,
    Diverged,
    FixedPrompts,
    ImageSet,
    TrainedPrompts,
    copies,
    new_optimizer,
    take_steps,
)
from attrdb.ingest.devices import enough_memory, is_cpu
from attrdb.ingest.options import CustomizeSettings
from attrdb.progress import Progress, no_progress

__all__ = [
    "TOKEN_KEY",
    "CustomizeSettings",
    "Delta",
    "Diverged",
    "Regularization",
    "apply_delta",
    "check_prompts",
    "customize",
    "encode_prompts",
    "load_delta",
    "prompt_states",
    "save_delta",
    "token_ids",
    "token_keys",
    "trained_model",
]

TOKEN_KEY = "text_encoder.token_embedding"

Delta = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Regularization:
    """Images that keep the base model's idea of a category (prior preservation), each with a prompt and a name.

    names: image ids of the corpus, or sha256 of the pixels for images that the base model has generated
    """

    images: Sequence[Image.Image]
    prompts: Sequence[str]
    names: Sequence[str]


def check_prompts(pipeline: StableDiffusionPipeline, prompts: Sequence[str], tokens: Collection[str]) -> None:
    """raises: InvalidValue for a prompt with a token that lies beyond what the text encoder reads, or without any token"""
    tokenizer = pipeline.tokenizer
    longest = tokenizer.model_max_length
    for prompt in prompts:
        named = [(text, token) for text, _weight in parts_of(prompt) for token in tokens if token in text]
        for text, token in named or [(prompt, token) for token in tokens]:
            ids = tokenizer(text, truncation=True, max_length=longest).input_ids
            if tokenizer.convert_tokens_to_ids(token) not in ids:
                raise InvalidValue(f"the base model reads {longest} tokens, and {token} lies beyond them in {text!r}")


def token_ids(base: BaseModel, prompts: Sequence[str]) -> torch.Tensor:
    """(n, length) int64, padded to the number of tokens that the text encoder reads."""
    tokenizer = base.pipeline.tokenizer
    padding = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
    return tokenizer(list(prompts), return_tensors="pt", **padding).input_ids.to(base.device)


def prompt_states(base: BaseModel, prompt: str) -> torch.Tensor:
    """The text encoder's output, (length, width) float32; of a blend, the weighted mean of its parts'."""
    parts = parts_of(prompt)
    states = [base.pipeline.text_encoder(token_ids(base, [text])).last_hidden_state[0] for text, _weight in parts]
    if len(states) == 1:
        return states[0]
    return torch.stack([weight * part for part, (_text, weight) in zip(states, parts, strict=True)]).sum(0)


@torch.no_grad()
def encode_prompts(base: BaseModel, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """`prompt_states` by distinct prompt. Prompts are encoded one at a time, so that no result depends on the others."""
    return {prompt: prompt_states(base, prompt) for prompt in dict.fromkeys(prompts)}


def customize(
    base: BaseModel,
    exemplars: Sequence[Image.Image],
    prompt: str | Sequence[str],
    token: str | Sequence[str] | None,
    category: str | Sequence[str],
    settings: CustomizeSettings,
    report: Progress = no_progress,
    *,
    method: str = DEFAULT_METHOD,
    regularization: Regularization | None = None,
    gradient_checkpointing: bool = False,
    observer: Observer | None = None,
    left_out: Collection[int] = (),
) -> tuple[Delta, dict]:
    """Train a customized model; returns its delta to the base model, in float32 on the CPU, and figures.

    prompt:   of all exemplars, or a sequence with one for each
    token:    the new token by which the prompt names the concept, or several for several concepts, which are trained
              together; None: there is none, and none is trained
    category: of the concept, or of each: the words that its token starts from, unless the settings have others
    gradient_checkpointing: for small cards: activations are computed again in the backward pass, the delta is the same
    observer: is told of every step; the delta is the same, see `attrdb.ingest.customize.observer`
    left_out: exemplars, by number, whose slots are taken out of each batch; the others' stay. Not together with an observer
    returns:  figures: `losses` (one per step), `loss` (mean of the last tenth of them), `customize_seconds`

    The base model must be a fresh one. It is left customized, as by `apply_delta`; `base.restore()` undoes that. If training
    fails, it is left fresh.
    raises: InvalidValue for an unknown method or augmentation, a prompt that is cut before its token, or exemplars that
            cannot be left out; Diverged; OutOfMemory; whatever the observer raises
    """
    started = time.monotonic()
    if set(left_out) >= set(range(len(exemplars))):
        raise InvalidValue("every exemplar is left out; keep one or more")
    if left_out and observer is not None:
        raise InvalidValue("a customization without some of its exemplars cannot be observed; leave out the observer")
    customizer = load_customizer(method)
    prompts = [prompt] * len(exemplars) if isinstance(prompt, str) else list(prompt)
    tokens = _start_words(token, category, settings)
    try:
        ids = {token: base.add_token(token, words) for token, words in tokens.items()}
        if tokens:
            longest = Words(max(SIZES, key=len), max(SPOTS, key=len)) if settings.augment == "placed" else Words()
            check_prompts(base.pipeline, list(dict.fromkeys(map(longest.added_to, prompts))), tokens)
        with (
            enough_memory(base.device, _doing(base, settings), _advice(gradient_checkpointing)),
            _trained_parameters(base, customizer, ids, settings.seed) as parameters,
            _checkpointed(base, gradient_checkpointing),
        ):
            trains_token = any(key in parameters for key in token_keys(tokens).values())
            exemplar_set, prior_set = _encode(base, exemplars, prompts, settings, regularization, trains_token, report)
            optimizer = new_optimizer(parameters, settings.lr)
            run = Run(
                base=base,
                settings=settings,
                method=method,
                tokens=tuple(tokens),
                prompts=tuple(prompts),
                prior_prompts=tuple(regularization.prompts) if regularization else (),
                n_views=exemplar_set.latents.n_views,
                view_prompts=tuple(view_prompts(exemplar_set.latents, prompts)),
                parameters=parameters,
                _optimizer=optimizer,
            )
            with base.lowered(), observing(observer, run):
                batches = Batches(base, settings, exemplar_set, prior_set, left_out)
                losses = take_steps(batches, parameters, optimizer, report, observer)
            delta = {name: weight.cpu() for name, weight in copies(parameters).items()}
    finally:
        base.restore()
    apply_delta(base, delta, tokens, method)
    last = losses[-max(1, len(losses) // 10) :]
    figures = {"customize_seconds": time.monotonic() - started, "loss": sum(last) / len(last), "losses": losses}
    return delta, figures


def _start_words(
    token: str | Sequence[str] | None, category: str | Sequence[str], settings: CustomizeSettings
) -> dict[str, str]:
    """The words that each token starts from, by token."""
    tokens = [token] if isinstance(token, str) else list(token or ())
    categories = [category] * len(tokens) if isinstance(category, str) else category
    return {name: settings.like(words) for name, words in zip(tokens, categories, strict=True)}


def token_keys(tokens: Iterable[str]) -> dict[str, str]:
    """The name in the delta of each token's embedding, by token."""
    names = list(tokens)
    return {name: TOKEN_KEY if len(names) == 1 else f"{TOKEN_KEY}.{name}" for name in names}


def _encode(
    base: BaseModel,
    exemplars: Sequence[Image.Image],
    prompts: Sequence[str],
    settings: CustomizeSettings,
    regularization: Regularization | None,
    trains_token: bool,
    report: Progress,
) -> tuple[ImageSet, ImageSet | None]:
    """The exemplars and the regularization images with their prompts, encoded; 0 steps are reported after each image."""

    def report_start(*_: object) -> None:
        report("customize", 0, settings.steps)

    latents = encode_views(base, exemplars, settings.augment, settings.seed, report_start)
    of_views = view_prompts(latents, prompts)
    exemplar_set = ImageSet(
        latents, _trained_prompts(base, of_views) if trains_token else _fixed_prompts(base, of_views)
    )
    if regularization is None:
        return exemplar_set, None
    prior_set = ImageSet(
        encode_views(base, regularization.images, "none", settings.seed, report_start),
        _fixed_prompts(base, regularization.prompts),
    )
    return exemplar_set, prior_set


def _fixed_prompts(base: BaseModel, prompts: Sequence[str]) -> FixedPrompts:
    states = encode_prompts(base, prompts)
    return FixedPrompts(torch.stack(list(states.values())), _index_of(prompts, list(states)))


def _trained_prompts(base: BaseModel, prompts: Sequence[str]) -> TrainedPrompts:
    distinct = list(dict.fromkeys(prompts))
    return TrainedPrompts(base.pipeline.text_encoder, token_ids(base, distinct), _index_of(prompts, distinct))


def _index_of(prompts: Sequence[str], distinct: list[str]) -> torch.Tensor:
    """(n,) int64: where each prompt is in `distinct`."""
    positions = {prompt: position for position, prompt in enumerate(distinct)}
    return torch.tensor([positions[prompt] for prompt in prompts])


def _doing(base: BaseModel, settings: CustomizeSettings) -> str:
    n_pictures = settings.batch * (2 if settings.prior_images else 1)
    return f"training {n_pictures} pictures of {base.resolution} pixels a side at a time"


def _advice(gradient_checkpointing: bool) -> str:
    """What to change if memory runs out, by the names that options and keys of a spec share."""
    first = "" if gradient_checkpointing else "turn gradient checkpointing on (gradient_checkpointing), or "
    return f"{first}give a smaller batch (batch), which makes another model"


@contextmanager
def _checkpointed(base: BaseModel, enabled: bool) -> Iterator[None]:
    """If enabled, the U-Net keeps few activations for the backward pass inside the block."""
    if not enabled:
        yield
        return
    base.pipeline.unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        base.pipeline.unet.disable_gradient_checkpointing()


@contextmanager
def _trained_parameters(
    base: BaseModel, customizer: Customizer, token_ids: Mapping[str, int], seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """All that the method trains, by name in the delta, used by the base model inside the block.

    token_ids: by token
    raises:    InvalidValue if nothing is trained
    """
    trained_ids = token_ids if customizer.trains_token else {}
    with _attached(customizer, base, seed) as weights:
        parameters = {f"unet.{name}": weight for name, weight in weights.items()}
        if not trained_ids and not parameters:
            raise InvalidValue(
                f"method {customizer.name!r} trains a token alone, and there is none; choose another method"
            )
        with ExitStack() as hooked:
            keys = token_keys(trained_ids)
            embeddings = {
                keys[token]: hooked.enter_context(_trained_embedding(base, number))
                for token, number in trained_ids.items()
            }
            yield embeddings | parameters


@contextmanager
def trained_model(
    base: BaseModel, delta: Delta, tokens: Mapping[str, str], method: str
) -> Iterator[dict[str, torch.Tensor]]:
    """All that the method trained, by name in the delta, as it was after training; the base model uses it inside the block.

    It can be differentiated. The base model must be a fresh one, and is left fresh.
    tokens: as in `apply_delta`
    raises: InvalidValue if the delta was made for another architecture or is not of this method
    """
    try:
        ids = {token: base.add_token(token, words) for token, words in tokens.items()}
        with _trained_parameters(base, load_customizer(method), ids, seed=0) as parameters:
            shapes = {name: weight.shape for name, weight in parameters.items()}
            if shapes != {name: value.shape for name, value in delta.items()}:
                raise _does_not_fit(base)
            for name, weight in parameters.items():
                weight.data.copy_(delta[name])
            yield parameters
    finally:
        base.restore()


@contextmanager
def _trained_embedding(base: BaseModel, token_id: int) -> Iterator[torch.Tensor]:
    """The token's embedding, (width,) float32, which the text encoder uses inside the block instead of its table's row.

    The table itself never gets a gradient.
    """
    table = base.pipeline.text_encoder.get_input_embeddings()
    embedding = table.weight.data[token_id].clone().requires_grad_(True)

    def insert(_module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return torch.where((inputs[0] == token_id).unsqueeze(-1), embedding.to(output.dtype), output)

    hook = table.register_forward_hook(insert)
    try:
        yield embedding
    finally:
        hook.remove()


@contextmanager
def _attached(customizer: Customizer, base: BaseModel, seed: int) -> Iterator[dict[str, torch.nn.Parameter]]:
    """What the method trains in the U-Net, which is left as it was, bit for bit."""
    unet = base.pipeline.unet
    devices = [] if is_cpu(base.device) else [base.device]
    trained: dict[str, torch.nn.Parameter] = {}
    before: dict[str, torch.Tensor] = {}
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            trained = customizer.attach(unet)
        unet.requires_grad_(False)
        before = copies(trained)
        for weight in trained.values():
            weight.requires_grad_(True)
        yield trained
    finally:
        for name, weight in trained.items():
            weight.requires_grad_(False)
            weight.grad = None
            if name in before:  # not if memory ran out while they were copied, before anything was trained
                weight.data.copy_(before[name])
        customizer.detach(unet)


def save_delta(delta: Delta, path: Path, tokens: Collection[str], base_hash: str, method: str = DEFAULT_METHOD) -> None:
    """Write the delta as safetensors; the file's metadata says what it belongs to."""
    named = {"tokens": list(tokens)} if len(tokens) > 1 else {"token": next(iter(tokens), None)}
    belongs_to = {"method": method, **named, "base_model_hash": base_hash}
    # A single entry: safetensors writes several in any order, so that equal weights would have different hashes.
    save_file(delta, path, metadata={"attrdb": json.dumps(belongs_to)})


def load_delta(path: Path, method: str = DEFAULT_METHOD) -> Delta:
    """raises: InvalidValue for a file that is not a delta, or was trained by another method"""
    try:
        with safe_open(path, framework="pt") as file:
            belongs_to = json.loads((file.metadata() or {}).get("attrdb", "{}"))
            delta = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise InvalidValue(f"customized weights {path} cannot be read: {error}") from error
    if (stored := belongs_to.get("method")) != method:
        raise InvalidValue(f"customized weights {path} are of method {stored!r}; needed is {method!r}")
    return delta


def apply_delta(base: BaseModel, delta: Delta, tokens: Mapping[str, str], method: str = DEFAULT_METHOD) -> None:
    """Turn a fresh base model into the customized one; `base.restore()` undoes it.

    tokens: words that each new token starts from, see `CustomizeSettings.like`; methods that train no token leave it there
    raises: InvalidValue if the delta was made for another architecture, has other tokens or is not of this method
    """
    customizer = load_customizer(method)
    keys = token_keys(tokens if customizer.trains_token else ())
    weights = dict(base.pipeline.unet.named_parameters())
    unet_delta = {name.removeprefix("unet."): value for name, value in delta.items() if name not in keys.values()}
    width = base.pipeline.text_encoder.get_input_embeddings().weight.shape[1:]
    try:
        values = customizer.changed(base.pipeline.unet, unet_delta)
        fits = all(values[name].shape == weights[name].shape for name in values)
        fits = fits and all(delta[key].shape == width for key in keys.values())
    except (KeyError, RuntimeError):
        fits = False
    if not fits:
        raise _does_not_fit(base)
    base.replace(values)
    for token, words in tokens.items():
        token_id = base.add_token(token, words)
        if token in keys:
            base.pipeline.text_encoder.get_input_embeddings().weight.data[token_id] = delta[keys[token]].to(base.device)


def _does_not_fit(base: BaseModel) -> InvalidValue:
    return InvalidValue(f"the customized weights do not fit base model {base.name!r}; name the one they were made from")
