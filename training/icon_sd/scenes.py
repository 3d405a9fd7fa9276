"""IconScenes: small captioned pictures, composed of sprites on the device that learns from them.

A scene is made in two steps. `Composer.draw` chooses on the CPU what it shows, and writes its caption. `compose` makes the
pixels of a whole batch on any device. The same seed gives the same scenes. Nothing is stored.
"""

from __future__ import annotations

import io
import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image

from attrdb.training.icon_sd import media
from attrdb.training.icon_sd.words import (
    COLOURS,
    PAIR_SIZES,
    PATTERN_WORDS,
    PATTERNS,
    PLACES,
    RELATIONS,
    SIZES,
    SPOTS,
    plural,
    with_article,
)

MOST_THINGS = 3
COMMON_FROM, COMMON = 8, 0.8  # a thing with so many sprites is common; share of what is drawn that is
WHITE = (255, 255, 255)

Colour = tuple[int, int, int]  # red, green and blue, 0 to 255


@dataclass
class Sprites:
    """The sprites of a Parquet file (see sprites.py).

    pixels: (n, 4, side, side) uint8, colours multiplied by coverage; white where the sprite is mono
    """

    pixels: torch.Tensor
    things: list[str]
    styles: list[str]
    mono: list[bool]

    @classmethod
    def read(cls, path: Path) -> Sprites:
        rows = pq.read_table(path, columns=["thing", "style", "mono", "image"]).to_pylist()
        pixels = np.stack([_unpacked(row["image"], row["mono"]) for row in rows])
        things, styles, mono = ([row[name] for row in rows] for name in ("thing", "style", "mono"))
        return cls(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), things, styles, mono)


