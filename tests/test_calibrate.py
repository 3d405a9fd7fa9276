"""Calibration: the divergence against a plain evaluation over the whole gallery, and that queries use what was fitted."""

import json
import math
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import rows

import attrdb
from attrdb.attribution.batch import attribute_samples
from attrdb.attribution.influence import Calibrated, influence
from attrdb.attribution.query import AttributionRequest
from attrdb.cli import main
from attrdb.errors import InvalidValue, NotFound
from attrdb.store.methods import DEFAULT_LAM, DEFAULT_TAU
from attrdb.training import calibrate as module
from attrdb.training import influence_fit
from attrdb.training.calibrate import calibrate, scores_of
from attrdb.training.influence_fit import Scores, divergence_of, fit, held_out_reliability, reliability
from attrdb.training.train import TrainSettings, train

WITHOUT = Calibrated(1.0, 0.0)
SOME = [WITHOUT, Calibrated(0.05, 0.05, 0.2), Calibrated(0.01, 0.5, 0.6)]


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


@pytest.fixture
def of_two_kinds(db):
    """Models of one exemplar are of kind object, and their samples are a tenth as far from it as those of styles."""
    for number in range(20, 28):
        model_id, at = f"o{number}", 13.0 * number
        entries = [(f"{model_id}/e0", "exemplar", model_id, at)]
        entries += [(f"{model_id}/{n}/0", "sample", model_id, at + 0.2 * (n - 2.5)) for n in range(6)]
        db.writer.append_model(rows(entries), {"model_id": model_id, "kind": "object", "split": "val"})
    return db


def slow_divergence(db, calibrated):
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
        share = influence(similarity, *calibrated) + calibrated.unattributed / len(gallery)
        assert share.sum() == pytest.approx(1)
        divergences.append(sum(1 / len(own) * math.log(1 / len(own) / share[n]) for n in range(len(own))))
    return float(np.mean(divergences))


def of(db):
    return scores_of(db, "toy_2", "val")[0]


@pytest.mark.parametrize("calibrated", SOME)
def test_the_divergence_is_that_over_the_whole_gallery(db, monkeypatch, calibrated):
    assert divergence_of(of(db), calibrated) == pytest.approx(slow_divergence(db, calibrated), rel=1e-5)
    for part in (influence_fit, module):
        monkeypatch.setattr(part, "KEPT", 40)
    monkeypatch.setattr(module, "SAMPLES_PER_PASS", 7)
    found = of(db)
    assert found.tail.sum() == 60 * (400 - 40)
    assert divergence_of(found, calibrated) == pytest.approx(slow_divergence(db, calibrated), rel=1e-3)


def test_an_exemplar_without_influence_costs_infinitely_much_unless_some_is_unattributed(db):
    found = of(db)
    assert divergence_of(found, Calibrated(0.001, 0.9)) == math.inf
    assert divergence_of(found, Calibrated(0.001, 0.9, 0.5)) < 10


def test_what_is_fitted_is_a_minimum(db):
    found = of(db)
    fitted, kl = fit(found)
    assert kl == divergence_of(found, fitted) < min(divergence_of(found, one) for one in SOME)
    tau, lam, unattributed = fitted
    for other in (
        Calibrated(tau * 1.1, lam, unattributed),
        Calibrated(tau / 1.1, lam, unattributed),
        Calibrated(tau, min(0.999, lam * 1.1), unattributed),
        Calibrated(tau, lam / 1.1, unattributed),
        Calibrated(tau, lam, unattributed * 1.1),
        Calibrated(tau, lam, unattributed / 1.1),
    ):
        if other.lam >= influence_fit.LEAST_LAM:
            assert divergence_of(found, other) >= kl - 1e-4


