"""Views of the training pictures: augmented copies, and their latents, encoded once before training."""

from __future__ import annotations

import random
import re
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
# `placed`: each is mirrored or not, made smaller, and put at a spot; its prompt says its size and spot.
VIEWS = {"none": 1, "mild": 2, "strong": 16, "placed": 16}
GREY = (128, 128, 128)

# The spots of `placed`: shares of the room that is left and above, from 0 to 1.
SPOTS = {
    "in the middle": (0.5, 0.5),
    "on the left": (0.0, 0.5),
    "on the right": (1.0, 0.5),
    "at the top": (0.5, 0.0),
    "at the bottom": (0.5, 1.0),
    "in the top left corner": (0.0, 0.0),
    "in the top right corner": (1.0, 0.0),
    "in the bottom left corner": (0.0, 1.0),
    "in the bottom right corner": (1.0, 1.0),
}
OFF_SPOT = 0.12  # of the room, at most
# Words for the side of a picture, as a share of the whole, up to so much.
SIZES = {"small": 0.45, "": 0.7, "large": 1.0}
ARTICLES = {"a": "a", "an": "a", "the": "the", "A": "A", "An": "A", "The": "The"}  # of a prompt, and before a size
LEAST_SIDE = 1 / 3
PLAIN = 8  # levels of 255: colours of a plain border differ by no more


@dataclass(frozen=True)
class Words:
    """What a view adds to the prompt of its picture: a size, such as "small", and a spot, such as "on the left".

    "a V* bell" becomes "a small V* bell on the left"; the spot comes before a comma, or before the style.
    """

    size: str = ""
    spot: str = ""

    def added_to(self, prompt: str) -> str:
        article, _, rest = prompt.partition(" ")
        if self.size and article in ARTICLES:
            prompt = f"{ARTICLES[article]} {self.size} {rest}"
        elif self.size:
            prompt = f"{self.size} {prompt}"
        if not self.spot:
            return prompt
        thing, *others = re.split("(?=, | in the style of )", prompt, maxsplit=1)
        return "".join([f"{thing} {self.spot}", *others])


@dataclass(frozen=True)
class View:
    """An augmented copy of a picture. box: left, top, right, bottom in pixels: the part that counts"""

    picture: Image.Image
    box: tuple[int, int, int, int]
    words: Words = Words()


