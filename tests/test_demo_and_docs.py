"""The demo on a small corpus, and the documentation: what the README says to type is typed."""

import hashlib
import importlib.util
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import attrdb
from attrdb import demo
from attrdb.bundled import write_corpus
from attrdb.cli import main
from attrdb.errors import InvalidValue
from attrdb.ingest.models.settings import settings_for
from attrdb.training.evaluate import evaluate

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONCEPTS = (demo.CONCEPTS[0], demo.CONCEPTS[-1])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The demo with one object, one style, 200 pretraining images and few steps, in a folder of its own."""
    folder = tmp_path_factory.mktemp("demo")
    write_corpus(folder / "few.parquet", 200)
    stages = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "settings_for", lambda *names: settings_for(*names, {"steps": 10}))
        page = demo.build(folder / "demo", lambda *stage: stages.append(stage), folder / "few.parquet", CONCEPTS)
        yield folder, page, stages


def test_demo_fills_every_table_and_reports_every_stage(built):
    folder, _, stages = built
    found = attrdb.open(folder / "demo" / "icons.attrdb").status()
    assert found["models_by_kind"] == {"object": 1, "style": 1}
    assert found["images_by_role"]["pretraining"] == 200
    assert all(encoder["n_encoded"] == found["n_images"] for encoder in found["encoders"].values())
    assert found["tables"]["exemplar_ranks"]["rows"] > 0
    done = {stage: units == total for stage, units, total, *_ in stages}
    assert {stage.split(": ")[-1].split()[0] for stage in done} == {
        "ingest",
        "encode",
        "customize",
        "sample",
        "evaluate",
        "attribute",
    }
    assert all(done.values())


def test_demo_again_changes_nothing(built):
    folder, page, _ = built
    db = attrdb.open(folder / "demo" / "icons.attrdb")
    before, text = db.version, page.read_text()
    demo.build(folder / "demo", lambda *_: None, folder / "few.parquet", CONCEPTS)
    assert attrdb.open(db.path).version == before
    assert page.read_text() == text


def test_demo_of_other_weights_is_not_mixed_with_these(built, tmp_path):
    folder, _, _ = built
    shutil.copytree(folder / "demo", tmp_path / "old")
    db = attrdb.open(tmp_path / "old" / "icons.attrdb")
    db.writer.upsert("models", [{"model_id": "old", "base_model_hash": "other"}])
    with pytest.raises(InvalidValue, match="holds a demo of another icon-sd; remove it, or name another folder"):
        demo.build(tmp_path / "old", lambda *_: None, folder / "few.parquet", CONCEPTS)


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href")]


def test_demo_page_is_self_contained_and_says_what_influence_is(built):
    folder, page, _ = built
    text = page.read_text()
    links = Links()
    links.feed(text)
    assert links.found
    assert all(link.startswith("data:image/webp;base64,") for link in links.found)
    assert "estimate" in text
    assert "not a causal" in text
    db = attrdb.open(folder / "demo" / "icons.attrdb")
    for prompt in db.sql("SELECT prompt FROM samples")["prompt"].to_pylist():
        assert prompt in text
    for row in db.sql(demo.FIGURES).to_pylist():
        assert f"{row['recall_at_10']:.3f}" in text


def test_demo_figures_are_those_of_the_named_query_and_of_gallery_own(built):
    folder, _, _ = built
    db = attrdb.open(folder / "demo" / "icons.attrdb")
    evaluate(db, "pixels_8", "all")
    keys = ("kind", "prompt_scheme", "encoder_id")
    rows = [row for row in db.query("recall_at_k", k=10).to_pylist() if row["gallery"] == "own"]
    named = {tuple(row[key] for key in keys): row for row in rows}
    figures = db.sql(demo.FIGURES).to_pylist()
    assert len(figures) == len(named) == 8
    for row in figures:
        same = named[tuple(row[key] for key in keys)]
        assert row["recall_at_10"] == pytest.approx(same["recall_at_k"])
        assert row["chance"] == pytest.approx(same["chance"])
        assert row["n_samples"] == same["n_samples"]


def test_demo_tells_its_figures_with_their_sql(built, capsys):
    folder, page, _ = built
    demo.tell(folder / "demo", page)
    said = capsys.readouterr().out
    assert demo.FIGURES in said
    assert "icon_moco" in said
    assert str(page) in said


def test_readme_has_no_gap():
    assert "DEMO_FIGURES" not in README


def readme_commands():
    return [line.strip() for line in README.splitlines() if re.match(r"    attrdb ", line)]


def test_readme_commands_on_the_demo_work(built, tmp_path, monkeypatch):
    folder, _, _ = built
    monkeypatch.chdir(folder)
    sample = attrdb.open("demo/icons.attrdb").sql("SELECT min(image_id) AS id FROM samples")["id"][0].as_py()
    asked = [command for command in readme_commands() if "demo/icons.attrdb" in command or "queries" in command]
    assert len(asked) >= 6
    (tmp_path / "contracts.csv").write_text("creator,until\nnobody,2030\n")  # of the reader's own
    for command in asked:
        words = shlex.split(command.replace("SAMPLE_ID", sample), comments=True)[1:]
        words = [word.replace("contracts.csv", str(tmp_path / "contracts.csv")) for word in words]
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, (command, done.output)
        assert done.stdout.strip()


def test_readme_ingest_commands_parse():
    appended = [command for command in readme_commands() if " my.attrdb" in command]
    named = {shlex.split(command)[1] for command in appended}
    assert named == {
        "ingest", "encode", "train", "calibrate", "evaluate", "report", "models", "status", "optimize",
        "check", "export", "upgrade", "index", "attribute", "methods", "score", "truth", "backup", "remove", "query",
    }  # fmt: skip
    for command in appended:
        context, words = main, shlex.split(command, comments=True)[1:]
        while hasattr(context, "commands"):
            context = context.commands[words.pop(0)]
        # Raises for an unknown option. Click keeps the help option of a command as it first sees it: with its parent's names.
        context.make_context("attrdb", words, parent=click.Context(main, **main.context_settings))


def test_readme_python_works(built, monkeypatch, capsys):
    folder, _, _ = built
    monkeypatch.chdir(folder)
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    assert "influence" in capsys.readouterr().out


def test_readme_names_its_two_commands():
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_readme_pictures_and_pages_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_command_page_is_what_the_program_says():
    spec = importlib.util.spec_from_file_location("cli_page", ROOT / "docs" / "cli.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "stale: run make docs"


def test_model_card_states_the_figures_of_the_weights():
    card = (ROOT / "docs" / "icon-sd.md").read_text()
    figures = json.loads((ROOT / "attrdb" / "assets" / "icon-sd" / "training.json").read_text())
    for name in ("unet_images", "unet_steps", "vae_images"):
        assert f"{figures[name]:,}" in card, name
    for file in (ROOT / "attrdb" / "assets" / "icon-sd").rglob("*.safetensors"):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in card, file
    assert f"{figures['unet_loss']:.3f}" in card
