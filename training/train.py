"""Train a mapper on the pairs of a database's models, and keep the epoch that ranks the exemplars of validation models best.

The best epoch has the lowest mean logarithm of these ranks. Recall@10 is reported too, but does not see exemplars rise from
rank 5,000 to 50, as those of styles do: it stays at 0, and training would stop too early.

A job that was killed resumes at its last epoch when it is rerun, and ends in the same mapper.

<database>/jobs/.train-<mapper_id>/   settings.json, checkpoint.pt, features.f32; features.mild or .strong with augmentation
"""

from __future__ import annotations

import io
import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attrdb.database import Database
from attrdb.errors import InvalidValue
from attrdb.progress import Progress, no_progress
from attrdb.search import index_tuning
from attrdb.search.mapper import Mapper
from attrdb.store import jobs
from attrdb.store.files import write_whole
from attrdb.store.job_folders import JobFolder, check_same_settings, train_job
from attrdb.store.locks import exclusive_lock
from attrdb.store.predicates import among
from attrdb.training.augment import AUGMENTS
from attrdb.training.checks import check_choice, check_numbers, check_splits
from attrdb.training.evaluate import features_by_model, ranks
from attrdb.training.mapper_rows import default_mapper_id, store_mapper, stored_texts
from attrdb.training.objective import Maps, contrastive_loss, regularizer
from attrdb.training.pairs import Choice, Pairs

K = 10  # of the validation recall
STOPPED_BY = "mean_log_rank"  # one of a mapper's settings; an earlier attrdb stopped by recall
KINDS = ("object", "style", "both")
PROMPT_SCHEMES = ("gpt", "procedural", "both")


@dataclass(frozen=True)
class TrainSettings:
    """All that decides a mapper, except the database.

    kind:           of the models that it learns from: object, style, or both
    form:           of the maps, see `objective.STORED_FORMS`
    temperature:    v of Eq. 3; the paper has 1
    lambda_reg:     weight of the regularizer; the paper has 0.05
    lr, batch:      of Adam; the paper does not state them
    epochs:         at most; each takes every sample once
    patience:       training ends after so many epochs without a better mean log rank in validation
    n_candidates:   pretraining images in the gallery of validation, a fixed random part
    augment:        of the training images, see `attrdb.training.augment`; validation images are not augmented
    """

    kind: str = "both"
    form: str = "affine"
    prompt_scheme: str = "both"
    split: str = "train"
    val_split: str = "val"
    temperature: float = 0.1
    lambda_reg: float = 0.05
    lr: float = 1e-4
    batch: int = 256
    epochs: int = 100
    patience: int = 10
    n_candidates: int = 10_000
    augment: str = "none"
    seed: int = 0

    def choice(self) -> Choice:
        return Choice(self.kind, self.split, self.prompt_scheme, self.seed)


@dataclass(frozen=True)
class TrainResult:
    """A mapper that was trained.

    trained:               False if it was stored already, with these settings
    recall, mean_log_rank: on the validation models, with the mapper, see `Validation.measure`; `_before`: without it
    """

    mapper_id: str
    trained: bool
    n_epochs: int
    best_epoch: int
    recall: float
    recall_before: float
    mean_log_rank: float
    mean_log_rank_before: float


def train(
    db: Database,
    encoder_id: str | None = None,
    settings: TrainSettings | None = None,
    mapper_id: str | None = None,
    report: Progress = no_progress,
) -> TrainResult:
    """Train a mapper and store it in `mappers`.

    mapper_id: None makes one from encoder, kind and settings
    raises:    InvalidValue for an id (`ids.check_id`) or settings that cannot be used, a mapper of that id with other
               settings, splits that are empty, equal, or kept for tests, a single model, missing features, or a loss that
               is not finite; NotFound for an unknown encoder; Busy if another process trains the mapper
    source:    Wang et al. 2023, section 4; learning rate, batch size and stopping are ours
    """
    settings = settings or TrainSettings()
    _check(settings)
    db.refresh()
    _check_splits(db, settings)
    encoder_id = db.encoder_id(encoder_id)
    record = {"encoder_id": encoder_id, "stopped_by": STOPPED_BY, **asdict(settings)}
    if mapper_id is None:
        mapper_id = default_mapper_id(encoder_id, settings.kind, record)
    job = train_job(db.path, mapper_id)
    if stored := _stored(db, mapper_id, record):
        return stored
    with exclusive_lock(job.lock, f"mapper {mapper_id!r} is being trained"):
        if stored := _stored(db, mapper_id, record):
            return stored
        with jobs.running(db.writer, "train", mapper_id, record):
            _begin(job, mapper_id, record)
            training = _Training(db, encoder_id, settings, mapper_id, job.path)
            training.run(report)
            result = _store(training, record)
        job.remove()
    index_tuning.measure_trained(db.writer, mapper_id)
    return result


