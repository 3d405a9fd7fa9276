"""CONTRIBUTING.md: its recipes work, what it names exists, and the light tests are light."""

from __future__ import annotations

import re
import subprocess
import sys
import zlib
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import LIGHT, NEEDS, ROOT

import attrdb
from attrdb.attribution.batch import attribute_samples
from attrdb.attribution.query import AttributionRequest
from attrdb.ingest.score import _check_scorer, score
from attrdb.sql import relations
from attrdb.store import upgrades
from attrdb.store.tables import open_table, schema_version

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MODULES = {path.stem for path in (ROOT / "tests").glob("test_*.py")}


def example(name: str) -> str:
    [found] = re.findall(rf"<!-- example: {name} -->\n```\w+\n(.*?)```", TEXT, re.DOTALL)
    return found


def run(name: str, **names) -> dict:
    exec(compile(example(name), f"CONTRIBUTING.md: {name}", "exec"), names)
    return names


def test_recipes_are_short():
    recipes = re.findall(r"<!-- example: \w+ -->\n```\w+\n(.*?)```", TEXT, re.DOTALL)
    assert len(recipes) == 6
    assert max(recipe.count("\n") for recipe in recipes) <= 16


@pytest.mark.skipif(find_spec("PIL") is None, reason="encoders read pictures with Pillow")
def test_the_encoder():
    from PIL import Image

    from attrdb.ingest.encode import encode
    from attrdb.ingest.encode.plugins import _check

    encoder = run("encoder", np=np)["Mean"]("red")
    _check(encoder, "mean:red")
    np.testing.assert_allclose(encode(encoder, [Image.new("RGB", (9, 9), (3, 4, 0))]), [[0.6, 0.8, 0]], atol=1e-6)


@pytest.mark.skipif(find_spec("torch") is None, reason="trains")
def test_the_customizer(tiny_base, monkeypatch):
    from PIL import Image

    from attrdb.ingest.customize import base_model, customize, customizers

    customizer = run("customizer")["OutputLayers"]
    customizers._check(customizer(), "output-layers")
    monkeypatch.setitem(customizers.BUILT_IN, "output-layers", customizer)
    base = base_model.load_base_model(str(tiny_base))
    before = {name: weight.clone() for name, weight in base.pipeline.unet.named_parameters()}
    settings = customize.CustomizeSettings(steps=2, batch=1, lr=0.01)
    picture = Image.new("RGB", (32, 32), (200, 30, 30))
    customize.customize(base, [picture], "V* vase", "V*", "vase", settings, method="output-layers")
    moved = {name for name, weight in base.pipeline.unet.named_parameters() if not weight.equal(before[name])}
    assert moved == {name for name in before if "attn2.to_out" in name}
    assert moved


def test_the_method(toy):
    scorer = run("method", np=np, pa=pa, zlib=zlib)["Random"]("3")
    _check_scorer(scorer)
    assert score(toy, "random:3", scorer).n_done == 2
    attribute_samples(toy.writer, "true", AttributionRequest(k=2, method="random_3"))
    stored = toy.sql("SELECT sample_id, count(*) AS n FROM attributions GROUP BY ALL ORDER BY ALL").to_pylist()
    assert [row["sample_id"] for row in stored] == ["m/0/1", "m/0/2"]
    found = toy.sql("SELECT score FROM scores ORDER BY ALL")["score"].to_pylist()
    assert len(set(found)) == 2 * 5


def test_the_query(toy, tmp_path):
    (tmp_path / "wide_samples.sql").write_text(example("query"), encoding="utf-8")
    db = attrdb.open(toy.path, query_folders=[tmp_path])  # refuses a header that does not fit its statement
    assert db.query("wide_samples").to_pylist() == [{"model_id": "m", "n_samples": 2}]
    assert db.query("wide_samples", width=1).to_pylist() == []


def test_the_macro(toy, tmp_path, monkeypatch):
    (tmp_path / "views").mkdir()
    (tmp_path / "views" / "samples_of.sql").write_text(example("macro"), encoding="utf-8")
    monkeypatch.setattr(relations, "files", lambda package: tmp_path)
    macro = relations._read("samples_of", "samples_of.sql")
    assert (macro.summary, macro.signature) == ("Samples of one model.", "model, narrowest := 0")
    monkeypatch.undo()
    known = relations.relations()
    monkeypatch.setattr("attrdb.sql.connection.relations", lambda: (*known, macro))
    assert toy.sql("SELECT image_id FROM samples_of('m')")["image_id"].to_pylist() == ["m/0/1", "m/0/2"]
    assert len(toy.sql("FROM samples_of('m', narrowest := 1)")) == 0


def test_the_schema_step(empty):
    names = run("step", Path=Path, _create=upgrades._create)
    for _ in range(2):  # a step may be run again
        names["_to_9"](empty.path)
    table = open_table(empty.path, "reviews")
    assert (schema_version(table), table.count_rows()) == (9, 0)
    assert table.schema.names == ["review_id", "image_id", "verdict", "reviewed_at"]
    assert [field.nullable for field in table.schema] == [False, False, True, True]


def test_every_test_module_is_in_the_table_once():
    table = [line for line in TEXT.splitlines() if re.match(r"\|.*\btest_", line)]
    assert Counter(re.findall(r"\btest_\w+", "\n".join(table))) == Counter(MODULES)


def test_files_and_commands_that_it_names_exist():
    paths = re.findall(r"`((?:attrdb|ingest|training|queries|tests|docs|benchmarks)/[\w/]*(?:\.\w+)?)`", TEXT)
    paths += re.findall(r"\]\(([^)#]+)", TEXT)
    assert len(paths) > 20
    assert [path for path in paths if "NAME" not in path and not (ROOT / path).exists()] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"^    make ([\w-]+)", TEXT, re.MULTILINE)
    assert len(commands) > 4
    assert [command for command in commands if not re.search(rf"^{command}:", makefile, re.MULTILINE)] == []
    source = {name: (ROOT / name).read_text(encoding="utf-8") for name in re.findall(r"`([\w/]+\.py)`", TEXT)}
    code = "\n".join(source.values())
    for name in ("ROLE_VIEWS", "STORED", "MACROS", "SCHEMA_VERSION", "STEPS", "MADE_IN", "LIGHT"):
        assert f"`{name}`" in TEXT
        assert re.search(rf"^{name}\b.* = ", code, re.MULTILINE), name
    for name in ("Encoder", "Customizer", "Scorer", "Method"):
        assert f"`{name}`" in TEXT
        assert re.search(rf"^class {name}\(Protocol\):", code, re.MULTILINE), name


COLLECT = """
import sys
for name in ("torch", "triton", "PIL", "diffusers", "transformers", "timm", "open_clip", "peft", "matplotlib", "jinja2"):
    sys.modules[name] = None
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests"]))
"""


def test_light_tests_need_no_torch():
    """Collected where the packages of the extra `ml` cannot be imported: these modules, and no other."""
    done = subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert set(re.findall(r"^tests/(\w+)\.py", done.stdout, re.MULTILINE)) == {
        name for name in LIGHT if find_spec(NEEDS[name])
    }
