"""The U-Net and the text encoder of icon-sd, trained together with v-prediction on latents of scenes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

from attrdb.ingest.devices import is_cpu, resolved_precision
from attrdb.training.icon_sd.parts import IconSdSettings, new_text_encoder, new_unet, noise_levels
from attrdb.training.icon_sd.recorded import Recorded, adamw, load_moments, memory_format, set_rate, steps_taken
from attrdb.training.icon_sd.runs import Counts, Execution, Stage
from attrdb.training.icon_sd.scenes import Sprites, compose
from attrdb.training.icon_sd.stream import Packed, SceneBatches, together

AHEAD = 4  # batches that are composed and encoded at a time where a step is recorded
FIRST_BATCHES = 64  # of new scenes, which fill a pool at first
POOL = 24_576  # scenes whose latents a CPU keeps
WARM_UP = 300  # steps of a new optimizer
SHAPE, SPREAD = (
    1.0,
    0.8,
)  # mean and spread, as logits of a share of all time steps, of those at which a thing takes its shape
RENEWED = 4  # on a CPU one scene in so many of a batch is new; the others come from the pool


class Latents:
    """Batches of latents (b, channels, 8, 8) float32, scaled, with the tokens of their captions (b, max_tokens).

    On a CPU, composing and encoding a scene takes a good third of the time of learning from it. So a CPU keeps a pool of
    scenes, and one scene in RENEWED of each batch is new: a scene is seen about RENEWED times. Without a pool every scene
    is new.

    first: the step of the first batch, which decides its scenes
    pool:  scenes; 0 for none
    ahead: batches of new scenes that are composed and encoded at a time
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        sprites: Sprites,
        tokenizer: CLIPTokenizer,
        settings: IconSdSettings,
        first: int,
        workers: int,
        pool: int,
        ahead: int = 1,
    ):
        self.vae, self.sprites, self.settings, self.pool = vae, sprites, settings, pool
        n_new = settings.unet_batch // RENEWED if pool else settings.unet_batch
        batches = SceneBatches(sprites, n_new, settings.seed + 1, first, tokenizer).loaded(workers)
        self.batches = self._encoded(together(batches, ahead), n_new)
        self.latents: Any = None  # tensors, made when the first scenes are added
        self.tokens: Any = None
        self.n_added = 0
        self.generator = torch.Generator().manual_seed(settings.seed + first)
        if pool:
            for _ in range(FIRST_BATCHES):
                self._add(*next(self.batches))

    def _encoded(self, groups: Iterator[Packed], size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for packed in groups:
            with torch.no_grad():
                x = compose(packed, self.sprites.pixels, self.settings.size) * 2 - 1
                latents = self.vae.encode(x).latent_dist.mean.float() * self.vae.config.scaling_factor
            yield from zip(latents.split(size), packed["tokens"].to(latents.device).split(size), strict=True)

    def _add(self, latents: torch.Tensor, tokens: torch.Tensor) -> None:
        if self.latents is None:
            self.latents = latents.new_zeros(self.pool, *latents.shape[1:])
            self.tokens = tokens.new_zeros(self.pool, tokens.shape[1])
        rows = (torch.arange(len(latents)) + self.n_added) % self.pool
        self.latents[rows], self.tokens[rows] = latents, tokens
        self.n_added += len(latents)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        latents, tokens = next(self.batches)
        if not self.pool:
            return latents, tokens
        self._add(latents, tokens)
        n_old = self.settings.unet_batch - len(latents)
        picks = torch.randint(min(self.n_added, self.pool), (n_old,), generator=self.generator)
        return torch.cat([latents, self.latents[picks]]), torch.cat([tokens, self.tokens[picks]])


class Learner:
    """U-Net and text encoder, the moving average (EMA) of their weights, their optimizer, and the counts."""

    def __init__(self, tokenizer: CLIPTokenizer, settings: IconSdSettings, execution: Execution):
        self.settings, self.device = settings, execution.device
        torch.manual_seed(settings.seed)
        self.unet = new_unet(settings).to(self.device, memory_format=memory_format(self.device))
        self.text_encoder = new_text_encoder(tokenizer, settings).to(self.device)
        self.attention: Callable[[], AbstractContextManager] = nullcontext
        if is_cpu(self.device):
            # Over 64 positions, the backward pass of fused attention takes a third of a step: 67 images/s, 118 without it.
            self.unet.set_attn_processor(AttnProcessor())
            self.attention = partial(sdpa_kernel, SDPBackend.MATH)
        if execution.compiled:
            self.unet.compile()
            self.text_encoder.compile()
        bf16 = resolved_precision("auto", self.device) == "bf16"
        kind, kept = torch.device(self.device).type, not execution.recorded
        self.autocast = partial(torch.autocast, kind, torch.bfloat16, bf16, cache_enabled=kept)
        self.signals, self.sigmas = (level.to(self.device) for level in noise_levels())

        self.models = torch.nn.ModuleDict({"unet": self.unet, "text_encoder": self.text_encoder})
        self.optimizer = adamw(
            self.models.parameters(), settings.unet_lr, execution.recorded, weight_decay=0.01, betas=(0.9, 0.99)
        )
        self.step: Callable[..., torch.Tensor] = Recorded(self._step) if execution.recorded else self._step
        weights = self.models.state_dict()
        self.ema = {name: value.detach().clone() for name, value in weights.items()}
        averaged = [name for name, value in weights.items() if value.is_floating_point()]
        self._averages, self._weights = [self.ema[name] for name in averaged], [weights[name] for name in averaged]
        self.counts = Counts()

    def state(self) -> dict[str, Any]:
        """The checkpoint of the stage."""
        tensors = {"weights": self.models.state_dict(), "ema": self.ema, "optimizer": self.optimizer.state_dict()}
        return {**tensors, **asdict(self.counts)}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. One that was carried between machines has no optimizer; its moments build up again."""
        self.models.load_state_dict(state["weights"])
        if "optimizer" in state:
            load_moments(self.optimizer, state["optimizer"])
        for name, average in self.ema.items():
            average.copy_(state["ema"][name])
        self.counts = Counts(**{name: state[name] for name in asdict(self.counts)})

    def learn(self, latents: torch.Tensor, tokens: torch.Tensor, lr: float) -> torch.Tensor:
        """Take one step; its loss, a scalar. The step decides time steps and noise."""
        generator = torch.Generator(self.device).manual_seed(self.settings.seed * 1_000_003 + self.counts.step)
        t = _time_steps(len(latents), len(self.signals), generator)
        noise = torch.randn(latents.shape, generator=generator, device=self.device)
        set_rate(self.optimizer, lr)
        loss = self.step(latents, tokens, t, noise)
        self._average()
        self.counts.step += 1
        self.counts.images += len(latents)
        return loss

    def _step(self, latents: torch.Tensor, tokens: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Learn from the mean squared error of v, each latent at its time step t."""
        signal, sigma = self.signals[t].view(-1, 1, 1, 1), self.sigmas[t].view(-1, 1, 1, 1)
        with self.autocast(), self.attention():
            states = self.text_encoder(tokens).last_hidden_state
            v = self.unet(signal * latents + sigma * noise, t, states).sample.float()
        loss = F.mse_loss(v, signal * noise - sigma * latents)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.models.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.settings.ema, (self.counts.step + 1) / (self.counts.step + 10))
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)


