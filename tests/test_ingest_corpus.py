"""Corpora: folders and Parquet files, resumed, with what cannot be read left out and named."""

import io
import re
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture
from PIL import Image

from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.encode import EfficientNetLite0, Pixels, encode
from attrdb.ingest.read import corpus
from attrdb.ingest.read.discover import open_corpus
from attrdb.ingest.read.pictures import on_white, read_picture, read_picture_file, square, webp


def bomb() -> bytes:
    """A PNG of a few bytes whose header claims 60000 x 60000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def ingest(db, path, encoders, source=None, **how):
    return corpus.ingest_corpus(db, open_corpus(path, source), encoders, **how)


def first(failures):
    return next(iter(failures.values()))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    picture(root / "red.png", (200, 10, 10))
    picture(root / "deep" / "green.jpg", (10, 200, 10))
    (root / "red.txt").write_text("a red square\n")
    (root / "notes.md").write_text("not an image")
    return root


def test_a_folder_with_captions(empty, folder, toy_encoder):
    result = ingest(empty, folder, [toy_encoder])
    assert (result.n_done, result.n_stored, result.failures) == (2, 0, {})
    found = empty.sql("SELECT image_id, role, source, prompt, width, toy_2 FROM images ORDER BY image_id").to_pylist()
    assert [(row["image_id"], row["role"], row["source"], row["prompt"], row["width"]) for row in found] == [
        ("photos/deep/green.jpg", "pretraining", "photos", None, 32),
        ("photos/red.png", "pretraining", "photos", "a red square", 32),
    ]
    np.testing.assert_allclose(found[1]["toy_2"], np.array([201, 11]) / np.hypot(201, 11), rtol=1e-6)


def test_given_again_it_takes_only_what_is_new(empty, folder, toy_encoder):
    ingest(empty, folder, [toy_encoder])
    version = empty.version
    assert ingest(empty, folder, [toy_encoder]).n_stored == 2
    assert empty.version == version
    picture(folder / "blue.png", (10, 10, 200))
    assert ingest(empty, folder, [toy_encoder]).n_done == 1


def test_interrupted_it_goes_on_where_it_was(empty, folder, toy_encoder, monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK", 1)

    def kill(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(empty, folder, [toy_encoder], report=kill)
    result = ingest(empty, folder, [toy_encoder])
    assert (result.n_done, result.n_stored) == (1, 1)


def test_what_cannot_be_read_is_left_out_and_named(empty, folder, toy_encoder):
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:40])
    picture(folder / "dot.png", (1, 2, 3), size=1)
    (folder / "bomb.png").write_bytes(bomb())
    result = ingest(empty, folder, [toy_encoder])
    assert result.n_done == 2
    said = "\n".join(result.failures.values())
    assert "broken.png cannot be decoded" in said
    assert "dot.png is 1x1 pixels; at least 16x16 are needed" in said
    assert "bomb.png claims" in said
    assert len(result.failures) == 3


def test_parquet_keeps_its_columns_and_leaves_exemplars_out(empty, tmp_path, toy_encoder):
    encoded = webp(Image.new("RGB", (32, 32), (9, 99, 199)))
    table = pa.table(
        {
            "name": ["set/a", "set/b"],
            "role": ["pretraining", "exemplar"],
            "creator": ["Ann", "Bob"],
            "license": ["MIT", "MIT"],
            "image": [encoded, encoded],
        }
    )
    pq.write_table(table, tmp_path / "icons.parquet")
    assert open_corpus(tmp_path / "icons.parquet").n_items == 1
    ingest(empty, tmp_path / "icons.parquet", [toy_encoder])
    found = empty.sql("SELECT image_id, creator, license, image FROM images").to_pylist()
    assert found == [{"image_id": "set/a", "creator": "Ann", "license": "MIT", "image": encoded}]


def test_a_source_names_a_parquet_corpus(empty, tmp_path, toy_encoder):
    encoded = webp(Image.new("RGB", (32, 32), (9, 99, 199)))
    pq.write_table(pa.table({"name": ["a"], "source": ["old"], "image": [encoded]}), tmp_path / "x.parquet")
    ingest(empty, tmp_path / "x.parquet", [toy_encoder], source="mine")
    assert empty.sql("SELECT image_id, source FROM images").to_pylist() == [{"image_id": "mine/a", "source": "mine"}]


def test_another_picture_under_a_stored_name_is_named_and_not_dropped(empty, folder, tmp_path, toy_encoder):
    ingest(empty, folder, [toy_encoder])
    picture(tmp_path / "2024" / "photos" / "red.png", (1, 1, 222))
    result = ingest(empty, tmp_path / "2024" / "photos", [toy_encoder])
    assert (result.n_done, result.n_stored) == (0, 0)
    assert "'photos/red.png' is stored already, with other content, from file://" in first(result.failures)
    assert "give this corpus another --source" in first(result.failures)
    assert ingest(empty, tmp_path / "2024" / "photos", [toy_encoder], source="photos24").n_done == 1


def test_a_folder_that_moved_is_known_by_its_content(empty, folder, tmp_path, toy_encoder):
    ingest(empty, folder, [toy_encoder])
    moved = folder.rename(tmp_path / "elsewhere")
    result = ingest(empty, moved, [toy_encoder], source="photos")
    assert (result.n_stored, result.failures) == (2, {})


def test_two_rows_of_one_name(empty, tmp_path, toy_encoder):
    encoded = [webp(Image.new("RGB", (32, 32), (9, 99, blue))) for blue in (1, 1, 200)]
    pq.write_table(pa.table({"name": ["a"] * 3, "image": encoded}), tmp_path / "x.parquet")
    result = ingest(empty, tmp_path / "x.parquet", [toy_encoder])
    assert (result.n_done, result.n_stored, len(result.failures)) == (1, 1, 1)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"name": None, "image": b"x"}, "row 0: name must be an id, which is text, found None"),
        ({"name": 7, "image": b"x"}, "row 0: name must be an id, which is text, found 7"),
        ({"name": " ", "image": b"x"}, "row 0: name must be an id, which is text, found ' '"),
        ({"name": "a", "image": b""}, "row 0 has no picture: its column 'image' is empty"),
    ],
)
def test_rows_of_the_wrong_type_are_left_out_and_named(empty, tmp_path, toy_encoder, row, says):
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    result = ingest(empty, tmp_path / "x.parquet", [toy_encoder])
    assert re.search(says, first(result.failures))
    assert result.n_done == 0


def test_a_row_without_an_image_stops_no_other(empty, tmp_path, toy_encoder):
    encoded = webp(Image.new("RGB", (32, 32), (9, 99, 1)))
    pq.write_table(pa.table({"name": ["a", "b", "c"], "image": [encoded, None, encoded]}), tmp_path / "x.parquet")
    result = ingest(empty, tmp_path / "x.parquet", [toy_encoder])
    assert (result.n_done, len(result.failures)) == (2, 1)


def test_a_damaged_parquet_file_is_named(empty, tmp_path, toy_encoder):
    encoded = [np.random.default_rng(n).bytes(20_000) for n in range(20)]
    pq.write_table(pa.table({"name": [str(n) for n in range(20)], "image": encoded}), tmp_path / "x.parquet")
    whole = bytearray((tmp_path / "x.parquet").read_bytes())
    whole[100:120_000] = bytes(119_900)
    (tmp_path / "x.parquet").write_bytes(whole)
    result = ingest(empty, tmp_path / "x.parquet", [toy_encoder])
    assert re.search(r"x\.parquet cannot be read: .*; fetch it again", first(result.failures))


def test_a_file_name_that_is_not_text_stops_no_other(empty, folder, toy_encoder):
    picture(folder / "ok.png", (1, 1, 1)).rename(folder / "bad\udcff.png")
    result = ingest(empty, folder, [toy_encoder])
    assert result.n_done == 2
    assert "bad?.png: its name is not UTF-8; rename it" in first(result.failures)


def test_large_images_are_committed_a_few_at_a_time(empty, folder, toy_encoder, monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 1)
    assert ingest(empty, folder, [toy_encoder]).n_done == 2
    assert len(empty.snapshot.tables["images"].get_fragments()) == 2


def test_two_folders_of_one_source_keep_their_failures_apart(empty, tmp_path, toy_encoder):
    picture(tmp_path / "one" / "a.png", (1, 1, 1))
    (tmp_path / "one" / "broken.png").write_bytes(b"no")
    picture(tmp_path / "two" / "b.png", (2, 2, 2))
    ingest(empty, tmp_path / "one", [toy_encoder], source="s")
    assert ingest(empty, tmp_path / "two", [toy_encoder], source="s").failures == {}
    assert empty.sql("SELECT item FROM failures")["item"].to_pylist() == ["s/broken.png"]
    (tmp_path / "one" / "broken.png").unlink()
    assert ingest(empty, tmp_path / "one", [toy_encoder], source="s").failures == {}


def test_a_caption_that_is_not_text_is_named(empty, folder, toy_encoder):
    (folder / "red.txt").write_bytes("赤い四角".encode("shift-jis"))
    result = ingest(empty, folder, [toy_encoder])
    assert result.n_done == 1
    assert "red.txt is not UTF-8 text" in first(result.failures)


def test_an_encoder_that_the_stored_images_lack_is_refused(empty, folder, toy_encoder):
    ingest(empty, folder, [toy_encoder])
    with pytest.raises(InvalidValue, match=r"encoder 'pixels:4' is new, .* its encoders are: toy:2"):
        ingest(empty, folder, [toy_encoder, Pixels(4)])


def test_paths_that_are_no_corpus(empty, tmp_path, toy_encoder):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "words.csv").write_text("a,b")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InvalidValue, match=r"torn\.parquet is not a readable Parquet file"):
        ingest(empty, tmp_path / "torn.parquet", [toy_encoder])
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(InvalidValue, match="has no image in it"):
        ingest(empty, tmp_path / "nothing", [toy_encoder])
    with pytest.raises(NotFound, match="no folder or file"):
        ingest(empty, tmp_path / "nowhere", [toy_encoder])
    with pytest.raises(InvalidValue, match=r"neither a folder of images nor a file that holds them: \.parquet, "):
        ingest(empty, tmp_path / "words.csv", [toy_encoder])
    with pytest.raises(InvalidValue, match=r"has no pictures: no column holds pictures; .* It has: a"):
        ingest(empty, tmp_path / "other.parquet", [toy_encoder])


def test_pictures_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(bomb())
    with pytest.raises(InvalidValue, match=r"a\.png claims"):
        read_picture_file(tmp_path / "a.png")
    with pytest.raises(InvalidValue, match=r"text cannot be decoded: .*PNG, JPEG, WebP, BMP, GIF, .* are read"):
        read_picture("text", b"hello")
    icon = io.BytesIO()
    Image.new("RGB", (32, 32)).save(icon, "ICO")
    with pytest.raises(InvalidValue, match="cannot be decoded"):
        read_picture("icon", icon.getvalue())


def test_a_photo_is_turned_upright(tmp_path):
    lying = Image.new("RGB", (40, 20), "white")
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save(tmp_path / "phone.jpg", exif=exif)
    read = read_picture_file(tmp_path / "phone.jpg")
    assert (read.width, read.height, read.image.size) == (20, 40, (20, 40))


def test_grey_of_16_bits_is_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.full((20, 20), 20000, np.uint16)).save(tmp_path / "deep.png")
    assert read_picture_file(tmp_path / "deep.png").image.getpixel((3, 3)) == (77, 77, 77)


def test_a_large_picture_is_kept_small_in_memory(tmp_path):
    Image.new("RGB", (3000, 1500), "red").save(tmp_path / "large.png")
    read = read_picture_file(tmp_path / "large.png")
    assert (read.width, read.height, read.image.size) == (3000, 1500, (1024, 512))


def test_transparency_is_laid_on_white_and_oblong_pictures_are_squared():
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert on_white(clear).getpixel((3, 3)) == (255, 255, 255)
    tall = square(Image.new("RGB", (20, 40), "black"), 32)
    assert tall.size == (32, 32)
    assert tall.getpixel((0, 16)) == (255, 255, 255)
    assert tall.getpixel((16, 16)) == (0, 0, 0)


def test_links_out_of_a_folder_are_not_followed(empty, folder, toy_encoder, tmp_path):
    outside = picture(tmp_path / "secret.png", (1, 1, 1))
    (folder / "link.png").symlink_to(outside)
    assert ingest(empty, folder, [toy_encoder]).n_done == 2


# --- encoders ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_encoded_as_its_pictures_are():
    images = [Image.new("RGB", (48, 48), (40 * i, 255 - 30 * i, 90)) for i in range(5)]
    encoder = EfficientNetLite0()
    one_by_one = np.concatenate([encode(encoder, [image]) for image in images])
    np.testing.assert_allclose(encode(encoder, images), one_by_one, atol=1e-5)