def test_the_fit_finds_the_lower_of_two_valleys():
    """Exemplars seldom come first, so that a large temperature is right; from the default one it is downhill to none."""
    rng = np.random.default_rng(0)
    own, top = rng.uniform(-0.5, 0.9, (40, 1)), np.sort(rng.uniform(-0.9, 0.95, (40, 200)))
    found = Scores(np.arange(40), own, top, np.zeros((40, influence_fit.BINS), np.int64))
    fitted, kl = fit(found)
    divergence = influence_fit._Divergence(found)
    for tau in np.geomspace(1e-3, 10, 30):
        for lam in (0.001, 0.01, 0.05, 0.2, 0.5, 0.9):
            least, other = divergence(tau, lam)
            assert kl <= least + 1e-3, (fitted, other)


def test_at_most_some_candidates_have_influence():
    """Exemplars a little better than most: a large temperature would spread influence over all of 20,000 candidates."""
    rng = np.random.default_rng(0)
    own = rng.normal(0.1, 0.1, (40, 1))
    scores = np.sort(rng.normal(0, 0.12, (40, 20_000)))
    bins = ((scores[:, :-1000] + 1) * (influence_fit.BINS / 2)).astype(int)
    tail = np.stack([np.bincount(row, minlength=influence_fit.BINS) for row in bins])
    found = Scores(np.arange(40), own, scores[:, -1000:], tail)
    (tau, lam, unattributed), _ = fit(found)
    best = np.maximum(own[:, 0], scores[:, -1])
    assert (scores > (best + tau * np.log(lam))[:, None]).sum(axis=1).mean() <= 0.0101 * 20_000
    assert unattributed > 0.5


def test_the_unattributed_share_is_that_of_exemplars_that_nothing_tells_from_others():
    """Of 400 samples a quarter resemble their exemplar, the others any candidate."""
    rng = np.random.default_rng(0)
    own = np.where(np.arange(400) % 4 == 0, 0.25, rng.uniform(-0.9, 0.2, 400))[:, None]
    top = np.sort(rng.uniform(-0.9, 0.2, (400, 300)))
    found = Scores(np.arange(400), own, top, np.zeros((400, influence_fit.BINS), np.int64))
    (_, _, unattributed), _ = fit(found)
    assert unattributed == pytest.approx(0.75, abs=0.06)


def test_reliability_counts_every_candidate_once(db, monkeypatch):
    for part in (influence_fit, module):
        monkeypatch.setattr(part, "KEPT", 40)
    found = of(db)
    table = reliability(found, Calibrated(0.05, 0.05, 0.1))
    assert sum(row["n"] for row in table) == 60 * 400 + int(found.n_own.sum())
    assert sum(row["n"] * row["influence"] for row in table) == pytest.approx(0.9 * 60)
    assert sum(row["n"] * row["share"] for row in table) == pytest.approx(60)
    assert all(row["least"] <= row["influence"] <= row["most"] for row in table)


def test_held_out_reliability_is_that_of_each_half_by_the_other(db):
    found = of(db)
    held_out = held_out_reliability(found)
    assert sum(row["n"] for row in held_out) == 60 * 400 + int(found.n_own.sum())
    assert sum(row["n"] * row["share"] for row in held_out) == pytest.approx(60)
    halves = [found.of(f"m{n:02d}" for n in range(first, 10, 2)) for first in (0, 1)]
    by_other = reliability(halves[0], fit(halves[1])[0]) + reliability(halves[1], fit(halves[0])[0])
    top = [row for row in by_other if row["most"] == held_out[-1]["most"]]
    assert held_out[-1]["n"] == sum(row["n"] for row in top)
    share = sum(row["n"] * row["share"] for row in top) / held_out[-1]["n"]
    assert held_out[-1]["share"] == pytest.approx(share)
    assert held_out_reliability(found.of(["m00"])) == []


@pytest.mark.filterwarnings("error")
def test_a_bin_far_above_a_samples_best_counts_nothing():
    """At a small temperature its weight would be infinite, times the none of this sample's candidates in it."""
    own = np.array([[0.9], [0.1]])
    tail = np.zeros((2, influence_fit.BINS), np.int64)
    tail[[0, 1], [3600, 1000]] = 5  # at similarities of 0.76 and -0.51
    found = Scores(np.array(["a", "b"]), own, np.full((2, 1), -np.inf), tail)
    sharp = Calibrated(1e-4, 0.5)
    assert divergence_of(found, sharp) == pytest.approx(0, abs=1e-9)
    table = reliability(found, sharp)
    assert [(row["n"], row["influence"], row["share"]) for row in table] == [(10, 0.0, 0.0), (2, 1.0, 1.0)]


