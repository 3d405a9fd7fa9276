"""attrdb import: an export becomes a new database, equal in every row."""

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import rows

import attrdb
from attrdb.cli import main
from attrdb.sql.export import export
from attrdb.store.schema import TABLES
from attrdb.upkeep.health import check
from attrdb.upkeep.import_export import OF_INDICES


def run(*words, code=0):
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def full(toy):
    """The toy database with a second encoder, a mapper, a method of scores, ranks, attributions, a failure and a picture."""
    db, version = toy, 40  # of images, as an older database would have it
    db.writer.append_images(pa.table({"image_id": ["bytes"], "role": ["pretraining"], "image": [b"\x89PNG \x00"]}))
    db.writer.add_encoder("other:3", 3, {"size": 8}, "abc")
    db.writer.add_mapper({"mapper_id": "w", "encoder_id": "toy_2", "form": "gain", "images_version": version})
    ranks = [("toy_2", "own", "m/0/1", "m/e0", 1, 5, version), ("toy_2/w", "own", "m/0/2", "m/e40", 2, 5, version)]
    names = ("method_id", "gallery", "sample_id", "exemplar_id", "rank", "gallery_size", "images_version")
    for row in ranks:
        table = pa.Table.from_pylist([dict(zip(names, row, strict=True))], TABLES["exemplar_ranks"])
        db.writer.replace_exemplar_ranks(table, row[0], "own")
    run("attribute", db.path, "--samples", "true")
    db.refresh()
    return db


def everything(db):
    """All rows of all tables as text, in one order; pictures and features too."""
    tables = {}
    for name in TABLES:
        table = db.snapshot.tables[name].to_table()
        tables[name] = (table.schema.names, sorted(repr(row) for row in table.to_pylist()))
    return tables


def test_every_row_comes_back(full, tmp_path):
    run("export", full.path, tmp_path / "out")
    done = run("import", tmp_path / "new.attrdb", tmp_path / "out")
    assert "8 images" in done.stderr
    assert "no index is in an export; build it again with: attrdb index" in done.stderr
    imported = attrdb.open(tmp_path / "new.attrdb")
    before, after = everything(full), everything(imported)
    for name in TABLES.keys() - {*OF_INDICES}:
        assert after[name] == before[name], name
    assert list(imported.encoders) == list(full.encoders)
    assert imported.attribute("m/0/1").equals(full.attribute("m/0/1"))
    assert imported.query("recall_at_k", k=1).equals(full.query("recall_at_k", k=1))
    assert not check(imported.snapshot)
    export(imported.snapshot, tmp_path / "again")
    for name in TABLES:
        assert sorted(map(repr, pq.read_table(tmp_path / "again" / f"{name}.parquet").to_pylist())) == after[name][1]


def test_no_result_is_taken_for_one_of_the_new_database(full, tmp_path):
    """Results name versions of the old table of images; the new one counts on from the highest, and is written to."""
    run("export", full.path, tmp_path / "out")
    run("import", tmp_path / "new.attrdb", tmp_path / "out")
    imported = attrdb.open(tmp_path / "new.attrdb")
    assert imported.version > 40
    imported.writer.append_images(rows([("p30", "pretraining", None, 30)]))
    done = run("attribute", imported.path, "--samples", "true")
    assert done.stderr == "2 samples attributed, 0 were already\n"
    assert len(lance.dataset(str(imported.path / "images.lance")).versions()) < 10


@pytest.mark.parametrize("left_out", ["--no-vectors", "--no-images"])
def test_what_an_export_left_out_is_null(full, tmp_path, left_out):
    run("export", full.path, tmp_path / "out", left_out)
    run("import", tmp_path / "new.attrdb", tmp_path / "out")
    imported = attrdb.open(tmp_path / "new.attrdb")
    assert imported.sql("SELECT count(*) AS n FROM images")["n"][0].as_py() == 8
    assert list(imported.encoders) == ["toy_2", "other_3"]
    column = "toy_2" if left_out == "--no-vectors" else "image"
    assert imported.images("true", [column])[column].null_count == 8


def rewrite(file, change):
    pq.write_table(change(pq.read_table(file)), file)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda out: (out / "images.parquet").unlink(), "is no export of a database (no images.parquet in it)"),
        (
            lambda out: (out / "jobs.parquet").unlink(),
            "has no jobs.parquet: it is not whole, or of another schema version",
        ),
        (lambda out: (out / "models.parquet").write_text("hello"), "models.parquet cannot be read"),
        (
            lambda out: (out / "images.parquet").write_bytes((out / "images.parquet").read_bytes()[:-9]),
            "cannot be read",
        ),
        (
            lambda out: rewrite(out / "models.parquet", lambda table: table.drop_columns("split")),
            "it lacks the column 'split'; upgrade the database",
        ),
        (
            lambda out: rewrite(out / "models.parquet", lambda table: table.append_column("x", table["split"])),
            "it also has the column 'x'",
        ),
        (
            lambda out: rewrite(out / "images.parquet", lambda table: table.append_column("mood", table["split"])),
            "images have no column 'mood'",
        ),
        (
            lambda out: rewrite(out / "images.parquet", lambda table: pa.concat_tables([table, table])),
            "appears more than once",
        ),
    ],
)
def test_an_export_that_cannot_be_used_leaves_nothing(full, tmp_path, damage, says):
    run("export", full.path, tmp_path / "out")
    damage(tmp_path / "out")
    assert says in run("import", tmp_path / "new.attrdb", tmp_path / "out", code=1).stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "toy.attrdb"]


def test_what_is_there_is_not_touched(full, tmp_path):
    run("export", full.path, tmp_path / "out")
    assert "exists already" in run("import", full.path, tmp_path / "out", code=1).stderr
    run("export", full.path, tmp_path / "one.duckdb", "--duckdb")
    done = run("import", tmp_path / "new.attrdb", tmp_path / "one.duckdb", code=1)
    assert (
        "one.duckdb is a file; import reads a folder of Parquet files, as attrdb export DB FOLDER makes it"
        in done.stderr
    )


# --- names that promise another format, and the form of a DuckDB file ------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("out.xlsx", [], "out.xlsx is named like a file of rows, and an export has several tables; name a new folder"),
        ("out.CSV", [], "is named like a file of rows"),
        ("out.parquet", [], "-o out.parquet"),
        ("out.xlsx", ["--duckdb"], "is named like a file of rows"),
        ("out.duckdb", [], "out.duckdb is named like a DuckDB file; add --duckdb, or name a new folder"),
        ("out.db", [], "add --duckdb"),
    ],
)
def test_a_target_that_promises_another_format(toy, tmp_path, name, options, says):
    assert says in run("export", toy.path, tmp_path / name, *options, code=1).stderr
    assert not (tmp_path / name).exists()


def test_a_name_with_a_point_is_no_suffix(toy, tmp_path):
    run("export", toy.path, tmp_path / "export-2026.11")
    assert (tmp_path / "export-2026.11" / "images.parquet").exists()


def test_a_duckdb_file_has_the_storage_version_of_1_4(toy, tmp_path):
    """Opened by hand with DuckDB 1.4.0, 1.4.4, 1.5.0 and 2.0.0; the header counts 67 for 1.4, and 999 for DuckDB 2's own."""
    run("export", toy.path, tmp_path / "it's.duckdb", "--duckdb")
    header = (tmp_path / "it's.duckdb").read_bytes()[:20]
    assert (header[8:12], int.from_bytes(header[12:20], "little")) == (b"DUCK", 67)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it's.duckdb", "toy.attrdb"]
