"""The loss of a model on single pictures, over draws of noise that all pictures and models share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from PIL import Image

from attrdb.ingest.customize.augmentation import encode_views
from attrdb.ingest.customize.base_model import BaseModel

DRAWS = 24  # timesteps and noises that a loss is averaged over


@dataclass(frozen=True)
class Draws:
    """Timesteps at equal distances and noises by seed, shared by all images: differences are the images'."""

    timesteps: torch.Tensor  # (n,) int64
    noise: torch.Tensor  # (n, channels, height, width)

    @classmethod
    def of(cls, base: BaseModel, n: int, seed: int = 0) -> Draws:
        n_timesteps = base.pipeline.scheduler.config.num_train_timesteps
        timesteps = ((torch.arange(n) + 0.5) / n * n_timesteps).long()
        shape = (n, base.pipeline.unet.config.in_channels, *[base.latent_side] * 2)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return cls(timesteps.to(base.device), noise.to(base.device))


def latents_of(base: BaseModel, image: Image.Image) -> torch.Tensor:
    """(1, channels, height, width) float32: the mean of the autoencoder's posterior, scaled as the U-Net reads it."""
    return encode_views(base, [image], "none", seed=0).mean


def denoised(
    base: BaseModel, draws: Draws, latents: torch.Tensor, states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the U-Net makes of a picture at every draw, and what it should: (n, channels, height, width) float32 each.

    latents: (1, channels, height, width), see `latents_of`
    states:  (1, length, width) float32: of the picture's prompt
    """
    scheduler = DDPMScheduler.from_config(base.pipeline.scheduler.config)
    every = latents.expand(len(draws.timesteps), -1, -1, -1)
    noisy = scheduler.add_noise(every, draws.noise, draws.timesteps)
    is_v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(every, draws.noise, draws.timesteps) if is_v else draws.noise
    return base.predict(noisy, draws.timesteps, states), target
