"""What one statement of SQL may be: PIVOT and EXPLAIN, from standard input or a file, and across two versions."""

import pytest
from click.testing import CliRunner
from conftest import rows

from attrdb.cli import main
from attrdb.errors import QueryRefused
from attrdb.models import set_models

PIVOT = "PIVOT samples ON prompt_scheme USING count(*) GROUP BY model_id"


def run(*words, code=0, **settings):
    result = CliRunner().invoke(main, [str(word) for word in words], **settings)
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize(
    "statement",
    [
        PIVOT,
        f"{PIVOT};",
        f"-- a note\n{PIVOT} -- and another",
        f"SELECT * FROM ({PIVOT})",
        f"WITH p AS ({PIVOT}) FROM p",
        f"{PIVOT} ORDER BY model_id LIMIT 3",
        "PIVOT samples ON prompt_scheme IN ('gpt') USING count(*) GROUP BY model_id",
    ],
)
def test_pivot(toy, statement):
    assert toy.sql(statement).to_pylist() == [{"model_id": "m", "gpt": 2}]
    assert toy.sql(statement, rows=1).num_rows == 1


@pytest.mark.parametrize(
    "statement",
    [
        "EXPLAIN SELECT 1",
        "EXPLAIN ANALYZE FROM samples",
        "explain (FORMAT json) SELECT count(*) FROM images",
        f"EXPLAIN {PIVOT}",
        "/* why */ EXPLAIN (SELECT 1)",
    ],
)
def test_explain(toy, statement):
    plan = toy.sql(statement)
    assert plan.column_names == ["explain_key", "explain_value"]
    assert plan["explain_value"][0].as_py()
    assert toy.sql(statement, rows=5).num_rows >= 1


@pytest.mark.parametrize(
    "statement", ["DESCRIBE images", "SUMMARIZE models", "UNPIVOT models ON n_samples", "VALUES (1)"]
)
def test_other_forms_of_reading(toy, statement):
    assert toy.sql(statement).num_rows > 0


@pytest.mark.parametrize(
    "statement",
    [
        "EXPLAIN ANALYZE DROP VIEW samples",
        "EXPLAIN COPY images TO '/tmp/stolen.parquet'",
        "EXPLAIN ANALYZE CREATE TABLE t AS SELECT 1",
        "EXPLAIN (ANALYZE) CREATE TABLE t AS SELECT 1",
        f"COPY ({PIVOT}) TO '/tmp/stolen.parquet'",
        f"CREATE TABLE t AS {PIVOT}",
        f"CREATE VIEW v AS {PIVOT}",
        f"WITH p AS ({PIVOT}), t AS (COPY (SELECT 1) TO '/tmp/stolen.csv') FROM p",
        f"WITH p AS ({PIVOT}) INSERT INTO models SELECT * FROM p",
        f"{PIVOT}; {PIVOT}",
        f"{PIVOT}; SELECT 1",
        f"{PIVOT}) ; DROP VIEW samples; FROM (SELECT 1",
        "PRAGMA database_list",
        "CALL pragma_version()",
    ],
)
def test_what_does_more_than_read_is_refused(toy, statement):
    with pytest.raises(QueryRefused):
        toy.sql(statement)
    assert toy.sql("SELECT count(*) AS n FROM samples")["n"][0].as_py() == 2


def test_several_statements_are_told_where_to_go(toy):
    with pytest.raises(QueryRefused, match="found: SELECT, SELECT; several go through: attrdb shell DB < FILE"):
        toy.sql("SELECT 1; SELECT 2")


# --- from standard input and files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["SELECT $n::INT AS n;\n", "\ufeff-- note\nSELECT $n::INT AS n"])
def test_a_statement_from_standard_input_and_from_a_file(toy, tmp_path, text):
    (tmp_path / "q.sql").write_text(text, encoding="utf-8")
    assert run("sql", toy.path, "-", "-p", "n=3", "--csv", input=text).stdout == "n\n3\n"
    assert run("sql", toy.path, "--file", tmp_path / "q.sql", "-p", "n=3", "--csv").stdout == "n\n3\n"
    assert run("sql", toy.path, "--file", "-", "-p", "n=3", "--csv", input=text).stdout == "n\n3\n"


