"""Pictures from outside: whatever is wrong with one, it is decoded or refused with a reason, and nothing else is raised."""

import io
import itertools
import re
import struct
import warnings

import numpy as np
import pytest
from broken_pictures import (
    chunk,
    exif,
    flipped,
    odd_exif,
    odd_metadata,
    odd_modes,
    odd_sizes,
    truncated,
    whole,
    with_chunks,
)
from PIL import Image

from attrdb.errors import InvalidValue
from attrdb.ingest.read.formats import picture_suffixes
from attrdb.ingest.read.pictures import read_picture


def decoded(name, encoded):
    """The picture, or the reason for which it is refused, which names it and holds no address of memory."""
    try:
        picture = read_picture(name, encoded)
    except InvalidValue as error:
        reason = str(error)
        assert reason.startswith(f"image {name} ")
        assert not re.search(r"at 0x[0-9a-f]{6}|object at|\(\w*Error\)", reason), reason
        return reason
    assert picture.image.mode == "RGB"
    assert picture.encoded == encoded
    return picture


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("broken", [truncated, flipped, odd_sizes, odd_modes])
def test_a_broken_picture_is_decoded_or_refused_with_a_reason(broken):
    outcomes = [decoded(name, encoded) for name, encoded in broken()]
    assert any(isinstance(outcome, str) for outcome in outcomes)


@pytest.mark.filterwarnings("ignore")
def test_every_combination_of_exif_is_decoded():
    for name, encoded in odd_exif():
        assert not isinstance(outcome := decoded(name, encoded), str), outcome


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "encoded"), list(odd_metadata()))
def test_metadata_that_cannot_be_read_keeps_no_picture_out(name, encoded):
    picture = decoded(name, encoded)
    assert not isinstance(picture, str), picture
    assert picture.image.size == (24, 20)


def test_pixels_are_the_same_without_the_metadata():
    plain = read_picture("plain", whole("PNG")).image
    text = chunk(b"zTXt", b"workflow\0\0no zlib")
    assert np.array_equal(read_picture("text", with_chunks(text)).image, plain)
    # A colour that is transparent, and a turn, are not lost with the text.
    turned = io.BytesIO()
    Image.new("P", (24, 20)).save(turned, "PNG", transparency=0, exif=exif((0x112, 3, 1, b"\6\0\0\0"))[6:])
    at = turned.getvalue().index(b"IDAT") - 4
    picture = read_picture("turned", turned.getvalue()[:at] + text + turned.getvalue()[at:])
    assert (picture.image.size, picture.image.getpixel((3, 3))) == ((20, 24), (255, 255, 255))


def test_a_photo_is_turned_although_its_exif_cannot_be_written_back():
    width = (0x100, 9, 1, struct.pack("<i", -5))  # ImageWidth, a signed number
    for value, size in ((1, (24, 20)), (3, (24, 20)), (6, (20, 24)), (8, (20, 24)), (9, (24, 20))):
        block = exif(width, (0x112, 3, 1, struct.pack("<I", value)))
        picture = read_picture("phone", whole("JPEG", exif=block))
        assert (picture.image.size, (picture.width, picture.height)) == (size, size)


def test_turns_are_those_of_pillow():
    from PIL import ImageOps

    for value in range(1, 9):
        encoded = whole("JPEG", exif=exif((0x112, 3, 1, struct.pack("<I", value))))
        with Image.open(io.BytesIO(encoded)) as image:
            assert np.array_equal(read_picture("x", encoded).image, ImageOps.exif_transpose(image))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI"])
def test_formats_that_are_read(form):
    assert read_picture("x", whole(form)).image.size == (24, 20)


def test_jfif_and_tiff_are_known_by_their_endings():
    assert {".jfif", ".jpe", ".tif", ".tiff", ".avif", ".webp"} <= picture_suffixes()


def test_heic_is_read_with_its_extra():
    pillow_heif = pytest.importorskip("pillow_heif")
    encoded = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (32, 24), "red")).save(encoded)
    assert ".heic" in picture_suffixes()
    assert read_picture("x", encoded.getvalue()).image.size == (32, 24)


def test_heic_without_its_extra_says_what_to_install(monkeypatch):
    from attrdb.ingest.read import formats, pictures

    monkeypatch.setattr(formats, "heic_formats", lambda: ())
    monkeypatch.setattr(pictures, "heic_formats", lambda: ())
    assert "x is a HEIC picture; to read it: pip install 'attrdb[heic]'" in decoded(
        "x", b"\0\0\0\x18ftypheic" + bytes(80)
    )


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "is empty; fetch it again"),
        (bytes(5000), "has nothing but zero bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "is a Git LFS pointer, .* git lfs pull"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><html>", "is a web page, not a picture"),
        (b'<?xml version="1.0"?>\n<svg xmlns="x">', "is an SVG drawing; convert it to PNG"),
        (b'{"error": "404"}', "is JSON text, perhaps the answer of a server"),
        (b"%PDF-1.7", "is a PDF document"),
        (b"\x1f\x8b\x08", "is compressed with gzip"),
        (b"\xff\xd8no marker", "cannot be decoded: its header is broken; fetch it again"),
        (b"hello", "begins like no picture of a known format; PNG, JPEG, .* are read"),
    ],
)
def test_what_a_file_is_that_is_no_picture(encoded, reason):
    assert re.search(reason, decoded("x", encoded))


def test_the_reason_is_in_the_words_of_the_decoder():
    assert "cannot be decoded: image file is truncated (" in decoded("x", whole("JPEG", size=(200, 200))[:-2000])


def test_pixels_of_an_unknown_range_are_refused():
    for kind in (np.float32, np.int32):
        encoded = io.BytesIO()
        Image.fromarray(np.full((20, 20), 1e6, kind)).save(encoded, "TIFF")
        assert "of which the range is not known" in decoded("x", encoded.getvalue())
    grey = io.BytesIO()
    Image.fromarray(np.full((20, 20), 20000, np.int32)).save(grey, "TIFF")
    assert read_picture("x", grey.getvalue()).image.getpixel((3, 3)) == (77, 77, 77)


def test_memory_that_runs_out_in_a_decoder_is_a_reason(monkeypatch):
    def load(_image):
        raise MemoryError

    encoded = whole("BMP")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    assert "cannot be decoded: MemoryError" in decoded("x", encoded)


def test_the_command_line_shows_no_warning_of_a_decoder(tmp_path):
    from click.testing import CliRunner

    from attrdb.cli import main

    (tmp_path / "photos").mkdir()
    odd = itertools.islice((encoded for _, encoded in odd_exif()), 0, None, 40)
    for number, encoded in enumerate(odd):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(encoded)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = CliRunner().invoke(
            main, ["ingest", "corpus", str(tmp_path / "db"), str(tmp_path / "photos"), "--encoder", "pixels:2"]
        )
    assert done.exit_code == 0, done.output
    assert [warning for warning in caught if "PIL" in warning.filename] == []
