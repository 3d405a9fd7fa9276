"""Views of the training pictures: what augmentation makes of them, and their latents, encoded once before training."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps

from attrdb.errors import InvalidValue
from attrdb.ingest.read.pictures import square

if TYPE_CHECKING:
    from attrdb.ingest.base_model import BaseModel

# Views of a picture. `mild`: the picture and its mirror image. `strong`: each mirrored or not, by chance, and made smaller
# (to a third of its side at least, laid anywhere on grey) or larger (by a fifth to two fifths, cut anywhere).
VIEWS = {"none": 1, "mild": 2, "strong": 16}


@dataclass(frozen=True)
class Latents:
    """Views as the autoencoder sees them, scaled as the U-Net does: of picture p the rows p * n_views to (p + 1) * n_views.

    mean, deviation: (n, channels, height, width) float32
    seen:            (n, 1, height, width) float32: 1 where the picture is, 0 on the grey around it; None where all is picture
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    seen: torch.Tensor | None
    n_views: int


def views(image: Image.Image, augment: str, size: int, draw: random.Random) -> list[tuple[Image.Image, tuple]]:
    """Pictures of `size` pixels a side, each with the box (left, top, right, bottom) in pixels that shows the picture.

    raises: InvalidValue for no such augmentation
    source: Kumari et al. 2023, section 3.3; differs from it in that no words such as "far away" are put into the prompt, and
            that sizes are drawn for a fixed number of views, not for every step
    """
    if augment not in VIEWS:
        raise InvalidValue(f"augment is {augment!r}; it must be {' or '.join(VIEWS)}")
    whole, all_of_it = square(image, size), (0, 0, size, size)
    if augment == "none":
        return [(whole, all_of_it)]
    if augment == "mild":
        return [(whole, all_of_it), (ImageOps.mirror(whole), all_of_it)]
    return [_zoomed(ImageOps.mirror(whole) if draw.random() < 0.5 else whole, draw) for _ in range(VIEWS["strong"])]


def _zoomed(whole: Image.Image, draw: random.Random) -> tuple[Image.Image, tuple]:
    size = whole.width
    if draw.random() < 2 / 3:
        side = draw.randint(-(-size // 3), size)
        left, top = draw.randint(0, size - side), draw.randint(0, size - side)
        canvas = Image.new("RGB", (size, size), (128, 128, 128))
        canvas.paste(whole.resize((side, side), Image.BICUBIC), (left, top))
        return canvas, (left, top, left + side, top + side)
    side = round(size * draw.uniform(1.2, 1.4))
    left, top = draw.randint(0, side - size), draw.randint(0, side - size)
    return whole.resize((side, side), Image.BICUBIC).crop((left, top, left + size, top + size)), (0, 0, size, size)


@torch.no_grad()
def encode_views(
    base: BaseModel,
    images: Sequence[Image.Image],
    augment: str,
    seed: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Latents:
    """Mean and deviation of the latents of every picture's views, drawn by seed; raises as `views`."""
    draw = random.Random(f"{seed}/views")
    shown = [view for image in images for view in views(image, augment, base.resolution, draw)]
    pixels = np.stack([np.asarray(picture) for picture, _ in shown])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    # One at a time: the autoencoder's activations, not its weights, are what fills a card.
    posteriors = []
    for one in x.split(1):
        posteriors.append(base.pipeline.vae.encode(one.to(base.device).float() / 127.5 - 1).latent_dist)
        report(len(posteriors), len(x))
    scale = base.pipeline.vae.config.scaling_factor
    mean, deviation = (torch.cat([getattr(one, what) for one in posteriors]) * scale for what in ("mean", "std"))
    seen = None
    if augment == "strong":
        seen = torch.stack([_seen(box, mean.shape[-1], base.pipeline.vae_scale_factor) for _, box in shown]).to(mean)
    return Latents(mean, deviation, seen, VIEWS[augment])


def _seen(box: tuple[int, int, int, int], side: int, factor: int) -> torch.Tensor:
    """(1, side, side): 1 for the latent positions that lie wholly inside a box of pixels."""
    left, top, right, bottom = -(-box[0] // factor), -(-box[1] // factor), box[2] // factor, box[3] // factor
    mask = torch.zeros(1, side, side)
    mask[:, top:bottom, left:right] = 1
    if not mask.any():  # too small to hold one position: the one in its middle counts
        mask[:, (box[1] + box[3]) // 2 // factor, (box[0] + box[2]) // 2 // factor] = 1
    return mask