@pytest.mark.parametrize(
    ("words", "text", "code", "says"),
    [
        ([], "", 2, "give a STATEMENT (- for standard input), or --file"),
        (["SELECT 1", "--file", "q.sql"], "", 2, "give a STATEMENT"),
        (["--file", "none.sql"], "", 2, "'none.sql' does not exist"),
        (["-"], "", 1, "one SELECT is needed, found: nothing"),
        (["-"], bytes(range(128, 256)) * 8, 1, "standard input is not UTF-8 text"),
    ],
)
def test_statements_that_are_not_there(toy, tmp_path, monkeypatch, words, text, code, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.sql").write_text("SELECT 1")
    assert says in run("sql", toy.path, *words, code=code, input=text).stderr


# --- across two versions ---------------------------------------------------------------------------------------------


def test_changes_between_two_versions(toy):
    before = toy.version
    assert toy.sql(f"FROM changes({before})").num_rows == 0
    toy.writer.append_images(rows([("p30", "pretraining", None, 30)]))
    between = toy.version
    table = rows([("n/e0", "exemplar", "n", 5), ("n/0/1", "sample", "n", 6)])
    toy.writer.append_model(table, {"model_id": "n", "kind": "object", "n_exemplars": 1, "n_samples": 1})
    set_models(toy, ["m"], split="val", category="art")
    toy.remove(where="image_id = 'p90'")
    toy.refresh()
    changed = toy.sql(f"SELECT relation, id, role, model_id, change, columns FROM changes({before})").to_pylist()
    found = {
        (row["relation"], row["id"]): (row["role"], row["model_id"], row["change"], row["columns"]) for row in changed
    }
    both = ["split", "category"]
    assert found == {
        ("images", "m/0/1"): ("sample", "m", "changed", both),
        ("images", "m/0/2"): ("sample", "m", "changed", both),
        ("images", "m/e0"): ("exemplar", "m", "changed", both),
        ("images", "m/e40"): ("exemplar", "m", "changed", both),
        ("images", "n/0/1"): ("sample", "n", "added", None),
        ("images", "n/e0"): ("exemplar", "n", "added", None),
        ("images", "p30"): ("pretraining", None, "added", None),
        ("images", "p90"): ("pretraining", None, "removed", None),
        ("models", "m"): (None, None, "changed", ["category", "split"]),
        ("models", "n"): (None, None, "added", None),
    }
    statement = f"SELECT id FROM changes({before})"
    assert run("sql", toy.path, statement, "--at", between, "--csv").stdout == "id\np30\n"
    counted = run(
        "sql", toy.path, f"SELECT change, count(*) AS n FROM changes('{before}') GROUP BY ALL ORDER BY 1", "--csv"
    )
    assert counted.stdout == "change,n\nadded,4\nchanged,5\nremoved,1\n"


@pytest.mark.parametrize(
    ("since", "says"),
    [("999", "has no version 999"), ("'yesterday'", "yesterday"), ("'1999-01-01'", "no version as old as 1999")],
)
def test_moments_that_are_not_kept(toy, since, says):
    with pytest.raises(QueryRefused, match=says):
        toy.sql(f"FROM changes({since})")


def test_a_moment_that_is_not_older(toy):
    before = toy.version
    toy.writer.append_images(rows([("p30", "pretraining", None, 30)]))
    done = run("sql", toy.path, f"FROM changes({toy.version})", "--at", before, code=1)
    assert f"version {toy.version} is newer than version {before}, which is read; name an older one" in done.stderr


def test_a_model_without_its_row_is_no_change(toy):
    before = toy.version
    toy.writer.append_images(rows([("half/0/1", "sample", "half", 5)]))
    assert toy.sql(f"FROM changes({before})").num_rows == 0
