"""Train an attribution model: a mapper whose cosines follow the scores of a method that watched training, such as `in_run`.

It then scores samples by their pictures alone, also those of models that nobody has watched. The idea of an attribution model
that is trained on an attribution table is that of MONTRAGE (Brokman et al., ECCV 2024); their model and loss are not public.
This one is ours: both sides of the mapper are the identity plus a matrix of low rank. The step is kept whose cosines have the
greatest rank correlation with the scores of validation models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from attrdb.attribution.methods import method_rows, resolve_method
from attrdb.database import Database
from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.score import BUILT_IN
from attrdb.progress import Progress, no_progress
from attrdb.search import index_tuning
from attrdb.search.mapper import SIDES, Mapper
from attrdb.store import jobs
from attrdb.store.job_folders import check_same_settings, train_job
from attrdb.store.locks import exclusive_lock
from attrdb.training.attribution_table import Table
from attrdb.training.checks import check_choice, check_numbers, check_splits
from attrdb.training.mapper_rows import default_mapper_id, store_mapper, stored_texts
from attrdb.training.objective import regularizer
from attrdb.training.table_losses import LOSSES, OUTLIERS, Batch

TRAINED_ON = "attribution-table"
FORM = "affine"
STEPS_PER_VALIDATION = 10


@dataclass(frozen=True)
class TableSettings:
    """All that decides an attribution model, except the database.

    target:      the method whose scores it learns
    loss:        see `attrdb.training.table_losses`
    temperature: v of the losses that have one
    rank:        of the matrix that is added to the identity
    lambda_reg:  weight of the regularizer
    n_others:    exemplars of other models for each sample
    steps:       at most; each takes `batch` samples
    patience:    training ends after so many steps without a better rank correlation in validation
    """

    target: str = "in_run"
    loss: str = "soft"
    split: str = "train"
    val_split: str = "val"
    temperature: float = 0.1
    rank: int = 16
    lambda_reg: float = 0.05
    lr: float = 1e-3
    batch: int = 64
    n_others: int = 32
    steps: int = 300
    patience: int = 100
    seed: int = 0


@dataclass(frozen=True)
class TableResult:
    """An attribution model that was trained.

    trained:     False if it was stored already, with these settings
    correlation: mean over validation models of the mean rank correlation of their samples; `_before`: of the encoder alone
    """

    mapper_id: str
    trained: bool
    best_step: int
    correlation: float
    correlation_before: float


def train_on_table(
    db: Database,
    encoder_id: str | None = None,
    settings: TableSettings | None = None,
    mapper_id: str | None = None,
    report: Progress = no_progress,
) -> TableResult:
    """Train an attribution model and store it in `mappers`. A run that was killed starts again, and ends in the same model.

    mapper_id: None makes one from encoder and settings
    raises:    InvalidValue for an id or settings that cannot be used, a mapper of that id with other settings, splits without
               scored models, missing features, or a loss that is not finite; NotFound for an unknown encoder or method;
               Busy if another process trains the mapper
    source:    after Brokman et al. 2024; model and losses are ours, see the module
    """
    settings = settings or TableSettings()
    _check(settings)
    db.refresh()
    encoder_id = db.encoder_id(encoder_id)
    target = _resolved(db, settings.target)
    if method_rows(db.snapshot)[target]["kind"] == "similarity":
        raise InvalidValue(
            f"method {target!r} compares features; name one with scores, made by attrdb score {db.path} NAME"
        )
    record = {"on": TRAINED_ON, "encoder_id": encoder_id, "stopped_by": "correlation", **asdict(settings)}
    if mapper_id is None:
        mapper_id = default_mapper_id(encoder_id, "table", record)
    with exclusive_lock(train_job(db.path, mapper_id).lock, f"mapper {mapper_id!r} is being trained"):
        if stored := _stored(db, mapper_id, record):
            return stored
        with jobs.running(db.writer, "train", mapper_id, record):
            result = _trained(db, encoder_id, settings, mapper_id, record, report)
    index_tuning.measure_trained(db.writer, mapper_id)
    return result


class LowRankMap(torch.nn.Module):
    """One side of the mapper: x -> x (I + V U^T) + b, of unit length; it starts at the identity."""

    def __init__(self, dimension: int, rank: int):
        super().__init__()
        self.u = torch.nn.Parameter(torch.zeros(dimension, rank))
        self.v = torch.nn.Parameter(torch.randn(dimension, rank) / dimension**0.5)
        self.bias = torch.nn.Parameter(torch.zeros(dimension))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(features + (features @ self.v) @ self.u.T + self.bias, dim=1)

    def weight(self) -> torch.Tensor:
        """(dimension, dimension): the matrix of `Map` in the objective of mappers."""
        return torch.eye(len(self.u)) + self.u @ self.v.T

    def deviation(self) -> torch.Tensor:
        """||W^T W - I||_F of the weight W, from products of its thin factors."""
        # W^T W - I = [V U] K [V U]^T with W = I + U V^T.
        thin, rank = torch.cat([self.v, self.u], 1), self.u.shape[1]
        core = torch.zeros(2 * rank, 2 * rank)
        core[:rank, :rank] = self.u.T @ self.u
        core[:rank, rank:] = core[rank:, :rank] = torch.eye(rank)
        product = (thin.T @ thin) @ core
        return ((product @ product).trace().clamp(min=0) + 1e-12).sqrt()


class LowRankMaps(torch.nn.ModuleDict):
    """Both sides, by seed."""

    def __init__(self, dimension: int, rank: int, seed: int):
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            super().__init__({side: LowRankMap(dimension, rank) for side in SIDES})

    def arrays(self) -> dict[str, np.ndarray]:
        """The `parameters` of a mapper of FORM."""
        arrays = {}
        for side in SIDES:
            arrays[f"{side}.weight"] = self[side].weight().detach().numpy()
            arrays[f"{side}.bias"] = self[side].bias.detach().numpy().copy()
        return arrays


def _resolved(db: Database, target: str) -> str:
    """raises: NotFound, with the command that makes the scores of a built-in method"""
    scorer = target.replace("_", "-")
    if scorer in BUILT_IN and target not in method_rows(db.snapshot):
        raise NotFound(f"{db.path} has no scores by {target!r}; make them first: attrdb score {db.path} {scorer}")
    return resolve_method(db.snapshot, target)


def _trained(
    db: Database, encoder_id: str, settings: TableSettings, mapper_id: str, record: dict, report: Progress
) -> TableResult:
    table = Table(db, encoder_id, settings.target, settings.split)
    validation = Table(db, encoder_id, settings.target, settings.val_split)
    if table.n_models < 2:
        raise InvalidValue(
            f"only one model of split {settings.split!r} has scores by {settings.target!r}; training compares models, so it "
            "needs at least two"
        )
    maps = LowRankMaps(table.samples.shape[1], settings.rank, settings.seed)

    def mapper() -> Mapper:
        return Mapper(mapper_id, encoder_id, FORM, maps.arrays())

    curves: list[dict[str, Any]] = [{"step": 0, "loss": None, "correlation": validation.correlation(None)}]
    best, best_row = mapper(), curves[0]
    for step, loss in _steps(table, maps, settings):
        if step % STEPS_PER_VALIDATION and step != settings.steps:
            continue
        curves.append({"step": step, "loss": loss, "correlation": validation.correlation(mapper())})
        if curves[-1]["correlation"] > best_row["correlation"]:
            best, best_row = mapper(), curves[-1]
        values = " -> ".join(f"{row['correlation']:.3f}" for row in (curves[0], best_row, curves[-1]))
        report("train", step, settings.steps, f"rank correlation {values} (before, best, now)")
        if step - best_row["step"] >= settings.patience:
            break
    metrics = {
        "best_step": best_row["step"],
        "correlation": best_row["correlation"],
        "correlation_before": curves[0]["correlation"],
        "n_samples": len(table.samples),
        "n_models": table.n_models,
        "n_validation_samples": len(validation.samples),
    }
    store_mapper(db, best, TRAINED_ON, record, curves, metrics)
    return _result(mapper_id, True, metrics)


def _steps(table: Table, maps: LowRankMaps, settings: TableSettings) -> Iterator[tuple[int, float]]:
    """Train; yields the number of each step and its loss."""
    logits = torch.nn.Parameter(torch.tensor([-5.0, 10.0]))
    optimizer = torch.optim.Adam([*maps.parameters(), logits], lr=settings.lr)
    random = torch.Generator().manual_seed(settings.seed)
    targets = table.shares(), table.scaled(), table.ranks()
    for step in range(1, settings.steps + 1):
        rows = torch.randperm(len(table.samples), generator=random)[: settings.batch]
        loss = LOSSES[settings.loss](
            _batch(table, targets, rows, maps, logits, settings.n_others, random), settings.temperature
        )
        if settings.lambda_reg:
            loss = loss + settings.lambda_reg * regularizer(maps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if not math.isfinite(loss.item()):
            raise InvalidValue(
                f"the loss of step {step} is {loss.item()}; lower the learning rate (lr, {settings.lr:g} now)"
            )
        yield step, loss.item()


def _batch(
    table: Table,
    targets: Sequence[torch.Tensor],
    rows: torch.Tensor,
    maps: LowRankMaps,
    logits: torch.Tensor,
    n_others: int,
    random: torch.Generator,
) -> Batch:
    """Some samples against the exemplars of their models, and against others that are drawn for each of them."""
    held, columns = table.held[rows], table.columns[rows]
    first, counts = columns[:, :1], held.sum(1, keepdim=True)
    # Of the other exemplars, which are those before a model's own and those behind them.
    chance = torch.rand(len(rows), n_others, generator=random)
    drawn_others = (chance * (len(table.exemplars) - counts)).long()
    drawn_others += counts * (drawn_others >= first)
    used, places = torch.cat([columns[held], drawn_others.flatten()]).unique(return_inverse=True)
    row_of, _ = held.nonzero(as_tuple=True)
    own_places, other_places = places[: len(row_of)], places[len(row_of) :].reshape(len(rows), n_others)

    def spread(values: torch.Tensor) -> torch.Tensor:
        whole = torch.zeros(len(rows), len(used), dtype=values.dtype)
        whole[row_of, own_places] = values[held]
        return whole

    def marked(places: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(len(rows), len(used), dtype=torch.bool)
        at, place = which.nonzero(as_tuple=True)
        mask[at, places[at, place]] = True
        return mask

    drawn = torch.multinomial(held.float(), 1, generator=random)
    everyone = torch.ones(len(rows), n_others, dtype=torch.bool)
    few = torch.arange(n_others) < (OUTLIERS * counts).ceil()
    shares, scaled, ranks = (spread(values[rows]) for values in targets)
    return Batch(
        cosines=maps["sample"](table.samples[rows]) @ maps["exemplar"](table.exemplars[used]).T,
        own=spread(held),
        others=marked(other_places, everyone),
        outliers=marked(other_places, few),
        shares=shares,
        scaled=scaled,
        ranks=ranks,
        drawn=torch.searchsorted(used, columns.gather(1, drawn)[:, 0]),
        models=table.models[rows],
        logits=logits,
    )


def _check(settings: TableSettings) -> None:
    """raises: InvalidValue for settings that cannot be used; reads nothing"""
    check_choice("loss", settings.loss, LOSSES)
    check_splits(settings.split, settings.val_split)
    check_numbers(settings, {"lambda_reg": 0, "batch": 2, "rank": 1, "n_others": 1, "steps": 1, "patience": 1})


def _stored(db: Database, mapper_id: str, record: dict) -> TableResult | None:
    """The result of a mapper that is stored; None if it is not. raises: InvalidValue if it has other settings"""
    if (stored := stored_texts(db, mapper_id)) is None:
        return None
    settings, metrics, _ = stored
    check_same_settings("mapper", mapper_id, settings, record, f"in {db.path}")
    return _result(mapper_id, False, metrics)


def _result(mapper_id: str, trained: bool, metrics: dict) -> TableResult:
    return TableResult(mapper_id, trained, metrics["best_step"], metrics["correlation"], metrics["correlation_before"])
