"""From a picture to what a network takes: resized and cropped in uint8 here, scaled by mean and deviation on the batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
from PIL import Image

from attrdb.errors import InvalidValue

RESIZES = ("shortest", "longest", "squash")
FILTERS = {name: Image.Resampling[name.upper()] for name in ("bicubic", "bilinear", "lanczos", "nearest")}
STATISTICS: dict[str, dict[str, tuple[float, ...]]] = {
    "imagenet": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    "clip": {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)},
    "half": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
}
SETTINGS = ("size", "resize", "crop", "interpolation", "mean", "std")


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes a square of `size` pixels.

    resize: shortest or longest: that side becomes `resized` pixels; squash: both do. Then the centre is cut out, or set on
            a square of the colour `fill`.
    """

    size: int
    resized: int
    resize: str = "shortest"
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = STATISTICS["imagenet"]["mean"]
    std: tuple[float, ...] = STATISTICS["imagenet"]["std"]
    fill: tuple[int, ...] = (0, 0, 0)

    def identity(self) -> dict:
        identity = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        if self.resize != "longest":
            del identity["fill"]
        return identity

    def prepare(self, image: Image.Image) -> np.ndarray:
        """(size, size, 3) uint8"""
        image = image.resize(self._resized(*image.size), FILTERS[self.interpolation])
        width, height = image.size
        # Rounded as torchvision rounds where it crops, and cut short where it pads.
        if width < self.size or height < self.size:
            canvas = Image.new("RGB", (max(width, self.size), max(height, self.size)), self.fill)
            canvas.paste(image, ((canvas.width - width) // 2, (canvas.height - height) // 2))
            image, (width, height) = canvas, canvas.size
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if self.resize == "squash":
            return self.resized, self.resized
        if self.resize == "longest":
            scale = max(width, height) / self.resized
            return max(1, round(width / scale)), max(1, round(height / scale))
        if width <= height:
            return self.resized, int(self.resized * height / width)
        return int(self.resized * width / height), self.resized

    def changed(self, settings: dict[str, str]) -> Preprocessing:
        """With the settings of a spec; `crop` is the share of the resized side that is kept.

        raises: InvalidValue for an unknown setting, or a value that is none
        """
        for name in settings:
            if name not in SETTINGS:
                raise InvalidValue(f"no setting {name!r} of an encoder; there are: {', '.join(SETTINGS)}")
        size = _value(settings, "size", int, self.size, lambda size: 16 <= size <= 1024, "16 to 1024 pixels")
        crop = _value(settings, "crop", float, self.size / self.resized, lambda crop: 0.1 <= crop <= 1, "0.1 to 1")
        # The side is kept exactly where neither changes: 224 / 248 does not divide back to 248.
        resized = math.floor(size / crop) if {"size", "crop"} & set(settings) else self.resized
        resize = _value(settings, "resize", str, self.resize, lambda name: name in RESIZES, "/".join(RESIZES))
        filters = "/".join(FILTERS)
        interpolation = _value(
            settings, "interpolation", str, self.interpolation, lambda name: name in FILTERS, filters
        )
        changed = replace(self, size=size, resized=resized, resize=resize, interpolation=interpolation)
        if "mean" in settings:
            changed = replace(changed, mean=_three("mean", settings["mean"]))
        if "std" in settings:
            changed = replace(changed, std=_three("std", settings["std"]))
        return changed


def _value(settings: dict[str, str], name: str, kind: Callable, default, fits: Callable, needed: str):
    if name not in settings:
        return default
    try:
        value = kind(settings[name])
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise InvalidValue(f"an encoder's setting {name}={settings[name]} is not one of: {needed}")
    return value


def _three(name: str, text: str) -> tuple[float, ...]:
    if text in STATISTICS:
        return STATISTICS[text][name]
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(math.isfinite(v) and (v > 0 or name == "mean") for v in values):
        known = ", ".join(STATISTICS)
        raise InvalidValue(f"an encoder's setting {name}={text} is neither three numbers a,b,c nor one of: {known}")
    return values
