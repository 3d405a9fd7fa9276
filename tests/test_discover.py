"""What people have in a folder: photos, tars, tables of Hugging Face, leavings; each is read or said."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from broken_pictures import whole
from conftest import picture
from corpora import encoded, ingest, sample, shard, stored

from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.read import walk
from attrdb.ingest.read.corpus import ingest_corpus
from attrdb.ingest.read.discover import open_corpus


def skipped(path):
    return dict(open_corpus(path).skipped.counts)


# --- one folder of all kinds ------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    """A folder as people have it: nine things that are images, and as many that are not."""
    root = tmp_path / "mixed"
    for number, text in enumerate((b"\xef\xbb\xbfone", "zwölf".encode("latin-1"), "three".encode("utf-16"))):
        picture(root / "photos" / f"{number}.png", (40 * number, 2, 3))
        (root / "photos" / f"{number}.txt").write_bytes(text)
    (root / "photos" / "torn.jpg").write_bytes(whole("JPEG", size=(200, 200))[:-5000])
    (root / "photos" / "link.png").symlink_to("0.png")
    (root / "photos" / "out.png").symlink_to("/etc/hostname")
    (root / "photos" / ".DS_Store").write_bytes(b"x")
    (root / "photos" / "icon.svg").write_text("<svg/>")
    shard(root / "tars" / "00000.tar", *sample("1"), *sample("2"), ("._1.jpg", b"x"))
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    table = pa.table({"image": [{"bytes": encoded(n), "path": f"{n}.png"} for n in (1, 2)], "label": [1, 0]})
    (root / "data").mkdir()
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}),
        root / "data" / "train-00000-of-00001.parquet",
    )
    (root / "README.md").write_text("---\nlicense: mit\n---\n")
    return root


def test_everything_in_a_mixed_folder_is_read_or_said(empty, mixed, toy_encoder):
    result = ingest(empty, mixed, toy_encoder)
    assert stored(empty, "prompt", "category") == [
        ("mixed/data/train-00000-of-00001/0", None, "dog"),
        ("mixed/data/train-00000-of-00001/1", None, "cat"),
        ("mixed/photos/0.png", "one", None),
        ("mixed/photos/1.png", "zwölf", None),
        ("mixed/photos/2.png", "three", None),
        ("mixed/photos/link.png", None, None),
        ("mixed/tars/1", "picture 1", None),
        ("mixed/tars/2", "picture 2", None),
    ]
    assert {kind: (o.n_done, o.n_stored, o.n_failed) for kind, o in result.outcomes.items()} == {
        "picture files": (4, 0, 1),
        "tar shards": (2, 0, 0),
        "Parquet files": (2, 0, 0),
    }
    ((item, reason),) = result.failures.items()
    assert item == "mixed/photos/torn.jpg"
    assert "torn.jpg cannot be decoded: image file is truncated" in reason
    again = ingest(empty, mixed, toy_encoder)
    assert (again.n_done, again.n_stored, len(again.failures)) == (0, 8, 1)


def test_the_command_says_what_became_of_each_kind(mixed, tmp_path):
    from click.testing import CliRunner

    from attrdb.cli import main

    def run(*words):
        return CliRunner().invoke(main, ["ingest", "corpus", str(tmp_path / "db"), str(mixed), *words])

    dry = run("--dry-run", "--encoder", "pixels:2")
    assert (dry.exit_code, dry.stderr) == (0, "")
    assert not (tmp_path / "db").exists()
    assert [line for line in dry.stdout.splitlines() if not line.startswith("  ")] == [
        "read: picture files: 5",
        "read: tar shards: 1, images: not counted",
        "read: Parquet files: 1, images: 2",
        "not read: hidden or system files and folders: 1 (photos/.DS_Store)",
        "not read: links that lead out of the folder: 1 (photos/out.png)",
        "not read: other files: 1 (.md 1)",
        "not read: pictures in formats that are not read: 1 (.svg 1)",
        "dry run: nothing was stored",
    ]
    assert f"  {mixed / 'tars' / '00000.tar'}" in dry.stdout.splitlines()
    done = run("--encoder", "pixels:2")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[:-2] == [
        "8 images appended, 0 were stored already",
        "picture files: 4 appended, 1 left out",
        "tar shards: 2 appended",
        "Parquet files: 2 appended",
        "not read: hidden or system files and folders: 2 (photos/.DS_Store, 00000.tar/._1.jpg)",
        "not read: links that lead out of the folder: 1 (photos/out.png)",
        "not read: other files: 1 (.md 1)",
        "not read: pictures in formats that are not read: 1 (.svg 1)",
    ]


def test_photos_beside_a_tar_are_read_too(empty, tmp_path, toy_encoder):
    picture(tmp_path / "b" / "a.png", (1, 2, 3))
    shard(tmp_path / "b" / "backup.tar", *sample("1"))
    ingest(empty, tmp_path / "b", toy_encoder)
    assert stored(empty) == ["b/1", "b/a.png"]


def test_tars_of_two_folders_may_have_the_same_keys(empty, tmp_path, toy_encoder):
    for name in ("train", "test"):
        shard((tmp_path / "b").mkdir(exist_ok=True) or tmp_path / "b" / name / "0.tar", *sample("1"))
    ingest(empty, tmp_path / "b", toy_encoder)
    assert stored(empty) == ["b/test/1", "b/train/1"]


@pytest.mark.parametrize("first", [b"", b"no tar at all" * 100, bytes(10240)])
def test_a_first_shard_that_is_broken_keeps_no_other_out(empty, tmp_path, toy_encoder, first):
    shard(tmp_path / "b" / "00001.tar", *sample("1"))
    (tmp_path / "b" / "00000.tar").write_bytes(first)
    corpus = open_corpus(tmp_path / "b")
    result = ingest_corpus(empty, corpus, [toy_encoder])
    assert stored(empty) == ["b/1"]
    if first == bytes(10240):
        assert corpus.skipped.lines() == ["tar shards with nothing in them: 1 (00000.tar)"]
    else:
        assert "00000.tar is damaged or cut off after the beginning" in result.failures["b/00000.tar"]


@pytest.mark.parametrize("damage", ["cut off", "no Parquet", "no image"])
def test_a_table_that_is_broken_keeps_no_other_out(empty, tmp_path, toy_encoder, damage):
    (tmp_path / "b").mkdir()
    pq.write_table(pa.table({"image": [encoded(n) for n in range(4)]}), tmp_path / "b" / "1.parquet")
    whole_file = (tmp_path / "b" / "1.parquet").read_bytes()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "b" / "0.parquet")
    if damage != "no image":
        (tmp_path / "b" / "0.parquet").write_bytes(whole_file[:-20] if damage == "cut off" else b"PAR1")
    result = ingest(empty, tmp_path / "b", toy_encoder)
    assert len(stored(empty)) == 4
    if damage == "no image":
        assert (result.failures, skipped(tmp_path / "b")) == ({}, {walk.NO_PICTURES: 1})
    else:
        (reason,) = result.failures.values()
        assert "0.parquet is not a readable Parquet file" in reason


def test_a_tar_whose_first_member_points_outside(empty, tmp_path, toy_encoder):
    path = shard(tmp_path / "b" / "0.tar", ("../esc.png", encoded()), *sample("1"))
    result = ingest(empty, path, toy_encoder)
    assert stored(empty) == ["0/1"]
    assert "member '../esc.png' is refused" in next(iter(result.failures.values()))


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [(".tar.gz", "w:gz"), (".tgz", "w:gz"), (".tar.bz2", "w:bz2"), (".tar.xz", "w:xz"), (".tar", "w:gz")],
)
def test_compressed_tars(empty, tmp_path, toy_encoder, suffix, mode):
    plain = shard(tmp_path / "plain.tar", *sample("1"), *sample("2", shade=3)).read_bytes()
    path = tmp_path / f"pets{suffix}"
    with tarfile.open(tmp_path / "plain.tar") as source, tarfile.open(path, mode) as target:
        for member in source:
            target.addfile(member, source.extractfile(member))
    ingest(empty, path, toy_encoder)
    assert stored(empty, "prompt") == [("pets/1", "picture 1"), ("pets/2", "picture 2")]
    assert len(plain) > 0


@pytest.mark.parametrize(("suffix", "codec"), [(".tar.zst", "zstd"), (".tzst", "zstd"), (".tar.lz4", "lz4")])
def test_tars_compressed_by_what_arrow_has(empty, tmp_path, toy_encoder, suffix, codec):
    plain = shard(tmp_path / "plain.tar", *sample("1")).read_bytes()
    with pa.CompressedOutputStream(str(tmp_path / f"pets{suffix}"), codec) as stream:
        stream.write(plain)
    ingest(empty, tmp_path / f"pets{suffix}", toy_encoder)
    assert stored(empty) == ["pets/1"]


def test_a_compressed_tar_that_is_cut_off_keeps_what_stands_before(empty, tmp_path, toy_encoder):
    members = [member for n in range(200) for member in sample(f"{n:03}", shade=n)]
    path = shard(tmp_path / "plain.tar", *members)
    with tarfile.open(path) as source, tarfile.open(tmp_path / "pets.tgz", "w:gz") as target:
        for member in source:
            target.addfile(member, source.extractfile(member))
    data = (tmp_path / "pets.tgz").read_bytes()
    (tmp_path / "pets.tgz").write_bytes(data[: len(data) // 2])
    result = ingest(empty, tmp_path / "pets.tgz", toy_encoder)
    assert 0 < result.n_done < 200
    (reason,) = result.failures.values()
    assert "pets.tgz is damaged or cut off after sample '" in reason


def test_a_tar_that_unpacks_to_fill_the_disk_is_refused(tmp_path, monkeypatch):
    from attrdb.ingest.read import shard_file

    monkeypatch.setattr(shard_file, "MIN_LIMIT", 2**20)
    info = tarfile.TarInfo("1.jpg")
    info.size = 2**28
    with tarfile.open(tmp_path / "bomb.tgz", "w:gz") as tar:
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    with pytest.raises(InvalidValue, match=r"bomb\.tgz unpacks to more than"):
        open_corpus(tmp_path / "bomb.tgz")


def test_nothing_to_read(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.zip").write_bytes(b"PK")
    with pytest.raises(InvalidValue, match=r"has no image in it; PNG, .*Not read: other files: 1 \(\.zip 1\)"):
        open_corpus(tmp_path / "photos")
    with pytest.raises(NotFound):
        walk.Skipped() and list(walk.walk(tmp_path / "nowhere", walk.Skipped()))
