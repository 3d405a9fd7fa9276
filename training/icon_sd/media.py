"""Media: filters that redraw a scene as a captioned medium, such as a pencil drawing or a mosaic.

A filter takes `Layers` of b scenes and returns (b, 3, side, side) in [0, 1]. Filters are tensor operations without
parameters, so they run on the device that composes the scenes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

HELD_OUT_SHARE = 8  # one in so many pairs of thing and medium is never drawn


@dataclass(frozen=True)
class Layers:
    """A composed scene before its medium.

    picture: (b, 3, side, side) in [0, 1], the things over their ground
    cover:   (b, 1, side, side) in [0, 1], how much of a pixel the things cover
    """

    picture: torch.Tensor
    cover: torch.Tensor


def held_out(thing: str, medium: str) -> bool:
    """Whether this thing is never drawn in this medium, so that tests have unseen combinations."""
    return zlib.crc32(f"{thing}/{medium}".encode()) % HELD_OUT_SHARE == 0


@lru_cache(maxsize=8)
def _grain(side: int, coarse: int, device: torch.device) -> torch.Tensor:
    """(1, 1, side, side): a fixed texture with mean 0, standard deviation 1 and spots of about `coarse` pixels."""
    noise = torch.randn(1, 1, -(-side // coarse), -(-side // coarse), generator=torch.Generator().manual_seed(coarse))
    spread = F.interpolate(noise, size=(side, side), mode="bilinear", align_corners=False)
    return ((spread - spread.mean()) / spread.std()).to(device)


@lru_cache(maxsize=8)
def _places(side: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of the pixels, (side, side) float32 each."""
    line = torch.arange(side, dtype=torch.float32, device=device)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    return rows, columns


def _grey(picture: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114], device=picture.device).view(1, 3, 1, 1)
    return (picture * weights).sum(1, keepdim=True)


def _blurred(picture: torch.Tensor, reach: int) -> torch.Tensor:
    return F.avg_pool2d(F.pad(picture, [reach] * 4, mode="replicate"), 2 * reach + 1, stride=1)


