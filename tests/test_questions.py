"""docs/questions.md: ten questions of analysts, each one command, which runs as it stands there."""

import csv
import io
import re
import shlex

import duckdb
import pyarrow as pa
import pytest
from click.testing import CliRunner
from conftest import ROOT, rows

from attrdb.cli import main

COMMANDS = re.findall(r"^ {8}(attrdb .*)$", (ROOT / "docs" / "questions.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture
def studio(toy, monkeypatch, tmp_path):
    """The toy database, whose model is of split val, with creators; a contract with one of them, and a query file."""
    toy.writer.update("models", "true", {"split": "val"})
    toy.writer.update("images", "role = 'sample'", {"split": "val"})
    creators = pa.array(["ann", "bob"])
    toy.writer.append_images(rows([("a", "pretraining", None, 1), ("b", "pretraining", None, 3)], creator=creators))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "contracts.csv").write_text("creator,rate\nann,100\ncy,50\n")
    (tmp_path / "mine.sql").write_text("SELECT count(*) AS n FROM samples")
    return toy


def answer(db, command):
    """The rows of a command, as CSV has them."""
    words = shlex.split(command.replace("my.attrdb", str(db.path)).replace("MODEL_ID", "m"))[1:]
    if words[0] in ("sql", "query") and "--csv" not in words:
        words.append("--csv")
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    return list(csv.DictReader(io.StringIO(done.stdout)))


def test_there_are_ten_questions():
    assert len(COMMANDS) == 10


def test_shares_of_a_model_a_split_and_a_choice(studio):
    of_model, of_split, rest = (answer(studio, command) for command in COMMANDS[:3])
    for shares in (of_model, of_split):
        assert sum(float(row["share"]) for row in shares) == pytest.approx(1)
        assert shares[-1]["part"] == "unattributed"
        assert {row["n_samples"] for row in shares} == {"2"}
    assert {row["name"] for row in of_model} == {"ann", "bob", ""}
    assert sorted(row["part"] for row in rest) == ["unattributed", "unnamed"]


def test_contracts_are_joined(studio):
    assert answer(studio, COMMANDS[3]) == [{"creator": "ann", "rate": "100", "n": "1"}]
    [due] = answer(studio, COMMANDS[4])
    [share] = studio.sql("SELECT share FROM influence_shares('creator') WHERE name = 'ann'")["share"].to_pylist()
    assert float(due["due"]) == pytest.approx(100 * share)
    assert float(due["low"]) <= float(due["due"]) <= float(due["high"])


def test_one_column_per_scheme(studio):
    assert answer(studio, COMMANDS[5]) == [{"model_id": "m", "gpt": "2"}]


def test_what_has_changed(studio):
    changed = answer(studio, COMMANDS[6])
    assert {"relation": "images", "change": "added", "n": "9"} in changed
    assert {"relation": "models", "change": "added", "n": "1"} in changed


def test_a_query_from_a_file(studio):
    assert answer(studio, COMMANDS[7]) == [{"n": "2"}]


def test_a_model_moves_to_another_split(studio):
    studio.writer.update("models", "true", {"split": "train"})
    answer(studio, COMMANDS[8])
    studio.refresh()
    assert studio.sql("SELECT split FROM models")["split"].to_pylist() == ["val"]


def test_one_file_for_others(studio, tmp_path):
    answer(studio, COMMANDS[9])
    with duckdb.connect(str(tmp_path / "all.duckdb"), read_only=True) as connection:
        assert connection.sql("SELECT count(*) FROM samples").fetchall() == [(2,)]
