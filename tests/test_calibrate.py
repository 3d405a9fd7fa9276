"""Calibration: the divergence against a plain evaluation over the whole gallery, and that queries use what was fitted."""

import json
import math
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import rows

import attrdb
from attrdb.attribution.influence import influence
from attrdb.cli import main
from attrdb.errors import InvalidValue, NotFound
from attrdb.store.methods import DEFAULT_LAM, DEFAULT_TAU
from attrdb.training import calibrate as module
from attrdb.training.calibrate import calibrate, divergence_of, fit, reliability, similarities
from attrdb.training.train import TrainSettings, train


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Ten validation models of one to three exemplars on the circle, their samples nearby, and 400 pretraining images."""
    rng = np.random.default_rng(0)
    db = attrdb.create(tmp_path_factory.mktemp("calibrate") / "some.attrdb")
    db.writer.add_encoder("toy:2", 2, {}, "none")
    db.writer.append_images(
        rows([(f"p{n:03d}", "pretraining", None, d) for n, d in enumerate(rng.uniform(0, 360, 400))])
    )
    for number in range(20):
        model_id, at = f"m{number:02d}", rng.uniform(0, 360, 1 + number % 3)
        entries = [(f"{model_id}/e{n}", "exemplar", model_id, d) for n, d in enumerate(at)]
        entries += [(f"{model_id}/{n}/0", "sample", model_id, at[n % len(at)] + rng.normal(0, 2)) for n in range(6)]
        db.writer.append_model(
            rows(entries), {"model_id": model_id, "kind": "style", "split": "val" if number < 10 else "train"}
        )
    return db


@pytest.fixture
def db(made, tmp_path):
    """A copy that a test may change."""
    return attrdb.open(shutil.copytree(made.path, tmp_path / "copy.attrdb"))


def slow_divergence(db, tau, lam):
    """Sample by sample over its whole gallery."""
    found = db.sql(
        "SELECT i.image_id, i.role, i.model_id, toy_2, m.split FROM images AS i LEFT JOIN models AS m USING (model_id)"
    )
    images = found.to_pylist()
    divergences = []
    for sample in (one for one in images if one["role"] == "sample" and one["split"] == "val"):
        own = [one for one in images if one["role"] == "exemplar" and one["model_id"] == sample["model_id"]]
        gallery = own + [one for one in images if one["role"] == "pretraining"]
        similarity = np.array([np.dot(one["toy_2"], sample["toy_2"]) for one in gallery], np.float64)
        excess = np.exp((similarity - similarity.max()) / tau) - lam
        weight = np.logaddexp(0, 100 * excess) / 100
        share = weight / weight.sum()
        divergences.append(sum(1 / len(own) * math.log(1 / len(own) / share[n]) for n in range(len(own))))
    return float(np.mean(divergences))


def of(db):
    return similarities(db, "toy_2", None, "val", lambda *_: None)[0]


@pytest.mark.parametrize(("tau", "lam"), [(1.0, 0.0), (0.05, 0.05), (0.01, 0.5)])
def test_the_divergence_is_that_over_the_whole_gallery(db, monkeypatch, tau, lam):
    assert divergence_of(of(db), tau, lam) == pytest.approx(slow_divergence(db, tau, lam), rel=1e-5)
    monkeypatch.setattr(module, "KEPT", 40)
    monkeypatch.setattr(module, "SAMPLES_PER_PASS", 7)
    found = of(db)
    assert found.tail.sum() == 60 * (400 - 40)
    assert divergence_of(found, tau, lam) == pytest.approx(slow_divergence(db, tau, lam), rel=1e-4)


def test_a_bare_top_would_not_do(db, monkeypatch):
    """Thousands of low similarities weigh a little each, under a softplus."""
    monkeypatch.setattr(module, "KEPT", 40)
    found = of(db)
    cut = module.Similarities(found.own, found.top, np.zeros_like(found.tail))
    assert divergence_of(cut, 0.05, 0.02) < divergence_of(found, 0.05, 0.02) - 0.01


def test_what_is_fitted_is_a_minimum(db):
    found = of(db)
    tau, lam, kl = fit(found)
    assert kl < divergence_of(found, DEFAULT_TAU, DEFAULT_LAM)
    assert kl < divergence_of(found, 1.0, 0.0)
    for other_tau, other_lam in ((tau * 1.1, lam), (tau / 1.1, lam), (tau, min(0.999, lam * 1.1)), (tau, lam / 1.1)):
        assert divergence_of(found, other_tau, other_lam) >= kl - 1e-9


def test_the_fit_finds_the_lower_of_two_valleys():
    """Exemplars seldom come first, so that a large temperature is right; from the default one it is downhill to none."""
    rng = np.random.default_rng(0)
    own, top = rng.uniform(-0.5, 0.9, (40, 1)), np.sort(rng.uniform(-0.9, 0.95, (40, 200)))
    found = module.Similarities(own, top, np.zeros((40, module.BINS), np.int64))
    tau, lam, kl = fit(found)
    for other_tau in np.geomspace(1e-3, 10, 30):
        for other_lam in (1e-6, 0.001, 0.01, 0.05, 0.2, 0.5, 0.9):
            assert kl <= divergence_of(found, other_tau, other_lam) + 1e-3, (tau, lam, other_tau, other_lam)


def test_reliability_counts_every_candidate_once(db, monkeypatch):
    monkeypatch.setattr(module, "KEPT", 40)
    found = of(db)
    table = reliability(found, 0.05, 0.05)
    assert sum(row["n"] for row in table) == 60 * 400 + int(found.n_own.sum())
    assert sum(row["n"] * row["influence"] for row in table) == pytest.approx(60)
    assert sum(row["n"] * row["share"] for row in table) == pytest.approx(60)
    assert all(row["least"] <= row["influence"] <= row["most"] for row in table)


@pytest.mark.filterwarnings("error")
def test_a_bin_far_above_a_samples_best_counts_nothing():
    """At a small temperature its weight would be infinite, times the none of this sample's candidates in it."""
    own = np.array([[0.9], [0.1]])
    tail = np.zeros((2, module.BINS), np.int64)
    tail[[0, 1], [3600, 1000]] = 5  # at similarities of 0.76 and -0.51
    found = module.Similarities(own, np.full((2, 1), -np.inf), tail)
    assert divergence_of(found, 1e-4, 0.5) == pytest.approx(0, abs=1e-9)
    table = reliability(found, 1e-4, 0.5)
    assert [(row["n"], row["influence"], row["share"]) for row in table] == [(10, 0.0, 0.0), (2, 1.0, 1.0)]


