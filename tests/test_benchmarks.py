"""The programs of benchmarks run at sizes that take seconds, and their results become sections of RESULTS.md."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT

from attrdb.search import index_build, planner

FOLDER = ROOT / "benchmarks"
PARTS = ("ann", "evaluation", "folding", "growth", "later", "predicates", "real")  # that need no other package


@pytest.fixture(scope="module")
def program():
    """Load a program by name; programs import each other by name too."""
    sys.path.insert(0, str(FOLDER))
    loaded = {}

    def load(name):
        if name not in loaded:
            spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
            loaded[name] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded[name])
        return loaded[name]

    yield load
    sys.path.remove(str(FOLDER))


def run(command, *words):
    done = CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.py")))
def test_every_program_can_be_imported(program, name):
    program(name)


@pytest.fixture(scope="module")
def searched(program, tmp_path_factory):
    """What search.py stores of PARTS, by the name of the part."""
    search, clustered, folder = program("search"), program("clustered"), tmp_path_factory.mktemp("search")
    db = clustered.database(folder / "real.attrdb", 2000, 64)
    mapper = search.some_mapper(np.concatenate(list(clustered.features(2000, 64))), "clustered_64", 0.05)
    db.writer.upsert("mappers", [mapper.row() | {"trained_on": "both"}])
    out = folder / "search.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_build, "MIN_ROWS", 1500)
        patch.setattr(planner, "EXACT_BELOW_ROWS", 15)
        patch.setattr(search, "limits", lambda: {"gflops": 1.0, "read_gb_a_second": 1.0})  # takes gigabytes and seconds
        patch.setattr(search, "use_the_machine", lambda: None)  # changes this process
        sizes = ["--rows", 2000, "--dimension", 64, "--sizes", "1000,2000"]
        run(search.main, *PARTS, *sizes, "--peer", "attrdb", "--database", db.path, "--folder", folder, "--json", out)
    return json.loads(out.read_text())


def found(searched, part):
    [result] = [result for name, result in searched.items() if name.split()[0] == part]
    return result["found"]


def test_ranks_and_searches_are_right(searched):
    evaluation = found(searched, "evaluation")
    assert evaluation["n_ranks_different"] == 0
    assert evaluation["memory"]["peak_gib"] >= evaluation["memory"]["before_gib"] > 0
    [ours] = found(searched, "ann")
    assert ours["what"].startswith("attrdb (IVF_RQ, 56 partitions)")
    recalls = [setting["recall"] for setting in ours["settings"]]
    assert recalls == sorted(recalls)
    assert recalls[-1] > 0.9


def test_the_index_is_measured_in_every_case(searched):
    without, with_index = found(searched, "growth")
    assert without["recall"] == 1.0
    assert "n_probes" not in without
    assert with_index["n_partitions"] == 56
    assert [row["appended"] for row in found(searched, "later")] == [0.0, 0.05, 0.2]
    assert [row["n_candidates"] for row in found(searched, "predicates")] == [20, 400, 2000]
    assert min(row["recall"] for part in ("later", "predicates") for row in found(searched, part)) > 0.9


def test_mappers_are_measured_through_the_index(searched):
    for row in found(searched, "folding"):
        assert row["folded"]["recall_measured"] > 0.5
        assert row["column"]["recall"] > 0.9
    [encoder] = found(searched, "real")
    assert [mapper["mapper_id"] for mapper in encoder["mappers"]] == ["some"]
    assert set(encoder["mappers"][0]["recall_at_the_third"]) == {"plain", "tilted"}


def test_the_section_on_searches_is_written(program, searched):
    text = program("searching").section(searched)
    for title in ("Ranks of 1,000", "Approximate search of 2,000 x 64", "As the gallery grows", "With a predicate"):
        assert f"### {title}" in text


def test_real_needs_a_database(program):
    done = CliRunner().invoke(program("search").main, ["real"])
    assert done.exit_code == 2
    assert "the part real needs a database; name one with --database" in done.output


@pytest.mark.parametrize(
    ("name", "words", "title"),
    [
        ("appending", ["--rows", 2000, "--dimension", 8, "--models", 3, "--optimize-every", 2], "Appending models"),
        ("importing", ["--rows", 2000, "--dimension", 8, "--shards", 2, "--rounds", 1], "Importing embeddings"),
        ("monitoring", ["--steps", 10, "--questions", 2, "--models", 50], "Monitoring"),
        (
            "training",
            ["--models", 40, "--samples", 3, "--dimension", 8, "--batch", 16, "--rounds", 1],
            "Reading pairs for training",
        ),
    ],
)
def test_a_program_runs_and_its_section_is_written(program, tmp_path, name, words, title):
    out = tmp_path / f"{name}.json"
    run(program(name).main, *words, "--json", out)
    section, command = program("report").SECTIONS[name]
    assert f"## {title}" in section(json.loads(out.read_text()))
    assert command.startswith(f"benchmarks/{name}.py")


@pytest.mark.filterwarnings("error")  # a plot without room for its legend
def test_the_page_is_what_the_stored_figures_give(program):
    assert program("report").page() == (FOLDER / "RESULTS.md").read_text(encoding="utf-8"), "run benchmarks/report.py"
