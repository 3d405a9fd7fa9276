"""The autoencoder of icon-sd: scenes of 64 x 64 pixels to latents of 8 x 8, and back."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from attrdb.errors import InvalidValue
from attrdb.ingest.devices import resolved_precision
from attrdb.training.icon_sd.parts import IconSdSettings, new_vae
from attrdb.training.icon_sd.recorded import Recorded, adamw, load_moments, memory_format, set_rate
from attrdb.training.icon_sd.runs import Execution, Stage
from attrdb.training.icon_sd.scenes import Composer, Sprites, compose, pack
from attrdb.training.icon_sd.stream import SceneBatches, draw_batch, together

AHEAD = 32  # batches that are composed at a time where a step is recorded
HELD_OUT_SEED = 987_654_321  # of the scenes that reconstruction is measured on
HALVED = 0.25  # share of the steps that reconstruct half-size scenes from halved latents


def _rate(done: float) -> float:
    """The learning rate's factor after a share of the training: warm-up, level, a fall to zero in the last third."""
    return max(0.0, min(1.0, done / 0.02 + 0.01, (1 - done) / 0.34 + 0.005))


def _loss(decoded: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """L1 and L2 of pixels; L1 of differences between neighbours, for sharp edges; L1 at a quarter of the size."""
    error = decoded - x
    across, down = error[..., :, 1:] - error[..., :, :-1], error[..., 1:, :] - error[..., :-1, :]
    coarse = F.avg_pool2d(decoded, 4) - F.avg_pool2d(x, 4)
    return (
        error.abs().mean()
        + error.square().mean()
        + 0.1 * (across.abs().mean() + down.abs().mean())
        + coarse.abs().mean()
    )


class Learner:
    """The autoencoder, its optimizer, the two kinds of step that it learns by, and how many it has taken.

    decoder_alone: the encoder stays as it is, and no step is of halved latents, which nothing makes any more
    """

    def __init__(self, settings: IconSdSettings, execution: Execution, decoder_alone: bool = False):
        self.settings, self.device, self.decoder_alone = settings, execution.device, decoder_alone
        self.n_steps = 0
        torch.manual_seed(settings.seed)
        self.vae = new_vae(settings).to(self.device, memory_format=memory_format(self.device))
        if decoder_alone:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        self.trained = [weight for weight in self.vae.parameters() if weight.requires_grad]
        self.optimizer = adamw(self.trained, settings.vae_lr, execution.recorded, betas=(0.9, 0.99), weight_decay=0.0)
        kind, bf16 = torch.device(self.device).type, resolved_precision("auto", self.device) == "bf16"
        # What autocast keeps of a step does not outlive its recording.
        self.autocast = partial(torch.autocast, kind, torch.bfloat16, bf16, cache_enabled=not execution.recorded)
        steps = [partial(self._step, halved=halved) for halved in (False, True)]
        self.steps = [Recorded(step) for step in steps] if execution.recorded else steps

    def learn(self, x: torch.Tensor, lr: float) -> torch.Tensor:
        """Take one step on pictures in [-1, 1]; its loss, a scalar. The number of the step decides the noise."""
        seed = self.settings.seed * 1_000_003 + self.n_steps
        self.n_steps += 1
        generator = torch.Generator(self.device).manual_seed(seed)
        side = x.shape[-1] // vae_factor(self.settings)
        shape = (len(x), self.settings.latent_channels, side, side)
        noise = torch.randn(shape, generator=generator, device=self.device)
        halved = not self.decoder_alone and random.Random(seed).random() < HALVED
        set_rate(self.optimizer, lr)
        return self.steps[halved](x, noise)

    def _step(self, x: torch.Tensor, noise: torch.Tensor, halved: bool) -> torch.Tensor:
        with self.autocast():
            posterior = self.vae.encode(x).latent_dist
            latents = posterior.mean + posterior.std * noise
            if halved:
                latents, x = F.avg_pool2d(latents, 2), F.avg_pool2d(x, 2)
            decoded = self.vae.decode(latents).sample.float()
        loss = _loss(decoded, x) + self.settings.kl_weight * posterior.kl().float().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def train_autoencoder(
    sprites: Sprites,
    settings: IconSdSettings,
    stage: Stage,
    execution: Execution,
    minutes: float = math.inf,
) -> AutoencoderKL:
    """The autoencoder after `vae_images` images, or as many as the stage has time for: see `finished` in its checkpoint.

    One that is finished stays as it is, whatever the call asks for: the U-Net has learned its latents.

    In a quarter of the steps the latents are halved and must decode to the scene at half its size: latents that scale as
    pictures do are easier for the U-Net to learn (after Kouzelis et al. 2025, EQ-VAE).
    sprites: with their pixels on the device
    minutes: of training, over all calls, after which it is finished too; the learning rate falls in time for that
    """
    learner = Learner(settings, execution)
    n_steps, before = math.ceil(settings.vae_images / settings.vae_batch), 0.0
    stored = stage.load()
    if stored:
        learner.vae.load_state_dict(stored["vae"])
        if "optimizer" in stored:
            load_moments(learner.optimizer, stored["optimizer"])
        learner.n_steps, before = stored["step"], stored["seconds"]
    pictures = _pictures(sprites, settings, execution, settings.seed, learner.n_steps)

    def done(seconds: float) -> float:
        return max(learner.n_steps / n_steps, seconds / (60 * minutes))

    def figures() -> dict[str, float]:
        return {"images": learner.n_steps * settings.vae_batch, "decibels": _decibels(learner.vae, sprites, settings)}

    def state(seconds: float) -> dict[str, Any]:
        weights = {"vae": learner.vae.state_dict(), "optimizer": learner.optimizer.state_dict()}
        return weights | {"step": learner.n_steps, "seconds": seconds, "finished": done(seconds) >= 1}

    if not (stored and stored["finished"]):
        stage.take_steps(
            lambda seconds: learner.learn(next(pictures), settings.vae_lr * _rate(done(seconds))),
            figures,
            state,
            before,
            lambda seconds: done(seconds) >= 1,
        )
    return learner.vae.eval().requires_grad_(False)


def refine_decoder(sprites: Sprites, settings: IconSdSettings, stage: Stage, execution: Execution) -> float:
    """Train the decoder of a finished autoencoder for the stage's time, and replace the stage's checkpoint; its decibels.

    What a U-Net has learned stays right, since the encoder stays. The learning rate falls to zero over the call.
    sprites: with their pixels on the device
    raises:  InvalidValue for an autoencoder that is not finished
    """
    state = stage.load()
    if state is None or not state["finished"]:
        raise InvalidValue(f"the autoencoder of {stage.checkpoint.parent} is not finished; train it to its end first")
    learner = Learner(settings, execution, decoder_alone=True)
    learner.vae.load_state_dict(state["vae"])
    refined = state.get("refined", 0)
    learner.n_steps = state["step"] + refined
    pictures = _pictures(sprites, settings, execution, settings.seed + 3, refined)
    budget = max(1e-9, stage.deadline - time.monotonic())

    def step(seconds: float) -> torch.Tensor:
        return learner.learn(next(pictures), settings.vae_lr * _rate(min(1.0, seconds / budget)))

    def figures() -> dict[str, float]:
        n_images = (learner.n_steps - state["step"]) * settings.vae_batch
        return {"refined": n_images, "decibels": _decibels(learner.vae, sprites, settings)}

    last = stage.take_steps(
        step,
        figures,
        lambda _seconds: state | {"vae": learner.vae.state_dict(), "refined": learner.n_steps - state["step"]},
    )
    return last["decibels"]


def _pictures(
    sprites: Sprites, settings: IconSdSettings, execution: Execution, seed: int, first: int
) -> Iterator[torch.Tensor]:
    """Batches in [-1, 1] from the first that is wanted on; a GPU composes AHEAD of them at a time."""
    batches = SceneBatches(sprites, settings.vae_batch, seed, first).loaded(execution.workers)
    for packed in together(batches, AHEAD if execution.recorded else 1):
        yield from (compose(packed, sprites.pixels, settings.size) * 2 - 1).split(settings.vae_batch)


def _decibels(vae: AutoencoderKL, sprites: Sprites, settings: IconSdSettings) -> float:
    return round(reconstruction(vae, sprites, settings), 2)


def vae_factor(settings: IconSdSettings) -> int:
    """Pixels per latent along a side."""
    return 2 ** (len(settings.vae_channels) - 1)


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, sprites: Sprites, settings: IconSdSettings, n_scenes: int = 256) -> float:
    """Peak signal-to-noise ratio on scenes that training never drew: decibels of the mean error over all pixels."""
    scenes = draw_batch(Composer(sprites), n_scenes, HELD_OUT_SEED, 0)
    errors = []
    for start in range(0, n_scenes, 64):
        x = compose(pack(scenes[start : start + 64]), sprites.pixels, settings.size)
        decoded = vae.decode(vae.encode(x * 2 - 1).latent_dist.mean).sample.float()
        errors.append(((decoded / 2 + 0.5).clamp(0, 1) - x).square().mean().item())
    return -10 * math.log10(sum(errors) / len(errors))


@torch.no_grad()
def latent_scale(vae: AutoencoderKL, sprites: Sprites, settings: IconSdSettings, n_scenes: int = 1024) -> float:
    """The scaling factor with which latents have a standard deviation of 1."""
    scenes = draw_batch(Composer(sprites), n_scenes, HELD_OUT_SEED, 1)
    parts = [
        compose(pack(scenes[start : start + 64]), sprites.pixels, settings.size) for start in range(0, n_scenes, 64)
    ]
    latents = torch.cat([vae.encode(x * 2 - 1).latent_dist.mean for x in parts])
    return round(float(1 / latents.std()), 6)