@dataclass(frozen=True)
class Latents:
    """The autoencoder's posterior of every view, scaled as the U-Net reads it.

    Picture p has the rows p * n_views to (p + 1) * n_views - 1.
    mean, deviation: (n, channels, height, width) float32
    seen:            (n, 1, height, width) float32: 1 where the picture is, 0 on the grey around it; None if there is no grey
    words:           of every view, n of them
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    seen: torch.Tensor | None
    n_views: int
    words: Sequence[Words]


def views(image: Image.Image, augment: str, size: int, draw: random.Random) -> list[View]:
    """Views of `size` pixels a side.

    raises: InvalidValue for an unknown augmentation
    source: Kumari et al. 2023, section 3.3; differs from it in that sizes are drawn for a fixed number of views, not for
            every step. There the prompt of a view says "far away" or "zoomed in"; here that of `strong` says nothing, and
            that of `placed` says size and spot.
    """
    if augment not in VIEWS:
        raise InvalidValue(f"augment is {augment!r}; it must be {' or '.join(VIEWS)}")
    whole, full_box = square(image, size), (0, 0, size, size)
    if augment == "none":
        return [View(whole, full_box)]
    if augment == "mild":
        return [View(whole, full_box), View(ImageOps.mirror(whole), full_box)]
    make = _placed if augment == "placed" else _zoomed
    return [make(ImageOps.mirror(whole) if draw.random() < 0.5 else whole, draw) for _ in range(VIEWS[augment])]


def _zoomed(whole: Image.Image, draw: random.Random) -> View:
    """The picture made smaller, on grey, or larger and cut."""
    size = whole.width
    if draw.random() < 2 / 3:
        side = draw.randint(-(-size // 3), size)
        left, top = draw.randint(0, size - side), draw.randint(0, size - side)
        return View(*_pasted(whole, side, left, top, GREY))
    side = round(size * draw.uniform(1.2, 1.4))
    left, top = draw.randint(0, side - size), draw.randint(0, side - size)
    larger = whole.resize((side, side), Image.Resampling.BICUBIC)
    return View(larger.crop((left, top, left + size, top + size)), (0, 0, size, size))


def _placed(whole: Image.Image, draw: random.Random) -> View:
    """The picture made smaller, near a spot. Around it is the colour of its border, or grey if that is not plain."""
    size = whole.width
    side = draw.randint(round(LEAST_SIDE * size), size)
    size_word = next(word for word, most in SIZES.items() if side <= most * size)
    spot = draw.choice(list(SPOTS))
    near = (min(1.0, max(0.0, share + draw.uniform(-OFF_SPOT, OFF_SPOT))) for share in SPOTS[spot])
    left, top = (round(share * (size - side)) for share in near)
    ground = border_colour(whole)
    picture, box = _pasted(whole, side, left, top, ground or GREY)
    words = Words(size_word, "" if size_word == "large" else spot)  # a large picture has hardly any room beside it
    return View(picture, (0, 0, size, size) if ground else box, words)


def _pasted(
    whole: Image.Image, side: int, left: int, top: int, ground: tuple[int, int, int]
) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """The picture made smaller, on a ground of its former size, and the box that it fills."""
    canvas = Image.new("RGB", whole.size, ground)
    canvas.paste(whole.resize((side, side), Image.Resampling.BICUBIC), (left, top))
    return canvas, (left, top, left + side, top + side)


def border_colour(picture: Image.Image) -> tuple[int, int, int] | None:
    """The colour of a plain border, one pixel wide; None if it is not plain."""
    pixels = np.asarray(picture.convert("RGB")).astype(np.int16)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    median = np.median(border, axis=0).astype(np.int16)
    red, green, blue = median.tolist()
    return (red, green, blue) if np.abs(border - median).max() <= PLAIN else None


def view_prompts(latents: Latents, prompts: Sequence[str]) -> list[str]:
    """The prompt of every view. prompts: of the pictures"""
    return [words.added_to(prompts[row // latents.n_views]) for row, words in enumerate(latents.words)]


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
    pixels = np.stack([np.asarray(view.picture) for view in all_views])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    # One view at a time: the autoencoder's activations, not its weights, are what fills a card.
    posteriors = []
    for one in x.split(1):
        posteriors.append(base.pipeline.vae.encode(one.to(base.device).float() / 127.5 - 1).latent_dist)
        report("augment", len(posteriors), len(x))
    scale = base.pipeline.vae.config.scaling_factor
    mean = torch.cat([posterior.mean for posterior in posteriors]) * scale
    deviation = torch.cat([posterior.std for posterior in posteriors]) * scale
    seen = None
    if augment in ("strong", "placed"):
        masks = [_seen(view.box, mean.shape[-1], base.pipeline.vae_scale_factor) for view in all_views]
        seen = torch.stack(masks).to(mean)
    return Latents(mean, deviation, seen, VIEWS[augment], [view.words for view in all_views])


def _seen(box: tuple[int, int, int, int], side: int, factor: int) -> torch.Tensor:
    """(1, side, side) float32: 1 for latent positions wholly inside the box of pixels. factor: pixels per position."""
    left, top, right, bottom = -(-box[0] // factor), -(-box[1] // factor), box[2] // factor, box[3] // factor
    mask = torch.zeros(1, side, side)
    mask[:, top:bottom, left:right] = 1
    if not mask.any():  # too small to hold a position: the one at its centre counts
        mask[:, (box[1] + box[3]) // 2 // factor, (box[0] + box[2]) // 2 // factor] = 1
    return mask
