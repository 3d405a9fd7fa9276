"""Pictures that look the same: exemplars that a base model must not have seen are compared with its sprites."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

# Pictures that differ by less look the same: root of the mean square over thumbnails of values from 0 to 1.
SAME = 0.05
THUMBNAIL = 16  # pixels


def thumbnails(rows: Sequence[dict]) -> np.ndarray:
    """(n, THUMBNAIL * THUMBNAIL * 3) float32 from 0 to 1: pictures on white, each cut to the square that its ink fills."""
    found = np.empty((len(rows), THUMBNAIL * THUMBNAIL * 3), np.float32)
    for number, row in enumerate(rows):
        picture = Image.open(io.BytesIO(row["image"])).convert("RGB")
        box = picture.convert("L").point(lambda value: 255 if value < 240 else 0).getbbox()
        cut = picture.crop(box) if box else picture
        square = Image.new("RGB", [max(cut.size)] * 2, "white")
        square.paste(cut, ((square.width - cut.width) // 2, (square.height - cut.height) // 2))
        small = square.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        found[number] = np.asarray(small, np.float32).ravel() / 255
    return found


def unlike(rows: list[dict], sprites: list[dict]) -> list[dict]:
    """The rows whose pictures differ from every sprite's."""
    pictures, known = thumbnails(rows), thumbnails(sprites)
    norms = (known**2).sum(1)
    kept = []
    for start in range(0, len(rows), 1024):
        some = pictures[start : start + 1024]
        squares = (some**2).sum(1)[:, None] + norms - 2 * some @ known.T
        nearest = squares.min(axis=1, initial=np.inf) / known.shape[1]
        kept += [row for row, square in zip(rows[start : start + 1024], nearest, strict=True) if square >= SAME**2]
    return kept