def test_attribution_uses_what_was_fitted(db):
    before = db.attribute("m00/0/0", k=5)["influence"].to_pylist()
    assert before == db.attribute("m00/0/0", k=5, tau=DEFAULT_TAU, lam=DEFAULT_LAM)["influence"].to_pylist()
    [found] = calibrate(db)
    after = db.attribute("m00/0/0", k=5)
    assert after["influence"].to_pylist() != before
    whole = db.attribute("m00/0/0", k=5, tau=found.tau, lam=found.lam)["influence"].to_pylist()
    assert after["influence"].to_pylist() == pytest.approx([(1 - found.unattributed) * one for one in whole])
    assert after["missing_influence"].to_pylist() == pytest.approx([found.unattributed] * 5)
    assert all(after["complete"].to_pylist())
    said = db.sql("SELECT influence FROM attribute('m00/0/0', k := 5)")["influence"].to_pylist()
    assert said == after["influence"].to_pylist()
    named = db.query("influence", image_id="m00/0/0")["influence"].to_pylist()
    assert named[: len(said)] == [one for one in said if one > 0]
    assert sum(named) == pytest.approx(1 - found.unattributed)
    fixed = db.query("influence", image_id="m00/0/0", tau=DEFAULT_TAU, lam=DEFAULT_LAM)["influence"].to_pylist()
    assert fixed[:5] == before
    [row] = db.sql("SELECT * FROM calibrations").to_pylist()
    assert (row["method_id"], row["kind"], row["tau"], row["lam"]) == ("toy_2", None, found.tau, found.lam)
    assert (row["unattributed"], row["kl"]) == (found.unattributed, found.kl)
    assert (row["n_samples"], row["gallery_size"], row["split"]) == (60, 400, "val")
    tables = {"before": found.reliability_before, "fitted": found.reliability, "held_out": found.held_out}
    assert json.loads(row["reliability"]) == tables
    db.writer.append_images(rows([(f"q{n:03d}", "pretraining", None, n) for n in range(300)]))
    [again] = calibrate(db)
    assert again.gallery_size == 700
    assert len(db.sql("SELECT * FROM calibrations")) == 1


def test_what_is_unattributed_is_a_row_of_the_shares(db):
    [found] = calibrate(db)
    shares = db.query("influence_shares", per="role", samples="model_id = 'm00'").to_pylist()
    assert sum(row["share"] for row in shares) == pytest.approx(1)
    assert shares[-1]["part"] == "unattributed"
    assert shares[-1]["share"] == pytest.approx(found.unattributed)


def test_each_kind_of_models_has_its_fit(of_two_kinds):
    db = of_two_kinds
    both, objects, styles = calibrate(db)
    assert [one.kind for one in (both, objects, styles)] == [None, "object", "style"]
    assert (objects.n_samples, styles.n_samples, both.n_samples) == (48, 60, 108)
    assert objects.kl < styles.kl
    assert objects.kl * 48 + styles.kl * 60 <= both.kl * 108 + 1e-6
    rows_of = db.sql("SELECT calibration_id, kind, tau FROM calibrations ORDER BY ALL").to_pylist()
    assert rows_of == [
        {"calibration_id": "toy_2", "kind": None, "tau": both.tau},
        {"calibration_id": "toy_2:object", "kind": "object", "tau": objects.tau},
        {"calibration_id": "toy_2:style", "kind": "style", "tau": styles.tau},
    ]
    for image, fitted in (("o20/0/0", objects), ("m00/0/0", styles), ("p000", both), ("m00/e0", both)):
        answer = db.attribute(image, k=3)
        whole = db.attribute(image, k=3, tau=fitted.tau, lam=fitted.lam)["influence"].to_pylist()
        assert answer["influence"].to_pylist() == pytest.approx([(1 - fitted.unattributed) * one for one in whole])
    by_feature = db.attribute(db.feature("o20/0/0"), k=1)
    assert by_feature["missing_influence"][0].as_py() == pytest.approx(both.unattributed)
    # In one statement, each sample has that of its kind.
    said = db.sql(
        "SELECT samples.image_id, sum(influence) AS influence "
        "FROM samples, attribute(samples.image_id, k := NULL) WHERE samples.image_id IN ('o20/0/0', 'm00/0/0') "
        "GROUP BY ALL ORDER BY ALL"
    )
    assert said["influence"].to_pylist() == pytest.approx([1 - styles.unattributed, 1 - objects.unattributed])


