"""Reading pictures that come from outside: checked before they are decoded, refused with the file named."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from attrdb.errors import InvalidValue, NotFound

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
MIN_SIDE = 16  # pixels; a feature of anything smaller says nothing
MAX_PIXELS = 64_000_000
MAX_SIDE = 1024  # pixels; no encoder or base model looks at more
MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Picture:
    """A decoded image, upright, RGB on white, at most MAX_SIDE pixels a side, with the bytes that it came from."""

    name: str
    image: Image.Image
    encoded: bytes
    width: int  # pixels, of the original
    height: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.encoded).hexdigest()


def read_picture(name: str, encoded: bytes) -> Picture:
    """The picture in some encoded bytes; the size in its header is checked before a pixel is decoded.

    raises: InvalidValue if it is no image of FORMATS, is broken, or has a side below MIN_SIDE or above MAX_PIXELS in all
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        width, height = image.size
        if min(width, height) < MIN_SIDE:
            raise InvalidValue(f"image {name} is {width}x{height} pixels; at least {MIN_SIDE}x{MIN_SIDE} are needed")
        if width * height > MAX_PIXELS:
            raise InvalidValue(
                f"image {name} claims {width}x{height} pixels, more than {MAX_PIXELS:,}; scale it down first"
            )
        image.load()
    except InvalidValue:
        raise
    except Image.DecompressionBombError as error:
        raise InvalidValue(f"image {name} claims more than {MAX_PIXELS:,} pixels; scale it down first") from error
    except Exception as error:  # Pillow's decoders raise many kinds for broken data
        raise InvalidValue(
            f"image {name} cannot be decoded ({type(error).__name__}); {'/'.join(FORMATS)} are read"
        ) from error
    upright = on_white(ImageOps.exif_transpose(image))
    width, height = upright.size
    upright.thumbnail((MAX_SIDE, MAX_SIDE))
    return Picture(name, upright, encoded, width, height)


def read_picture_file(path: Path) -> Picture:
    """raises: InvalidValue as `read_picture`, or for a file above MAX_BYTES"""
    try:
        size = path.stat().st_size
        encoded = path.read_bytes() if size <= MAX_BYTES else b""
    except OSError as error:
        raise InvalidValue(f"image {path} cannot be read: {error.strerror}") from error
    if size > MAX_BYTES:
        raise InvalidValue(f"image {path} has {size:,} bytes, more than {MAX_BYTES:,}; scale it down first")
    return read_picture(str(path), encoded)


def on_white(image: Image.Image) -> Image.Image:
    """RGB, transparency laid on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode.startswith("I;16"):
        # Pillow's own conversion to RGB clips 16-bit grey at 255.
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image.convert("RGB")


def square(image: Image.Image, size: int) -> Image.Image:
    """The whole picture, centred on a white square of `size` pixels."""
    scale = size / max(image.size)
    small = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BICUBIC
    )
    if small.size == (size, size):
        return small
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return canvas


def webp(image: Image.Image) -> bytes:
    """Lossless WebP: what is read back is what was encoded."""
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", lossless=True, quality=60, method=3)
    return encoded.getvalue()


def read_text(path: Path) -> str:
    """raises: InvalidValue for a file that is not UTF-8 text"""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValue(f"{path} is not UTF-8 text: {error}") from error


def image_files(folder: Path) -> Iterator[Path]:
    """Image files below a folder, by path; links are not followed.

    raises: NotFound if there is no such folder
    """
    if not folder.is_dir():
        raise NotFound(f"no folder {folder}")
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.is_symlink():
            yield path
