"""Folders of pictures as people have them: hidden files, links, endings, captions and other side files."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from broken_pictures import whole
from conftest import picture
from corpora import encoded, ingest, stored
from PIL import Image

from attrdb.errors import InvalidValue
from attrdb.ingest.read import walk
from attrdb.ingest.read.discover import open_corpus


def skipped(path):
    return dict(open_corpus(path).skipped.counts)


# --- hidden files, links, endings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hidden",
    [
        ".ipynb_checkpoints/a-checkpoint.png",
        ".thumbnails/normal/a.png",
        "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg",
        "__MACOSX/._a.png",
        "deep/._a.png",
        ".git/lfs/a.png",
        "$RECYCLE.BIN/a.png",
        "deep/#recycle/a.png",
        "lost+found/a.png",
        "Thumbs.db",
        "~$a.png",
    ],
)
def test_hidden_and_system_files_are_passed_over_and_counted(empty, tmp_path, toy_encoder, hidden):
    root = tmp_path / "photos"
    picture(root / "a.png", (1, 2, 3))
    picture(root / "hidden.png", (1, 2, 3)).rename(
        (root / hidden).parent.mkdir(parents=True, exist_ok=True) or root / hidden
    )
    assert skipped(root) == {walk.HIDDEN: 1}
    ingest(empty, root, toy_encoder)
    assert stored(empty) == ["photos/a.png"]


def test_a_folder_that_is_hidden_itself_may_be_named(empty, tmp_path, toy_encoder):
    picture(tmp_path / ".cache" / "photos" / "a.png", (1, 2, 3))
    ingest(empty, tmp_path / ".cache" / "photos", toy_encoder)
    assert stored(empty) == ["photos/a.png"]


def test_links_that_end_inside_are_followed_and_others_said(empty, tmp_path, toy_encoder):
    root = tmp_path / "photos"
    picture(root / "store" / "a.png", (1, 2, 3)).rename(root / "store" / "blob-1")
    (root / "a.png").symlink_to("store/blob-1")
    (root / "b.png").symlink_to(picture(tmp_path / "secret.png", (9, 9, 9)))
    (root / "c.png").symlink_to("nowhere.png")
    (root / "d.png").symlink_to("d.png")
    (root / "up").symlink_to("..")
    (root / "again").symlink_to("store")
    assert skipped(root) == {
        walk.OUTSIDE: 2,
        walk.NOWHERE: 2,
        walk.FOLDER_LINKS: 1,
        walk.OTHER_FILES: 1,
    }
    ingest(empty, root, toy_encoder)
    assert stored(empty, "uri") == [("photos/a.png", (root / "store" / "blob-1").as_uri())]


def test_the_cache_of_a_hub_is_read(empty, tmp_path, toy_encoder):
    cache = tmp_path / "datasets--org--pets"
    picture(cache / "blobs" / "0a.png", (1, 2, 3)).rename(cache / "blobs" / "0a")
    pq.write_table(pa.table({"image": [{"bytes": encoded(), "path": None}]}), cache / "blobs" / "0b")
    snapshot = cache / "snapshots" / "rev"
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "cat.png").symlink_to("../../blobs/0a")
    (snapshot / "data" / "train-00000-of-00001.parquet").symlink_to("../../../blobs/0b")
    (snapshot / "out.png").symlink_to(picture(tmp_path / "out.png", (1, 1, 1)))
    assert skipped(snapshot) == {walk.OUTSIDE: 1}
    ingest(empty, snapshot, toy_encoder, source="pets")
    assert stored(empty) == ["pets/cat.png", "pets/data/train-00000-of-00001/0"]


def test_a_caption_is_not_read_through_a_link_that_leads_out(empty, tmp_path, toy_encoder):
    root = tmp_path / "photos"
    (tmp_path / "passwd").write_text("root:x:0:0")
    (root / "texts").mkdir(parents=True)
    (root / "texts" / "b").write_text("a caption")
    for name, target in (("a", tmp_path / "passwd"), ("b", "texts/b"), ("c", "/dev/zero")):
        picture(root / f"{name}.png", (1, 2, 3))
        (root / f"{name}.txt").symlink_to(target)
    (root / "c.json").symlink_to(tmp_path / "passwd")
    ingest(empty, root, toy_encoder)
    assert stored(empty, "prompt") == [("photos/a.png", None), ("photos/b.png", "a caption"), ("photos/c.png", None)]
    assert skipped(root) == {walk.OUTSIDE: 3, walk.OTHER_FILES: 1}


def test_exemplars_obey_the_same_rules(tmp_path):
    from attrdb.ingest.models.exemplars import read_exemplar, read_exemplars

    root = tmp_path / "vase"
    (tmp_path / "passwd").write_text("root:x:0:0")
    picture(root / "a.png", (1, 2, 3))
    picture(root / ".thumbnails" / "a.png", (1, 2, 3))
    (root / "._a.jpg").write_bytes(b"leavings")
    (root / "b.svg").write_text("<svg/>")
    (root / "a.txt").symlink_to(tmp_path / "passwd")
    skips = walk.Skipped()
    (exemplar,) = read_exemplars(root, skips)
    assert "prompt" not in exemplar.fields
    assert "prompt" not in read_exemplar(root / "a.png", "vase").fields
    assert dict(skips.counts) == {walk.HIDDEN: 2, walk.OUTSIDE: 1, walk.OTHER_PICTURES: 1}
    (root / "a.png").unlink()
    with pytest.raises(InvalidValue, match=r"has no image; .*Not read: .*pictures in formats .*: 1 \(\.svg 1\)"):
        read_exemplars(root)


def test_endings_that_are_not_read_are_counted_by_ending(tmp_path, monkeypatch):
    monkeypatch.setattr("attrdb.ingest.read.formats.heic_formats", lambda: ())
    monkeypatch.setattr(walk, "picture_suffixes", lambda: frozenset((".png", ".jfif")))
    monkeypatch.setattr("attrdb.ingest.read.discover.picture_suffixes", lambda: frozenset((".png", ".jfif")))
    root = tmp_path / "photos"
    picture(root / "a.png", (1, 2, 3))
    (root / "b.jfif").write_bytes(whole("JPEG"))
    for name in ("c.HEIC", "d.svg", "e.CR2", "f.svg", "README.md", "Makefile", "a.txt", "lonely.txt"):
        (root / name).write_text("x")
    corpus = open_corpus(root)
    assert corpus.n_items == 2
    assert corpus.skipped.lines() == [
        "HEIC pictures, which need: pip install 'attrdb[heic]': 1 (c.HEIC)",
        "other files: 3 (no ending 1, .md 1, .txt 1)",
        "pictures in formats that are not read: 3 (.svg 2, .cr2 1)",
    ]


@pytest.mark.parametrize("form", ["TIFF", "AVIF", "JPEG"])
def test_more_formats(empty, tmp_path, toy_encoder, form):
    (tmp_path / "photos").mkdir()
    name = {"TIFF": "a.TIF", "AVIF": "a.avif", "JPEG": "a.jfif"}[form]
    (tmp_path / "photos" / name).write_bytes(whole(form))
    ingest(empty, tmp_path / "photos", toy_encoder)
    assert stored(empty) == [f"photos/{name}"]


def test_heic_beside_other_pictures(empty, tmp_path, toy_encoder):
    pillow_heif = pytest.importorskip("pillow_heif")
    picture(tmp_path / "photos" / "a.png", (1, 2, 3))
    pillow_heif.from_pillow(Image.new("RGB", (32, 24), "red")).save(tmp_path / "photos" / "IMG_1.HEIC", format="HEIF")
    (tmp_path / "photos" / "torn.heic").write_bytes((tmp_path / "photos" / "IMG_1.HEIC").read_bytes()[:200])
    result = ingest(empty, tmp_path / "photos", toy_encoder)
    assert stored(empty) == ["photos/IMG_1.HEIC", "photos/a.png"]
    assert "torn.heic cannot be decoded" in result.failures["photos/torn.heic"]


def test_a_database_within_the_folder_is_passed_over(empty, tmp_path, toy_encoder):
    root = empty.path.parent
    picture(root / "a.png", (1, 2, 3))
    assert skipped(root) == {walk.DATABASES: 1}
    with pytest.raises(InvalidValue, match="has no image in it"):
        open_corpus(empty.path)


def test_folders_deeper_than_calls_of_python(tmp_path):
    deep = tmp_path / "photos"
    for _ in range(40):
        deep = deep / "d"
    picture(deep / "a.png", (1, 2, 3))
    import sys

    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(len(__import__("inspect").stack()) + 35)
        assert sum(1 for _ in walk.walk(tmp_path / "photos", walk.Skipped())) == 1
    finally:
        sys.setrecursionlimit(limit)


# --- captions and fields beside pictures ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "prompt"),
    [
        (b"\xef\xbb\xbfa cat", "a cat"),
        ("\ufeffein Kätzchen".encode("utf-16-le"), "ein Kätzchen"),
        ("ein Kätzchen".encode("utf-16"), "ein Kätzchen"),
        ("a cat on a mat".encode("utf-16-be"), "a cat on a mat"),
        ("\ufeffcat".encode("utf-32-le"), "cat"),
        ("ein Kätzchen".encode("latin-1"), "ein Kätzchen"),
        ("“cat” – 5 €".encode("cp1252"), "“cat” – 5 €"),
        ("猫".encode(), "猫"),
        (b"a\0 cat\x1b[31m red\x07\r\n", "a cat red"),
        ("a \u202bcat\u2028mat".encode(), "a \u202bcat\u2028mat"),
        (b"", None),
        (b" \n", None),
    ],
)
def test_captions_in_the_encodings_that_people_have(empty, tmp_path, toy_encoder, written, prompt):
    picture(tmp_path / "photos" / "a.png", (1, 2, 3))
    (tmp_path / "photos" / "a.txt").write_bytes(written)
    assert ingest(empty, tmp_path / "photos", toy_encoder).failures == {}
    assert stored(empty, "prompt") == [("photos/a.png", prompt)]


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("猫が好き".encode("shift-jis"), "a.txt is not UTF-8 text; save it as UTF-8"),
        (b"\xff\xfea", "a.txt is not UTF-16-LE text"),
        (b"x" * 2_000_000, "a.txt has 2,000,000 bytes, more than 1,048,576; shorten it"),
    ],
)
def test_captions_that_cannot_be_used_say_why(empty, tmp_path, toy_encoder, written, reason):
    picture(tmp_path / "photos" / "a.png", (1, 2, 3))
    (tmp_path / "photos" / "a.txt").write_bytes(written)
    (failure,) = ingest(empty, tmp_path / "photos", toy_encoder).failures.values()
    assert reason in failure


def test_the_files_of_img2dataset_are_read_whole(empty, tmp_path, toy_encoder):
    root = tmp_path / "laion"
    for number, url in ((0, "http://a.example/0.jpg"), (1, "http://a.example/1.jpg")):
        name = f"00000/00000000{number}"
        (root / "00000").mkdir(parents=True, exist_ok=True)
        (root / f"{name}.jpg").write_bytes(whole("JPEG"))
        (root / f"{name}.txt").write_text(f"caption {number}")
        fields = {"url": url, "LICENSE": "CC0", "caption": f"caption {number}", "status": "success", "key": name}
        (root / f"{name}.json").write_text(json.dumps(fields))
    pq.write_table(pa.table({"url": ["u"], "key": ["0"], "status": ["success"]}), root / "00000.parquet")
    (root / "00000_stats.json").write_text('{"successes": 2}')
    assert skipped(root) == {walk.SIDE_FILES: 2}
    ingest(empty, root, toy_encoder)
    rows = stored(empty, "uri", "prompt", "license", "metadata")
    assert [row[:4] for row in rows] == [
        ("laion/00000/000000000.jpg", "http://a.example/0.jpg", "caption 0", "CC0"),
        ("laion/00000/000000001.jpg", "http://a.example/1.jpg", "caption 1", "CC0"),
    ]
    assert json.loads(rows[0][4]) == {"status": "success", "key": "00000/000000000"}
    assert ingest(empty, root, toy_encoder).n_stored == 2
    # A shard's folder alone has the same fields, and ids of its own.
    ingest(empty, root / "00000", toy_encoder)
    assert stored(empty, "license")[0] == ("00000/000000000.jpg", "CC0")


def test_side_files_that_are_odd_keep_no_picture_out(empty, tmp_path, toy_encoder):
    root = tmp_path / "photos"
    for number, side in enumerate(
        ('{"license": 4, "author": {"name": "Ann"}, "x": NaN}', "[1]", "{", '{"caption": ["a"]}')
    ):
        picture(root / f"{number}.png", (number, 2, 3))
        (root / f"{number}.json").write_text(side)
    assert ingest(empty, root, toy_encoder).failures == {}
    rows = stored(empty, "license", "creator", "prompt", "metadata")
    assert [row[1:4] for row in rows] == [("4", None, None), (None,) * 3, (None,) * 3, (None, None, "a")]
    assert json.loads(rows[0][4]) == {"author": {"name": "Ann"}, "x": None}
    assert "1.json must be a JSON object" in json.loads(rows[1][4])["side_file"]
    assert "2.json is not JSON" in json.loads(rows[2][4])["side_file"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "a cat", "n": 1}\n{"file_name": "deep/b.png", "text": "a dog"}\n',
        ),
        ("metadata.csv", "file_name,text,n\r\na.png,a cat,1\r\ndeep/b.png,a dog,\r\n"),
        ("metadata.csv", "\ufefffile_name,text,n\na.png,a cat,1\n./deep/b.png,a dog,\n"),
    ],
)
def test_tables_of_captions_beside_pictures(empty, tmp_path, toy_encoder, name, text):
    root = tmp_path / "pets"
    picture(root / "a.png", (1, 2, 3))
    picture(root / "deep" / "b.png", (4, 2, 3))
    (root / name).write_text(text)
    ingest(empty, root, toy_encoder)
    assert [row[:2] for row in stored(empty, "prompt")] == [("pets/a.png", "a cat"), ("pets/deep/b.png", "a dog")]
    assert skipped(root) == {}


def test_a_parquet_table_of_captions(empty, tmp_path, toy_encoder):
    root = tmp_path / "pets"
    picture(root / "train" / "a.png", (1, 2, 3))
    rows = {"file_name": ["a.png"], "caption": ["a cat"], "license": ["CC0"]}
    pq.write_table(pa.table(rows), root / "train" / "metadata.parquet")
    ingest(empty, root, toy_encoder)
    assert stored(empty, "prompt", "license") == [("pets/train/a.png", "a cat", "CC0")]
    (root / "train" / "metadata.parquet").write_bytes(b"PAR1")
    assert "train/metadata.parquet (" in open_corpus(root).skipped.lines()[0]


def test_lines_of_captions_that_cannot_be_read_are_said(tmp_path):
    picture(tmp_path / "pets" / "a.png", (1, 2, 3))
    (tmp_path / "pets" / "metadata.jsonl").write_text('{"file_name": "a.png"\n[]\n{"file_name": "a.png", "text": "x"}')
    (line,) = open_corpus(tmp_path / "pets").skipped.lines()
    assert (
        "tables of captions, or lines of them, that cannot be read: 2 (metadata.jsonl line 1, metadata.jsonl line 2)"
        in line
    )
