"""The mappers of the experiments: settings are chosen on validation models, then trained with every seed.

Temperature and learning rate lie on ladders with two rungs per decade. Which of two mappers of nearly equal mean log rank is
better is a matter of chance: seeds of one setting differ by 0.01 to 0.11.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from attrdb.database import Database
from attrdb.errors import InvalidValue
from attrdb.store.job_folders import train_job
from attrdb.store.methods import similarity_id
from attrdb.training.train import TrainResult, TrainSettings, train

BASE = TrainSettings()  # of all mappers, but for what is searched and what a variant changes
TEMPERATURES = (0.032, 0.1, 0.32, 1.0, 3.2)
RATES = (3.2e-5, 1e-4, 3.2e-4, 1e-3, 3.2e-3)
FIRST = range(1, 4)  # the rungs of both ladders that the search begins with
PREFERRED = (0.1, 1e-3)  # temperature and learning rate
CHANCE = 0.05  # of mean log rank; a smaller difference is not followed
SEEDS = (0, 1, 2)
PAPER_TEMPERATURE = 1.0  # of Wang et al. 2023

PLAIN, CHOSEN = "plain", "both"  # without a mapper; the chosen mapper, on both kinds of models
BY_KIND: dict[str, dict[str, Any]] = {"object": {"kind": "object"}, "style": {"kind": "style"}}
# Differences from the chosen mapper on both kinds.
ABLATIONS: dict[str, dict[str, Any]] = {
    "no-regularizer": {"lambda_reg": 0.0},
    "gain": {"form": "gain"},
    "mlp": {"form": "mlp"},
    "released-gain": {"form": "released-gain"},
    "released-mlp": {"form": "released-mlp"},
    "mild": {"augment": "mild"},
    "strong": {"augment": "strong"},
}
PAPER = "paper-temperature"  # a further ablation, unless that temperature is the chosen one
DIVERGED = ("the loss of epoch", "zero or not finite")  # what an error of a training that diverges says

Point = tuple[float, float]  # temperature and learning rate


@dataclass(frozen=True)
class Method:
    """What a row of the tables is about.

    encoder:    its spec
    variant:    PLAIN, CHOSEN, a kind of models that the mapper learned from alone, or an ablation
    method_ids: one per training seed; a single one without a mapper
    """

    encoder: str
    variant: str
    method_ids: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """A mapper that was trained, or that diverged, for a reason; then it has no figures."""

    encoder: str  # its spec
    variant: str
    temperature: float
    lr: float
    seed: int
    recall: float | None = None
    recall_before: float | None = None
    mean_log_rank: float | None = None
    mean_log_rank_before: float | None = None
    best_epoch: int | None = None
    n_epochs: int | None = None
    reason: str | None = None

    @property
    def figure(self) -> float:
        """What is compared: the mean log rank, infinite if the training diverged."""
        return math.inf if self.mean_log_rank is None else self.mean_log_rank


def search(attempt: Callable[[Point], float]) -> tuple[Point, dict[Point, float]]:
    """The chosen point, and the figures of all that were tried; lower is better.

    The grid grows by a rung beyond an edge whose best figure is better by CHANCE than that of all other points, until a
    ladder ends. Chosen is, among the points that are worse than the best by less than CHANCE, the one with the fewest rungs
    to PREFERRED; of several, the best.
    attempt: the figure of a point; infinite if its training diverged
    raises:  InvalidValue if all of them diverged
    """
    ladders = (TEMPERATURES, RATES)
    spans = [(FIRST[0], FIRST[-1])] * 2
    tried: dict[Point, float] = {}
    while True:
        rungs = [ladder[low : high + 1] for ladder, (low, high) in zip(ladders, spans, strict=True)]
        for point in product(*rungs):
            if point not in tried:
                tried[point] = attempt(point)
        if not any(map(math.isfinite, tried.values())):
            raise InvalidValue(f"all {len(tried)} trainings diverged; lower the learning rates")
        grown = [_grown(tried, axis, ladders[axis], spans[axis]) for axis in (0, 1)]
        if grown == spans:
            break
        spans = grown
    best = min(tried.values())
    near = [point for point, figure in tried.items() if figure < best + CHANCE]
    return min(near, key=lambda point: (_rungs_to_preferred(point), tried[point])), tried


def _grown(
    tried: Mapping[Point, float], axis: int, ladder: tuple[float, ...], span: tuple[int, int]
) -> tuple[int, int]:
    """The first and the last rung of an axis, one further where an edge is better than all other points."""

    def is_better(rung: int) -> bool:
        on_edge = min(figure for point, figure in tried.items() if point[axis] == ladder[rung])
        others = min((figure for point, figure in tried.items() if point[axis] != ladder[rung]), default=math.inf)
        return on_edge + CHANCE <= others and math.isfinite(on_edge)

    low, high = span
    return max(low - is_better(low), 0), min(high + is_better(high), len(ladder) - 1)


def _rungs_to_preferred(point: Point) -> int:
    return sum(
        abs(ladder.index(value) - ladder.index(preferred))
        for ladder, value, preferred in zip((TEMPERATURES, RATES), point, PREFERRED, strict=True)
    )


class Tuner:
    """Trains the mappers of an encoder, and knows all that was tried. A stored mapper is not trained again.

    log: takes a line per mapper
    """

    def __init__(self, db: Database, spec: str, encoder_id: str, log: Callable[[str], None]):
        self.db, self.spec, self.encoder_id, self.log = db, spec, encoder_id, log
        self.trials: dict[str, Trial] = {}  # by mapper_id
        self.diverged = _diverged(db)

    def choose(self) -> Point:
        """Temperature and learning rate, by mappers on both kinds, with the first seed."""
        chosen, _ = search(lambda point: self.trial(CHOSEN, point, SEEDS[0]).figure)
        self.log(f"{self.spec}: chosen are temperature {chosen[0]:g} and learning rate {chosen[1]:g}")
        return chosen

    def method(self, variant: str, point: Point, **changes: Any) -> Method | None:
        """Mappers of a variant with every seed; None if all of them diverged."""
        trials = {self.mapper_id(variant, point, seed): self.trial(variant, point, seed, **changes) for seed in SEEDS}
        trained = [mapper_id for mapper_id, trial in trials.items() if trial.reason is None]
        method_ids = tuple(similarity_id(self.encoder_id, mapper_id) for mapper_id in trained)
        return Method(self.spec, variant, method_ids) if trained else None

    def paper_point(self) -> Point:
        """The paper's temperature, with the learning rate that is best with it."""
        at_paper = [trial for trial in self.trials.values() if trial.temperature == PAPER_TEMPERATURE]
        best = min((trial for trial in at_paper if trial.variant == CHOSEN), key=lambda trial: trial.figure)
        return best.temperature, best.lr

    def mapper_id(self, variant: str, point: Point, seed: int) -> str:
        return f"{self.encoder_id}-{variant}-v{point[0]:g}-lr{point[1]:g}-s{seed}"

    def trial(self, variant: str, point: Point, seed: int, **changes: Any) -> Trial:
        """Train a mapper, unless it is stored, or known to diverge."""
        mapper_id = self.mapper_id(variant, point, seed)
        if mapper_id not in self.trials:
            settings = replace(BASE, temperature=point[0], lr=point[1], seed=seed, **changes)
            found = Trial(self.spec, variant, *point, seed)
            self.trials[mapper_id] = replace(found, **self._outcome(mapper_id, settings))
        return self.trials[mapper_id]

    def _outcome(self, mapper_id: str, settings: TrainSettings) -> dict[str, Any]:
        reason = self.diverged.get(mapper_id)
        if reason is None:
            try:
                result = train(self.db, self.encoder_id, settings, mapper_id)
            except InvalidValue as error:
                if not any(words in str(error) for words in DIVERGED):
                    raise
                train_job(self.db.path, mapper_id).remove()
                reason = str(error)
        if reason is None and not math.isfinite(result.mean_log_rank):
            reason = f"the mean log rank is {result.mean_log_rank}"
        if reason is not None:
            self.log(f"{mapper_id}: diverged, {reason}")
            return {"reason": reason}
        self.log(f"{mapper_id}: {_line(result)}")
        known = Trial.__dataclass_fields__.keys()
        return {name: value for name, value in asdict(result).items() if name in known}


def _line(result: TrainResult) -> str:
    ranks = (math.exp(figure) for figure in (result.mean_log_rank_before, result.mean_log_rank))
    return f"typical rank {' -> '.join(f'{rank:,.0f}' for rank in ranks)} in epoch {result.best_epoch}"


def _diverged(db: Database) -> dict[str, str]:
    """The reasons why earlier trainings diverged, by mapper_id."""
    rows = db.sql("SELECT job_id, message FROM jobs WHERE command = 'train' AND state = 'failed'").to_pylist()
    return {
        row["job_id"].removeprefix("train/"): row["message"]
        for row in rows
        if any(words in row["message"] for words in DIVERGED)
    }
