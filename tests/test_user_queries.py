"""Queries of one's own: folders given in Python or on the command line, and packages that offer them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import attrdb
from attrdb import queries
from attrdb.cli import main
from attrdb.errors import InvalidValue, NotFound, QueryRefused

SEEDS = """-- Samples of one model that are at least so wide.
-- source ours
-- grain  one row per sample
-- param  $model_id  VARCHAR the model
-- param  $width     INTEGER = 0 pixels, >= 0
-- reads  samples
-- column image_id   VARCHAR
SELECT image_id FROM samples WHERE model_id = $model_id AND coalesce(width, 0) >= $width ORDER BY image_id
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    (folder / "reports").mkdir(parents=True)
    (folder / "reports" / "model_samples.sql").write_text(SEEDS)
    (folder / "roles.sql").write_text("-- Roles.\nSELECT DISTINCT role FROM images ORDER BY role\n")
    return folder


def test_a_folder_works_from_python(toy, mine):
    db = attrdb.open(toy.path, query_folders=[mine])
    assert db.query("model_samples", model_id="m")["image_id"].to_pylist() == ["m/0/1", "m/0/2"]
    assert db.query("model_samples", model_id="m", width=9).num_rows == 0
    assert db.query("roles")["role"].to_pylist() == ["exemplar", "pretraining", "sample"]
    assert db.query("recall_at_k").num_rows == 0  # attrdb's own are there too
    with pytest.raises(NotFound, match="no query 'roles'"):
        toy.query("roles")


def test_several_folders_and_their_groups(mine, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "one.sql").write_text("SELECT 1 AS one")
    found = queries.all_queries([mine, str(tmp_path / "more")])
    assert {name: found[name].group for name in ("model_samples", "roles", "one")} == {
        "model_samples": "reports",
        "roles": "mine",
        "one": "more",
    }


def test_a_folder_works_on_the_command_line(toy, mine):
    words = ["query", str(toy.path), "model_samples", "-p", "model_id=m", "--json"]
    done = CliRunner().invoke(main, [*words, "--queries", str(mine)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == [{"image_id": "m/0/1"}, {"image_id": "m/0/2"}]
    by_variable = CliRunner().invoke(main, words, env={"ATTRDB_QUERIES": str(mine)})
    assert by_variable.stdout == done.stdout
    without = CliRunner().invoke(main, words)
    assert without.exit_code == 1
    assert "no query 'model_samples'" in without.stderr


def test_a_folder_is_listed_and_shown(mine):
    listed = CliRunner().invoke(main, ["queries", "list", "--queries", str(mine), "--json"])
    [row] = [row for row in json.loads(listed.stdout) if row["name"] == "model_samples"]
    assert row == {
        "name": "model_samples",
        "group": "reports",
        "parameters": "model_id=? width=0",
        "summary": "Samples of one model that are at least so wide.",
    }
    shown = CliRunner().invoke(main, ["queries", "show", "model_samples", "--queries", str(mine)])
    assert shown.stdout == SEEDS


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("-- Says.\n-- param k INTEGER\nSELECT $k AS k", "query wrong: not a parameter line: -- param k INTEGER"),
        ("-- Says.\n-- param $k FLOAT one\nSELECT $k AS k", r"not a parameter line: -- param \$k FLOAT one"),
        ("-- Says.\n-- column\nSELECT 1 AS k", "not a column line: -- column"),
        ("-- Says.\nSELECT $k AS k", r"header declares the parameters \[\], its SQL uses \['k'\]"),
        ("-- Says.\n-- param $k INTEGER\nSELECT 1 AS k", r"header declares the parameters \['k'\], its SQL uses \[\]"),
        (
            "-- Says.\n-- param $k INTEGER\n-- param $k DOUBLE\nSELECT $k AS k",
            "header declares a parameter twice",
        ),
        (
            "-- Says.\n-- param $k INTEGER = ten\nSELECT $k AS k",
            "by default parameter k is 'ten'; it must be INTEGER",
        ),
        ("SELECT 1; SELECT 2", "query wrong: a file holds one SELECT, and nothing else"),
        ("COPY images TO 'x.csv'", "a file holds one SELECT, and nothing else"),
        ("", "a file holds one SELECT, and nothing else"),
        ("SELEC 1", "query wrong: .*syntax error"),
    ],
)
def test_a_wrong_file_names_what_is_wrong(tmp_path, text, says):
    (tmp_path / "wrong.sql").write_text(text)
    with pytest.raises(InvalidValue, match=says):
        queries.load("recall_at_k", [tmp_path])


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "wrong.sql").write_bytes(b"SELECT '\xff'")
    with pytest.raises(InvalidValue, match=r"query wrong: .*is not UTF-8"):
        queries.all_queries([tmp_path])


