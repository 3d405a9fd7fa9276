"""IconScenes: small captioned pictures, composed of sprites on the device that learns from them.

A scene is drawn in two steps. `Composer.draw` decides on the CPU what is in it and says so in a caption; `compose` makes the
pixels, for a whole batch, on any device. The same seed gives the same scenes. Nothing is stored.
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

MOST_THINGS = 3
COLOURS = {
    "black": (24, 24, 28),
    "white": (250, 250, 250),
    "grey": (140, 142, 148),
    "red": (214, 40, 44),
    "orange": (244, 136, 34),
    "yellow": (252, 212, 60),
    "green": (58, 158, 74),
    "teal": (28, 152, 152),
    "blue": (44, 98, 214),
    "sky blue": (132, 196, 244),
    "navy": (26, 36, 92),
    "purple": (128, 66, 178),
    "pink": (246, 150, 190),
    "brown": (122, 80, 48),
    "cream": (246, 234, 206),
}
PATTERNS = ("plain", "fade down", "fade across", "stripes", "bars", "diagonal", "dots", "checks", "horizon", "stars")
# Places that captions name: pattern, and its two colours.
PLACES = {
    "in the snow": ("horizon", (206, 226, 244), (252, 252, 254)),
    "on the beach": ("horizon", (120, 196, 236), (238, 214, 160)),
    "at sea": ("horizon", (168, 214, 244), (30, 88, 164)),
    "in the desert": ("horizon", (252, 226, 160), (214, 160, 90)),
    "on a meadow": ("horizon", (150, 208, 250), (98, 178, 76)),
    "in a forest": ("horizon", (70, 130, 80), (40, 84, 46)),
    "on the road": ("horizon", (196, 210, 222), (104, 106, 112)),
    "in a room": ("horizon", (248, 232, 204), (150, 100, 62)),
    "in space": ("stars", (12, 12, 34), (250, 250, 240)),
    "at sunset": ("fade down", (250, 150, 70), (116, 56, 130)),
    "under water": ("fade down", (110, 200, 226), (14, 62, 128)),
    "in the fog": ("fade down", (222, 224, 228), (176, 180, 188)),
}
SIZES = {"small": (0.30, 0.42), "": (0.46, 0.64), "large": (0.72, 0.92)}
SPOTS = {
    "in the middle": (0.0, 0.0),
    "on the left": (-1.0, 0.0),
    "on the right": (1.0, 0.0),
    "at the top": (0.0, -1.0),
    "at the bottom": (0.0, 1.0),
    "in the top left corner": (-1.0, -1.0),
    "in the top right corner": (1.0, -1.0),
    "in the bottom left corner": (-1.0, 1.0),
    "in the bottom right corner": (1.0, 1.0),
}
# Two things: how captions say where the first stands, and the centres of both.
RELATIONS = {
    "to the left of": ((-0.46, 0.0), (0.46, 0.0)),
    "to the right of": ((0.46, 0.0), (-0.46, 0.0)),
    "above": ((0.0, -0.48), (0.0, 0.46)),
    "under": ((0.0, 0.48), (0.0, -0.46)),
    "next to": ((-0.46, 0.08), (0.46, 0.0)),
    "and": ((-0.46, 0.0), (0.46, 0.05)),
    "in front of": ((-0.14, 0.34), (0.10, -0.10)),
    "behind": ((0.16, -0.30), (-0.10, 0.26)),
}


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
class Placed:
    """A sprite in a scene. Lengths are in halves of the picture's side, from its centre; y goes down.

    scale: side of the sprite over side of the picture
    angle: degrees, clockwise
    """

    sprite: int
    tint: tuple[int, int, int]
    x: float
    y: float
    scale: float
    angle: float = 0.0
    mirrored: bool = False


@dataclass(frozen=True)
class Scene:
    """What is in a scene; things from back to front. medium: position in `media.NAMES`, or -1."""

    caption: str
    things: tuple[Placed, ...]
    pattern: str = "plain"
    first: tuple[int, int, int] = (255, 255, 255)
    second: tuple[int, int, int] = (255, 255, 255)
    medium: int = -1


def with_article(name: str) -> str:
    last = name.split()[-1]
    if last.endswith("s") and not last.endswith(("ss", "us", "is")):
        return name
    vowel = name[0] in "aeiou" and not name.startswith(("uni", "usb", "eu", "one "))
    return f"{'an' if vowel else 'a'} {name}"


def _plural(name: str) -> str:
    if with_article(name) == name:
        return name
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


def _far(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    return math.dist(one, other)


class Composer:
    """Draws scenes from sprites.

    Things are drawn so that rare ones are seen: with probability in proportion to the root of the number of their sprites.
    """

    def __init__(self, sprites: Sprites):
        # Names alone, no pixels: composers are copied to worker processes.
        self.things, self.styles, self.mono = sprites.things, sprites.styles, sprites.mono
        self.by_style = defaultdict(list)
        for number, style in enumerate(self.styles):
            self.by_style[style].append(number)
        counts = Counter(sprites.things)
        self.weights = np.cumsum([counts[thing] ** -0.5 for thing in sprites.things])

    def _any(self, rng: random.Random) -> int:
        return int(np.searchsorted(self.weights, rng.random() * self.weights[-1]))

    def draw(self, rng: random.Random) -> Scene:
        """A scene; one in ten has an empty caption, for classifier-free guidance."""
        kind = rng.random()
        n_things = 1 if kind < 0.58 else 2 if kind < 0.90 else 3
        plain = kind < 0.20
        first = self._any(rng)
        style = self.styles[first] if rng.random() < 0.8 else None
        picks = [first]
        while len(picks) < n_things:
            pick = rng.choice(self.by_style[style]) if style else self._any(rng)
            picks.append(pick)
        if n_things > 1 and rng.random() < 0.12:
            picks = [first] * n_things
        style = style if n_things > 1 else self.styles[first]

        pattern, one, two, ground = ("plain", (255, 255, 255), (255, 255, 255), "") if plain else self._ground(rng)
        medium = self._medium(picks, plain, min(sum(one), sum(two)) < 200, rng)
        coloured = medium < 0 or media.NAMES[medium] not in media.WITHOUT_COLOUR
        named = [self._tinted(pick, one, two, plain, coloured, rng) for pick in picks]
        layout = self._centred if plain else (self._alone, self._pair, self._three)[n_things - 1]
        things, words = layout(named, rng)

        caption = self._caption(words, ground, style, medium, rng)
        return Scene(caption, things, pattern, one, two, medium)

    def _ground(self, rng: random.Random) -> tuple[str, tuple, tuple, str]:
        """Pattern, two colours, and the words for them."""
        if rng.random() < 0.3:
            words = rng.choice(list(PLACES))
            pattern, one, two = PLACES[words]
            return pattern, _shaken(one, rng), _shaken(two, rng), words
        a, b = rng.sample(list(COLOURS), 2)
        one, two = _shaken(COLOURS[a], rng), _shaken(COLOURS[b], rng)
        draw = rng.random()
        if draw < 0.55:
            depth = rng.choice(("", "", "pale ", "dark "))
            if a in ("black", "white", "navy", "cream"):
                depth = ""
            mixed = {"pale ": 255, "dark ": 0}.get(depth)
            if mixed is not None:
                red, green, blue = (round(0.5 * value + 0.5 * mixed) for value in one)
                one = red, green, blue
            return "plain", one, one, f"on {with_article(depth + a)} ground"
        if draw < 0.75:
            pattern = rng.choice(("fade down", "fade across"))
            return pattern, one, two, f"on a ground that fades from {a} to {b}"
        pattern, word = rng.choice(
            (
                ("stripes", "striped"),
                ("bars", "barred"),
                ("diagonal", "diagonally striped"),
                ("dots", "dotted"),
                ("checks", "checkered"),
            )
        )
        return pattern, one, two, f"on {with_article(a)} and {b} {word} ground"

    def _tinted(
        self, pick: int, one: tuple, two: tuple, plain: bool, coloured: bool, rng: random.Random
    ) -> tuple[int, tuple[int, int, int], str]:
        """Sprite, tint, and its name, with its colour where it has one that is seen."""
        thing = self.things[pick]
        if not self.mono[pick]:
            return pick, (255, 255, 255), thing
        if plain and rng.random() < 0.4:
            return pick, COLOURS["black"], thing
        clear = [name for name, rgb in COLOURS.items() if min(_far(rgb, one), _far(rgb, two)) > 110]
        name = rng.choice(clear or ["black"])
        return pick, _shaken(COLOURS[name], rng), f"{name} {thing}" if coloured else thing

    def _medium(self, picks: list[int], plain: bool, dark: bool, rng: random.Random) -> int:
        """A medium or none; none for a pair that is held out, or a black silhouette on a dark ground."""
        if rng.random() >= (0.15 if plain else 0.35):
            return -1
        number = rng.randrange(len(media.NAMES))
        name = media.NAMES[number]
        unfit = (name == "silhouette" and dark) or any(media.held_out(self.things[pick], name) for pick in picks)
        return -1 if unfit else number

    def _centred(self, named: list[tuple], rng: random.Random) -> tuple[tuple[Placed, ...], str]:
        pick, tint, name = named[0]
        return (Placed(pick, tint, 0, 0, rng.uniform(0.86, 0.96)),), with_article(name)

    def _alone(self, named: list[tuple], rng: random.Random) -> tuple[tuple[Placed, ...], str]:
        pick, tint, name = named[0]
        size = rng.choice(("small", "", "", "large", "large"))
        scale = rng.uniform(*SIZES[size])
        spot, place = rng.choice(list(SPOTS.items())), ""
        room = 1 - scale
        if size == "large" or rng.random() < 0.3:
            spot = ("in the middle", (0.0, 0.0))
        x, y = (room * (0.86 * at + rng.uniform(-0.12, 0.12)) for at in spot[1])
        if size != "large" and rng.random() < 0.75:
            place = f" {spot[0]}"
        angle, turned = 0.0, ""
        draw = rng.random()
        if draw < 0.12:
            angle, turned = rng.uniform(20, 45) * rng.choice((-1, 1)), "tilted "
        elif draw < 0.17:
            angle, turned = 180.0, "upside down "
        words = f"{size} {turned}{name}".strip()
        return (Placed(pick, tint, x, y, scale, angle, rng.random() < 0.3),), with_article(words) + place

    def _pair(self, named: list[tuple], rng: random.Random) -> tuple[tuple[Placed, ...], str]:
        relation = rng.choice(list(RELATIONS))
        twins = named[0] == named[1]
        sizes = rng.choice((("", ""), ("", ""), ("small", "large"), ("large", "small")))
        if twins:
            sizes = rng.choice((("", ""), ("small", "small"), ("large", "large")))
        placed, words = [], []
        overlapping = relation in ("in front of", "behind")
        for (pick, tint, name), size, (x, y) in zip(named, sizes, RELATIONS[relation], strict=True):
            low, high = {"small": (0.26, 0.34), "": (0.40, 0.48), "large": (0.52, 0.60)}[size]
            scale = rng.uniform(low, high) * (1.25 if overlapping else 1)
            reach = 1 - scale
            x, y = (max(-reach, min(reach, at + rng.uniform(-0.06, 0.06))) for at in (x, y))
            placed.append(Placed(pick, tint, x, y, scale, mirrored=rng.random() < 0.3))
            words.append(f"{size} {name}".strip() if rng.random() < 0.7 else name)
        if twins and relation in ("and", "next to"):
            text = f"two {_plural(words[0])}"
        else:
            text = f"{with_article(words[0])} {relation} {with_article(words[1])}"
        if relation == "in front of":
            placed.reverse()
        back, front = placed
        if overlapping and front.scale > 1.3 * back.scale:  # or nothing would be seen of what is behind
            placed[0] = replace(back, x=0.55 if back.x > 0 else -0.55, y=-0.55)
        return tuple(placed), text

    def _three(self, named: list[tuple], rng: random.Random) -> tuple[tuple[Placed, ...], str]:
        upright = rng.random() < 0.3
        placed = []
        for (pick, tint, _), at in zip(named, (-0.64, 0.0, 0.64), strict=True):
            scale, off = rng.uniform(0.28, 0.34), rng.uniform(-0.22, 0.22)
            x, y = (off, at) if upright else (at, off)
            placed.append(Placed(pick, tint, x, y, scale, mirrored=rng.random() < 0.3))
        one, two, three = (with_article(name) for _, _, name in named)
        if len({name for _, _, name in named}) == 1:
            return tuple(placed), f"three {_plural(named[0][2])}"
        if rng.random() < 0.4:
            return tuple(placed), f"{two} between {one} and {three}"
        return tuple(placed), f"{one}, {two} and {three}" + (" from top to bottom" if upright else "")

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


def _shaken(rgb: tuple[int, int, int], rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (max(0, min(255, value + rng.randint(-10, 10))) for value in rgb)
    return red, green, blue


def pack(scenes: Sequence[Scene]) -> dict[str, torch.Tensor]:
    """Scenes as tensors on the CPU, which `compose` takes: a row per scene.

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
    """The pictures of packed scenes, on the device of `pixels`, the sprites'.

    returns: (b, 3, side, side) float32 in [0, 1]
    """
    device = pixels.device
    given = {name: value.to(device, non_blocking=True) for name, value in packed.items()}
    picture = _grounds(given["pattern"], given["ground"], side)
    cover = picture.new_zeros(len(picture), 1, side, side)
    line = (torch.arange(side, device=device) + 0.5) * 2 / side - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    for layer in range(MOST_THINGS):
        own = (packed["sprite"][:, layer] >= 0).nonzero().flatten().to(device)
        if not len(own):
            break
        sprites = pixels[given["sprite"][own, layer]].float() / 255
        at_x, at_y, scale, angle, mirrored = (value.view(-1, 1, 1) for value in given["place"][own, layer].unbind(-1))
        right, down = (x - at_x) / scale, (y - at_y) / scale
        cos, sin = angle.cos(), angle.sin()
        grid = torch.stack([(cos * right + sin * down) * mirrored, cos * down - sin * right], dim=-1)
        # A sprite that shrinks is averaged first, or thin lines would break.
        small = F.avg_pool2d(sprites, 2)
        near = F.grid_sample(sprites, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        far = F.grid_sample(small, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        blend = ((scale - 0.45) / 0.3).clamp(0, 1).unsqueeze(1)
        drawn = near * blend + far * (1 - blend)
        colour, alpha = drawn[:, :3] * given["tint"][own, layer].view(-1, 3, 1, 1), drawn[:, 3:]
        picture[own] = picture[own] * (1 - alpha) + colour
        cover[own] = cover[own] * (1 - alpha) + alpha
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
    of = torch.stack([share[name] for name in PATTERNS])[pattern].unsqueeze(1)
    return colours[:, 0].view(-1, 3, 1, 1) * (1 - of) + colours[:, 1].view(-1, 3, 1, 1) * of