def test_attribution_uses_what_was_fitted(db):
    before = db.attribute("m00/0/0", k=5)["influence"].to_pylist()
    assert before == db.attribute("m00/0/0", k=5, tau=DEFAULT_TAU, lam=DEFAULT_LAM)["influence"].to_pylist()
    found = calibrate(db)
    after = db.attribute("m00/0/0", k=5)
    assert after["influence"].to_pylist() != before
    assert after.equals(db.attribute("m00/0/0", k=5, tau=found.tau, lam=found.lam))
    said = db.sql("SELECT influence FROM attribute('m00/0/0', k := 5)")["influence"].to_pylist()
    assert said == after["influence"].to_pylist()
    named = db.query("influence", image_id="m00/0/0")["influence"].to_pylist()
    assert named[: len(said)] == [one for one in said if one > 0]
    fixed = db.query("influence", image_id="m00/0/0", tau=DEFAULT_TAU, lam=DEFAULT_LAM)["influence"].to_pylist()
    assert fixed[:5] == before
    [row] = db.sql("SELECT * FROM calibrations").to_pylist()
    assert (row["method_id"], row["tau"], row["lam"], row["kl"]) == ("toy_2", found.tau, found.lam, found.kl)
    assert (row["n_samples"], row["gallery_size"], row["split"]) == (60, 400, "val")
    assert json.loads(row["reliability"]) == {"before": found.reliability_before, "fitted": found.reliability}
    db.writer.append_images(rows([(f"q{n:03d}", "pretraining", None, n) for n in range(300)]))
    assert calibrate(db).gallery_size == 700
    assert len(db.sql("SELECT * FROM calibrations")) == 1


def test_influence_of_a_mapper_is_that_over_the_whole_gallery_whatever_k(db):
    mapper_id = train(db, settings=TrainSettings(kind="style", lr=0.05, batch=10, epochs=3)).mapper_id
    found = calibrate(db, mapper_id)
    mapper = db.mapper(mapper_id)
    images = db.sql("SELECT image_id, role, toy_2 FROM images ORDER BY image_id").to_pylist()
    gallery = [one for one in images if one["role"] != "sample"]
    [sample] = [one for one in images if one["image_id"] == "m03/1/0"]

    def mapped(of_images, how):
        return how(np.array([one["toy_2"] for one in of_images]), np.float64)

    similarity = mapped(gallery, mapper.exemplars) @ mapped([sample], mapper.samples)[0]
    direct = dict(zip([one["image_id"] for one in gallery], influence(similarity, found.tau, found.lam), strict=True))
    for k in (1, 5, 400):
        answer = db.attribute("m03/1/0", k=k, mapper_id=mapper_id)
        assert all(answer["complete"].to_pylist())
        for row in answer.to_pylist():
            assert row["influence"] == pytest.approx(direct[row["image_id"]], abs=1e-6)
    shares = db.query("influence", image_id="m03/1/0", mapper_id=mapper_id).to_pylist()
    assert sum(row["influence"] for row in shares) == pytest.approx(1)
    by_sql = db.sql(f"SELECT image_id FROM attribute('m03/1/0', k := 5, mapper_id := '{mapper_id}')")
    assert by_sql["image_id"].to_pylist() == answer["image_id"].to_pylist()[:5]


def test_what_cannot_be_calibrated(db, toy):
    with pytest.raises(InvalidValue, match="split is 'test': test models are for evaluation"):
        calibrate(db, split="test")
    with pytest.raises(InvalidValue, match="no model with 'toy_2' features in split 'nowhere'"):
        calibrate(db, split="nowhere")
    with pytest.raises(NotFound, match="no method 'x'"):
        calibrate(db, "x")
    with pytest.raises(NotFound, match="no mapper 'x'"):
        db.attribute("m00/0/0", mapper_id="x")


def test_the_command(db):
    done = CliRunner().invoke(main, ["calibrate", str(db.path), "--quiet"])
    assert done.exit_code == 0, done.output
    assert "without a cut-off; 60 samples among 400 pretraining images" in done.stderr
    assert done.stdout.split()[:5] == ["least", "most", "n", "influence", "share"]
    assert CliRunner().invoke(main, ["attribute", str(db.path), "m00/0/0", "--json"]).exit_code == 0
