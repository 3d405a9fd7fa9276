"""The command line: output, exit codes, and what a command must not import."""

import csv
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile

import click
import pytest
from click.testing import CliRunner
from conftest import picture
from test_ingest_corpus import bomb

import attrdb
from attrdb.cli import main
from attrdb.errors import InvalidValue
from attrdb.ingest.encode import load_encoder
from attrdb.ingest.read.corpus import register


def run(*words, code=0):
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


def python(code: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def processor_seconds() -> float:
    """That ended child processes took: unlike the clock it does not depend on what else the machine does."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def processor_seconds_of(*arguments: str) -> tuple[float, str]:
    """Processor seconds and output of one run of Python."""
    before = processor_seconds()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    return processor_seconds() - before, done.stdout


def test_help_is_quick_and_imports_nothing_heavy():
    """In units of what Python with click alone takes (0.09 s here), to spare slow machines: 1.9, or 3.1 if busy."""
    click_alone, help_page = [], []
    for _ in range(5):
        click_alone.append(processor_seconds_of("-c", "import click")[0])
        seconds, printed = processor_seconds_of("-m", "attrdb", "--help")
        help_page.append(seconds)
        assert "Influence scores are estimates" in printed
    assert min(help_page) < 5 * min(click_alone)
    heavy = python(
        "import sys, click.testing, attrdb.cli as c\n"
        "click.testing.CliRunner().invoke(c.main, ['--help'])\n"
        "print([m for m in ('torch', 'diffusers', 'lance', 'lancedb', 'duckdb', 'numpy', 'pyarrow') if m in sys.modules])"
    )
    assert heavy.stdout.strip() == "[]", heavy.stderr


NO_TORCH = """
import sys
import tempfile
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
    # A picture needs Pillow first; what its encoder needs is known once the database is read.
    assert "pip install 'attrdb[images]'" in done.stdout
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
    assert "4 ranks by toy_2" in run("evaluate", toy.path).stderr
    [row] = json.loads(run("query", toy.path, "recall_at_k", "-p", "k=1", "--json").stdout)
    assert row["recall_at_k"] == 0.5
    listed = {row["name"] for row in json.loads(run("queries", "list", "--json").stdout)}
    assert {"recall_at_k", "mean_average_precision", "influence_by_creator", "model_counts"} < listed
    assert run("queries", "show", "influence").stdout.startswith("-- Who influenced one image")


def test_a_method_that_cannot_be_evaluated_stops_no_other(toy):
    toy.writer.add_encoder("a:3", 3, {}, "none")
    toy.refresh()
    result = CliRunner().invoke(main, ["evaluate", str(toy.path)])
    assert result.exit_code == 1
    assert "4 ranks by toy_2" in result.stderr
    assert "a_3 was not evaluated: " in result.stderr
    assert "has no model whose samples have 'a_3' features; ingest one first" in result.stderr


def test_attribute_a_stored_image(toy):
    rows = json.loads(run("attribute", toy.path, "m/0/1", "-k", 2, "--json").stdout)
    assert [row["image_id"] for row in rows] == ["m/e0", "p10"]
    sharp = json.loads(run("attribute", toy.path, "m/0/1", "-k", 1, "--tau", 0.001, "--json").stdout)
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
    [best] = json.loads(run("attribute", db, photos / "1.png", "-k", 1, "--json").stdout)
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
    assert row == {"a": "NaN", "b": ["2026-01-02 00:00:00"], "c": {"x": "Infinity"}}


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


def commands(command=main, path=("attrdb",)):
    """Every command with its path."""
    yield path, command
    for name, member in getattr(command, "commands", {}).items():
        yield from commands(member, (*path, name))


def test_every_command_has_a_section():
    sections = {name for names in main.sections.values() for name in names}
    assert sections == set(main.commands)
    text = run("--help").stdout
    assert [line for line in text.splitlines() if line in ("Start:", "Bring in:", "Ask:", "Learn:", "Keep:")] == [
        "Start:", "Bring in:", "Ask:", "Learn:", "Keep:"
    ]  # fmt: skip
    assert "Other commands" not in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(("path", "command"), list(commands()), ids=[" ".join(path) for path, _ in commands()])
def test_summaries_fit_and_every_option_has_help(path, command):
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, (path, option.opts)
            assert option.hidden or "..." not in option.help
    members = getattr(command, "commands", {})
    room = 78 - 6 - max(map(len, members), default=0)  # click writes 78 columns on a terminal of 80
    for name, member in members.items():
        assert member.short_help, (*path, name)
        assert len(member.short_help) <= room, (*path, name)
    assert max(map(len, run(*path[1:], "--help").stdout.splitlines())) <= 80


def test_old_names_of_options_work_with_a_warning(toy):
    old = run("attribute", toy.path, "m/0/1", "--top", 2, "--csv")
    assert old.stdout == run("attribute", toy.path, "m/0/1", "--k", 2, "--csv").stdout
    assert old.stderr == "warning: --top is now called -k; the old name goes with the next release\n"
    both = run("attribute", toy.path, "m/0/1", "--top", 2, "-k", 1, "--nl")
    assert both.stdout.count("\n") == 1
    wrong = run("attribute", toy.path, "m/0/1", "--top", 0, code=2)
    assert "Invalid value for '-k' / '--k': 0 is not in the range x>=1" in wrong.stderr
    assert "--top" not in run("attribute", "--help").stdout


def trained_with(db, *words):
    """The settings of the mapper that `attrdb train` makes, and what it says."""
    done = run("train", db.path, "--epochs", 1, "--mapper-id", "a", *words)
    [row] = json.loads(run("sql", db.path, "SELECT settings, trained_on FROM mappers", "--json").stdout)
    return json.loads(row["settings"]), row["trained_on"], done.stderr


@pytest.mark.parametrize(
    ("words", "warnings"),
    [
        (["--kind", "object+style", "--contrastive-temperature", 0.2, "--encoder", "toy:12"], []),
        (
            ["--kind", "both", "--temperature", 0.2],
            ["--temperature is now called --contrastive-temperature", "--kind both is now called --kind object+style"],
        ),
    ],
)
def test_names_of_train_and_its_stored_settings(learnable, tmp_path, words, warnings):
    shutil.copytree(learnable.path, tmp_path / "db")
    settings, trained_on, said = trained_with(attrdb.open(tmp_path / "db"), *words)
    assert (settings["kind"], trained_on, settings["temperature"]) == ("both", "both", 0.2)
    assert [line for line in said.splitlines() if line.startswith("warning")] == [
        f"warning: {warning}; the old name goes with the next release" for warning in warnings
    ]


def test_an_encoder_is_named_by_its_id_or_its_spec(tmp_path, photos):
    db = tmp_path / "new.attrdb"
    run("ingest", "corpus", db, photos, "--encoder", "pixels:4", "--encoder", "pixels:2")
    for query in ("photos/1.png", photos / "1.png"):
        words = ["attribute", db, query, "-k", 2, "--csv", "--encoder"]
        assert run(*words, "pixels:2").stdout == run(*words, "pixels_2").stdout
    for name in ("pixels:2", "pixels_2"):
        assert "0 images encoded" in run("encode", db, "--encoder", name).stderr
    picture(photos / "9.png", (9, 9, 9))
    assert (
        "1 images appended"
        in run("ingest", "corpus", db, photos, "--encoder", "pixels_4", "--encoder", "pixels:2").stderr
    )
    assert "no encoder 'pixels_9'" in run("encode", db, "--encoder", "pixels_9", code=1).stderr
    assert "pixels_9" in run("attribute", db, "photos/1.png", "--encoder", "pixels:9", code=1).stderr


def test_several_encoders_are_added_by_one_command(tmp_path, photos):
    db = tmp_path / "new.attrdb"
    run("ingest", "corpus", db, photos, "--encoder", "pixels:4")
    n = attrdb.open(db).status()["n_images"]
    assert "pixels_9" in run("encode", db, "--encoder", "pixels:3", "--encoder", "pixels_9", code=1).stderr
    assert list(attrdb.open(db).encoders) == ["pixels_4"]
    said = run("encode", db, "--encoder", "pixels:3", "--encoder", "pixels_4", "--encoder", "pixels:3").stderr
    assert said.splitlines()[-2:] == [f"{n} images encoded by pixels:3", "0 images encoded by pixels:4"]
    assert attrdb.open(db).status()["encoders"]["pixels_3"]["n_encoded"] == n


def test_an_encoder_that_is_given_twice_counts_once(tmp_path, photos):
    """By its spec, or once by its spec and once by its id."""
    db = tmp_path / "new.attrdb"
    run("ingest", "corpus", db, photos, "--encoder", "pixels:2", "--encoder", "pixels:2")
    picture(photos / "9.png", (9, 9, 9))
    again = run("ingest", "corpus", db, photos, "--encoder", "pixels:2", "--encoder", "pixels_2")
    assert "1 images appended" in again.stderr
    assert list(attrdb.open(db).encoders) == ["pixels_2"]
    with pytest.raises(InvalidValue, match="encoder 'pixels:2' is given twice; give it once"):
        register(attrdb.open(db), [load_encoder("pixels:2")] * 2)


def test_check_writes_wrong_rows_in_a_format(toy):
    assert run("check", toy.path, "--json").stdout == "[]\n"
    toy.writer.upsert("models", [{"model_id": "m", "kind": "style", "n_exemplars": 5, "n_samples": 2}])
    [row] = json.loads(run("check", toy.path, "--json", code=1).stdout)
    assert (row["check"], json.loads(row["row"])["model_id"]) == ("model_counts", "m")


def test_completion_of_query_names():
    environment = {"_ATTRDB_COMPLETE": "bash_complete", "COMP_WORDS": "attrdb query db recall_a", "COMP_CWORD": "3"}
    assert python("import attrdb.cli as c; c.main(prog_name='attrdb')", **environment).stdout == "plain,recall_at_k\n"


# --- what nobody foresaw ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "the machine has no memory left"),
        (ImportError("libtorch.so: failed to map segment from shared object"), "the machine has no memory left"),
        (RuntimeError("can't start new thread"), "the machine has no memory left"),
        (RuntimeError("Creating Tokio runtime: Too many open files"), "raise the limit (ulimit -n)"),
    ],
)
def test_what_the_machine_lacks_is_said(toy, monkeypatch, error, said):
    monkeypatch.setattr(attrdb.database.Database, "status", lambda db: (_ for _ in ()).throw(error))
    failed = run("status", toy.path, code=1)
    assert said in failed.output
    assert "what was finished is kept" in failed.output


@pytest.mark.parametrize("can_write", [True, False])
def test_a_fault_of_attrdb_keeps_its_traceback_in_a_file(toy, tmp_path, monkeypatch, can_write):
    monkeypatch.setattr(attrdb.database.Database, "status", lambda db: {}["odd\x1b"])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path if can_write else tmp_path / "nowhere"))
    failed = run("status", toy.path, code=1)
    assert "Error: this is a fault of attrdb (KeyError: 'odd\\x1b'); what was finished is kept" in failed.output
    if can_write:
        [kept] = tmp_path.glob("attrdb-fault-*.txt")
        assert str(kept) in failed.output
        assert "Traceback" in kept.read_text()
        assert "Traceback" not in failed.output
