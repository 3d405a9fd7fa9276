"""Embeddings that others computed: shards, positions, resume, and every way in which a shard can be wrong."""

import json

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TOY, angle

from attrdb.errors import Busy, InvalidValue, NotFound
from attrdb.ingest.read import embeddings
from attrdb.ingest.read.embedding_shards import is_embeddings, open_embeddings
from attrdb.ingest.read.embeddings import ingest_embeddings
from attrdb.store.ids import lock_file
from attrdb.store.locks import exclusive_lock

SPEC = TOY["spec"]


def write_shard(folder, number, degrees, dtype=np.float16, **columns):
    """A shard whose vectors point at the degrees; keys are `<number>-<degree>`."""
    (folder / "img_emb").mkdir(parents=True, exist_ok=True)
    (folder / "metadata").mkdir(exist_ok=True)
    np.save(folder / "img_emb" / f"img_emb_{number}.npy", np.array([angle(one) for one in degrees], dtype))
    keys = [f"{number}-{one}" for one in degrees]
    table = {"key": keys, "url": [f"https://example.org/{key}" for key in keys], "caption": keys, **columns}
    pq.write_table(pa.table(table), folder / "metadata" / f"metadata_{number}.parquet")
    return folder


@pytest.fixture
def laion(tmp_path):
    folder = tmp_path / "laion"
    write_shard(folder, "000", [0, 10, 20], NSFW=["UNLIKELY"] * 3, similarity=[0.25, 0.5, 0.75])
    return write_shard(folder, "001", [30, 40], NSFW=["UNSURE"] * 2, similarity=[0.5, 0.5])


def ingest(db, folder, source="laion", **how):
    return ingest_embeddings(db, open_embeddings(str(folder)), SPEC, source, **how)


def test_rows_and_vectors_meet_by_position(empty, laion):
    result = ingest(empty, laion)
    assert (result.n_done, result.n_stored, result.failures) == (5, 0, {})
    found = empty.sql(
        "SELECT image_id, role, source, uri, prompt, metadata, image, toy_2 FROM images ORDER BY 1"
    ).to_pylist()
    assert [row["image_id"] for row in found] == [
        f"laion/{key}" for key in ("000-0", "000-10", "000-20", "001-30", "001-40")
    ]
    row = found[3]
    assert (row["role"], row["source"], row["prompt"], row["image"]) == ("pretraining", "laion", "001-30", None)
    assert row["uri"] == "https://example.org/001-30"
    assert json.loads(row["metadata"]) == {"NSFW": "UNSURE", "similarity": 0.5}
    np.testing.assert_allclose(row["toy_2"], angle(30), atol=1e-3)
    assert np.linalg.norm(row["toy_2"]) == pytest.approx(1, abs=1e-6)  # float16 was not


def test_it_is_what_attribution_finds(toy, laion):
    ingest(toy, laion)
    assert set(toy.attribute("m/0/2", k=3)["image_id"].to_pylist()) == {"m/e40", "laion/001-30", "laion/001-40"}


def test_the_encoder_is_named_and_its_dimension_checked(toy, laion):
    toy.writer.add_encoder("other", 3, {}, "none")
    with pytest.raises(InvalidValue, match=r"have dimension 2, encoder 'other' of .* makes 3; name the encoder that"):
        ingest_embeddings(toy, open_embeddings(str(laion)), "other", "laion")
    ingest_embeddings(toy, open_embeddings(str(laion)), "open_clip:Mine/own", "laion")
    row = toy.encoders["open_clip_mine_own"]
    assert (row["dimension"], row["weights_fingerprint"]) == (2, "")


def test_given_again_nothing_is_stored_twice(empty, laion):
    ingest(empty, laion)
    version = empty.version
    result = ingest(empty, laion)
    assert (result.n_done, result.n_stored, empty.version) == (0, 5, version)
    write_shard(laion, "002", [50], NSFW=["UNSURE"], similarity=[0.5])
    assert ingest(empty, laion).n_done == 1


def test_interrupted_it_goes_on_where_it_was(empty, laion, monkeypatch):
    monkeypatch.setattr(embeddings, "PART_ROWS", 2)

    def kill(_stage, done, _total, note=""):
        if done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(empty, laion, report=kill)
    assert empty.sql("SELECT count(*) AS n FROM images")["n"].to_pylist() == [3]
    assert empty.sql("SELECT state, message FROM jobs").to_pylist() == [
        {"state": "failed", "message": "KeyboardInterrupt: "}
    ]
    result = ingest(empty, laion)
    assert (result.n_done, result.n_stored) == (2, 3)
    assert empty.sql("SELECT count(DISTINCT image_id) AS n FROM images")["n"].to_pylist() == [5]
    assert empty.sql("SELECT job_id, state, n_done FROM jobs").to_pylist() == [
        {"job_id": f"ingest corpus/laion from file://{laion}", "state": "done", "n_done": 2}
    ]


