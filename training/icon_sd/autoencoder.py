"""The autoencoder of icon-sd: scenes of 64 x 64 pixels to latents of 8 x 8, and back."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from attrdb.errors import InvalidValue
from attrdb.ingest.devices import resolved_precision
from attrdb.training.icon_sd.parts import IconSdSettings, new_vae
from attrdb.training.icon_sd.recorded import Recorded, adamw, load_moments, memory_format, set_rate
from attrdb.training.icon_sd.runs import Execution, Stage
from attrdb.training.icon_sd.scenes import Composer, Sprites, compose, pack
from attrdb.training.icon_sd.stream import Packed, SceneBatches, draw_batch, together

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
    """The autoencoder, its optimizer, and the two kinds of step that it learns by.

    decoder_alone: the encoder stays as it is, and no step is of halved latents, which nothing makes any more
    """

    def __init__(self, settings: IconSdSettings, execution: Execution, decoder_alone: bool = False):
        self.settings, self.device, self.decoder_alone = settings, execution.device, decoder_alone
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

    def learn(self, x: torch.Tensor, step: int, lr: float) -> torch.Tensor:
        """Take one step on pictures in [-1, 1]; its loss, a scalar. The step decides the noise."""
        seed = self.settings.seed * 1_000_003 + step
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
    n_steps = math.ceil(settings.vae_images / settings.vae_batch)
    step, before, finished = 0, 0.0, False
    if state := stage.load():
        learner.vae.load_state_dict(state["vae"])
        if "optimizer" in state:
            load_moments(learner.optimizer, state["optimizer"])
        step, before, finished = state["step"], state["seconds"], state["finished"]
    seconds = before
    losses: list[torch.Tensor] = []
    scenes = SceneBatches(sprites, settings.vae_batch, settings.seed, step).loaded(execution.workers)
    begun = time.monotonic()
    for x in _pictures(scenes, sprites, settings, AHEAD if execution.recorded else 1) if not finished else ():
        lr = settings.vae_lr * _rate(max(step / n_steps, seconds / (60 * minutes)))
        losses.append(learner.learn(x, step, lr))
        step += 1
        seconds = before + time.monotonic() - begun
        late, finished = stage.late, step >= n_steps or seconds >= 60 * minutes
        if stage.report_is_due(seconds) or finished or late:
            loss = round(float(torch.stack(losses).mean()), 5)
            losses.clear()
            decibels = round(reconstruction(learner.vae, sprites, settings), 2)
            stage.log(images=step * settings.vae_batch, loss=loss, decibels=decibels, seconds=round(seconds, 1))
        if stage.save_is_due or finished or late:
            state = {"vae": learner.vae.state_dict(), "optimizer": learner.optimizer.state_dict(), "finished": finished}
            stage.save(state | {"step": step, "seconds": seconds})
        if late or finished:
            break
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
    begun, budget = time.monotonic(), max(1e-9, stage.deadline - time.monotonic())
    step, refined = state["step"], state.get("refined", 0)
    scenes = SceneBatches(sprites, settings.vae_batch, settings.seed + 3, refined).loaded(execution.workers)
    losses: list[torch.Tensor] = []
    late = False
    for x in _pictures(scenes, sprites, settings, AHEAD if execution.recorded else 1):
        seconds = time.monotonic() - begun
        losses.append(learner.learn(x, step + refined, settings.vae_lr * _rate(min(1.0, seconds / budget))))
        refined += 1
        late = stage.late
        if stage.report_is_due(seconds) or late:
            loss = round(float(torch.stack(losses).mean()), 5)
            losses.clear()
            decibels = round(reconstruction(learner.vae, sprites, settings), 2)
            stage.log(refined=refined * settings.vae_batch, loss=loss, decibels=decibels, seconds=round(seconds, 1))
        if stage.save_is_due or late:
            stage.save(state | {"vae": learner.vae.state_dict(), "refined": refined})
        if late:
            break
    return decibels


def _pictures(scenes: Iterator[Packed], sprites: Sprites, settings: IconSdSettings, n: int) -> Iterator[torch.Tensor]:
    """The batches in [-1, 1], so many composed at a time."""
    for packed in together(scenes, n):
        yield from (compose(packed, sprites.pixels, settings.size) * 2 - 1).split(settings.vae_batch)


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
def set_scale(vae: AutoencoderKL, sprites: Sprites, settings: IconSdSettings, n_scenes: int = 1024) -> None:
    """Set the scaling factor so that latents have a standard deviation of 1."""
    scenes = draw_batch(Composer(sprites), n_scenes, HELD_OUT_SEED, 1)
    parts = [
        compose(pack(scenes[start : start + 64]), sprites.pixels, settings.size) for start in range(0, n_scenes, 64)
    ]
    latents = torch.cat([vae.encode(x * 2 - 1).latent_dist.mean for x in parts])
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 6))
