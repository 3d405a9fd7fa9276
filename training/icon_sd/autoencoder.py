"""The autoencoder of icon-sd: scenes of 64 x 64 pixels to latents of 8 x 8, and back."""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from attrdb.ingest.devices import resolved_precision
from attrdb.training.icon_sd.parts import IconSdSettings, new_vae
from attrdb.training.icon_sd.runs import Execution, Stage
from attrdb.training.icon_sd.scenes import Composer, Sprites, compose, pack
from attrdb.training.icon_sd.stream import SceneBatches, draw_batch

REPORT_IMAGES = 3_200
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


def train_autoencoder(
    sprites: Sprites,
    settings: IconSdSettings,
    stage: Stage,
    execution: Execution,
    minutes: float = math.inf,
) -> AutoencoderKL:
    """The autoencoder after `vae_images` images, or as many as the stage has time for: see `finished` in its checkpoint.

    In a quarter of the steps the latents are halved and must decode to the scene at half its size: latents that scale as
    pictures do are easier for the U-Net to learn (after Kouzelis et al. 2025, EQ-VAE).
    sprites: with their pixels on the device
    minutes: of training, over all calls, after which it is finished too; the learning rate falls in time for that
    """
    device = execution.device
    torch.manual_seed(settings.seed)
    vae = new_vae(settings).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.vae_lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    step, seconds = 0, 0.0
    if state := stage.load():
        vae.load_state_dict(state["vae"])
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    n_steps = math.ceil(settings.vae_images / settings.vae_batch)
    finished = step >= n_steps or seconds >= 60 * minutes
    report_steps = max(1, REPORT_IMAGES // settings.vae_batch)
    encode, decode = (torch.compile(part) if execution.compiled else part for part in (vae.encode, vae.decode))
    bf16 = resolved_precision("auto", device) == "bf16"
    kind, side = torch.device(device).type, settings.size // vae_factor(settings)
    losses: list[torch.Tensor] = []
    scenes = SceneBatches(sprites, settings.vae_batch, settings.seed, step)
    for packed in scenes.loaded(execution.workers) if not finished else ():
        started = time.monotonic()
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        x = compose(packed, sprites.pixels, settings.size) * 2 - 1
        noise = torch.randn(len(x), settings.latent_channels, *[side] * 2, generator=generator)
        halved = torch.rand((), generator=generator) < HALVED
        with torch.autocast(kind, torch.bfloat16, enabled=bf16):
            posterior = encode(x).latent_dist
            latents = posterior.mean + posterior.std * noise.to(device)
            if halved:
                latents, x = F.avg_pool2d(latents, 2), F.avg_pool2d(x, 2)
            decoded = decode(latents).sample.float()
        loss = _loss(decoded, x) + settings.kl_weight * posterior.kl().float().mean()
        for group in optimizer.param_groups:
            group["lr"] = settings.vae_lr * _rate(max(step / n_steps, seconds / (60 * minutes)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        step += 1
        seconds += time.monotonic() - started
        late, finished = stage.late, step >= n_steps or seconds >= 60 * minutes
        if step % report_steps == 0 or finished or late:
            figures = {"images": step * settings.vae_batch, "loss": round(float(torch.stack(losses).mean()), 5)}
            losses.clear()
            if step % (5 * report_steps) == 0 or finished or late:
                figures["decibels"] = round(reconstruction(vae, sprites, settings), 2)
            stage.log(**figures, seconds=round(seconds, 1))
        if stage.save_is_due or finished or late:
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "finished": finished}
            stage.save(state | {"step": step, "seconds": seconds})
        if late or finished:
            break
    return vae.eval().requires_grad_(False)


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
