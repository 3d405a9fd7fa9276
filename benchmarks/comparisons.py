"""Means and differences of methods over models and training seeds, with intervals, and a correction for many comparisons.

Values are arrays (n_seeds, n_models): of one method, by the seed that it was trained with and by model. A method that is not
trained has one seed. Samples of a model are not independent, so a model is what a bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

N_DRAWS = 10_000
FEWEST_MODELS = 5  # below, an interval or a test says nothing


@dataclass(frozen=True)
class Estimate:
    """A mean over models and seeds, and the middle 95 % of a bootstrap that draws both; p of the test that it is 0."""

    mean: float
    low: float
    high: float
    n_models: int
    n_seeds: int
    p: float | None = None


def mean_of(values: np.ndarray, seed: int = 0) -> Estimate:
    """The mean of a method."""
    n_seeds, n_models = values.shape
    draws = _drawn(values, *_picks(n_seeds, n_models, seed))
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(float(values.mean()), float(low), float(high), n_models, n_seeds)


def mean_with_interval(by_model: Sequence[float]) -> dict[str, Any]:
    """`mean_of` one figure per model, as JSON has it."""
    found = mean_of(np.array([by_model], float))
    return {"mean": found.mean, "interval": [found.low, found.high]}


def difference(one: np.ndarray, other: np.ndarray, seed: int = 0) -> Estimate:
    """What one method gains over another on the same models; each draws its own seeds.

    p: two-sided, by turning the signs of the models' differences; None for fewer than FEWEST_MODELS
    """
    rng = np.random.default_rng(seed)
    n_models = one.shape[1]
    models = rng.integers(n_models, size=(N_DRAWS, n_models))
    draws = [_drawn(values, rng.integers(len(values), size=(N_DRAWS, len(values))), models) for values in (one, other)]
    low, high = np.quantile(draws[0] - draws[1], (0.025, 0.975))
    by_model = one.mean(axis=0) - other.mean(axis=0)
    p = None
    if n_models >= FEWEST_MODELS:
        signs = rng.choice((-1.0, 1.0), size=(N_DRAWS, n_models))
        turned = np.abs(signs @ by_model) >= abs(by_model.sum()) - 1e-12
        p = float((1 + turned.sum()) / (1 + N_DRAWS))
    return Estimate(float(by_model.mean()), float(low), float(high), n_models, max(len(one), len(other)), p)


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


def _picks(n_seeds: int, n_models: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(N_DRAWS, n_seeds) and (N_DRAWS, n_models): the draws; those of models do not depend on the number of seeds."""
    rng = np.random.default_rng(seed)
    models = rng.integers(n_models, size=(N_DRAWS, n_models))
    return rng.integers(n_seeds, size=(N_DRAWS, n_seeds)), models


def _drawn(values: np.ndarray, seeds: np.ndarray, models: np.ndarray) -> np.ndarray:
    """(N_DRAWS,): the mean of each draw of seeds and models."""
    by_seed = np.stack([row[models].mean(axis=1) for row in values], axis=1)  # (N_DRAWS, n_seeds)
    drawn: np.ndarray = np.take_along_axis(by_seed, seeds, axis=1).mean(axis=1)
    return drawn