def _edges(picture: torch.Tensor) -> torch.Tensor:
    """(b, 1, side, side) in [0, 1]: the steepest change over the colours."""
    padded = F.pad(picture, [1] * 4, mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    return (across.abs() + down.abs()).amax(1, keepdim=True).clamp(0, 1)


def _colour(layers: Layers, *rgb: int) -> torch.Tensor:
    return (torch.tensor(rgb, device=layers.picture.device) / 255).view(1, 3, 1, 1)


def _blocks(picture: torch.Tensor, size: int) -> torch.Tensor:
    return F.interpolate(F.avg_pool2d(picture, size), scale_factor=size, mode="nearest")


def pencil(layers: Layers) -> torch.Tensor:
    rows, columns = _places(layers.picture.shape[-1], layers.picture.device)
    hatch = ((rows + columns) % 4 < 1.5).float()
    shade = (1 - _grey(layers.picture)) * layers.cover
    lead = (_edges(layers.picture) * 0.9 + shade * (0.2 + 0.35 * hatch)).clamp(0, 1)
    paper = 0.97 + 0.015 * _grain(layers.picture.shape[-1], 1, layers.picture.device)
    return (paper - 0.8 * lead).clamp(0, 1).expand(-1, 3, -1, -1)


def watercolour(layers: Layers) -> torch.Tensor:
    side, device = layers.picture.shape[-1], layers.picture.device
    wash = _blurred(layers.picture, 2)
    pale = 1 - (1 - wash) * (0.7 + 0.16 * _grain(side, 7, device))
    return (pale - 0.28 * _edges(wash) + 0.012 * _grain(side, 1, device)).clamp(0, 1)


def oil(layers: Layers) -> torch.Tensor:
    smooth = F.max_pool2d(_blurred(layers.picture, 1), 5, stride=1, padding=2)
    smooth = -F.max_pool2d(-smooth, 5, stride=1, padding=2)
    strokes = _grain(layers.picture.shape[-1], 3, layers.picture.device)
    rich = smooth + 0.35 * (smooth - smooth.mean(1, keepdim=True))
    return (rich * 0.92 + 0.05 * strokes).clamp(0, 1)


def mosaic(layers: Layers) -> torch.Tensor:
    rows, columns = _places(layers.picture.shape[-1], layers.picture.device)
    grout = ((rows % 4 == 3) | (columns % 4 == 3)).float()
    return _blocks(layers.picture, 4) * (1 - grout) + 0.72 * grout


def pixels(layers: Layers) -> torch.Tensor:
    return (_blocks(layers.picture, 4) * 5).round() / 5


def woodcut(layers: Layers) -> torch.Tensor:
    rows, _ = _places(layers.picture.shape[-1], layers.picture.device)
    wave = 0.5 + 0.5 * torch.sin(rows * 2 * torch.pi / 4)
    ink = torch.sigmoid(14 * (wave * 0.75 + 0.12 - _grey(layers.picture)))
    ink = torch.maximum(ink, torch.sigmoid(16 * (_edges(layers.picture) - 0.45)))
    return _colour(layers, 240, 226, 200) * (1 - ink) + _colour(layers, 40, 24, 18) * ink


def silhouette(layers: Layers) -> torch.Tensor:
    return layers.picture * (1 - layers.cover) + 0.04 * layers.cover


def outline(layers: Layers) -> torch.Tensor:
    inside = _edges(layers.picture * layers.cover + 1 - layers.cover)
    lines = torch.sigmoid(14 * (torch.maximum(inside, _edges(layers.cover)) - 0.35))
    return (1 - lines).expand(-1, 3, -1, -1)


def night(layers: Layers) -> torch.Tensor:
    dark = layers.picture * _colour(layers, 66, 84, 150)
    return (dark + _colour(layers, 6, 8, 30)).clamp(0, 1)


def faded(layers: Layers) -> torch.Tensor:
    grey = _grey(layers.picture)
    pale = 0.45 * layers.picture + 0.55 * grey
    return 0.5 * pale + 0.5 * _colour(layers, 238, 222, 190) * (0.85 + 0.15 * pale)


def sepia(layers: Layers) -> torch.Tensor:
    side = layers.picture.shape[-1]
    rows, columns = _places(side, layers.picture.device)
    far = ((rows - side / 2) ** 2 + (columns - side / 2) ** 2) / (side**2 / 2)
    tone = _grey(layers.picture) * _colour(layers, 255, 222, 170) + _colour(layers, 30, 14, 0) * 0.6
    return (tone * (1 - 0.45 * far)).clamp(0, 1)


def blueprint(layers: Layers) -> torch.Tensor:
    rows, columns = _places(layers.picture.shape[-1], layers.picture.device)
    grid = ((rows % 8 == 0) | (columns % 8 == 0)).float() * 0.12
    lines = torch.sigmoid(14 * (_edges(layers.picture) - 0.3))
    paper = _colour(layers, 28, 70, 158) + grid
    return (paper * (1 - lines) + 0.94 * lines).clamp(0, 1)


def neon(layers: Layers) -> torch.Tensor:
    lines = torch.sigmoid(12 * (_edges(layers.cover) - 0.3)) + 0.6 * _edges(layers.picture) * layers.cover
    vivid = layers.picture - layers.picture.amin(1, keepdim=True)
    vivid = vivid / vivid.amax(1, keepdim=True).clamp(min=0.25)
    glow = _colour(layers, 255, 70, 200) * 0.5 + vivid * 0.5
    return (_colour(layers, 14, 8, 30) + glow * (lines + 0.8 * _blurred(lines, 3))).clamp(0, 1)


def chalk(layers: Layers) -> torch.Tensor:
    grain = _grain(layers.picture.shape[-1], 1, layers.picture.device)
    lines = torch.sigmoid(12 * (_edges(layers.picture) - 0.3)) + 0.25 * _grey(layers.picture) * layers.cover
    board = _colour(layers, 38, 66, 56)
    return (board + 0.8 * lines * (0.85 + 0.25 * grain) + 0.01 * grain).clamp(0, 1)


def halftone(layers: Layers) -> torch.Tensor:
    rows, columns = _places(layers.picture.shape[-1], layers.picture.device)
    turn = torch.pi / 3
    dots = 0.5 + 0.25 * (torch.sin((rows + columns) * turn) + torch.sin((rows - columns) * turn))
    ink = torch.sigmoid(10 * (0.15 + 0.6 * dots - _grey(layers.picture)))
    return (_colour(layers, 244, 240, 226) * (1 - ink) + 0.12 * ink).clamp(0, 1)


def negative(layers: Layers) -> torch.Tensor:
    return 1 - layers.picture


def embroidery(layers: Layers) -> torch.Tensor:
    rows, columns = _places(layers.picture.shape[-1], layers.picture.device)
    thread = 0.82 + 0.18 * torch.cos((rows - columns) * 2 * torch.pi / 3)
    cloth = 0.94 + 0.06 * torch.cos(rows * torch.pi) * torch.cos(columns * torch.pi)
    return (_blurred(layers.picture, 1) * (layers.cover * thread + (1 - layers.cover) * cloth)).clamp(0, 1)


# Medium -> how captions name it, and the filter.
MEDIA: dict[str, tuple[str, Callable[[Layers], torch.Tensor]]] = {
    "pencil": ("pencil drawing", pencil),
    "watercolor": ("watercolor painting", watercolour),
    "oil": ("oil painting", oil),
    "mosaic": ("mosaic", mosaic),
    "pixels": ("pixel picture", pixels),
    "woodcut": ("woodcut", woodcut),
    "silhouette": ("silhouette", silhouette),
    "outline": ("outline drawing", outline),
    "night": ("night picture", night),
    "faded": ("faded print", faded),
    "sepia": ("sepia photo", sepia),
    "blueprint": ("blueprint", blueprint),
    "neon": ("neon sign", neon),
    "chalk": ("chalk drawing", chalk),
    "halftone": ("newspaper print", halftone),
    "negative": ("negative", negative),
    "embroidery": ("embroidery", embroidery),
}
NAMES = tuple(MEDIA)
# Media that do not show grounds or colours, so captions do not name them.
WITHOUT_GROUND = {"pencil", "outline", "blueprint", "neon", "chalk", "woodcut", "sepia", "halftone", "negative"}
WITHOUT_COLOUR = {"pencil", "outline", "blueprint", "chalk", "woodcut", "silhouette", "sepia", "halftone", "negative"}


def apply(layers: Layers, medium: torch.Tensor) -> torch.Tensor:
    """Each scene in its medium.

    medium:  (b,) int64 on any device, positions in NAMES, -1 for none
    returns: (b, 3, side, side) in [0, 1]
    """
    drawn = layers.picture.clone()
    for number in medium.unique().tolist():
        if number >= 0:
            rows = (medium == number).nonzero().flatten().to(drawn.device)
            filtered = MEDIA[NAMES[number]][1](Layers(layers.picture[rows], layers.cover[rows]))
            drawn[rows] = filtered.to(drawn.dtype)
    return drawn
