"""Reading pictures that come from outside: checked before they are decoded, refused with the file and the reason named."""

from __future__ import annotations

import hashlib
import io
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from attrdb.errors import InvalidValue
from attrdb.ingest.read.formats import FORMATS, READ, begins_like_a_picture, heic_formats, nature

MIN_SIDE = 16  # pixels; a feature of anything smaller says nothing
MAX_PIXELS = 64_000_000
MAX_SIDE = 1024  # pixels; no encoder or base model looks at more
MAX_BYTES = 256 * 2**20
ORIENTATION = 0x0112  # the EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf")  # chunks that the pixels, or their turn, depend on
JPEG_START = b"\xff\xd8"
JPEG_SCAN, JPEG_EXIF, JPEG_ADOBE = 0xDA, 0xE1, 0xEE
JPEG_METADATA = (*range(0xE1, 0xF0), 0xFE)


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

    Metadata that cannot be read does not keep a picture out: its pixels are read without it.
    raises: InvalidValue if it is no image of FORMATS, is broken, or has a side below MIN_SIDE or above MAX_PIXELS in all;
            nothing else, whatever a decoder raises
    """
    try:
        upright = _decode(name, encoded)
    except InvalidValue:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for broken data
        plain = without_metadata(encoded)
        if plain is None:
            raise _undecodable(name, encoded, error) from error
        try:
            upright = _decode(name, plain)
        except InvalidValue:
            raise
        except Exception:
            raise _undecodable(name, encoded, error) from error
    width, height = upright.size
    upright.thumbnail((MAX_SIDE, MAX_SIDE))
    return Picture(name, upright, encoded, width, height)


def _decode(name: str, encoded: bytes) -> Image.Image:
    """The picture, upright, RGB on white.

    raises: InvalidValue for its size, and whatever a decoder raises
    """
    image = Image.open(io.BytesIO(encoded), formats=FORMATS + heic_formats())
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise InvalidValue(f"image {name} is {width}x{height} pixels; at least {MIN_SIDE}x{MIN_SIDE} are needed")
    if width * height > MAX_PIXELS:
        raise InvalidValue(
            f"image {name} claims {width}x{height} pixels, more than {MAX_PIXELS:,}; scale it down first"
        )
    image.load()
    turn = _turn(image)
    return on_white(image if turn is None else image.transpose(turn))


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How a picture must be turned to stand upright; None where its EXIF does not say so, or cannot be read."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow raises many kinds for broken EXIF
        return None


def _undecodable(name: str, encoded: bytes, error: Exception) -> InvalidValue:
    if isinstance(error, Image.DecompressionBombError):
        return InvalidValue(f"image {name} claims more than {MAX_PIXELS:,} pixels; scale it down first")
    if advice := nature(encoded):
        return InvalidValue(f"image {name} {advice}")
    if isinstance(error, UnidentifiedImageError) and begins_like_a_picture(encoded):
        return InvalidValue(f"image {name} cannot be decoded: its header is broken; fetch it again, or save it anew")
    if isinstance(error, UnidentifiedImageError):
        return InvalidValue(
            f"image {name} cannot be decoded: it begins like no picture of a known format; {READ} are read"
        )
    detail = " ".join(str(error).split())[:200] or type(error).__name__
    return InvalidValue(f"image {name} cannot be decoded: {detail}; fetch it again, or save it anew")


def without_metadata(encoded: bytes) -> bytes | None:
    """A PNG or JPEG without text, colour profiles and comments; None for other formats, or one that is cut off before."""
    if encoded.startswith(PNG_START):
        return _plain_png(encoded)
    return _plain_jpeg(encoded) if encoded.startswith(JPEG_START) else None


def _plain_png(encoded: bytes) -> bytes:
    kept, at = [PNG_START], len(PNG_START)
    while at + 8 <= len(encoded):
        (size,), kind = struct.unpack_from(">I", encoded, at), encoded[at + 4 : at + 8]
        end = at + 12 + size
        if kind in PNG_PIXELS:
            kept.append(encoded[at:end])
        at = end
    return b"".join(kept)


def _plain_jpeg(encoded: bytes) -> bytes | None:
    kept, at = [JPEG_START], len(JPEG_START)
    while at + 4 <= len(encoded) and encoded[at] == 0xFF:
        marker = encoded[at + 1]
        if marker == JPEG_SCAN:
            return b"".join([*kept, encoded[at:]])
        end = at + 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
        exif = marker == JPEG_EXIF and encoded[at + 4 : at + 8] == b"Exif"
        if marker not in JPEG_METADATA or marker == JPEG_ADOBE or exif:
            kept.append(encoded[at:end])
        at = end
    return None


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
    if image.mode.startswith("I"):
        # Pillow's own conversion to RGB clips 16-bit grey at 255.
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels are whole numbers of 32 bits, of which the range is not known")
        image = Image.fromarray((values // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of which the range is not known")
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
