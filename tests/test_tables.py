"""Tables of pictures as others write them: Hugging Face's Parquet and Arrow files, img2dataset's, and odd ones."""

import json
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from broken_pictures import whole
from conftest import picture
from corpora import encoded, ingest, sample, shard, stored

from attrdb.errors import InvalidValue
from attrdb.ingest.read import walk
from attrdb.ingest.read.discover import open_corpus


def hugging_face(n_rows=3, **columns):
    """Rows as `datasets` writes them, with the schema that names the classes."""
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    rows = {
        "image": [{"bytes": encoded(number), "path": f"{number}.png"} for number in range(n_rows)],
        "text": [f"picture {number}" for number in range(n_rows)],
        "label": [number % 2 for number in range(n_rows)],
    }
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(rows | columns).replace_schema_metadata(about)


def data_set(root, table, shards=1):
    (root / "data").mkdir(parents=True)
    size = len(table) // shards
    for number in range(shards):
        file = root / "data" / f"train-{number:05}-of-{shards:05}.parquet"
        pq.write_table(table.slice(number * size, size), file)
    (root / "README.md").write_text("---\nlicense: mit\n---\n")
    return root


def test_a_data_set_of_hugging_face(empty, tmp_path, toy_encoder):
    root = data_set(tmp_path / "pets", hugging_face(4, author=["Ann"] * 4, n=[1, 2, 3, 4]), shards=2)
    assert open_corpus(root).n_items == 4
    ingest(empty, root, toy_encoder)
    rows = stored(empty, "source", "prompt", "category", "creator", "metadata")
    assert rows[0] == ("pets/data/train-00000-of-00002/0", "pets", "picture 0", "cat", "Ann", '{"n": 1}')
    assert rows[3] == ("pets/data/train-00001-of-00002/1", "pets", "picture 3", "dog", "Ann", '{"n": 4}')
    again = ingest(empty, root, toy_encoder)
    assert (again.n_done, again.n_stored, again.failures) == (0, 4, {})


def test_one_file_of_it_has_ids_of_its_own(empty, tmp_path, toy_encoder):
    root = data_set(tmp_path / "pets", hugging_face())
    ingest(empty, root / "data" / "train-00000-of-00001.parquet", toy_encoder)
    ingest(empty, root / "data" / "train-00000-of-00001.parquet", toy_encoder, source="mine")
    names = [f"{source}/{row}" for source in ("mine", "train-00000-of-00001") for row in range(3)]
    assert stored(empty) == names


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_files_of_datasets(empty, tmp_path, toy_encoder, stream):
    (tmp_path / "pets" / "train").mkdir(parents=True)
    path = tmp_path / "pets" / "train" / "data-00000-of-00001.arrow"
    table = hugging_face(600)
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=500)
    path.with_name("cache-0123.arrow").write_bytes(path.read_bytes())
    path.with_name("dataset_info.json").write_text("{}")
    corpus = open_corpus(tmp_path / "pets")
    assert (corpus.n_items, dict(corpus.skipped.counts)) == (600, {walk.HIDDEN: 1, walk.OTHER_FILES: 1})
    ingest(empty, path, toy_encoder, source="pets")
    rows = stored(empty, "category")
    assert len(rows) == 600
    assert ("pets/599", "dog") in rows


def test_an_arrow_file_that_is_cut_off(empty, tmp_path, toy_encoder):
    path = tmp_path / "pets.arrow"
    table = hugging_face(8)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    path.write_bytes(path.read_bytes()[:-400])
    result = ingest(empty, path, toy_encoder)
    assert result.n_done == 6
    (reason,) = result.failures.values()
    assert "pets.arrow cannot be read" in reason


@pytest.mark.parametrize("column", ["jpg", "png", "webp", "img", "bild"])
def test_pictures_as_bytes_in_a_column_of_any_name(empty, tmp_path, toy_encoder, column):
    pq.write_table(pa.table({column: pa.array([encoded()], pa.large_binary())}), tmp_path / "x.parquet")
    ingest(empty, tmp_path / "x.parquet", toy_encoder)
    assert stored(empty) == ["x/0"]


