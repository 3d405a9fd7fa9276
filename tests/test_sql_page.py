"""docs/sql.md: its examples run, and what it says is pushed down to Lance is."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import of_duckdb_2, rows

import attrdb
from attrdb import queries, sql
from attrdb.cli import main
from attrdb.training.evaluate import evaluate

TEXT = (Path(__file__).parent.parent / "docs" / "sql.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```sql\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = re.findall(r"^    (attrdb .*)", TEXT, re.MULTILINE)


@pytest.fixture
def ranked(toy):
    evaluate(toy, "toy_2", "own")
    toy.writer.append_images(rows([("vase/e", "exemplar", "vase", 50)]))
    toy.writer.upsert("models", [{"model_id": "vase", "kind": "object", "n_exemplars": 1, "n_samples": 0}])
    return toy


def test_there_are_examples():
    assert len(EXAMPLES) >= 8
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs_and_finds_something(ranked, example):
    assert ranked.sql(example).num_rows > 0


def test_what_the_examples_find(ranked):
    by_model, features, ranks, licences, shares, per_row, means, compared, counted = map(ranked.sql, EXAMPLES)
    assert by_model.to_pylist() == [
        {"model_id": "m", "kind": "style", "n_samples": 2},
        {"model_id": "vase", "kind": "object", "n_samples": 0},
    ]
    assert features["n_encoded"].to_pylist() == [3, 3, 2]
    assert ranks["n_pairs"].to_pylist() == [4]
    assert licences["influence"].to_pylist() == pytest.approx([1])
    assert [row["part"] for row in shares.to_pylist()] == ["unnamed", "unattributed"]
    assert per_row.drop_columns("influence").to_pylist() == [
        {"sample_id": "m/0/1", "rank": 1, "image_id": "m/e0", "is_exemplar": True},
        {"sample_id": "m/0/1", "rank": 2, "image_id": "p10", "is_exemplar": False},
        {"sample_id": "m/0/2", "rank": 1, "image_id": "m/e40", "is_exemplar": True},
        {"sample_id": "m/0/2", "rank": 2, "image_id": "vase/e", "is_exemplar": False},
    ]
    # the mean of 0 and 40 degrees points to 20, and is cos(20) long
    [first] = [row for row in means.to_pylist() if row["model_id"] == "m" and row["rank"] == 1]
    assert first["image_id"] == "p20"
    assert first["similarity"] == pytest.approx(1)  # the mean of 0 and 40 degrees points at 20
    assert compared["image_id"].to_pylist() == ["m/e0", "m/e40", "vase/e"]
    assert counted["n"].to_pylist() == [1]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs(ranked, command, monkeypatch, tmp_path):
    (tmp_path / "DIR").mkdir()
    (tmp_path / "mine.sql").write_text("SELECT count(*) AS n FROM samples")
    (tmp_path / "contracts.csv").write_text("model_id,rate\nm,0.5\n")
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command.replace("my.attrdb", str(ranked.path)).replace("--at 12", "--at 3"))[1:]
    if "2026-11-01" in command:  # a time at which this database was not there yet
        words = [word.replace("2026-11-01", "2126-11-01") for word in words]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert done.output.strip()  # of a file that was written stderr tells


def test_the_example_query_is_one(ranked, tmp_path):
    [header] = re.findall(r"(?:^    (?:-- .*|SELECT image_id, width.*)\n)+", TEXT, re.MULTILINE)
    (tmp_path / "smallest.sql").write_text(re.sub(r"^    ", "", header, flags=re.MULTILINE))
    db = attrdb.open(ranked.path, query_folders=[tmp_path])
    assert db.query("smallest", model_id="m")["image_id"].to_pylist() == ["m/e0", "m/e40"]
    query = queries.load("smallest", [tmp_path])
    found = db.sql(query.sql, query.bind({"model_id": "m"}))
    assert found.column_names == [column.name for column in query.columns]


def scan(snapshot, statement):
    """What the plan says of its first scan, on one line."""
    with sql.connect(snapshot) as connection:
        plan = connection.sql(f"EXPLAIN {statement}").fetchall()[0][1]
    return re.sub(r"[\s│╭╮╰╯─┬┴┤├]+", " ", plan)


@of_duckdb_2
@pytest.mark.parametrize(
    ("statement", "pushed"),
    [
        ("SELECT image_id FROM samples WHERE model_id = 'm'", ["\"role\" = 'sample'", "\"model_id\" = 'm'"]),
        ("SELECT image_id FROM images WHERE seed BETWEEN 3 AND 5", ['"seed" >= 3', '"seed" <= 5']),
        ("SELECT image_id FROM images WHERE image_id IN ('a', 'b')", ["\"image_id\" IN ('a', 'b')"]),
        ("SELECT image_id FROM images WHERE seed = 1 OR role <> 'sample'", ['("seed" = 1) OR ("role" != \'sample\')']),
        ("SELECT image_id FROM images WHERE model_id IS NULL", ['"model_id" IS NULL']),
        ("SELECT image_id FROM images WHERE seed + 1 = 3", ['"seed" = 2']),
        ("SELECT image_id FROM images WHERE image_id >= 'm/' AND image_id < 'm0'", ["\"image_id\" >= 'm/'"]),
    ],
)
def test_filters_that_reach_lance(toy, statement, pushed):
    found = scan(toy.snapshot, statement)
    filters = found.partition("Filters:")[2]
    assert all(one in filters for one in pushed), found
    assert "Expression:" not in found
    assert "Projections: image_id ~" in found


@of_duckdb_2
@pytest.mark.parametrize("test", ["lower(source) = 'x'", "image_id LIKE '%p'", "starts_with(image_id, 'm/')"])
def test_filters_that_stay_in_duckdb(toy, test):
    found = scan(toy.snapshot, f"SELECT image_id FROM images WHERE {test}")
    assert "Expression:" in found
    assert "Filters:" not in found


@of_duckdb_2
def test_hidden_models_are_left_out_by_lance(toy):
    toy.writer.append_images(rows([("half/0/1", "sample", "half", 5)]))
    found = scan(toy.snapshot, "SELECT image_id FROM samples")
    assert "NOT (\"model_id\" IN ('half'))" in found.partition("Filters:")[2]


def test_other_encoders_are_not_read(toy):
    toy.writer.add_encoder("other:3", 3, {}, "none")
    found = scan(toy.snapshot, "SELECT feature FROM features WHERE encoder_id = 'toy_2'")
    assert "toy_2" in found
    assert "other_3" not in found
