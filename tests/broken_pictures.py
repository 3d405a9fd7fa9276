"""Pictures that are broken in every way that decoders have: a generator, each with a name that says how."""

import io
import itertools
import struct
import zlib

import numpy as np
from PIL import Image, PngImagePlugin

FORMATS = {
    "PNG": {},
    "JPEG": {},
    "WEBP": {"lossless": True},
    "BMP": {},
    "GIF": {},
    "TIFF": {"compression": "tiff_lzw"},
    "AVIF": {"speed": 10},
    "JPEG2000": {},
    "PPM": {},
    "QOI": {},
}
EXIF_TAGS = (0x100, 0x101, 0x10F, 0x112, 0x11A, 0x128, 0x13B, 0x8769, 0x8825, 0x927C, 0x9286, 0xA005, 0x14A, 0x501B)
EXIF_VALUES = (b"\xfb\xff\xff\xff", b"\1\0\0\0", b"\6\0\0\0")


def whole(form="PNG", size=(24, 20), mode="RGB", **save):
    """A small picture with some content, encoded."""
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(encoded, form, **(FORMATS.get(form, {}) | save))
    return encoded.getvalue()


def exif(*entries, order="<"):
    """An EXIF block of entries (tag, type, count, four bytes of value or offset), as they stand in the file."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return b"Exif\0\0" + head + b"".join(struct.pack(f"{order}HHI", *e[:3]) + e[3] for e in entries) + bytes(4)


def odd_exif():
    """JPEG with orientation 6 beside another EXIF field of any type, count and value."""
    for tag, kind, count, value in itertools.product(EXIF_TAGS, range(14), (0, 1, 5, 1000), EXIF_VALUES):
        block = exif((0x112, 3, 1, b"\6\0\0\0"), (tag, kind, count, value))
        yield f"EXIF {tag:#x} of type {kind}, {count} of {value.hex()}", whole("JPEG", exif=block)


def truncated(step=1):
    """Every format, cut off at every offset."""
    for form in FORMATS:
        encoded = whole(form, size=(17, 16))
        for length in range(0, len(encoded), step):
            yield f"{form} cut off after {length} bytes", encoded[:length]


def flipped(n=400):
    """Every format, with some bytes replaced."""
    rng = np.random.default_rng(1)
    for form in FORMATS:
        encoded = whole(form)
        for number in range(n):
            data = bytearray(encoded)
            for at in rng.integers(0, min(len(data), 200 if number % 2 else len(data)), 1 + number % 4):
                data[at] = rng.integers(256)
            yield f"{form} with other bytes, {number}", bytes(data)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(*chunks, before=b"IDAT"):
    """A PNG with further chunks, as they are given, before one of its own."""
    encoded = whole("PNG")
    at = encoded.index(before) - 4
    return encoded[:at] + b"".join(chunks) + encoded[at:]


def odd_metadata():
    """Pictures with metadata that Pillow refuses; their pixels are whole."""
    text = b"workflow\0\0" + zlib.compress(b"x" * (3 * 2**20))
    for before in (b"IDAT", b"IEND"):
        yield (
            f"PNG, 3 MiB of compressed text before {before.decode()}",
            with_chunks(chunk(b"zTXt", text), before=before),
        )
    yield "PNG, compressed text that is damaged", with_chunks(chunk(b"zTXt", b"workflow\0\0" + b"no zlib"))
    yield (
        "PNG, international text of 3 MiB",
        with_chunks(chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"x" * (3 * 2**20)))),
    )
    yield (
        "PNG, a colour profile of 3 MiB",
        with_chunks(chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(3 * 2**20))), before=b"IDAT"),
    )
    broken = bytearray(chunk(b"tEXt", b"a\0b"))
    broken[-1] ^= 1
    yield "PNG, text with a wrong checksum", with_chunks(bytes(broken))
    yield "PNG, pHYs that is too short", with_chunks(chunk(b"pHYs", b"\0"))
    yield "PNG, cHRM that is too short", with_chunks(chunk(b"cHRM", b"\0"))
    info = PngImagePlugin.PngInfo()
    for number in range(70):
        info.add_text(f"k{number}", "y" * 2**20, zip=True)
    yield "PNG, 70 MiB of text in all", whole("PNG", pnginfo=info)
    jpeg = whole("JPEG")
    for name, marker, data in (
        ("APP2 with half a profile", 0xE2, b"ICC_PROFILE\0\2\2" + bytes(10)),
        ("APP2 of MPF that is none", 0xE2, b"MPF\0II*\0" + bytes(5)),
        ("APP13 of Photoshop, cut off", 0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\xff"),
        ("APP1 of EXIF, empty", 0xE1, b"Exif\0\0"),
        ("APP1 of XMP that is no XML", 0xE1, b"http://ns.adobe.com/xap/1.0/\0<x"),
        ("a comment that is no text", 0xFE, b"\xff\xfe\0"),
    ):
        yield f"JPEG, {name}", jpeg[:2] + bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data + jpeg[2:]
    yield (
        "JPEG, XMP with an orientation that is none",
        whole("JPEG", xmp=b'<x:xmpmeta><rdf tiff:Orientation="9"/></x:xmpmeta>'),
    )
    yield "WEBP, EXIF that is none", whole("WEBP", exif=b"Exif\0\0none")
    yield "WEBP, a profile that is none", whole("WEBP", icc_profile=b"none")


def odd_sizes():
    """PNG whose header claims sizes and depths that it does not have."""
    for width, height in itertools.product((0, 1, 15, 16, 2**31 - 1, 2**32 - 1), repeat=2):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        encoded = whole("PNG")
        yield f"PNG of {width}x{height}", encoded[:8] + chunk(b"IHDR", header) + encoded[33:]
    for depth, colour in itertools.product((0, 1, 3, 16, 255), (0, 1, 3, 6, 9)):
        header = struct.pack(">IIBBBBB", 24, 20, depth, colour, 0, 0, 0)
        yield f"PNG of depth {depth} and colour {colour}", encoded[:8] + chunk(b"IHDR", header) + encoded[33:]


def odd_modes():
    """Every format in every mode that it can be written in."""
    for form, mode in itertools.product(
        FORMATS, ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F")
    ):
        try:
            yield f"{form} in mode {mode}", whole(form, mode=mode)
        except (OSError, ValueError, KeyError):
            continue
