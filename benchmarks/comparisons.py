"""Means and differences of methods over models and training seeds, with intervals, and a correction for many comparisons.

Values are arrays (n_seeds, n_models): of one method, by the seed that it was trained with and by model. A method that is not
trained has one seed. Samples of a model are not independent, and neither are models of one style: a bootstrap draws groups of
models. Without groups, each model is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

N_DRAWS = 10_000
N_FLIPS = 1_000_000  # of signs, in a test; where fewer are possible, each of them once
FLIPS_AT_ONCE = 100_000
FEWEST_GROUPS = 6  # below, no difference reaches p = 0.05


@dataclass(frozen=True)
class Estimate:
    """A mean over models and seeds, and the middle 95 % of a bootstrap that draws both; p of the test that it is 0."""

    mean: float
    low: float
    high: float
    n_models: int
    n_seeds: int
    p: float | None = None


def mean_of(values: np.ndarray, groups: Sequence[str] | None = None, seed: int = 0) -> Estimate:
    """The mean of a method. groups: of the models"""
    rng = np.random.default_rng(seed)
    sums, sizes = _by_group(values, groups)
    picks = rng.integers(len(sizes), size=(N_DRAWS, len(sizes)))
    low, high = np.quantile(_draws(sums, sizes, picks, rng), (0.025, 0.975))
    return Estimate(float(values.mean()), float(low), float(high), values.shape[1], len(values))


def mean_with_interval(by_model: Sequence[float]) -> dict[str, Any]:
    """`mean_of` one figure per model, as JSON has it."""
    found = mean_of(np.array([by_model], float))
    return {"mean": found.mean, "interval": [found.low, found.high]}


def difference(one: np.ndarray, other: np.ndarray, groups: Sequence[str] | None = None, seed: int = 0) -> Estimate:
    """What one method gains over another on the same models; each draws its own seeds.

    groups: of the models
    p:      two-sided, by flipping the signs of the groups' differences, means over seeds; None for fewer than FEWEST_GROUPS
    """
    rng = np.random.default_rng(seed)
    (sums, sizes), (other_sums, _) = _by_group(one, groups), _by_group(other, groups)
    picks = rng.integers(len(sizes), size=(N_DRAWS, len(sizes)))
    draws = _draws(sums, sizes, picks, rng) - _draws(other_sums, sizes, picks, rng)
    low, high = np.quantile(draws, (0.025, 0.975))
    p = _p_of(sums.mean(axis=0) - other_sums.mean(axis=0), rng) if len(sizes) >= FEWEST_GROUPS else None
    mean = one.mean() - other.mean()
    return Estimate(float(mean), float(low), float(high), one.shape[1], max(len(one), len(other)), p)


def _p_of(differences: np.ndarray, rng: np.random.Generator) -> float:
    """The share of all flips of the signs, or of N_FLIPS of them, at which the sum is at least as far from 0."""
    n, least = len(differences), abs(differences.sum()) - 1e-12 * np.abs(differences).sum()
    n_flips, is_exact = min(2**n, N_FLIPS), 2**n <= N_FLIPS
    n_far = 0
    for start in range(0, n_flips, FLIPS_AT_ONCE):
        size = min(FLIPS_AT_ONCE, n_flips - start)
        if is_exact:
            bits = np.arange(start, start + size)[:, None] >> np.arange(n) & 1
        else:
            bits = rng.integers(2, size=(size, n), dtype=np.int8)
        n_far += int((np.abs((1.0 - 2.0 * bits) @ differences) >= least).sum())
    return n_far / n_flips if is_exact else (1 + n_far) / (1 + n_flips)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p by name, corrected for their number: at most so often is any of those below a level below it by chance alone.

    source: Holm 1979
    """
    adjusted, largest = {}, 0.0
    ranked = sorted(p_values.items(), key=lambda item: item[1])
    for place, (name, p) in enumerate(ranked):
        largest = max(largest, min(1.0, p * (len(ranked) - place)))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def arranged(rows: Sequence[Mapping], value: str, models: Sequence[str]) -> np.ndarray:
    """(n_seeds, n_models): the values of one method from rows with seed, model_id and that column.

    raises: ValueError if a model or a seed lacks its value
    """
    seeds = sorted({row["seed"] for row in rows})
    found = np.full((len(seeds), len(models)), np.nan)
    at = {model_id: number for number, model_id in enumerate(models)}
    for row in rows:
        if row["model_id"] in at:
            found[seeds.index(row["seed"]), at[row["model_id"]]] = row[value]
    if np.isnan(found).any():
        raise ValueError(f"{int(np.isnan(found).sum())} of {found.size} values of {value} are missing")
    return found


def _by_group(values: np.ndarray, groups: Sequence[str] | None) -> tuple[np.ndarray, np.ndarray]:
    """(n_seeds, n_groups) and (n_groups,): the sum of each group's models, and their number."""
    if groups is None:
        return values, np.ones(values.shape[1])
    names, place = np.unique(np.array(groups), return_inverse=True)
    member = (place == np.arange(len(names))[:, None]).astype(float)
    return values @ member.T, member.sum(axis=1)


def _draws(sums: np.ndarray, sizes: np.ndarray, picks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N_DRAWS,): the mean over the models of each draw of groups, and over seeds that are drawn too."""
    n_models = sizes[picks].sum(axis=1)
    by_seed = np.stack([row[picks].sum(axis=1) / n_models for row in sums], axis=1)  # (N_DRAWS, n_seeds)
    seeds = rng.integers(len(sums), size=(N_DRAWS, len(sums)))
    drawn: np.ndarray = np.take_along_axis(by_seed, seeds, axis=1).mean(axis=1)
    return drawn
