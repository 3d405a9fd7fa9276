"""The experiment on removals: its plan, and all of its stages at a size that takes seconds."""

import hashlib
import importlib
import json
import shutil
import sys
from collections import Counter
from functools import partial
from itertools import product

import pytest
from click.testing import CliRunner
from conftest import ROOT

import attrdb
from attrdb.cli import main
from attrdb.ingest.customize.base_model import load_base_model
from attrdb.ingest.customize.denoising import latents_of
from attrdb.ingest.gradients.model_gradients import pictures as stored_pictures

FOLDER = ROOT / "benchmarks"
LATENTS = "torchscript_latents_size_64_mean_half_std_half"


@pytest.fixture(scope="module")
def programs():
    """plan.py, controls.py and run.py, and truth.py, which writes their section."""
    names, folders = ("controls", "kept", "plan", "run", "truth"), [str(FOLDER), str(FOLDER / "removals")]
    of_others = {name: sys.modules.pop(name) for name in names if name in sys.modules}  # such as IconAbC's plan
    sys.path[:0] = folders
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        del sys.modules[name]
    sys.modules.update(of_others)
    for folder in folders:
        sys.path.remove(folder)


def pictures(folder, spec):
    return [
        [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted((folder / concept["exemplars"]).iterdir())]
        for concept in spec["concepts"]
    ]


def test_the_plan_draws_models_that_share_no_picture(programs, tmp_path):
    plan = programs["plan"]
    specs = [json.loads(line) for line in plan.write_plan(tmp_path / "one").read_text().splitlines()]
    assert Counter(spec["split"] for spec in specs) == plan.N_MODELS
    assert len({spec["model_id"] for spec in specs}) == len(specs)
    found = []
    for spec in specs:
        assert [concept["kind"] for concept in spec["concepts"]] == ["object", "object", "style", "style"]
        assert [len(concept) for concept in pictures(tmp_path / "one", spec)] == [4] * 4
        found += [picture for concept in pictures(tmp_path / "one", spec) for picture in concept]
    assert len(set(found)) == len(found)
    again = [json.loads(line) for line in plan.write_plan(tmp_path / "two").read_text().splitlines()]
    assert again == specs
    assert pictures(tmp_path / "two", again[3]) == pictures(tmp_path / "one", specs[3])


@pytest.fixture(scope="module")
def work(programs, tiny_base, tmp_path_factory):
    """A model to measure, two to learn from and one to choose by, each in a few steps of a tiny base model."""
    plan, run, folder = programs["plan"], programs["run"], tmp_path_factory.mktemp("removals")

    def small(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan, "N_MODELS", {"test": 1, "val": 1, "train": 2})
            patch.setattr(plan, "MEASURED", {"gpt": 1})
            patch.setattr(plan, "LEARNED", {"gpt": 1})
            specs = plan.write_plan(folder)
        lines = [json.loads(line) | {"steps": 3, "solver_steps": 2} for line in specs.read_text().splitlines()]
        specs.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return specs

    def command(*words):
        words = [tiny_base if word == "icon-sd" else word for word in words]
        done = CliRunner().invoke(main, [*map(str, words), "--quiet"], catch_exceptions=False)
        assert done.exit_code == 0, done.output

    def staged(*words):
        done = CliRunner().invoke(run.main, [*map(str, words)], catch_exceptions=False)
        assert done.exit_code == 0, done.output

    with pytest.MonkeyPatch.context() as patch:
        changed = {"write_plan": small, "command": command, "ENCODERS": ("pixels:8",)}
        changed |= {
            "N_CORPUS": 3,
            "TEMPERATURES": (0.1,),
            "LOSSES": ("soft", "one-hot"),
            "TableSettings": partial(run.TableSettings, steps=20),
            "BUILT_IN": ("in-run",),
            "TEACHERS": ("in-run",),
            "SLOW": ("gradient-dot",),
        }
        for name, value in changed.items():
            patch.setattr(run, name, value)
        staged("make", folder)
        staged("truth", folder, "--halves", 3, "--images", 0)
        staged("score", folder)
        staged("figures", folder, "--json", folder / "removals.json")
    return folder


