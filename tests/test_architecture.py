"""The order of the rooms, the length of modules, and pictures of both that are not stale."""

from __future__ import annotations

import ast
import re

import pytest
from conftest import ROOT, docs_script

architecture = docs_script("architecture")

LONGEST = 420  # lines
LONGER: set[str] = set()


def imports_of(text: str, module: str = "attrdb.store.made_up") -> list[str]:
    found = architecture.imports_of(module, ast.parse(text), architecture.modules())
    return [one.target for one in found]


def test_a_room_imports_rooms_below_it_only():
    assert [(line.module, line.target) for line in architecture.upward(architecture.imports())] == []


def test_only_the_command_line_and_the_demo_import_jobs():
    jobs = {"ingest", "training"}
    importers = {one.module for one in architecture.imports() if one.rooms[1] in jobs and one.rooms[0] not in jobs}
    assert "attrdb.demo" in importers  # they are seen
    assert all(re.fullmatch(r"attrdb\.(demo|cli\..+)", module) for module in importers), importers


def test_ingest_does_not_import_training():
    assert not [one for one in architecture.imports() if one.rooms == ("ingest", "training")]


def test_imports_are_seen_wherever_they_stand():
    assert imports_of("from attrdb.cli import common") == ["attrdb.cli.common"]
    assert imports_of("from attrdb.cli import main") == ["attrdb.cli"]
    assert imports_of("import attrdb.cli.common as c") == ["attrdb.cli.common"]
    assert imports_of("def f():\n    if x:\n        from attrdb.training.train import train") == [
        "attrdb.training.train"
    ]
    assert imports_of("m = ml('training.train')") == ["attrdb.training.train"]
    assert imports_of("m = importlib.import_module('attrdb.ingest.score')") == ["attrdb.ingest.score"]
    assert imports_of("import json, torch") == []


def test_imports_for_type_checkers_are_free():
    text = "if TYPE_CHECKING:\n    from attrdb.cli import common\nelse:\n    from attrdb.search import ivf"
    assert imports_of(text) == ["attrdb.search.ivf"]


@pytest.mark.parametrize(
    ("module", "target", "allowed"),
    [
        ("attrdb.search.ivf", "attrdb.store.schema", True),
        ("attrdb.store.schema", "attrdb.store.ids", True),
        ("attrdb.store.schema", "attrdb.search.ivf", False),
        ("attrdb.pages.report", "attrdb.shell.prompt", False),
        ("attrdb.upkeep.health", "attrdb.database", False),
        ("attrdb.pages.report", "attrdb.training.train", False),
        ("attrdb.demo", "attrdb.training.train", True),
    ],
)
def test_the_check_can_fail(module, target, allowed):
    one = architecture.Import(module, target, 1)
    assert (architecture.upward([one]) == []) == allowed


def test_a_module_without_a_room_is_refused():
    with pytest.raises(KeyError, match="name its room"):
        architecture.room_of("attrdb.attic")


def test_no_module_is_too_long():
    files = [path for tree in architecture.TREES for kind in ("*.py", "*.sql") for path in (ROOT / tree).rglob(kind)]
    assert len(files) > 100
    longer = {path for path in files if len(path.read_text(encoding="utf-8").splitlines()) > LONGEST}
    assert {str(path.relative_to(ROOT)) for path in longer} == LONGER


def test_what_jobs_write_is_read_from_the_code():
    written = architecture.writes()
    assert written["ingest.models"] == {"images", "concepts", "models"}
    assert written["training.evaluate"] == {"exemplar_ranks"}
    assert written["ingest.score"] == {"scores", "methods"}
    assert architecture.written_by_writer()["add_mapper"] == {"mappers", "methods"}
    assert "exemplar_ranks" in architecture.reads()["queries/metrics"]


@pytest.mark.parametrize("file", architecture.PICTURES, ids=lambda file: file.name)
def test_the_pictures_are_what_the_program_draws(file):
    assert file.read_text(encoding="utf-8") == architecture.PICTURES[file](), "stale: run make docs"


def test_the_page_names_files_that_exist():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:attrdb|ingest|training|tests|docs)/[\w/]+\.py)`", page)
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert set(re.findall(r"architecture-\w+\.svg", page)) == {file.name for file in architecture.PICTURES}
