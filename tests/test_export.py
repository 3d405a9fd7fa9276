"""Exports: Parquet folders and DuckDB files that need no attrdb to be read, whole or not there at all."""

import duckdb
import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import TOY, rows

import attrdb
from attrdb.cli import main
from attrdb.errors import InvalidValue, StorageError
from attrdb.sql import export as exporting
from attrdb.sql.export import export
from attrdb.sql.relations import STORED
from attrdb.store.schema import TABLES, feature_array


@pytest.fixture
def pictured(toy):
    """The toy database with an image that has its bytes and no feature."""
    toy.writer.append_images(pa.table({"image_id": ["bytes"], "role": ["pretraining"], "image": [b"\x89PNG \x00"]}))
    return toy


def stored(db, name, left_out=()):
    """The rows of a table as Lance gives them, in no order, without hidden models."""
    shown = db.snapshot.visible("true") if name == "images" else None
    table = db.snapshot.tables[name].to_table(filter=shown)
    return in_order(table.select([column for column in table.column_names if column not in left_out]).to_pylist())


def in_order(entries):
    return sorted(entries, key=lambda entry: [str(value) for value in entry.values()])


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({}, set()),
        ({"vectors": False}, {"toy_2"}),
        ({"images": False}, {"image"}),
        ({"vectors": False, "images": False}, {"toy_2", "image"}),
    ],
)
@pytest.mark.parametrize("form", exporting.FORMATS)
def test_every_table_is_there_row_for_row(pictured, tmp_path, form, options, left_out):
    counts = export(pictured.snapshot, tmp_path / "out", form=form, **options)
    assert counts == {**dict.fromkeys(TABLES, 0), "images": 8, "models": 1, "encoders": 1, "methods": 1}
    for name in TABLES:
        expected = stored(pictured, name, left_out)
        if form == "parquet":
            found = pq.read_table(tmp_path / "out" / f"{name}.parquet").to_pylist()
        else:
            with duckdb.connect(str(tmp_path / "out"), read_only=True) as connection:
                found = connection.sql(f"FROM {'_' if name in STORED else ''}{name}").to_arrow_table().to_pylist()
        assert in_order(found) == expected
        assert counts[name] == len(expected)


def test_parquet_keeps_the_types(pictured, tmp_path):
    export(pictured.snapshot, tmp_path / "out")
    for name, dataset in pictured.snapshot.tables.items():
        written = pq.read_schema(tmp_path / "out" / f"{name}.parquet")
        assert written.names == dataset.schema.names
        assert written.types == dataset.schema.types


def test_a_duckdb_file_needs_nothing_but_duckdb(pictured, tmp_path):
    export(pictured.snapshot, tmp_path / "out.duckdb", form="duckdb")
    with duckdb.connect(str(tmp_path / "out.duckdb"), read_only=True) as connection:
        types = dict(connection.sql("SELECT column_name, column_type FROM (DESCRIBE images)").fetchall())
        assert (types["toy_2"], types["image"]) == ("FLOAT[2]", "BLOB")
        counts = {
            view: connection.sql(f"SELECT count(*) FROM {view}").fetchall()[0][0]
            for view in ("exemplars", "samples", "pretraining_images", "truth_scores")
        }
        assert counts == {"exemplars": 2, "samples": 2, "pretraining_images": 4, "truth_scores": 0}
        nearest = connection.sql(
            "SELECT image_id FROM pretraining_images WHERE toy_2 IS NOT NULL "
            "ORDER BY array_cosine_similarity(toy_2, [1, 0]::FLOAT[2]) DESC"
        ).fetchall()
        assert nearest == [("p10",), ("p20",), ("p90",)]


@pytest.mark.parametrize("form", exporting.FORMATS)
def test_a_hidden_model_is_not_exported(toy, tmp_path, form):
    toy.writer.append_images(rows([("half/0/1", "sample", "half", 5), ("half/e", "exemplar", "half", 5)]))
    assert export(toy.snapshot, tmp_path / "out", form=form)["images"] == 7
    if form == "parquet":
        ids = pq.read_table(tmp_path / "out" / "images.parquet")["image_id"].to_pylist()
    else:
        with duckdb.connect(str(tmp_path / "out")) as connection:
            ids = [row[0] for row in connection.sql("SELECT image_id FROM images").fetchall()]
    assert not [image_id for image_id in ids if image_id.startswith("half")]


def test_progress_counts_what_is_written(toy, tmp_path):
    toy.writer.append_images(rows([("half/0/1", "sample", "half", 5)]))
    told = {}
    export(toy.snapshot, tmp_path / "out", report=lambda stage, done, total: told.update({stage: (done, total)}))
    assert told["export images"] == (7, 7)
    assert told["export models"] == (1, 1)


