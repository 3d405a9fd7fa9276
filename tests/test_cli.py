"""The command line: output, exit codes, and what a command must not import."""

import csv
import io
import json
import os
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from conftest import picture
from test_ingest_corpus import bomb

from attrdb.cli import main


def run(*words, code=0):
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


def python(code: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_help_is_quick_and_imports_nothing_heavy():
    seconds = []
    for _ in range(5):
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "attrdb.cli", "--help"], capture_output=True, text=True, check=True
        )
        seconds.append(time.monotonic() - started)
        assert "Influence scores are estimates" in done.stdout
    assert min(seconds) < 0.4
    heavy = python(
        "import sys, click.testing, attrdb.cli as c\n"
        "click.testing.CliRunner().invoke(c.main, ['--help'])\n"
        "print([m for m in ('torch', 'diffusers', 'lance', 'lancedb', 'duckdb', 'numpy', 'pyarrow') if m in sys.modules])"
    )
    assert heavy.stdout.strip() == "[]", heavy.stderr


NO_TORCH = """
import sys
for name in ('torch', 'torchvision', 'diffusers', 'transformers', 'timm', 'PIL', 'safetensors', 'open_clip', 'jinja2'):
    sys.modules[name] = None
"""


def test_sql_query_status_and_attribute_need_no_torch(toy):
    done = python(
        NO_TORCH
        + f"""
import click.testing, attrdb.cli as c
for words in (['sql', {str(toy.path)!r}, 'SELECT count(*) AS n FROM images', '--csv'], ['status', {str(toy.path)!r}],
              ['query', {str(toy.path)!r}, 'recall_at_k'], ['attribute', {str(toy.path)!r}, 'm/0/1', '--nl'],
              ['evaluate', {str(toy.path)!r}], ['queries', 'list']):
    result = click.testing.CliRunner().invoke(c.main, words)
    assert result.exit_code == 0, (words, result.output)
    print(result.output)
"""
    )
    assert done.returncode == 0, done.stderr
    assert "n\n7\n" in done.stdout


def test_a_command_that_needs_ml_says_so(toy, tmp_path):
    picture(tmp_path / "x.png", (1, 2, 3))
    done = python(
        NO_TORCH
        + f"""
import click.testing, attrdb.cli as c
for words in (['ingest', 'corpus', {str(toy.path)!r}, {str(tmp_path)!r}], ['demo', {str(tmp_path / "demo")!r}]):
    result = click.testing.CliRunner().invoke(c.main, words)
    print(result.exit_code, result.output)
"""
    )
    assert done.stdout.count("1 Error: this command needs") == 2, done.stdout + done.stderr
    assert "pip install 'attrdb[ml]'" in done.stdout


def test_formats(toy):
    statement = "SELECT image_id, role, toy_2 FROM images WHERE image_id = 'p90'"
    row = {"image_id": "p90", "role": "pretraining"}
    [found] = json.loads(run("sql", toy.path, statement, "--json").stdout)
    assert {name: found[name] for name in row} == row
    assert found["toy_2"] == pytest.approx([0, 1], abs=1e-6)
    assert json.loads(run("sql", toy.path, statement, "--nl").stdout)["image_id"] == "p90"
    assert next(csv.DictReader(io.StringIO(run("sql", toy.path, statement, "--csv").stdout)))["role"] == "pretraining"
    assert "p90" in run("sql", toy.path, statement).stdout


def test_init_status_query_and_queries(tmp_path, toy):
    run("init", tmp_path / "new.attrdb")
    assert "0 images" in run("status", tmp_path / "new.attrdb").stdout
    assert json.loads(run("status", toy.path, "--json").stdout)["n_images"] == 7
    assert "2-d, 7 of 7 encoded" in run("status", toy.path).stdout
    assert "4 ranks of toy_2" in run("evaluate", toy.path).stderr
    [row] = json.loads(run("query", toy.path, "recall_at_k", "-p", "k=1", "--json").stdout)
    assert row["recall_at_k"] == 0.5
    listed = {row["name"] for row in json.loads(run("queries", "list", "--json").stdout)}
    assert {"recall_at_k", "mean_average_precision", "influence_by_creator", "model_counts"} < listed
    assert run("queries", "show", "influence").stdout.startswith("-- Who influenced one image")


def test_attribute_a_stored_image(toy):
    rows = json.loads(run("attribute", toy.path, "m/0/1", "--top", 2, "--json").stdout)
    assert [row["image_id"] for row in rows] == ["m/e0", "p10"]
    sharp = json.loads(run("attribute", toy.path, "m/0/1", "--top", 1, "--tau", 0.001, "--json").stdout)
    assert sharp[0]["influence"] > rows[0]["influence"]