def test_every_stage_runs_and_the_section_is_written(programs, work):
    found = json.loads((work / "removals.json").read_text())
    counts = {(row["leave"], row["draws"]): (row["n_models"], row["n"]) for row in found["retrainings"]}
    assert counts == {(leave, "fixed"): (1, n) for leave, n in {"none": 1, "concept": 4, "half": 3}.items()}
    controls = programs["controls"].CONTROLS
    methods = {row["method_id"].rpartition("/")[2] for row in found["removal_intervals"]}
    chosen = {row["mapper_id"] for row in found["tried"] if row["chosen"]}
    assert methods == {"pixels_8", LATENTS, "in_run", "gradient_dot", *controls, *chosen}
    assert len(chosen) == 2
    assert len(found["learned_concepts"]) == 4
    page = programs["truth"].section(found)
    for title in ("### Without random halves (LDS)", "### Between concepts: what the prompt names", "`in_run`"):
        assert title in page


def test_controls_score_what_they_say(work):
    db = attrdb.open(work / "removals.attrdb")
    scores = {
        (row["method_id"], row["sample_id"], row["candidate_id"]): row["score"]
        for row in db.sql("FROM scores").to_pylist()
    }
    visits = {
        row["image_id"]: row["n"]
        for row in db.sql("SELECT image_id, count(*) AS n FROM monitor_steps GROUP BY ALL").to_pylist()
    }
    samples = db.sql("SELECT image_id, model_id, prompt FROM samples WHERE split = 'test'").to_pylist()
    exemplars = db.sql("SELECT image_id, model_id, concept_id FROM exemplars WHERE split = 'test'").to_pylist()
    for sample, exemplar in product(samples, exemplars):
        key = sample["image_id"], exemplar["image_id"]
        if sample["model_id"] != exemplar["model_id"]:
            assert ("prompt", *key) not in scores
            continue
        named = exemplar["concept_id"].rpartition("/")[2] in sample["prompt"]
        assert (scores["prompt", *key] > 0) == named
        assert scores["visits", *key] == visits.get(exemplar["image_id"], 0)
        assert 0 <= scores["random", *key] < 1


def test_truth_is_kept_for_models_and_samples_that_are_the_same(programs, work, tmp_path):
    kept, file = programs["kept"], tmp_path / "truth.parquet"
    db = attrdb.open(shutil.copytree(work / "removals.attrdb", tmp_path / "removals.attrdb"))
    truth = "SELECT * FROM retrainings JOIN counterfactuals USING (retraining_id) ORDER BY retraining_id, sample_id"
    before = db.sql(truth).to_pylist()
    n = len({row["retraining_id"] for row in before})
    assert kept.keep(db, file) == n > 7
    assert kept.restore(db, file) == (0, 0)
    db.writer.delete("retrainings", "leave = 'concept'")
    db.writer.delete("counterfactuals", "retraining_id LIKE '%/concept/%'")
    db.refresh()
    assert kept.restore(db, file) == (4, 0)
    assert db.sql(truth).to_pylist() == before
    for table in ("retrainings", "counterfactuals"):
        db.writer.delete(table, "true")
    db.writer.update("models", "split = 'test'", {"weights_hash": "0" * 64})
    db.refresh()
    assert kept.restore(db, file) == (0, n)
    assert db.sql(truth).to_pylist() == []


def test_the_encoder_of_latents_has_those_that_the_model_sees(work):
    db = attrdb.open(work / "removals.attrdb")
    base = load_base_model("icon-sd")
    [sample_id, *_] = db.sql("SELECT image_id FROM samples ORDER BY image_id")["image_id"].to_pylist()
    for image_id, (image, _) in stored_pictures(db, [sample_id]).items():
        wanted = latents_of(base, image).flatten()
        assert db.feature(image_id, LATENTS) == pytest.approx((wanted / wanted.norm()).numpy(), abs=1e-5)