@pytest.mark.parametrize("form", exporting.FORMATS)
def test_an_empty_database_is_exported(empty, tmp_path, form):
    assert set(export(empty.snapshot, tmp_path / "out", form=form).values()) == {0}
    assert (tmp_path / "out").exists()


def test_an_older_moment_is_exported(toy, tmp_path):
    then = toy.version
    toy.writer.append_images(pa.table({"image_id": ["later"], "role": ["pretraining"]}))
    assert export(attrdb.open(toy.path, at=then).snapshot, tmp_path / "then")["images"] == 7
    assert export(toy.snapshot, tmp_path / "now")["images"] == 8


def test_wrong_targets_and_forms(toy, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InvalidValue, match="there exists already; name a new folder"):
        export(toy.snapshot, tmp_path / "there")
    with pytest.raises(InvalidValue, match="file exists already; name a new file"):
        export(toy.snapshot, tmp_path / "file", form="duckdb")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(InvalidValue, match="form is 'csv'; it must be parquet or duckdb"):
        export(toy.snapshot, tmp_path / "out", form="csv")
    with pytest.raises(InvalidValue, match="inside the database"):
        export(toy.snapshot, toy.path / "out")


@pytest.mark.parametrize("form", exporting.FORMATS)
def test_an_interrupted_export_leaves_nothing_at_the_target(toy, tmp_path, form):
    def interrupt(stage, done, total, note=""):
        if stage == "export images":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(toy.snapshot, tmp_path / "out", form=form, report=interrupt)
    assert not (tmp_path / "out").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["toy.attrdb"]
    assert export(toy.snapshot, tmp_path / "out", form=form)["images"] == 7


@pytest.mark.parametrize("form", exporting.FORMATS)
def test_a_target_that_cannot_be_written(toy, tmp_path, form):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="out could not be written, and nothing is left there"):
        export(toy.snapshot, tmp_path / "file" / "out", form=form)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("form", exporting.FORMATS)
def test_nothing_of_others_is_touched(toy, tmp_path, form):
    for name in ("out.part", ".out.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "images.parquet").write_bytes(b"mine")
    assert export(toy.snapshot, tmp_path / "out", form=form)["images"] == 7
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".out.part", "out", "out.part", "toy.attrdb"]


@pytest.mark.parametrize("form", exporting.FORMATS)
def test_rows_are_streamed(empty, tmp_path, monkeypatch, form):
    """Twenty thousand rows pass in batches, and no table is asked for as a whole."""
    empty.writer.add_encoder("wide:64", 64, {}, "none")
    n = 20_000
    features = np.random.default_rng(0).normal(size=(n, 64)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    ids = [f"p{number:05d}" for number in range(n)]
    empty.writer.append_images(
        pa.table({"image_id": ids, "role": ["pretraining"] * n, "wide_64": feature_array(features)})
    )
    snapshot = empty.snapshot
    assert snapshot.hidden_models == ()

    to_table = lance.LanceDataset.to_table

    def small(dataset, *args, **kwargs):
        assert "images.lance" not in dataset.uri, "the whole table was read"
        return to_table(dataset, *args, **kwargs)

    monkeypatch.setattr(lance.LanceDataset, "to_table", small)
    seen = []
    report = lambda stage, done, total: seen.append(done) if stage == "export images" else None  # noqa: E731
    export(snapshot, tmp_path / "out", form=form, report=report)
    steps = np.diff([0, *seen])
    assert steps.sum() == n
    assert steps.max() <= exporting.BATCH_ROWS
    if form == "parquet":
        file = pq.ParquetFile(tmp_path / "out" / "images.parquet")
        assert file.metadata.num_row_groups < n / exporting.BATCH_ROWS  # small batches do not make small row groups


def test_the_command(toy, tmp_path):
    def run(*words):
        return CliRunner().invoke(main, ["export", str(toy.path), *map(str, words)])

    done = run(tmp_path / "tables", "--no-vectors", "--no-images")
    assert done.exit_code == 0, done.output
    assert "7 images" in done.stderr
    assert not {"toy_2", "image"} & set(pq.read_schema(tmp_path / "tables" / "images.parquet").names)
    assert run(tmp_path / "all.duckdb", "--duckdb").exit_code == 0
    with duckdb.connect(str(tmp_path / "all.duckdb"), read_only=True) as connection:
        assert connection.sql("SELECT count(*) FROM samples").fetchall() == [(2,)]
    again = run(tmp_path / "tables")
    assert again.exit_code == 1
    assert "exists already; name a new folder" in again.stderr
    older = run(tmp_path / "older", "--at", 1)
    assert older.exit_code == 0, older.output
    assert "0 images" in older.stderr


def test_the_toy_encoder_has_a_row(toy, tmp_path):
    export(toy.snapshot, tmp_path / "out")
    [encoder] = pq.read_table(tmp_path / "out" / "encoders.parquet").to_pylist()
    assert (encoder["spec"], encoder["dimension"]) == (TOY["spec"], TOY["dimension"])