def test_a_name_stands_for_one_query(tmp_path, mine):
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "recall_at_k.sql").write_text("SELECT 1 AS one")
    with pytest.raises(InvalidValue, match=r"query 'recall_at_k' of .*again has the name of another query; rename"):
        queries.all_queries([tmp_path / "again"])
    (mine / "reports" / "roles.sql").write_text("SELECT 2 AS two")
    with pytest.raises(InvalidValue, match=r"query 'roles' stands twice in .*mine; rename"):
        queries.all_queries([mine])


def test_the_same_folder_twice_is_one(mine):
    assert "roles" in queries.all_queries([mine, str(mine)])


def test_a_folder_that_is_not_there(toy, tmp_path):
    with pytest.raises(NotFound, match=r"no folder of queries .*nowhere"):
        attrdb.open(toy.path, query_folders=[tmp_path / "nowhere"]).query("recall_at_k")
    done = CliRunner().invoke(main, ["queries", "list", "--queries", str(tmp_path / "nowhere")])
    assert done.exit_code == 1
    assert "no folder of queries" in done.stderr


def test_a_query_of_ones_own_is_closed_in_too(toy, tmp_path):
    (tmp_path / "files.sql").write_text("SELECT content FROM read_text('/etc/hostname')")
    with pytest.raises(QueryRefused, match="not files or the network"):
        attrdb.open(toy.path, query_folders=[tmp_path]).query("files")


# --- packages ------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A package that offers queries, built and installed into a folder of its own."""
    project, target = tmp_path / "project", tmp_path / "site"
    (project / "house_queries" / "audits").mkdir(parents=True)
    (project / "house_queries" / "__init__.py").write_text("")
    (project / "house_queries" / "audits" / "house_samples.sql").write_text(SEEDS)
    (project / "pyproject.toml").write_text(
        """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "house-queries"
version = "1.0"

[project.entry-points."attrdb.queries"]
house = "house_queries"

[tool.setuptools]
packages = ["house_queries"]

[tool.setuptools.package-data]
house_queries = ["**/*.sql"]
"""
    )
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(project)], check=True, capture_output=True, text=True)
    return target


def in_process(installed: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "attrdb", *words],
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )


def test_an_installed_package_offers_queries(toy, installed):
    done = in_process(installed, "query", str(toy.path), "house_samples", "-p", "model_id=m", "--nl")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [{"image_id": "m/0/1"}, {"image_id": "m/0/2"}]
    listed = json.loads(in_process(installed, "queries", "list", "--json").stdout)
    assert {row["name"]: row["group"] for row in listed}["house_samples"] == "audits"


def test_a_package_that_is_broken_is_named(toy, installed):
    (installed / "house_queries" / "__init__.py").unlink()
    (installed / "house_queries" / "audits" / "house_samples.sql").unlink()
    (installed / "house_queries" / "audits").rmdir()
    (installed / "house_queries").rename(installed / "gone")
    done = in_process(installed, "queries", "list")
    assert done.returncode == 1
    assert "entry point 'house' offers queries in house_queries, which cannot be imported" in done.stderr
    assert "Traceback" not in done.stderr