def test_the_parquet_output_of_img2dataset(empty, tmp_path, toy_encoder):
    table = {
        "key": ["000000000", "000000001"],
        "jpg": [whole("JPEG"), None],
        "caption": ["a cat", "a dog"],
        "url": ["http://a.example/0.jpg", "http://a.example/1.jpg"],
        "LICENSE": ["CC0", "CC0"],
        "status": ["success", "failed_to_download"],
        "error_message": [None, "HTTP Error 404"],
    }
    (tmp_path / "laion").mkdir()
    pq.write_table(pa.table(table), tmp_path / "laion" / "00000.parquet")
    (tmp_path / "laion" / "00000_stats.json").write_text('{"successes": 1}')
    result = ingest(empty, tmp_path / "laion", toy_encoder)
    assert stored(empty, "uri", "prompt", "license", "source", "metadata") == [
        (
            "laion/000000000",
            "http://a.example/0.jpg",
            "a cat",
            "CC0",
            "laion",
            '{"error_message": null, "status": "success"}',
        )
    ]
    (reason,) = result.failures.values()
    assert "row 1 was not fetched: failed_to_download, HTTP Error 404" in reason


def test_pictures_that_a_table_names_by_their_path(empty, tmp_path, toy_encoder):
    root = tmp_path / "pets"
    picture(root / "images" / "a.png", (1, 2, 3))
    picture(tmp_path / "secret.png", (1, 2, 3))
    paths = ["../images/a.png", "../../secret.png", "/etc/passwd", "http://a.example/a.png", "a\0.png"]
    images = pa.array(
        [{"bytes": None, "path": path} for path in paths], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    (root / "data").mkdir()
    pq.write_table(pa.table({"image": images}), root / "data" / "t.parquet")
    result = ingest(empty, root, toy_encoder)
    assert stored(empty) == ["pets/data/t/0", "pets/images/a.png"]
    assert len(result.failures) == 4
    assert all("leads to no file in" in reason for reason in result.failures.values())


def test_the_picture_and_the_columns_may_be_chosen(empty, tmp_path, toy_encoder):
    both = {"left": [whole("PNG")], "right": [whole("JPEG")], "de": ["eine Katze"], "id": [7]}
    pq.write_table(pa.table(both), tmp_path / "x.parquet")
    with pytest.raises(InvalidValue, match="in several columns: left, right; choose one with --column image=NAME"):
        open_corpus(tmp_path / "x.parquet")
    ingest(empty, tmp_path / "x.parquet", toy_encoder, columns={"image": "right", "prompt": "de"}, id_column="id")
    assert stored(empty, "prompt", "image", "metadata") == [("x/7", "eine Katze", whole("JPEG"), None)]
    with pytest.raises(InvalidValue, match="has no column 'key'; it has: left, right, de, id"):
        open_corpus(tmp_path / "x.parquet", id_column="key")
    with pytest.raises(
        InvalidValue, match=r"has no pictures: column 'de' is of type string; encoded pictures are needed"
    ):
        open_corpus(tmp_path / "x.parquet", columns={"image": "de"})


def test_a_role_of_another_meaning_is_a_field_like_any_other(empty, tmp_path, toy_encoder):
    table = {"name": ["a", "b"], "role": ["hero", "villain"], "image": [encoded()] * 2}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    ingest(empty, tmp_path / "x.parquet", toy_encoder)
    assert stored(empty, "role", "metadata") == [
        ("a", "pretraining", '{"role": "hero"}'),
        ("b", "pretraining", '{"role": "villain"}'),
    ]


@pytest.mark.parametrize("role", [pa.array([1, 2]), pa.array([None, None], pa.string()), pa.array(["exemplar", "x"])])
def test_roles_that_are_none_of_attrdb(tmp_path, role):
    pq.write_table(pa.table({"name": ["a", "b"], "role": role, "image": [encoded()] * 2}), tmp_path / "x.parquet")
    assert open_corpus(tmp_path / "x.parquet").n_items == 2


def test_values_of_any_type_become_text_or_stay_in_metadata(empty, tmp_path, toy_encoder):
    table = {
        "image": [encoded()],
        "license": [4],
        "caption": [["one", "two"]],
        "creator": [{"name": "Ann"}],
        "score": [float("nan")],
        "when": [datetime(2026, 1, 2)],
        "thumbnail": [{"bytes": encoded(), "path": None}],
        "raw": [b"x"],
        "vector": [np.ones(2)],
        "nul": ["a\0b\x1b[31m"],
        "category": [3],
    }
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    ingest(empty, tmp_path / "x.parquet", toy_encoder)
    [(_, licence, prompt, category, metadata)] = stored(empty, "license", "prompt", "category", "metadata")
    assert (licence, prompt, category) == ("4", "one", "3")
    assert json.loads(metadata) == {
        "caption": ["one", "two"],
        "creator": {"name": "Ann"},
        "nul": "ab",
        "score": None,
        "vector": [1, 1],
        "when": "2026-01-02 00:00:00",
    }


def test_labels_that_stand_for_nothing(empty, tmp_path, toy_encoder):
    pq.write_table(hugging_face(4, label=[-1, 7, None, 1]), tmp_path / "x.parquet")
    ingest(empty, tmp_path / "x.parquet", toy_encoder)
    assert [category for _, category in stored(empty, "category")] == [None, None, None, "dog"]
    # Without names a number is no category.
    pq.write_table(hugging_face(1).replace_schema_metadata({"huggingface": "{"}), tmp_path / "y.parquet")
    ingest(empty, tmp_path / "y.parquet", toy_encoder)
    assert stored(empty, "category", "metadata")[-1] == ("y/0", None, '{"label": 0}')


def test_text_that_is_not_utf8_and_times_beyond_python_lose_no_picture(empty, tmp_path, toy_encoder):
    bad = pa.array([b"a", b"\xff", b"c"]).cast(pa.binary()).view(pa.string())
    late = pa.array([0, 2**53, 0], pa.timestamp("ms"))
    pq.write_table(
        pa.table({"image": [encoded(n) for n in range(3)], "caption": bad, "when": late}), tmp_path / "x.parquet"
    )
    assert ingest(empty, tmp_path / "x.parquet", toy_encoder).failures == {}
    assert stored(empty, "prompt") == [("x/0", "a"), ("x/1", None), ("x/2", "c")]


def test_ids_that_are_missing_or_empty_are_left_out_and_named(empty, tmp_path, toy_encoder):
    table = {"key": ["", None, " ", "a\0", "b"], "image": [encoded(n) for n in range(5)]}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    result = ingest(empty, tmp_path / "x.parquet", toy_encoder)
    assert stored(empty) == ["x/a", "x/b"]
    assert len(result.failures) == 3
    assert all("key must be an id, found" in reason for reason in result.failures.values())


def test_columns_that_are_no_pictures_are_named(tmp_path):
    for column, what in (("image", "column 'image' is of type string"), ("url", "no column holds pictures")):
        pq.write_table(pa.table({column: ["http://a.example/a.png"]}), tmp_path / "x.parquet")
        with pytest.raises(InvalidValue, match=f"x.parquet has no pictures: {what}; .* It has: {column}"):
            open_corpus(tmp_path / "x.parquet")


# --- files that are damaged -------------------------------------------------------------------------------------------


def files_that_hold_pictures(root):
    """A file of every kind, with pictures in it."""
    root.mkdir()
    table = hugging_face(6, role=["pretraining"] * 6)
    pq.write_table(table, root / "a.parquet")
    for name, new in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        with pa.OSFile(str(root / f"{name}.arrow"), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    plain = shard(root / "a.tar", *(member for key in "012" for member in sample(key, shade=int(key)))).read_bytes()
    for codec in ("gzip", "zstd", "lz4"):
        with pa.CompressedOutputStream(str(root / f"{codec}.tar"), codec) as stream:
            stream.write(plain)
    return sorted(root.iterdir())


@pytest.mark.parametrize("kind", range(7))
def test_whatever_the_bytes_of_a_file_are_only_reasons_come_of_it(tmp_path, kind):
    """Nothing but InvalidValue is raised, from the opening or from an item; n of them are checked against the whole file."""
    original = files_that_hold_pictures(tmp_path / "whole")[kind]
    rng = np.random.default_rng(kind)
    (tmp_path / "x").mkdir()
    path = tmp_path / "x" / original.name
    path.write_bytes(original.read_bytes())
    n_whole = sum(1 for item in open_corpus(tmp_path / "x").items() if item.read())
    outcomes = set()
    for number in range(60):
        data = bytearray(original.read_bytes())
        for at in rng.integers(0, len(data), 1 + number % 4):
            data[at] = rng.integers(256)
        path.write_bytes(data[: rng.integers(len(data))] if number % 6 == 0 else data)
        try:
            items = list(open_corpus(tmp_path / "x").items())
        except InvalidValue as error:
            outcomes.add("refused" * bool(str(error)))
            continue
        n_read = 0
        for item in items:
            try:
                item.read()
                n_read += 1
            except InvalidValue as error:
                outcomes.add("left out" * bool(str(error)))
        assert n_read <= n_whole
    assert outcomes & {"refused", "left out"}
    assert "" not in outcomes