def test_any_file_system(empty, laion):
    memory = fsspec.filesystem("memory")
    memory.put(str(laion), "/bucket/laion", recursive=True)
    assert is_embeddings("memory://bucket/laion")
    result = ingest_embeddings(empty, open_embeddings("memory://bucket/laion"), SPEC, "laion")
    assert result.n_done == 5
    with pytest.raises(InvalidValue, match="cannot be opened: Protocol not known"):
        open_embeddings("gopher://bucket/laion")


def test_columns_of_laion_400m_and_columns_by_choice(empty, tmp_path):
    columns = {"URL": ["u"], "TEXT": ["a cat"], "LICENSE": ["?"], "WIDTH": [640.0], "artist": ["Ann"]}
    folder = write_shard(tmp_path / "l400m", "0", [5], **columns)
    table = pq.read_table(folder / "metadata" / "metadata_0.parquet").drop_columns(["key", "url", "caption"])
    pq.write_table(table, folder / "metadata" / "metadata_0.parquet")
    opened = open_embeddings(str(folder), columns={"creator": "artist"})
    ingest_embeddings(empty, opened, SPEC, "l400m")
    found = empty.sql("SELECT image_id, uri, prompt, license, width, creator, metadata FROM images").to_pylist()
    assert found == [
        {
            "image_id": "l400m/0/0",
            "uri": "u",
            "prompt": "a cat",
            "license": "?",
            "width": 640,
            "creator": "Ann",
            "metadata": None,
        }
    ]
    with pytest.raises(InvalidValue, match="has no column 'painter'; it has: URL, TEXT"):
        open_embeddings(str(folder), columns={"creator": "painter"})
    with pytest.raises(InvalidValue, match="'role' is no column that embeddings can fill; such are: prompt, uri"):
        open_embeddings(str(folder), columns={"role": "TEXT"})
    with pytest.raises(InvalidValue, match="has no column 'name'"):
        open_embeddings(str(folder), id_column="name")


def test_vectors_that_cannot_be_used_are_left_out_and_named(empty, laion):
    vectors = np.array([angle(0), [0, 0], angle(20)], np.float32)
    np.save(laion / "img_emb" / "img_emb_000.npy", vectors)
    np.save(laion / "img_emb" / "img_emb_001.npy", np.array([[np.nan, 1], [np.inf, 1]], np.float16))
    result = ingest(empty, laion)
    assert result.n_done == 2
    assert set(result.failures) == {"laion/000-10", "laion/001-30", "laion/001-40"}
    assert "img_emb_000.npy row 1 is zero or not finite" in result.failures["laion/000-10"]
    assert empty.sql("SELECT count(*) AS n FROM failures")["n"].to_pylist() == [3]
    assert empty.sql("SELECT state, n_failed FROM jobs").to_pylist() == [{"state": "incomplete", "n_failed": 3}]
    # Mended, they are passed over until they are asked for.
    write_shard(laion, "001", [30, 40], NSFW=["UNSURE"] * 2, similarity=[0.5, 0.5])
    assert (ingest(empty, laion).n_done, len(ingest(empty, laion).failures)) == (0, 3)
    again = ingest(empty, laion, retry_failed=True)
    assert (again.n_done, set(again.failures)) == (2, {"laion/000-10"})


def test_rows_without_an_id_are_left_out_and_named(empty, tmp_path):
    folder = write_shard(tmp_path / "x", "000", [1, 2], key=pa.array(["a", None]))
    result = ingest(empty, folder, "x")
    assert result.n_done == 1
    assert "metadata_000.parquet row 1 has no key" in result.failures["x/000/1"]
    assert ingest(empty, folder, "x").failures == result.failures


@pytest.mark.parametrize("part_rows", [1, 100])
def test_rows_with_the_id_of_an_earlier_row_are_recorded_and_the_first_is_kept(empty, tmp_path, monkeypatch, part_rows):
    monkeypatch.setattr(embeddings, "PART_ROWS", part_rows)
    write_shard(tmp_path / "other", "000", [7], key=["z"])
    ingest(empty, tmp_path / "other", "x")
    folder = write_shard(tmp_path / "x", "000", [1, 2, 3], key=["a", "b", "a"])
    for how in ({}, {}, {"retry_failed": True}):
        failures = ingest(empty, folder, "x", **how).failures
        assert list(failures) == ["x/000/2"]
        assert "metadata_000.parquet row 2 has the id of an earlier row (column 'key')" in failures["x/000/2"]
    found = empty.sql("SELECT image_id, uri FROM images ORDER BY 1").to_pylist()
    assert found == [
        {"image_id": "x/a", "uri": "https://example.org/000-1"},
        {"image_id": "x/b", "uri": "https://example.org/000-2"},
        {"image_id": "x/z", "uri": "https://example.org/000-7"},
    ]


