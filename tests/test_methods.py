"""Attribution methods: how they are named, and a method of another package, from its installation to the report."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import rows

import attrdb
from attrdb.attribution.batch import attribute_samples
from attrdb.attribution.methods import resolve_method
from attrdb.attribution.query import AttributionRequest
from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.score import score
from attrdb.search.mapper import Mapper
from attrdb.store.methods import similarity_row
from attrdb.training.calibrate import calibrate
from attrdb.training.evaluate import evaluate


class Shared:
    """Scores by the number of characters that two ids share at their start, but for the pairs of `special`."""

    unit, lowest, highest, tau, lam = "characters", 0.0, None, 2.0, 0.0

    def __init__(self, special=None):
        self.special, self.settings = special or {}, {"version": 1}

    def scores(self, db, sample_ids):
        def shared(one, other):
            return next(
                (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
            )

        candidates = db.sql("SELECT image_id FROM images WHERE role IN ('exemplar', 'pretraining') ORDER BY image_id")[
            "image_id"
        ].to_pylist()
        for sample in sample_ids:
            pairs = [(one, self.special.get((sample, one), shared(sample, one))) for one in candidates]
            pairs = [(one, value) for one, value in pairs if value is not None]
            ids, values = zip(*pairs, strict=True) if pairs else ((), ())
            yield pa.table(
                {
                    "sample_id": pa.array([sample] * len(ids), pa.string()),
                    "candidate_id": pa.array(ids, pa.string()),
                    "score": pa.array(values, pa.float64()),
                }
            )


@pytest.fixture
def scored(toy):
    score(toy, "shared", Shared({("m/0/1", "p10"): 9.0, ("m/0/1", "m/e0"): 4.0, ("m/0/1", "p90"): None}))
    return toy


# --- names -----------------------------------------------------------------------------------------------------------


def flat(db, mapper_id="flat"):
    arrays = {f"{side}.{name}": np.ones(2, np.float32) for side in ("exemplar", "sample") for name in ("gain", "bias")}
    db.writer.add_mapper(Mapper(mapper_id, "toy_2", "gain", arrays).row())


def test_a_method_is_named_by_its_own_id_an_encoder_or_a_mapper(toy):
    flat(toy)
    snapshot = toy.snapshot
    assert list(toy.methods) == ["toy_2", "toy_2/flat"]
    assert {resolve_method(snapshot, name) for name in (None, "toy_2")} == {"toy_2"}
    assert {resolve_method(snapshot, name) for name in ("flat", "toy_2/flat")} == {"toy_2/flat"}
    assert resolve_method(snapshot, None, "toy_2", "flat") == resolve_method(snapshot, "flat", "toy_2") == "toy_2/flat"


def test_names_that_do_not_go_together(toy, scored):
    flat(toy)
    snapshot = toy.snapshot
    with pytest.raises(NotFound, match=r"no method 'toy2' in .*; nearest: 'toy_2'"):
        resolve_method(snapshot, "toy2")
    with pytest.raises(InvalidValue, match="method 'shared' has no encoder; give the method alone"):
        resolve_method(snapshot, "shared", "toy_2")
    with pytest.raises(InvalidValue, match="method 'flat' is of mapper 'flat', not of 'other'"):
        resolve_method(snapshot, "flat", None, "other")


def test_the_row_of_a_method_that_was_not_written_is_not_missed(toy):
    """Adding a mapper was killed between its two rows, or the moment that is read has no table of methods."""
    flat(toy)
    before = toy.sql("SELECT * EXCLUDE (created_at) FROM methods").to_pylist()
    toy.writer.delete("methods", "true")
    assert toy.sql("SELECT * EXCLUDE (created_at) FROM methods").to_pylist() == before
    toy.writer.add_method(similarity_row("gone_3"))
    assert list(toy.methods) == ["toy_2", "toy_2/flat"]  # of an encoder that was never added


# --- stored scores, by hand --------------------------------------------------------------------------------------------


def test_a_stored_method_attributes(scored):
    found = scored.attribute("m/0/1", method="shared", k=3).to_pylist()
    assert [(row["image_id"], row["score"], row["similarity"]) for row in found] == [
        ("p10", 9.0, None),
        ("m/e0", 4.0, None),
        ("m/e40", 2.0, None),
    ]
    weights = np.exp((np.array([9.0, 4.0, 2.0, 0.0]) - 9) / 2)  # p20 shares nothing, p90 has no score
    np.testing.assert_allclose([row["influence"] for row in found], (weights / weights.sum())[:3])
    assert all(row["complete"] for row in found)
    by_sql = scored.sql("FROM attribute('m/0/1', k := 3, method := 'shared')").to_pylist()
    assert [row["influence"] for row in by_sql] == [row["influence"] for row in found]
    only = scored.attribute("m/0/1", method="shared", candidates="role = 'exemplar'", k=5)
    assert only["image_id"].to_pylist() == ["m/e0", "m/e40"]
    named = scored.query("influence_by_model", image_id="m/0/1", method="shared").to_pylist()
    assert [(row["model_id"], row["n_candidates"]) for row in named] == [(None, 2), ("m", 2)]


def test_what_a_stored_method_cannot_attribute(scored):
    with pytest.raises(NotFound, match="image 'p10' has no score by 'shared' yet"):
        scored.attribute("p10", method="shared")
    with pytest.raises(NotFound, match="no image 'nobody'"):
        scored.attribute("nobody", method="shared")
    with pytest.raises(InvalidValue, match="method 'shared' has scores of stored samples only"):
        scored.attribute(np.ones(2, np.float32), method="shared")
    with pytest.raises(InvalidValue, match=r"k is 11, .* has 4 candidates with a score by 'shared'; ask for 4 at most"):
        scored.attribute("m/0/1", method="shared", k=11)


def test_its_ranks_and_metrics(scored):
    assert evaluate(scored, "shared") == 4
    ranks = scored.sql("SELECT sample_id, exemplar_id, score, rank, gallery_size FROM exemplar_ranks ORDER BY ALL")
    assert [tuple(row.values()) for row in ranks.to_pylist()] == [
        ("m/0/1", "m/e0", 4.0, 2, 4),
        ("m/0/1", "m/e40", 2.0, 3, 4),
        ("m/0/2", "m/e0", 2.0, 1, 5),
        ("m/0/2", "m/e40", 2.0, 2, 5),
    ]
    [recall] = scored.query("recall_at_k", k=1).to_pylist()
    assert (recall["method_id"], recall["encoder_id"], recall["recall_at_k"]) == ("shared", None, 0.25)
    evaluate(scored)
    assert [row["method_id"] for row in scored.query("recall_at_k", k=1).to_pylist()] == ["toy_2", "shared"]
    assert (
        len(scored.query("compare_methods", method="shared", other="toy_2", k=1)) == 1
    )  # m/0/2, ranked among 5 by both


def test_an_exemplar_without_a_score_counts_as_not_found(toy):
    score(toy, "shared", Shared({("m/0/1", "m/e40"): None, ("m/0/2", "m/e40"): None}))
    evaluate(toy, "shared")
    [recall] = toy.query("recall_at_k", k=5).to_pylist()
    assert (recall["recall_at_k"], recall["n_unranked"]) == (0.5, 2)


def test_its_attributions_are_stored_and_its_influence_is_calibrated(scored):
    assert attribute_samples(scored.writer, "true", AttributionRequest(method="shared", k=2)).n_done == 2
    assert attribute_samples(scored.writer, "true", AttributionRequest(method="shared", k=2)).n_done == 0
    stored = scored.sql("FROM attributions WHERE sample_id = 'm/0/1' ORDER BY rank").to_pylist()
    assert [(row["candidate_id"], row["score"], row["encoder_id"], row["similarity"]) for row in stored] == [
        ("p10", 9.0, None, None),
        ("m/e0", 4.0, None, None),
    ]
    scored.writer.upsert(
        "models", [{"model_id": "m", "kind": "style", "split": "val", "n_exemplars": 2, "n_samples": 2}]
    )
    [found] = calibrate(scored, "shared")
    assert found.kl <= found.kl_before
    assert scored.sql("SELECT method_id, tau, encoder_id FROM calibrations").to_pylist() == [
        {"method_id": "shared", "tau": found.tau, "encoder_id": None}
    ]


# --- scoring ---------------------------------------------------------------------------------------------------------


def test_scoring_again_scores_what_is_new(scored):
    asked = []
    again = Shared()
    again.scores = lambda db, ids: asked.extend(ids) or Shared().scores(db, ids)
    scored.writer.append_model(rows([("n/0/1", "sample", "n", 1), ("n/e", "exemplar", "n", 1)]), {"model_id": "n"})
    result = score(scored, "shared", again)
    assert (asked, result.n_done, result.n_stored) == (["n/0/1"], 1, 2)


def test_a_sample_without_a_score_stops_no_other(toy):
    nothing = {("m/0/1", one): None for one in ("p10", "p20", "p90", "m/e0", "m/e40")}
    result = score(toy, "shared", Shared(nothing))
    assert (result.n_done, len(result.failures)) == (1, 1)
    assert toy.sql("SELECT item, reason FROM failures").to_pylist() == [
        {"item": "m/0/1", "reason": "shared gives it no score"}
    ]
    assert score(toy, "shared", Shared()).n_done == 1
    assert len(toy.sql("FROM failures")) == 0


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"sample_id": ["m/0/1"], "candidate_id": ["p10"]}, "scores need the columns"),
        ({"sample_id": ["m/0/1"], "candidate_id": ["p10"], "score": [float("nan")]}, "it must be finite"),
        ({"sample_id": ["m/0/1"], "candidate_id": ["p10"], "score": [None]}, "it must be finite"),
        (
            {"sample_id": ["m/0/1"], "candidate_id": ["m/0/2"], "score": [1.0]},
            "candidate_id 'm/0/2', which is not an exemplar",
        ),
        (
            {"sample_id": ["p10"], "candidate_id": ["p10"], "score": [1.0]},
            "sample_id 'p10', which is not a sample that",
        ),
        (
            {"sample_id": ["m/0/1"] * 2, "candidate_id": ["p10"] * 2, "score": [1.0, 2.0]},
            "'m/0/1' and 'p10' more than once",
        ),
    ],
)
def test_scores_that_cannot_be_stored(toy, table, message):
    bad = Shared()
    bad.scores = lambda db, ids: [pa.table(table)]
    with pytest.raises(InvalidValue, match=message):
        score(toy, "bad", bad)
    assert len(toy.sql("FROM scores")) == 0


def test_a_package_whose_code_fails_is_named(toy):
    broken = Shared()
    broken.scores = lambda db, ids: iter([1 / 0])
    with pytest.raises(InvalidValue, match="method 'broken' fails with ZeroDivisionError: division by zero"):
        score(toy, "broken", broken)


def test_attributions_are_stored_to_all_candidates(toy):
    attribute_samples(toy.writer, "true", AttributionRequest(k=1, candidates="image_id = 'p90'"))
    assert toy.sql("SELECT candidate_id FROM attributions ORDER BY sample_id")["candidate_id"].to_pylist() == [
        "m/e0",
        "m/e40",
    ]


def test_other_settings_are_another_method(scored):
    other = Shared()
    other.settings = {"version": 2}
    with pytest.raises(
        InvalidValue, match=r"has a method 'shared' with other settings .*; name this one with --method-id"
    ):
        score(scored, "shared", other)
    with pytest.raises(InvalidValue, match="has a method 'toy_2' with other settings"):
        score(scored, "shared", other, method_id="toy_2")
    with pytest.raises(InvalidValue, match=r"method id '\.\./up'"):
        score(scored, "shared", other, method_id="../up")
    with pytest.raises(NotFound, match=r"no sample of .* fulfils 'false'"):
        score(scored, "shared", other, "false", "more")


# --- a method of another package ---------------------------------------------------------------------------------------

PLUGIN = Path(__file__).read_text().split("class Shared:")[1].split("@pytest.fixture")[0]


def test_an_installed_package_adds_a_method(toy, tmp_path):
    """Installed with pip, it writes scores, is evaluated and calibrated, and stands beside similarity in the report."""
    source, site = tmp_path / "shared", tmp_path / "site"
    source.mkdir()
    (source / "shared_start.py").write_text(
        f"import os\nimport pyarrow as pa\n\n\nclass Shared:{PLUGIN}\n\ndef make(argument):\n    return Shared()\n\n\n"
        "def broken(argument):\n    raise OSError('no weights')\n"
    )
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "shared-start"\nversion = "1"\n[project.entry-points."attrdb.methods"]\n'
        'shared = "shared_start:make"\nbroken = "shared_start:broken"\nnone = "shared_start:os"\n'
        '[tool.setuptools]\npy-modules = ["shared_start"]\n'
    )
    pip = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([sys.executable, *pip, str(source)], check=True)
    toy.writer.upsert("models", [{"model_id": "m", "kind": "style", "split": "val", "n_exemplars": 2, "n_samples": 2}])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))}

    def attrdb_says(command, *words):
        line = [sys.executable, "-m", "attrdb", command, str(toy.path), *words]
        return subprocess.run(line, env=environment, capture_output=True, text=True)

    for name, said in (
        ("broken", "method 'broken' of package shared-start fails with OSError: no weights"),
        ("none", "method 'none' of package shared-start fails with TypeError"),
        ("nothing", "no method 'nothing' to score with; known: in-run, gradient-dot, "),
    ):
        done = attrdb_says("score", name)
        assert (done.returncode, said in done.stderr, "Traceback" in done.stderr) == (1, True, False), done.stderr
    done = attrdb_says("score", "shared")
    assert (done.returncode, done.stderr) == (0, "2 samples scored by shared, 0 were already\n")
    assert "2 were already" in attrdb_says("score", "shared").stderr
    for words in (
        ("evaluate",),
        ("calibrate", "--method", "shared"),
        ("report", "--out", str(tmp_path / "report.html")),
    ):
        done = attrdb_says(*words)
        assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text()
    assert {"toy_2", "shared"} <= set(re.findall(r'<td class="name">(\w+)</td>', page))
    alone = attrdb_says("report", "--method", "shared", "--out", str(tmp_path / "alone.html"))
    assert alone.returncode == 0, alone.stderr
    shown = set(re.findall(r'<td class="name">(\w+)</td>', (tmp_path / "alone.html").read_text()))
    assert shown & {"shared", "toy_2"} == {"shared"}
    rows = json.loads(attrdb_says("methods", "--json").stdout)
    assert [(row["method_id"], row["kind"], row["calibrated"]) for row in rows] == [
        ("toy_2", "similarity", False),
        ("shared", "stored", True),
    ]
    first = json.loads(attrdb_says("attribute", "m/0/2", "--method", "shared", "-k", "1", "--json").stdout)
    assert (first[0]["image_id"], first[0]["score"], first[0]["similarity"]) == ("m/e0", 2.0, None)
    # The scores stay when the package goes.
    shutil.rmtree(site)
    assert json.loads(attrdb_says("attribute", "m/0/2", "--method", "shared", "-k", "1", "--json").stdout) == first
    assert attrdb.open(toy.path).sql("SELECT count(*) AS n FROM scores")["n"].to_pylist() == [10]


# --- the page ----------------------------------------------------------------------------------------------------------


def test_the_examples_of_the_page_run(toy):
    page = (
        (Path(__file__).parent.parent / "docs" / "methods.md").read_text(encoding="utf-8").replace("pixels_8", "toy_2")
    )
    evaluate(toy)
    for statement in re.findall(r"```sql\n(.*?)```", page, re.S):
        assert len(toy.sql(statement))
    names: dict = {}
    [example] = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(compile(example, "methods.md", "exec"), names)
    assert score(toy, "brightness", names["Brightness"]()).n_done == 2
    assert toy.attribute("m/0/1", method="brightness", k=1)["image_id"].to_pylist() == ["m/e0"]  # cos 2 is near cos 0