def _time_steps(n: int, n_levels: int, generator: torch.Generator) -> torch.Tensor:
    """(n,) int64: of three in four scenes near the levels at which a thing takes its shape, of the fourth at any level.

    Below, the noisy latents show the shape already; above, only a mean over all shapes can be learned, at a great loss.
    source: the logit-normal density is that of Esser et al. 2024, at another place
    """
    device = generator.device
    near = torch.sigmoid(SHAPE + SPREAD * torch.randn(n, generator=generator, device=device))
    even = torch.rand(n, generator=generator, device=device)
    share = torch.where(torch.rand(n, generator=generator, device=device) < 0.75, near, even)
    return (share * n_levels).long().clamp(max=n_levels - 1)


def _learning_rate(settings: IconSdSettings, n_steps: int, spent: float, lr_end: float) -> float:
    """The rate after n_steps of the optimizer and a share of the call's time.

    It warms up, and falls evenly over the call to lr_end of itself.
    """
    return settings.unet_lr * min(1.0, (n_steps + 1) / WARM_UP) * (1 - (1 - lr_end) * spent)


def train_unet(
    vae: AutoencoderKL,
    sprites: Sprites,
    tokenizer: CLIPTokenizer,
    settings: IconSdSettings,
    stage: Stage,
    execution: Execution,
    lr_end: float = 1.0,
) -> tuple[UNet2DConditionModel, CLIPTextModel, dict]:
    """Train until the stage's time is over; U-Net and text encoder with their EMA weights, and the figures of the run.

    sprites: with their pixels on the device
    lr_end:  share of the learning rate that is left at the end of the stage's time; it falls evenly. 1: it stays
    """
    learner = Learner(tokenizer, settings, execution)
    if stored := stage.load():
        learner.load(stored)
    counts, n_before = learner.counts, steps_taken(learner.optimizer)
    pool = POOL if is_cpu(execution.device) else 0
    ahead = AHEAD if execution.recorded else 1
    source = Latents(vae, sprites, tokenizer, settings, counts.step, execution.workers, pool, ahead)
    budget, first, before = stage.deadline - time.monotonic(), counts.step, counts.seconds
    stage.loss = counts.loss

    def step(seconds: float) -> torch.Tensor:
        n_steps = n_before + counts.step - first
        return learner.learn(*source.next(), _learning_rate(settings, n_steps, (seconds - before) / budget, lr_end))

    def state(seconds: float) -> dict[str, Any]:
        counts.seconds, counts.loss = seconds, stage.loss
        return learner.state()

    if not stage.late:
        stage.take_steps(step, lambda: {"images": counts.images}, state, before)
    learner.models.load_state_dict(learner.ema)
    figures = {
        "unet_steps": counts.step,
        "unet_images": counts.images,
        "unet_seconds": round(counts.seconds),
        "unet_loss": counts.loss,
    }
    return learner.unet.eval(), learner.text_encoder.eval(), figures