def test_no_row_has_an_id(empty, tmp_path):
    folder = write_shard(tmp_path / "x", "000", [1, 2], key=pa.array([None, None], pa.string()))
    result = ingest(empty, folder, "x")
    assert (result.n_done, result.n_stored, len(result.failures)) == (0, 0, 2)


def test_odd_folders_and_columns(empty, tmp_path):
    folder = write_shard(tmp_path / "br[1]*", "000", [1], metadata=["m"], row=["r"])
    assert is_embeddings(str(folder))
    ingest(empty, folder, "x")
    assert json.loads(empty.sql("SELECT metadata FROM images")["metadata"][0].as_py()) == {"metadata": "m", "row": "r"}


def test_two_imports_of_one_source_at_once(empty, laion):
    with (
        exclusive_lock(lock_file(empty.path, "corpus", "laion"), "held"),
        pytest.raises(Busy, match="source 'laion' is being imported by another process"),
    ):
        ingest(empty, laion)


def damaged(laion, how):
    vectors, metadata = laion / "img_emb" / "img_emb_001.npy", laion / "metadata" / "metadata_001.parquet"
    rows = pq.read_table(metadata)
    if how == "row mismatch":
        pq.write_table(rows.slice(0, 1), metadata)
    elif how == "truncated":
        vectors.write_bytes(vectors.read_bytes()[:-3])
    elif how == "no npy":
        vectors.write_bytes(b"hello")
    elif how == "float64":
        np.save(vectors, np.zeros((2, 2)))
    elif how == "one-dimensional":
        np.save(vectors, np.zeros(2, np.float32))
    elif how == "pickled":
        np.save(vectors, np.array([{"a": 1}], object), allow_pickle=True)
    elif how == "dimension":
        np.save(vectors, np.ones((2, 3), np.float16))
    elif how == "no metadata":
        metadata.unlink()
    elif how == "no vectors":
        vectors.unlink()
    elif how == "no caption":
        pq.write_table(rows.drop_columns("caption"), metadata)
    else:
        metadata.write_bytes(b"PAR1")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("row mismatch", "shard 001 has 2 vectors and 1 rows of metadata; they belong together by position"),
        ("truncated", r"img_emb_001\.npy has 133 bytes, its header says 136; fetch it again"),
        ("no npy", r"img_emb_001\.npy is no readable \.npy file"),
        ("float64", r"img_emb_001\.npy holds float64 of shape \(2, 2\); float16 or float32 of shape"),
        ("one-dimensional", r"holds float32 of shape \(2,\)"),
        ("pickled", r"holds object of shape \(1,\)"),
        ("dimension", r"img_emb_001\.npy has dimension 3, .*img_emb_000\.npy has 2"),
        ("no metadata", "shard 001 of .* has no metadata file"),
        ("no vectors", "shard 001 of .* has no vectors file"),
        ("no caption", r"metadata_001\.parquet has no column 'caption'; it has: key, url"),
        ("no parquet", r"metadata_001\.parquet is not a readable Parquet file"),
    ],
)
def test_a_damaged_shard_is_named_before_anything_is_stored(laion, how, says):
    damaged(laion, how)
    with pytest.raises(InvalidValue, match=says):
        open_embeddings(str(laion))


def test_a_path_without_embeddings(tmp_path):
    assert not is_embeddings(str(tmp_path))
    with pytest.raises(NotFound, match=r"no img_emb/img_emb_<number>\.npy in"):
        open_embeddings(str(tmp_path / "nowhere"))


# --- the encoder that made them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "dimension"),
    [
        ("open_clip:ViT-L-14/openai", 768),
        ("open_clip:ViT-B-32-quickgelu/openai?size=224", 512),
        ("pixels:8", 192),
        ("efficientnet-lite0", 1280),
        ("vgg-gram", 900),
    ],
)
def test_an_architecture_of_another_dimension_is_refused_before_anything_is_made(tmp_path, laion, spec, dimension):
    from click.testing import CliRunner

    from attrdb.cli import main

    done = CliRunner().invoke(main, ["ingest", "corpus", str(tmp_path / "new.attrdb"), str(laion), "--encoder", spec])
    assert done.exit_code == 1
    assert f"embeddings have dimension 2, and {spec} makes features of dimension {dimension}; name the" in done.stderr
    assert not (tmp_path / "new.attrdb").exists()


