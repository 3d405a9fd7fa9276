"""Views of the training pictures: augmented copies, and their latents, encoded once before training."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps

from attrdb.errors import InvalidValue
from attrdb.ingest.read.pictures import square
from attrdb.progress import Progress, no_progress

if TYPE_CHECKING:
    from attrdb.ingest.customize.base_model import BaseModel

# Number of views per picture. `mild`: the picture and its mirror image. `strong`: each view is mirrored or not, by chance,
# and made smaller (to a third of its side at least, anywhere on grey) or larger (by a fifth to two fifths, cut anywhere).
VIEWS = {"none": 1, "mild": 2, "strong": 16}


@dataclass(frozen=True)
class Latents:
    """The autoencoder's posterior of every view, scaled as the U-Net reads it.

    Picture p has the rows p * n_views to (p + 1) * n_views - 1.
    mean, deviation: (n, channels, height, width) float32
    seen:            (n, 1, height, width) float32: 1 where the picture is, 0 on the grey around it; None if there is no grey
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    seen: torch.Tensor | None
    n_views: int


def views(image: Image.Image, augment: str, size: int, draw: random.Random) -> list[tuple[Image.Image, tuple]]:
    """Views of `size` pixels a side, each with the box (left, top, right, bottom) in pixels that the picture fills.

    raises: InvalidValue for an unknown augmentation
    source: Kumari et al. 2023, section 3.3; differs from it in that no words such as "far away" are put into the prompt, and
            that sizes are drawn for a fixed number of views, not for every step
    """
    if augment not in VIEWS:
        raise InvalidValue(f"augment is {augment!r}; it must be {' or '.join(VIEWS)}")
    whole, full_box = square(image, size), (0, 0, size, size)
    if augment == "none":
        return [(whole, full_box)]
    if augment == "mild":
        return [(whole, full_box), (ImageOps.mirror(whole), full_box)]
    return [_zoomed(ImageOps.mirror(whole) if draw.random() < 0.5 else whole, draw) for _ in range(VIEWS["strong"])]


def _zoomed(whole: Image.Image, draw: random.Random) -> tuple[Image.Image, tuple]:
    """The picture made smaller, on grey, or larger and cut; with the box that it fills."""
    size = whole.width
    if draw.random() < 2 / 3:
        side = draw.randint(-(-size // 3), size)
        left, top = draw.randint(0, size - side), draw.randint(0, size - side)
        canvas = Image.new("RGB", (size, size), (128, 128, 128))
        canvas.paste(whole.resize((side, side), Image.Resampling.BICUBIC), (left, top))
        return canvas, (left, top, left + side, top + side)
    side = round(size * draw.uniform(1.2, 1.4))
    left, top = draw.randint(0, side - size), draw.randint(0, side - size)
    return whole.resize((side, side), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size)), (
        0,
        0,
        size,
        size,
    )


@torch.no_grad()
def encode_views(
    base: BaseModel,
    images: Sequence[Image.Image],
    augment: str,
    seed: int,
    report: Progress = no_progress,
) -> Latents:
    """The latents of every picture's views, drawn by seed; raises as `views`. Reports views done, and views in all."""
    draw = random.Random(f"{seed}/views")
    all_views = [view for image in images for view in views(image, augment, base.resolution, draw)]
    pixels = np.stack([np.asarray(picture) for picture, _ in all_views])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    # One view at a time: the autoencoder's activations, not its weights, are what fills a card.
    posteriors = []
    for view in x.split(1):
        posteriors.append(base.pipeline.vae.encode(view.to(base.device).float() / 127.5 - 1).latent_dist)
        report("augment", len(posteriors), len(x))
    scale = base.pipeline.vae.config.scaling_factor
    mean = torch.cat([posterior.mean for posterior in posteriors]) * scale
    deviation = torch.cat([posterior.std for posterior in posteriors]) * scale
    seen = None
    if augment == "strong":
        masks = [_seen(box, mean.shape[-1], base.pipeline.vae_scale_factor) for _, box in all_views]
        seen = torch.stack(masks).to(mean)
    return Latents(mean, deviation, seen, VIEWS[augment])


def _seen(box: tuple[int, int, int, int], side: int, factor: int) -> torch.Tensor:
    """(1, side, side) float32: 1 for latent positions wholly inside the box of pixels. factor: pixels per position."""
    left, top, right, bottom = -(-box[0] // factor), -(-box[1] // factor), box[2] // factor, box[3] // factor
    mask = torch.zeros(1, side, side)
    mask[:, top:bottom, left:right] = 1
    if not mask.any():  # too small to hold a position: the one at its centre counts
        mask[:, (box[1] + box[3]) // 2 // factor, (box[0] + box[2]) // 2 // factor] = 1
    return mask
