"""The statistics of benchmarks: intervals that cover, tests that are level, and the correction for many of them."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import comparisons
from comparisons import N_FLIPS, arranged, difference, holm, mean_of


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_an_interval_covers_what_it_should(rng):
    """95 of 100 intervals of 40 models hold the true mean."""
    covered = 0
    for _ in range(200):
        found = mean_of(rng.normal(0.3, 0.2, (1, 40)))
        covered += found.low <= 0.3 <= found.high
    assert 180 <= covered <= 198


def test_seeds_that_differ_widen_the_interval(rng):
    models = rng.normal(0, 0.02, (1, 60))
    alike, apart = models.repeat(3, axis=0), models + np.array([[-0.2], [0.0], [0.2]])
    one, other = mean_of(alike), mean_of(apart)
    assert one.mean == pytest.approx(other.mean)
    assert other.high - other.low > 5 * (one.high - one.low)


def test_a_difference_is_paired_by_model(rng):
    """Models differ much, the gain is the same on each."""
    base = rng.uniform(0, 1, (1, 30))
    found = difference(base + 0.05, base)
    assert (found.mean, found.low, found.high) == pytest.approx((0.05, 0.05, 0.05))
    assert found.p == pytest.approx(1 / N_FLIPS, abs=5e-6)
    assert (found.n_models, found.n_seeds) == (30, 1)
    assert difference(base[:, :4] + 0.05, base[:, :4]).p is None


def test_all_flips_of_few_signs_are_taken():
    """Of 64 flips of six equal gains, two are at least as far from 0; whatever the unit of the gains is."""
    for unit in (0.1, 1e9 / 7):
        assert difference(np.full((1, 6), unit), np.zeros((1, 6))).p == 2 / 64
        gains = unit * np.array(
            [[3.0, 1, 1, 1, 1, -1]]
        )  # the sum is 6: 3 and three or more of the five ones, or all below 0
        assert difference(gains, np.zeros((1, 6))).p == 2 * 6 / 64
    assert difference(np.full((1, 5), 0.1), np.zeros((1, 5))).p is None


def test_random_flips_are_near_all_flips(rng, monkeypatch):
    gains = rng.normal(0.25, 1, (1, 14))
    exact = difference(gains, np.zeros((1, 14))).p
    monkeypatch.setattr(comparisons, "N_FLIPS", 16_000)
    monkeypatch.setattr(comparisons, "FLIPS_AT_ONCE", 3_000)
    found = difference(gains, np.zeros((1, 14))).p
    assert found != exact
    assert found == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 16_000) ** 0.5)


def test_models_of_one_group_count_as_one(rng):
    """Ten styles of four models each, whose models are alike: the interval is that of ten, and so is p."""
    of_styles = rng.normal(0.2, 0.2, (1, 10))
    models, groups = of_styles.repeat(4, axis=1), [f"style {number // 4}" for number in range(40)]
    apart, together, styles = mean_of(models), mean_of(models, groups), mean_of(of_styles)
    assert (together.mean, together.n_models) == (pytest.approx(styles.mean), 40)
    assert together.high - together.low == pytest.approx(styles.high - styles.low, rel=0.05)
    assert together.high - together.low > 1.7 * (apart.high - apart.low)
    found = difference(models, np.zeros((1, 40)), groups)
    assert found.p == difference(of_styles, np.zeros((1, 10))).p
    assert difference(models[:, :16], np.zeros((1, 16)), groups[:16]).p is None


def test_a_group_counts_by_its_models():
    """Groups of 1 and 3 models: the mean is over the four; draws are (a, a), (a, b), (b, a) and (b, b)."""
    found = mean_of(np.array([[1.0, 0.0, 0.0, 0.0]]), ["a", "b", "b", "b"])
    assert (found.mean, found.low, found.high) == (0.25, 0.0, 1.0)


def test_without_a_difference_one_test_in_twenty_is_below_its_level(rng):
    values = [difference(rng.normal(0, 1, (3, 12)), rng.normal(0, 1, (1, 12))).p for _ in range(300)]
    assert 5 <= sum(p < 0.05 for p in values) <= 28


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_values_are_arranged_by_seed_and_model():
    rows = [
        {"seed": seed, "model_id": model, "recall": 10 * seed + number}
        for seed in (1, 0)
        for number, model in enumerate("ab")
    ]
    np.testing.assert_array_equal(arranged(rows, "recall", ["b", "a"]), [[1, 0], [11, 10]])
    with pytest.raises(ValueError, match="1 of 4 values of recall are missing"):
        arranged(rows[1:], "recall", ["a", "b"])