class _Training:
    """A mapper in training: its maps, their best state so far, and the results of validation after each epoch (`curves`)."""

    def __init__(self, db: Database, encoder_id: str, settings: TrainSettings, mapper_id: str, folder: Path):
        self.db, self.encoder_id, self.settings, self.mapper_id = db, encoder_id, settings, mapper_id
        self.checkpoint = folder / "checkpoint.pt"
        self.validation = Validation(db, encoder_id, settings)
        self.pairs = Pairs(db, encoder_id, settings.choice(), folder / "features.f32", settings.augment)
        self.maps = Maps(settings.form, db.encoders[encoder_id]["dimension"], settings.seed)
        self.optimizer = torch.optim.Adam(self.maps.parameters(), lr=settings.lr)
        if self.checkpoint.exists():
            self._resume()
        else:
            self.curves: list[dict[str, Any]] = [{"epoch": 0, "loss": None, **self.validation.measure(None)}]
            self._keep_maps()

    @property
    def best(self) -> dict[str, Any]:
        """The epoch with the lowest mean log rank; the first of equal ones. Epoch 0 is the features without a mapper."""
        epochs = self.curves if self.maps.starts_at_identity else self.curves[1:] or self.curves
        return min(epochs, key=lambda epoch: (epoch["mean_log_rank"], epoch["epoch"]))

    @property
    def is_over(self) -> bool:
        last = self.curves[-1]["epoch"]
        return last >= self.settings.epochs or last - self.best["epoch"] >= self.settings.patience

    def mapper(self) -> Mapper:
        return Mapper(self.mapper_id, self.encoder_id, self.maps.form, self.maps.arrays())

    def run(self, report: Progress) -> None:
        """Train until it is over; the maps are then those of the best epoch."""
        self._report(report)
        while not self.is_over:
            epoch = self.curves[-1]["epoch"] + 1
            loss = _epoch(self.pairs, self.maps, self.optimizer, self.settings, epoch)
            self.curves.append({"epoch": epoch, "loss": loss, **self.validation.measure(self.mapper())})
            if self.best["epoch"] == epoch:
                self._keep_maps()
            self._save()
            self._report(report)
        self.maps.load_state_dict(self.best_maps)

    def metrics(self) -> dict:
        """Results of validation in the best epoch and before training, and the numbers of pairs and samples."""
        best, before = self.best, self.curves[0]
        return {
            "best_epoch": best["epoch"],
            **{name: best[name] for name in VALIDATED},
            **{f"{name}_before": before[name] for name in VALIDATED},
            "k": K,
            "n_pairs": self.pairs.n_pairs,
            "n_validation_samples": self.validation.n_samples,
        }

    def _report(self, report: Progress) -> None:
        note = _note(self.curves[0], self.best, self.curves[-1])
        report("train", self.curves[-1]["epoch"], self.settings.epochs, note)

    def _keep_maps(self) -> None:
        self.best_maps = {name: value.clone() for name, value in self.maps.state_dict().items()}

    def _resume(self) -> None:
        """raises: InvalidValue if the images that it learned from have changed, or if the checkpoint is damaged"""
        try:
            state = torch.load(self.checkpoint, weights_only=True)
            pairs = state["pairs"]
            self.maps.load_state_dict(state["maps"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.curves, self.best_maps = state["curves"], state["best"]
        except Exception as error:  # a file that is cut off or overwritten raises anything
            raise InvalidValue(
                f"the checkpoint {self.checkpoint} is damaged; delete {self.checkpoint.parent} to start again"
            ) from error
        if pairs != self.pairs.digest:
            raise InvalidValue(
                f"the images that mapper {self.mapper_id!r} learns from have changed since its training began; delete "
                f"{self.checkpoint.parent} to start again"
            )

    def _save(self) -> None:
        state = {
            "maps": self.maps.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curves": self.curves,
            "best": self.best_maps,
            "pairs": self.pairs.digest,
        }
        encoded = io.BytesIO()  # torch reports a full disk as it likes
        torch.save(state, encoded)
        write_whole(self.checkpoint, lambda part: part.write_bytes(encoded.getbuffer()))


def _store(training: _Training, record: dict) -> TrainResult:
    metrics, curves = training.metrics(), training.curves
    store_mapper(training.db, training.mapper(), training.settings.kind, record, curves, metrics)
    return _result(training.mapper_id, True, metrics, curves)


def _result(mapper_id: str, trained: bool, metrics: dict, curves: list[dict]) -> TrainResult:
    measured = {name: metrics[name] for figure in VALIDATED for name in (figure, f"{figure}_before")}
    return TrainResult(mapper_id, trained, curves[-1]["epoch"], metrics["best_epoch"], **measured)


def _note(before: dict, best: dict, now: dict) -> str:
    epochs = (before, best, now)
    ranks = " -> ".join(f"{math.exp(epoch['mean_log_rank']):,.0f}" for epoch in epochs)
    recalls = " -> ".join(f"{epoch['recall']:.3f}" for epoch in epochs)
    return f"typical rank {ranks}, recall@{K} {recalls} (before, best, now)"


def _epoch(pairs: Pairs, maps: Maps, optimizer: torch.optim.Optimizer, settings: TrainSettings, epoch: int) -> float:
    """Train on every sample once; the mean loss of the batches."""
    losses = []
    for exemplars, samples in pairs.batches(epoch, settings.batch):
        t, s = maps["exemplar"](torch.from_numpy(exemplars)), maps["sample"](torch.from_numpy(samples))
        loss = contrastive_loss(t, s, settings.temperature)
        if settings.lambda_reg:
            loss = loss + settings.lambda_reg * regularizer(maps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise InvalidValue(
                f"the loss of epoch {epoch} is {losses[-1]}; lower the learning rate (lr, {settings.lr:g} now)"
            )
    return float(np.mean(losses))


VALIDATED = ("recall", "mean_log_rank")


class Validation:
    """Ranks the exemplars of each validation model among these and a fixed part of the pretraining images.

    raises: InvalidValue if there is no validation model, or no pretraining image
    """

    def __init__(self, db: Database, encoder_id: str, settings: TrainSettings):
        kinds = _kinds(settings)
        known = db.sql("SELECT model_id, kind FROM models WHERE split = $split", {"split": settings.val_split})
        kind_of = {row["model_id"]: row["kind"] for row in known.to_pylist() if row["kind"] in kinds}
        of_models = among("model_id", sorted(kind_of))
        by_model = {
            role: features_by_model(db, encoder_id, f"role = '{role}' AND {of_models}")
            for role in ("sample", "exemplar")
        }
        names = sorted(by_model["sample"].keys() & by_model["exemplar"].keys())
        if not names:
            raise InvalidValue(
                f"no model{_of_kind(settings)} with {encoder_id!r} features in split {settings.val_split!r} of "
                f"{db.path}; training needs some to choose the epoch (--val-split)"
            )
        self.models = [(by_model["sample"][name], by_model["exemplar"][name]) for name in names]
        schemes = db.images(f"role = 'sample' AND {of_models}", ["image_id", "model_id", "prompt_scheme"]).to_pylist()
        self.case_of = {row["image_id"]: (kind_of[row["model_id"]], row["prompt_scheme"]) for row in schemes}
        self.gallery = [
            (batch["image_id"], batch["feature"].flatten().to_numpy().reshape(batch.num_rows, -1))
            for batch in db.stream_query(
                "validation_candidates", encoder_id=encoder_id, n=settings.n_candidates, seed=settings.seed
            )
        ]
        if not sum(len(ids) for ids, _ in self.gallery):
            raise InvalidValue(
                f"{db.path} has no pretraining image with a {encoder_id!r} feature; ingest a corpus first"
            )

    @property
    def n_samples(self) -> int:
        return sum(len(ids) for (ids, _), _ in self.models)

    def measure(self, mapper: Mapper | None) -> dict[str, float]:
        """recall (at K) and mean_log_rank (natural logarithm), over the exemplars of a sample; None: without a mapper.

        Both are averaged over the samples of a kind and prompt scheme, then over kinds and schemes, as in the paper.
        """
        ranks_of: dict[str, list[int]] = defaultdict(list)
        for row in ranks(self.models, self.gallery, own=True, mapper=mapper):
            ranks_of[row["sample_id"]].append(row["rank"])
        cases: dict[tuple, list[tuple[float, float]]] = defaultdict(list)
        for sample_id, sample_ranks in ranks_of.items():
            rank = np.array(sample_ranks)
            cases[self.case_of[sample_id]].append((float(np.mean(rank <= K)), float(np.mean(np.log(rank)))))
        means = np.mean([np.mean(figures, axis=0) for figures in cases.values()], axis=0)
        return dict(zip(VALIDATED, means.tolist(), strict=True))


def _check_splits(db: Database, settings: TrainSettings) -> None:
    """raises: InvalidValue for a split without enough models, before anything is read of their images"""
    counts = db.sql("SELECT kind, split, count(*) AS n FROM models GROUP BY ALL ORDER BY ALL").to_pylist()
    kinds = _kinds(settings)
    for option, split, least, purpose in (
        ("--split", settings.split, 2, "compares pairs of different models"),
        ("--val-split", settings.val_split, 1, "needs others to choose the epoch"),
    ):
        n_models = sum(row["n"] for row in counts if row["split"] == split and row["kind"] in kinds)
        if n_models < least:
            stored = ", ".join(f"{row['n']} of kind {row['kind']!r} in split {row['split']!r}" for row in counts)
            raise InvalidValue(
                f"{n_models or 'no'} model{'s' * (n_models != 1)}{_of_kind(settings)} in split {split!r} of {db.path}; "
                f"training {purpose}, so it needs at least {least}; its models: {stored or 'none'}. Name another split with "
                f"{option}, or move models: attrdb models set {db.path} MODEL_ID --split {split}"
            )


def _of_kind(settings: TrainSettings) -> str:
    return "" if settings.kind == "both" else f" of kind {settings.kind!r}"


def _kinds(settings: TrainSettings) -> tuple[str, ...]:
    return ("object", "style") if settings.kind == "both" else (settings.kind,)


def _check(settings: TrainSettings) -> None:
    """raises: InvalidValue for settings that cannot be used; reads nothing"""
    for name, value, allowed in (
        ("kind", settings.kind, KINDS),
        ("prompt_scheme", settings.prompt_scheme, PROMPT_SCHEMES),
        ("augment", settings.augment, AUGMENTS),
    ):
        check_choice(name, value, allowed)
    check_splits(settings.split, settings.val_split)
    check_numbers(settings, {"lambda_reg": 0, "batch": 2, "epochs": 1, "patience": 1, "n_candidates": 1})


def _begin(job: JobFolder, mapper_id: str, record: dict) -> None:
    """Store the settings in the job's folder, or compare them with those that the job began with."""
    job.make()
    begun = job.read_settings()
    if begun is None:
        job.write_settings(record)
    else:
        _check_same(mapper_id, begun, record, f"half trained in {job.path} (delete that folder to start again)")


def _check_same(mapper_id: str, stored: dict, wanted: dict, where: str) -> None:
    """raises: InvalidValue, as `check_same_settings`, and for a mapper of attrdb before 0.1"""
    if "stopped_by" not in stored:
        raise InvalidValue(
            f"mapper {mapper_id!r} is {where}, made by an earlier attrdb that stopped training by recall@{K}, not by "
            "ranks; keep it, or train a new one with another --mapper-id"
        )
    check_same_settings("mapper", mapper_id, stored, wanted, where)


def _stored(db: Database, mapper_id: str, record: dict) -> TrainResult | None:
    """The result of a mapper that is stored; None if it is not.

    raises: InvalidValue if it was trained with other settings
    """
    if (stored := stored_texts(db, mapper_id)) is None:
        return None
    settings, metrics, curves = stored
    _check_same(mapper_id, settings, record, f"in {db.path}")
    return _result(mapper_id, False, metrics, curves)