def test_stored_attributions_are_made_again_where_their_calibration_is_another(of_two_kinds):
    db = of_two_kinds
    request = AttributionRequest(k=2)
    assert attribute_samples(db.writer, "true", request).n_done == 168
    calibrate(db)
    assert attribute_samples(db.writer, "true", request).n_done == 168
    assert attribute_samples(db.writer, "true", request).n_done == 0
    stored = db.sql(
        "SELECT DISTINCT kind, attributions.tau, attributions.lam, attributions.unattributed FROM attributions "
        "JOIN samples ON samples.image_id = sample_id JOIN models USING (model_id) ORDER BY kind"
    ).to_pylist()
    fitted = "SELECT kind, tau, lam, unattributed FROM calibrations WHERE kind IS NOT NULL ORDER BY kind"
    assert stored == db.sql(fitted).to_pylist()
    # A fit of one kind leaves none of the other.
    db.writer.delete("models", "kind = 'object'")
    db.refresh()
    assert [one.kind for one in calibrate(db)] == [None]
    assert db.sql("SELECT kind FROM calibrations")["kind"].to_pylist() == [None]


def test_influence_of_a_mapper_is_that_over_the_whole_gallery_whatever_k(db):
    mapper_id = train(db, settings=TrainSettings(kind="style", lr=0.05, batch=10, epochs=3)).mapper_id
    [found] = calibrate(db, mapper_id)
    mapper = db.mapper(mapper_id)
    images = db.sql("SELECT image_id, role, toy_2 FROM images ORDER BY image_id").to_pylist()
    gallery = [one for one in images if one["role"] != "sample"]
    [sample] = [one for one in images if one["image_id"] == "m03/1/0"]

    def mapped(of_images, how):
        return how(np.array([one["toy_2"] for one in of_images]), np.float64)

    similarity = mapped(gallery, mapper.exemplars) @ mapped([sample], mapper.samples)[0]
    direct = dict(zip([one["image_id"] for one in gallery], influence(similarity, *found.calibrated), strict=True))
    for k in (1, 5, 400):
        answer = db.attribute("m03/1/0", k=k, mapper_id=mapper_id)
        assert all(answer["complete"].to_pylist())
        for row in answer.to_pylist():
            assert row["influence"] == pytest.approx(direct[row["image_id"]], abs=1e-6)
    shares = db.query("influence", image_id="m03/1/0", mapper_id=mapper_id).to_pylist()
    assert sum(row["influence"] for row in shares) == pytest.approx(1 - found.unattributed)
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


def test_the_command(of_two_kinds):
    path = str(of_two_kinds.path)
    done = CliRunner().invoke(main, ["calibrate", path, "--quiet"])
    assert done.exit_code == 0, done.output
    said = done.stderr.splitlines()
    assert len(said) == 3
    assert said[0].startswith("tau ")
    assert said[1].startswith("object models: tau ")
    assert said[0].endswith("with nothing unattributed; 108 samples among 400 pretraining images")
    assert "of influence cannot be attributed" in said[0]
    assert done.stdout.split()[:7] == ["kind", "measured_on", "least", "most", "n", "influence", "share"]
    assert CliRunner().invoke(main, ["attribute", path, "m00/0/0", "--json"]).exit_code == 0
    status = CliRunner().invoke(main, ["status", path]).stdout
    assert "influence by method toy_2, samples of object models: tau " in status