def _unpacked(image: bytes, mono: bool) -> np.ndarray:
    picture = Image.open(io.BytesIO(image))
    if mono:
        coverage = np.asarray(picture.convert("L"))
        return np.stack([coverage] * 4, axis=-1)
    rgba = np.asarray(picture.convert("RGBA")).astype(np.uint16)
    alpha = rgba[..., 3:]
    return np.concatenate([rgba[..., :3] * alpha // 255, alpha], axis=-1).astype(np.uint8)


@dataclass(frozen=True)
class PlacedSprite:
    """A sprite in a scene.

    sprite: its number in `Sprites`
    x, y:   its centre, in halves of the picture's side, from the picture's centre; y goes down
    scale:  side of the sprite over side of the picture
    angle:  degrees, clockwise
    """

    sprite: int
    tint: Colour
    x: float
    y: float
    scale: float
    angle: float = 0.0
    mirrored: bool = False


@dataclass(frozen=True)
class Scene:
    """A caption and what it describes.

    things:        from back to front
    pattern:       of the ground, of PATTERNS
    first, second: colours of the ground
    medium:        position in `media.NAMES`, or -1
    """

    caption: str
    things: tuple[PlacedSprite, ...]
    pattern: str = "plain"
    first: Colour = WHITE
    second: Colour = WHITE
    medium: int = -1


@dataclass(frozen=True)
class Ground:
    """The ground of a scene, and the words that captions name it by; "" for a white one."""

    pattern: str = "plain"
    first: Colour = WHITE
    second: Colour = WHITE
    words: str = ""

    @property
    def is_dark(self) -> bool:
        return min(sum(self.first), sum(self.second)) < 200

    def contrasts(self, colour: Colour) -> bool:
        return min(math.dist(colour, self.first), math.dist(colour, self.second)) > 110


@dataclass(frozen=True)
class Thing:
    """A sprite that a scene will show, its tint, and its name in the caption, with its colour if that is seen."""

    sprite: int
    tint: Colour
    name: str


Layout = tuple[tuple[PlacedSprite, ...], str]  # sprites from back to front, and words for them


class Composer:
    """Draws scenes from sprites.

    Most of what is drawn are things with many sprites: a base model of this size needs to see a thing some thousand times
    before it can be named. Among these, and among the others, the probability of a thing grows with the square root of the
    number of its sprites.
    """

    def __init__(self, sprites: Sprites):
        # Only names, no pixels: composers are copied to worker processes.
        self.things, self.styles, self.mono = sprites.things, sprites.styles, sprites.mono
        counts = Counter(sprites.things)
        common = np.array([counts[thing] >= COMMON_FROM for thing in sprites.things])
        weights = np.array([counts[thing] ** -0.5 for thing in sprites.things])
        for group, share in ((common, COMMON), (~common, 1 - COMMON)):
            weights[group] *= share / max(weights[group].sum(), 1e-9)
        self.weights = np.cumsum(weights)
        of_style = defaultdict(list)
        for number, style in enumerate(self.styles):
            of_style[style].append(number)
        self.by_style = {style: (of_style[style], np.cumsum(weights[of_style[style]]).tolist()) for style in of_style}

    def _any(self, rng: random.Random) -> int:
        return int(np.searchsorted(self.weights, rng.random() * self.weights[-1]))

    def _of_style(self, style: str, rng: random.Random) -> int:
        numbers, weights = self.by_style[style]
        return rng.choices(numbers, cum_weights=weights)[0]

    def draw(self, rng: random.Random) -> Scene:
        """A scene; one in ten has an empty caption, for classifier-free guidance."""
        kind = rng.random()
        n_things = 1 if kind < 0.66 else 2 if kind < 0.93 else 3
        plain = kind < 0.28
        first = self._any(rng)
        style = self.styles[first] if rng.random() < 0.8 else None
        picks = [first]
        while len(picks) < n_things:
            picks.append(self._of_style(style, rng) if style else self._any(rng))
        if n_things > 1 and rng.random() < 0.12:
            picks = [first] * n_things
        style = style if n_things > 1 else self.styles[first]

        ground = Ground() if plain else self._ground(rng)
        medium = self._medium(picks, plain, ground.is_dark, rng)
        coloured = medium < 0 or media.NAMES[medium] not in media.WITHOUT_COLOUR
        things = [self._tinted(pick, ground, plain, coloured, rng) for pick in picks]
        layout = self._centred if plain else (self._single, self._pair, self._three)[n_things - 1]
        placed, words = layout(things, rng)

        caption = self._caption(words, ground.words, style, medium, rng)
        return Scene(caption, placed, ground.pattern, ground.first, ground.second, medium)

    def _ground(self, rng: random.Random) -> Ground:
        if rng.random() < 0.3:
            words = rng.choice(list(PLACES))
            pattern, first, second = PLACES[words]
            return Ground(pattern, _jittered(first, rng), _jittered(second, rng), words)
        a, b = rng.sample(list(COLOURS), 2)
        first, second = _jittered(COLOURS[a], rng), _jittered(COLOURS[b], rng)
        draw = rng.random()
        if draw < 0.55:
            depth = rng.choice(("", "", "pale ", "dark "))
            if a in ("black", "white", "navy", "cream"):
                depth = ""
            mixed = {"pale ": 255, "dark ": 0}.get(depth)
            if mixed is not None:
                red, green, blue = (round(0.5 * value + 0.5 * mixed) for value in first)
                first = red, green, blue
            return Ground("plain", first, first, f"on {with_article(depth + a)} ground")
        if draw < 0.75:
            pattern = rng.choice(("fade down", "fade across"))
            return Ground(pattern, first, second, f"on a ground that fades from {a} to {b}")
        pattern, word = rng.choice(PATTERN_WORDS)
        return Ground(pattern, first, second, f"on {with_article(a)} and {b} {word} ground")

    def _tinted(self, pick: int, ground: Ground, plain: bool, coloured: bool, rng: random.Random) -> Thing:
        """A thing whose tint is seen on the ground; coloured: whether the caption names the tint."""
        name = self.things[pick]
        if not self.mono[pick]:
            return Thing(pick, WHITE, name)
        if plain and rng.random() < 0.4:
            return Thing(pick, COLOURS["black"], name)
        visible = [colour for colour, rgb in COLOURS.items() if ground.contrasts(rgb)]
        colour = rng.choice(visible or ["black"])
        return Thing(pick, _jittered(COLOURS[colour], rng), f"{colour} {name}" if coloured else name)

    def _medium(self, picks: list[int], plain: bool, dark: bool, rng: random.Random) -> int:
        """A medium or none; none for a pair of thing and medium that is held out, or a silhouette on a dark ground."""
        if rng.random() >= (0.15 if plain else 0.35):
            return -1
        number = rng.randrange(len(media.NAMES))
        name = media.NAMES[number]
        unfit = (name == "silhouette" and dark) or any(media.held_out(self.things[pick], name) for pick in picks)
        return -1 if unfit else number

    def _centred(self, things: list[Thing], rng: random.Random) -> Layout:
        thing = things[0]
        sprite = PlacedSprite(thing.sprite, thing.tint, 0, 0, rng.uniform(0.86, 0.96))
        return (sprite,), with_article(thing.name)

    def _single(self, things: list[Thing], rng: random.Random) -> Layout:
        thing = things[0]
        size = rng.choice(("small", "", "", "large", "large", "large"))
        scale = rng.uniform(*SIZES[size])
        spot, centre = rng.choice(list(SPOTS.items()))
        reach = 1 - scale
        if size == "large" or rng.random() < 0.3:
            spot, centre = "in the middle", (0.0, 0.0)
        x, y = (reach * (0.86 * at + rng.uniform(-0.12, 0.12)) for at in centre)
        place = f" {spot}" if size != "large" and rng.random() < 0.75 else ""
        angle, turn = 0.0, ""
        draw = rng.random()
        if draw < 0.12:
            angle, turn = rng.uniform(20, 45) * rng.choice((-1, 1)), "tilted "
        elif draw < 0.17:
            angle, turn = 180.0, "upside down "
        sprite = PlacedSprite(thing.sprite, thing.tint, x, y, scale, angle, rng.random() < 0.3)
        return (sprite,), with_article(f"{size} {turn}{thing.name}".strip()) + place

    def _pair(self, things: list[Thing], rng: random.Random) -> Layout:
        relation = rng.choice(list(RELATIONS))
        twins = things[0] == things[1]
        sizes = rng.choice((("", ""), ("", ""), ("small", "large"), ("large", "small")))
        if twins:
            sizes = rng.choice((("", ""), ("small", "small"), ("large", "large")))
        placed, words = [], []
        overlapping = relation in ("in front of", "behind")
        for thing, size, centre in zip(things, sizes, RELATIONS[relation], strict=True):
            scale = rng.uniform(*PAIR_SIZES[size]) * (1.25 if overlapping else 1)
            reach = 1 - scale
            x, y = (max(-reach, min(reach, at + rng.uniform(-0.06, 0.06))) for at in centre)
            placed.append(PlacedSprite(thing.sprite, thing.tint, x, y, scale, mirrored=rng.random() < 0.3))
            words.append(f"{size} {thing.name}".strip() if rng.random() < 0.7 else thing.name)
        if twins and relation in ("and", "next to"):
            text = f"two {plural(words[0])}"
        else:
            text = f"{with_article(words[0])} {relation} {with_article(words[1])}"
        if relation == "in front of":
            placed.reverse()
        back, front = placed
        if overlapping and front.scale > 1.3 * back.scale:  # the thing behind would be hidden
            placed[0] = replace(back, x=0.55 if back.x > 0 else -0.55, y=-0.55)
        return tuple(placed), text

    def _three(self, things: list[Thing], rng: random.Random) -> Layout:
        upright = rng.random() < 0.3
        placed = []
        for thing, along in zip(things, (-0.64, 0.0, 0.64), strict=True):
            scale, across = rng.uniform(0.28, 0.34), rng.uniform(-0.22, 0.22)
            x, y = (across, along) if upright else (along, across)
            placed.append(PlacedSprite(thing.sprite, thing.tint, x, y, scale, mirrored=rng.random() < 0.3))
        first, second, third = (with_article(thing.name) for thing in things)
        if len({thing.name for thing in things}) == 1:
            return tuple(placed), f"three {plural(things[0].name)}"
        if rng.random() < 0.4:
            return tuple(placed), f"{second} between {first} and {third}"
        return tuple(placed), f"{first}, {second} and {third}" + (" from top to bottom" if upright else "")

    def _caption(self, words: str, ground: str, style: str | None, medium: int, rng: random.Random) -> str:
        draw = rng.random()
        if draw < 0.10:
            return ""
        if ground and rng.random() < 0.85 and (medium < 0 or media.NAMES[medium] not in media.WITHOUT_GROUND):
            words += f", {ground}" if rng.random() < 0.5 else f" {ground}"
        styled = style is not None and rng.random() < 0.55
        if medium >= 0:
            words = f"{with_article(media.MEDIA[media.NAMES[medium]][0])} of {words}"
        elif style and styled and rng.random() < 0.2:
            return f"{'an' if style[0] in 'aeiou' else 'a'} {style} icon of {words}"
        elif rng.random() < 0.4:
            words = f"a picture of {words}"
        return f"{words} in the style of {style} art" if styled else words


def _jittered(rgb: Colour, rng: random.Random) -> Colour:
    red, green, blue = (max(0, min(255, value + rng.randint(-10, 10))) for value in rgb)
    return red, green, blue


def pack(scenes: Sequence[Scene]) -> dict[str, torch.Tensor]:
    """Scenes as tensors on the CPU, one row per scene, for `compose`.

    sprite (b, 3) int64, -1 where there is none; tint (b, 3, 3) in [0, 1]; place (b, 3, 5) float32: x, y, scale, angle in
    radians, 1 or -1 for mirrored; pattern (b,) int64; ground (b, 2, 3) in [0, 1]; medium (b,) int64
    """
    n = len(scenes)
    sprite = np.full((n, MOST_THINGS), -1, dtype=np.int64)
    tint = np.zeros((n, MOST_THINGS, 3), dtype=np.float32)
    place = np.zeros((n, MOST_THINGS, 5), dtype=np.float32)
    place[..., 2] = place[..., 4] = 1
    for row, scene in enumerate(scenes):
        for layer, thing in enumerate(scene.things):
            sprite[row, layer] = thing.sprite
            tint[row, layer] = thing.tint
            side = -1 if thing.mirrored else 1
            place[row, layer] = (thing.x, thing.y, thing.scale, math.radians(thing.angle), side)
    ground = np.array([[scene.first, scene.second] for scene in scenes], dtype=np.float32)
    return {
        "sprite": torch.from_numpy(sprite),
        "tint": torch.from_numpy(tint / 255),
        "place": torch.from_numpy(place),
        "pattern": torch.tensor([PATTERNS.index(scene.pattern) for scene in scenes]),
        "ground": torch.from_numpy(ground / 255),
        "medium": torch.tensor([scene.medium for scene in scenes]),
    }


def compose(packed: dict[str, torch.Tensor], pixels: torch.Tensor, side: int = 64) -> torch.Tensor:
    """The pictures of packed scenes.

    pixels:  of the sprites, see `Sprites`; the device that they are on computes
    returns: (b, 3, side, side) float32 in [0, 1]
    """
    device = pixels.device
    batch = {name: value.to(device, non_blocking=True) for name, value in packed.items()}
    picture = _grounds(batch["pattern"], batch["ground"], side)
    cover = picture.new_zeros(len(picture), 1, side, side)
    line = (torch.arange(side, device=device) + 0.5) * 2 / side - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    for layer in range(MOST_THINGS):
        rows = (packed["sprite"][:, layer] >= 0).nonzero().flatten().to(device)
        if not len(rows):
            break
        sprites = pixels[batch["sprite"][rows, layer]].float() / 255
        at_x, at_y, scale, angle, mirrored = (value.view(-1, 1, 1) for value in batch["place"][rows, layer].unbind(-1))
        right, down = (x - at_x) / scale, (y - at_y) / scale
        cos, sin = angle.cos(), angle.sin()
        grid = torch.stack([(cos * right + sin * down) * mirrored, cos * down - sin * right], dim=-1)
        # A sprite that shrinks is averaged first; otherwise thin lines would break.
        small = F.avg_pool2d(sprites, 2)
        near = F.grid_sample(sprites, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        far = F.grid_sample(small, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        blend = ((scale - 0.45) / 0.3).clamp(0, 1).unsqueeze(1)
        drawn = near * blend + far * (1 - blend)
        colour, alpha = drawn[:, :3] * batch["tint"][rows, layer].view(-1, 3, 1, 1), drawn[:, 3:]
        picture[rows] = picture[rows] * (1 - alpha) + colour
        cover[rows] = cover[rows] * (1 - alpha) + alpha
    return media.apply(media.Layers(picture, cover), packed["medium"])


def _grounds(pattern: torch.Tensor, colours: torch.Tensor, side: int) -> torch.Tensor:
    """(b, 3, side, side): the grounds alone."""
    line = torch.arange(side, device=colours.device, dtype=torch.float32)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    unit = side / 64
    rows, columns = rows / unit, columns / unit
    dots = ((rows % 16 - 8) ** 2 + (columns % 16 - 8) ** 2 < 18).float()
    stars = (((rows * 7 + columns * 13).long() % 97 == 0) & ((rows.long() + columns.long()) % 3 == 0)).float()
    share = {
        "plain": torch.zeros_like(rows),
        "fade down": rows / 63,
        "fade across": columns / 63,
        "stripes": (rows % 16 >= 8).float(),
        "bars": (columns % 16 >= 8).float(),
        "diagonal": ((rows + columns) % 16 >= 8).float(),
        "dots": dots,
        "checks": ((rows % 16 >= 8) ^ (columns % 16 >= 8)).float(),
        "horizon": (rows >= 40).float(),
        "stars": stars,
    }
    second = torch.stack([share[name] for name in PATTERNS])[pattern].unsqueeze(1)
    return colours[:, 0].view(-1, 3, 1, 1) * (1 - second) + colours[:, 1].view(-1, 3, 1, 1) * second