@pytest.fixture
def photos(tmp_path):
    for n in range(3):
        picture(tmp_path / "photos" / f"{n}.png", (80 * n, 200 - 60 * n, 30))
    return tmp_path / "photos"


def test_ingest_corpus_then_attribute_a_file(tmp_path, photos):
    db = tmp_path / "new.attrdb"
    done = run("ingest", "corpus", db, photos, "--encoder", "pixels:4")
    assert "3 images appended, 0 were stored already" in done.stderr
    assert done.stdout == ""
    [best] = json.loads(run("attribute", db, photos / "1.png", "--top", 1, "--json").stdout)
    assert (best["image_id"], best["similarity"]) == ("photos/1.png", pytest.approx(1))


def test_ingest_corpus_ends_with_an_error_when_something_was_left_out(tmp_path, photos):
    (photos / "broken.png").write_bytes(b"no")
    done = run("ingest", "corpus", tmp_path / "db", photos, "--encoder", "pixels:4", code=1)
    assert "3 images appended" in done.stderr
    assert "left out: image" in done.stderr
    assert "1 images were left out, all others are stored" in done.stderr


def test_ingest_model_and_again(tmp_path, exemplar_folder, tiny_base):
    db = tmp_path / "new.attrdb"
    words = ["ingest", "model", db, "--exemplars", exemplar_folder, "--category", "vase", "--kind", "object"]
    words += ["--base-model", tiny_base, "--encoder", "pixels:4", "--model-id", "vase-1"]
    assert "model vase-1: 1 exemplars, 4 samples appended" in run(*words).stderr
    before = json.loads(run("status", db, "--json").stdout)
    assert "stored already, nothing to do" in run(*words).stderr
    assert json.loads(run("status", db, "--json").stdout) == before
    assert "with customize" in run(*words, "--steps", 9, code=1).stderr


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("torn.png", b"\x89PNG and no more", "torn.png cannot be decoded"),
        ("dot.png", None, "dot.png is 1x1 pixels; at least 16x16 are needed"),
        ("bomb.png", bomb(), "bomb.png claims"),
    ],
)
def test_a_bad_exemplar_is_named_and_nothing_is_written(tmp_path, exemplar_folder, tiny_base, name, content, says):
    if content:
        (exemplar_folder / name).write_bytes(content)
    else:
        picture(exemplar_folder / name, (1, 1, 1), size=1)
    words = ["ingest", "model", tmp_path / "new.attrdb", "--exemplars", exemplar_folder, "--category", "vase"]
    done = run(*words, "--kind", "object", "--base-model", tiny_base, code=1)
    assert says in done.stderr
    assert not (tmp_path / "new.attrdb").exists()


def test_json_of_what_json_cannot_hold(toy):
    statement = "SELECT 'nan'::DOUBLE AS a, [TIMESTAMP '2026-01-02'] AS b, {'x': 'inf'::DOUBLE} AS c"
    [row] = json.loads(run("sql", toy.path, statement, "--json").stdout)
    assert row == {"a": None, "b": ["2026-01-02 00:00:00"], "c": {"x": None}}


MODEL = ["ingest", "model", "x.attrdb", "--category", "a", "--kind", "object", "--base-model", "b"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["attribute", "DB", "nobody"], "'nobody' is neither an image_id of"),
        (["sql", "DB", "SELECT * FROM read_csv('/etc/passwd')"], "not files or the network"),
        (["query", "DB", "nothing"], "no query 'nothing'"),
        (["query", "DB", "recall_at_k", "-p", "k"], "parameter 'k' is not of the form name=value"),
        (["status", "nowhere.attrdb"], "does not exist; make one with: attrdb init nowhere.attrdb"),
        (["init", "DB"], "is an attrdb database already"),
        (["ingest", "corpus", "DB", "nowhere"], "no folder or file nowhere"),
        (["ingest", "corpus", "new.attrdb", "PHOTOS", "--encoder", "clip"], "no encoder 'clip'"),
        (["ingest", "corpus", "new.attrdb", "DB"], "has no image in it"),
        ([*MODEL, "--exemplars", "none"], "no folder none"),
    ],
)
def test_errors_are_one_sentence_and_exit_1(toy, photos, words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {"DB": toy.path, "PHOTOS": photos}
    done = run(*[paths.get(word, word) for word in words], code=1)
    assert says in done.stderr
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.output
    assert not (tmp_path / "x.attrdb").exists()
    assert not (tmp_path / "new.attrdb").exists()
