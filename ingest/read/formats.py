"""The formats of pictures: which are read, by which endings they are known, and what a file is that is none of them."""

from __future__ import annotations

from functools import cache

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI")  # as Pillow calls them
READ = "PNG, JPEG, WebP, BMP, GIF, TIFF, AVIF, JPEG 2000, PPM and QOI"
SUFFIXES = frozenset(
    (
        ".png",
        ".apng",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".avif",
        ".jp2",
        ".j2k",
        ".jpx",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".qoi",
    )
)
HEIC_SUFFIXES = frozenset((".heic", ".heif", ".hif"))
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
HEIC_ADVICE = "which need: pip install 'attrdb[heic]'"
# Pictures in formats that are not read: said by their endings, because a person sees a picture there.
OTHER_SUFFIXES = frozenset(
    (
        ".svg",
        ".svgz",
        ".psd",
        ".psb",
        ".xcf",
        ".kra",
        ".ai",
        ".eps",
        ".pdf",
        ".jxl",
        ".ico",
        ".icns",
        ".tga",
        ".dds",
        ".exr",
        ".hdr",
        ".wmf",
        ".emf",
        ".cr2",
        ".cr3",
        ".nef",
        ".arw",
        ".dng",
        ".orf",
        ".rw2",
        ".raf",
        ".raw",
        ".djvu",
        ".jxr",
        ".pcx",
        ".sgi",
        ".xbm",
        ".xpm",
    )
)
# How most pictures begin that are read; with a broken header, Pillow knows them no more.
PICTURE_STARTS = (b"\x89PNG", b"\xff\xd8", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*")
# How files begin that are often found where a picture should be, and what to do about them.
STARTS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the picture itself; fetch it with: git lfs pull"),
    (b"%PDF", "is a PDF document; convert it to PNG"),
    (b"PK\x03\x04", "is a ZIP archive; unpack it"),
    (b"\x1f\x8b", "is compressed with gzip; unpack it"),
    (b"8BPS", "is a Photoshop document; convert it to PNG"),
    (b"\xff\x0a", "is a JPEG XL picture; convert it to PNG"),
    (b"\x00\x00\x00\x0cJXL ", "is a JPEG XL picture; convert it to PNG"),
)
MARKUP_STARTS = (
    (b"<!doctype html", "is a web page, not a picture; fetch the picture itself"),
    (b"<html", "is a web page, not a picture; fetch the picture itself"),
    (b"<svg", "is an SVG drawing; convert it to PNG"),
    (b"{", "is JSON text, perhaps the answer of a server, not a picture; fetch the picture itself"),
)


@cache
def heic_formats() -> tuple[str, ...]:
    """HEIF, if the package that reads it is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return ()
    register_heif_opener()
    return ("HEIF",)


@cache
def picture_suffixes() -> frozenset[str]:
    """The endings, in lower case, of the files that are read as pictures."""
    return SUFFIXES | HEIC_SUFFIXES if heic_formats() else SUFFIXES


def begins_like_a_picture(encoded: bytes) -> bool:
    """Whether a file begins as pictures of most formats do."""
    return encoded.startswith(PICTURE_STARTS) or encoded[4:8] == b"ftyp"


def nature(encoded: bytes) -> str | None:
    """What a file is that is no picture of FORMATS, and what to do about it; None if its beginning does not show it."""
    if not encoded:
        return "is empty; fetch it again"
    if not encoded.strip(b"\0"):
        return "has nothing but zero bytes; fetch it again"
    if encoded[4:8] == b"ftyp" and encoded[8:12] in HEIC_BRANDS and not heic_formats():
        return "is a HEIC picture; to read it: pip install 'attrdb[heic]'"
    head = encoded[:1000].lstrip(b"\xef\xbb\xbf \t\r\n")
    for start, advice in STARTS:
        if encoded.startswith(start):
            return advice
    if head.startswith(b"<?xml") and b"<svg" in encoded[:4000]:
        head = b"<svg"
    if begins_like_a_picture(encoded):
        return None
    lowered = head.lower()
    return next((advice for start, advice in MARKUP_STARTS if lowered.startswith(start)), None)