def test_dimensions_are_known_without_the_package_that_makes_them(monkeypatch):
    from attrdb.ingest import dimensions

    with_package = dimensions.known_dimension("open_clip:ViT-H-14/laion2b_s32b_b79k")
    monkeypatch.setattr(dimensions.importlib.util, "find_spec", lambda name: None)
    assert dimensions.known_dimension("open_clip:ViT-H-14/laion2b_s32b_b79k") == with_package == 1024
    unknown = ("open_clip:Mine/x.pt", "timm:resnet18", "torchscript:a.pt", "clip", "open_clip:../../etc/x")
    assert [dimensions.known_dimension(spec) for spec in unknown] == [None] * 5


def test_the_same_rows_under_a_second_encoder_are_refused_and_it_is_not_made(empty, laion):
    ingest(empty, laion)
    with pytest.raises(
        InvalidValue, match=r"image 'laion/000-0' is stored already, without a feature of other:2, as are 2 "
    ):
        ingest_embeddings(empty, open_embeddings(str(laion)), "other:2", "laion")
    assert list(empty.encoders) == ["toy_2"]
    # Nor are rows that another data set has, once the second encoder is there.
    assert ingest_embeddings(empty, open_embeddings(str(laion)), "other:2", "more").n_done == 5
    with pytest.raises(
        InvalidValue, match=r"features of toy:2\. Name the encoder that made these embeddings, or import"
    ):
        ingest_embeddings(empty, open_embeddings(str(laion)), "other:2", "laion")
    assert ingest(empty, laion).n_stored == 5


def test_an_encoder_of_which_no_vector_can_be_used_is_not_made(empty, laion):
    np.save(laion / "img_emb" / "img_emb_000.npy", np.zeros((3, 2), np.float32))
    np.save(laion / "img_emb" / "img_emb_001.npy", np.zeros((2, 2), np.float32))
    assert ingest_embeddings(empty, open_embeddings(str(laion)), "other:2", "laion").n_done == 0
    assert list(empty.encoders) == []


# --- metadata that is odd ---------------------------------------------------------------------------------------------


def test_metadata_is_strict_json_and_clean_text(empty, tmp_path):
    folder = write_shard(
        tmp_path / "x",
        "000",
        [1, 2],
        similarity=[float("nan"), 0.5],
        half=pa.array([np.inf, 1], pa.float32()),
        boxes=[[1.0, float("nan")], None],
        about=[{"a": float("inf"), "b": "x"}, None],
        note=["a\0b\x1b[31mred\x9b", "plain"],
        caption=["\ufeffa cat\0", "a dog"],
    )
    ingest(empty, folder, "x")
    rows = empty.sql("SELECT prompt, metadata FROM images ORDER BY image_id").to_pylist()
    assert [row["prompt"] for row in rows] == ["a cat", "a dog"]
    assert [json.loads(row["metadata"], parse_constant=pytest.fail) for row in rows] == [
        {"similarity": None, "half": None, "boxes": [1.0, None], "about": {"a": None, "b": "x"}, "note": "abred"},
        {"similarity": 0.5, "half": 1.0, "boxes": None, "about": None, "note": "plain"},
    ]


def test_text_that_is_not_utf8_is_repaired(empty, tmp_path):
    bad = pa.array([b"a", b"\xff"], pa.binary()).view(pa.string())
    folder = write_shard(tmp_path / "x", "000", [1, 2], note=bad, caption=bad)
    assert ingest(empty, folder, "x").n_done == 2
    assert empty.sql("SELECT prompt FROM images ORDER BY 1")["prompt"].to_pylist() == ["a", "\ufffd"]


def test_half_of_a_folder_of_embeddings_is_named(laion, tmp_path):
    with pytest.raises(InvalidValue, match=rf"img_emb/ holds vectors alone; .* metadata in it: {laion}"):
        is_embeddings(f"{laion}/img_emb/")
    (laion / "img_emb").rename(laion / "text_emb")
    for file in (laion / "text_emb").iterdir():
        file.rename(file.with_name(file.name.replace("img", "text")))
    with pytest.raises(InvalidValue, match=r"has embeddings of texts alone \(text_emb\)"):
        is_embeddings(str(laion))
    (laion / "photo.png").write_bytes(b"x")
    assert not is_embeddings(str(laion))


def test_a_dry_run_says_what_would_be_read(tmp_path, laion):
    from click.testing import CliRunner

    from attrdb.cli import main

    words = ["ingest", "corpus", str(tmp_path / "db"), str(laion), "--encoder", "toy:2", "--dry-run"]
    done = CliRunner().invoke(main, words)
    assert done.stdout.splitlines() == [
        "read: embeddings of 2 numbers: 5, in shards: 2",
        f"  {laion}/img_emb/img_emb_000.npy, {laion}/metadata/metadata_000.parquet",
        f"  {laion}/img_emb/img_emb_001.npy, {laion}/metadata/metadata_001.parquet",
        "dry run: nothing was stored",
    ]
    assert not (tmp_path / "db").exists()
