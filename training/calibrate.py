"""Calibrate influence: fit what brings it closest to the exemplars' known shares (see `influence_fit`).

Models of different kinds have different numbers of exemplars, and their samples resemble these differently. So there is one
fit for all, and one per kind.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from attrdb.attribution.influence import Calibrated
from attrdb.attribution.methods import load_method, model_kinds, resolve_method
from attrdb.attribution.protocol import Method
from attrdb.attribution.similarity import Similarity
from attrdb.database import Database
from attrdb.errors import InvalidValue
from attrdb.progress import Progress, no_progress
from attrdb.search.mapper import Mapper
from attrdb.store.features import Block
from attrdb.store.predicates import among
from attrdb.training.checks import check_learned
from attrdb.training.evaluate import features_by_model
from attrdb.training.influence_fit import (
    BINS,
    KEPT,
    Scores,
    bin_centres,
    divergence_of,
    fit,
    held_out_reliability,
    reliability,
)

SAMPLES_PER_PASS = 512


@dataclass(frozen=True)
class Calibration:
    """tau, lam and the unattributed share, and their divergence, on the samples of the fit.

    kind:        of the models whose samples these are; None: all
    kl:          in nats
    kl_before:   the same with tau_before (1 for cosines), no cut-off and nothing unattributed; None if it is infinite
    reliability, reliability_before: one row per bin of influence, see `reliability`
    held_out:    the same, on each half of the models with what is fitted on the other half; empty for a single model
    """

    kind: str | None
    tau: float
    lam: float
    unattributed: float
    kl: float
    tau_before: float
    kl_before: float | None
    n_samples: int
    gallery_size: int
    reliability: list[dict]
    reliability_before: list[dict]
    held_out: list[dict]

    @property
    def calibrated(self) -> Calibrated:
        return Calibrated(self.tau, self.lam, self.unattributed)


def calibrate(
    db: Database,
    method: str | None = None,
    split: str = "val",
    report: Progress = no_progress,
) -> list[Calibration]:
    """Fit tau, lambda and the unattributed share on the samples of a split, and store them in place of the method's former
    ones; first the fit on all samples, then, where models are of several kinds, one per kind.

    The gallery is that of the evaluation: a sample's own exemplars and all pretraining images; with a stored method, those
    that have a score. Queries also share influence with exemplars of other models, of which the fit knows nothing.
    method: a method_id, encoder_id or mapper_id; similarity of the first encoder for None
    raises: InvalidValue for a split that is kept for tests or has no model that the method scores, or without a corpus;
            NotFound for an unknown method
    source: Wang et al. 2023, Eq. 5 and 6. Ours: the unattributed share, in the place of a softplus that queries do not have;
            a fit per kind; that the whole gallery counts; and the optimiser
    """
    check_learned(split)
    db.refresh()
    method_id = resolve_method(db.snapshot, method)
    scores, gallery_size = scores_of(db, method_id, split, report)
    kinds = _kinds(db, scores)
    report("fit", 0, 1 + len(kinds))
    calibrations = [_calibrated(None, scores, gallery_size)]
    for kind, models in kinds.items():
        report("fit", len(calibrations), 1 + len(kinds))
        calibrations.append(_calibrated(kind, scores.of(models), gallery_size))
    report("fit", 1 + len(kinds), 1 + len(kinds))
    shared = {"split": split, "images_version": db.version, "created_at": datetime.now(UTC)}
    db.writer.replace_calibrations([_row(method_id, one) | shared for one in calibrations], method_id)
    return calibrations


def _kinds(db: Database, scores: Scores) -> dict[str, list[str]]:
    """The models of the samples by their kind; none if all are of one."""
    of_model, of_kind = db.snapshot.once(model_kinds), defaultdict(list)
    measured = sorted(set(scores.models))
    for model_id in measured:
        if kind := of_model.get(model_id):
            of_kind[kind].append(model_id)
    return {} if any(len(models) == len(measured) for models in of_kind.values()) else dict(sorted(of_kind.items()))


def _calibrated(kind: str | None, scores: Scores, gallery_size: int) -> Calibration:
    fitted, kl = fit(scores)
    before = Calibrated(scores.scale, 0.0)
    kl_before = divergence_of(scores, before)
    return Calibration(
        kind,
        *fitted,
        kl,
        before.tau,
        kl_before if math.isfinite(kl_before) else None,
        len(scores.own),
        gallery_size,
        reliability(scores, fitted),
        reliability(scores, before),
        held_out_reliability(scores),
    )


def _row(method_id: str, calibration: Calibration) -> dict:
    """The row of `calibrations`, without what all rows of a fit share."""
    tables = {"before": calibration.reliability_before, "fitted": calibration.reliability}
    names = ("kind", "tau", "lam", "unattributed", "kl", "kl_before", "n_samples", "gallery_size")
    row = {name: getattr(calibration, name) for name in names}
    row |= {"reliability": json.dumps(tables | {"held_out": calibration.held_out}), "method_id": method_id}
    return row | {"calibration_id": f"{method_id}:{calibration.kind}" if calibration.kind else method_id}


def scores_of(db: Database, method_id: str, split: str, report: Progress = no_progress) -> tuple[Scores, int]:
    """Of all samples of a split's models, and the number of pretraining images, for a stored method the mean number scored.

    raises: InvalidValue if there are none
    """
    loaded = load_method(db.snapshot, method_id)
    if isinstance(loaded, Similarity):
        return _similarities(db, loaded.encoder_id, loaded.mapper, split, report)
    return _stored_scores(db, loaded, split)


def _similarities(
    db: Database, encoder_id: str, mapper: Mapper | None, split: str, report: Progress
) -> tuple[Scores, int]:
    """The corpus is read once per SAMPLES_PER_PASS samples."""
    names = db.sql("SELECT model_id FROM models WHERE split = $split ORDER BY model_id", {"split": split})
    of_models = among("model_id", names["model_id"].to_pylist())
    by_model = {
        role: features_by_model(db, encoder_id, f"role = '{role}' AND {of_models}") for role in ("sample", "exemplar")
    }
    models = sorted(by_model["sample"].keys() & by_model["exemplar"].keys())
    if not models:
        raise InvalidValue(
            f"no model with {encoder_id!r} features in split {split!r} of {db.path}; name another split with --split"
        )
    exemplars = [by_model["exemplar"][name][1] for name in models]
    samples = [by_model["sample"][name][1] for name in models]
    if mapper:
        exemplars = [mapper.exemplars(features) for features in exemplars]
        samples = [mapper.samples(features) for features in samples]
    most = max(map(len, exemplars))
    rows = [
        np.pad(s.astype(np.float64) @ e.astype(np.float64).T, ((0, 0), (0, most - len(e))), constant_values=-np.inf)
        for s, e in zip(samples, exemplars, strict=True)
    ]
    queries, parts, size = np.concatenate(samples), [], 0
    for start in range(0, len(queries), SAMPLES_PER_PASS):
        report("compare", start, len(queries))
        gallery = db.features(encoder_id, "role = 'pretraining'")
        part = queries[start : start + SAMPLES_PER_PASS]
        *top_and_tail, size = count_in_bins(part, mapper.candidates(gallery) if mapper else gallery)
        parts.append(top_and_tail)
    report("compare", len(queries), len(queries))
    if not size:
        raise InvalidValue(f"{db.path} has no pretraining image with a {encoder_id!r} feature; ingest a corpus first")
    top, tail = (np.concatenate(part) for part in zip(*parts, strict=True))
    of_sample = np.repeat(np.array(models, dtype=object), [len(part) for part in samples])
    return Scores(of_sample, np.concatenate(rows), top, tail), size


def _stored_scores(db: Database, method: Method, split: str) -> tuple[Scores, int]:
    """The size is the mean number of pretraining images that have a score."""
    table = db.query("stored_scores", method=method.method_id, split=split)
    samples, first = np.unique(table["sample_id"].to_numpy(), return_index=True)
    if not len(samples):
        raise InvalidValue(
            f"no model in split {split!r} of {db.path} has a sample with a {method.scored}; name another split with "
            "--split"
        )
    scores, is_own = table["score"].to_numpy(), table["is_own"].to_numpy()
    models = table["model_id"].to_numpy()[first]
    parts = list(zip(first, [*first[1:], len(scores)], strict=True))
    own = [scores[a:b][is_own[a:b]] for a, b in parts]
    others = [scores[a:b][~is_own[a:b]] for a, b in parts]
    both = [n for n in range(len(parts)) if len(own[n]) and len(others[n])]
    if not both:
        raise InvalidValue(
            f"{db.path} has no sample in split {split!r} with a {method.scored} of an exemplar and of a pretraining image; "
            "score both to calibrate"
        )
    most = max(len(own[n]) for n in both)
    low, high = float(scores.min()), float(scores.max())
    centres = bin_centres(low, high)
    width = (high - low) / BINS or 1.0
    tails = [
        np.bincount(np.clip((others[n][KEPT:] - low) // width, 0, BINS - 1).astype(int), minlength=BINS) for n in both
    ]
    spread = float(np.mean([max(own[n][0], others[n][0]) - np.median(others[n]) for n in both])) or 1.0
    scored = Scores(
        models[both],
        np.array([np.pad(own[n], (0, most - len(own[n])), constant_values=-np.inf) for n in both]),
        np.array([np.pad(others[n][:KEPT], (0, max(0, KEPT - len(others[n]))), constant_values=-np.inf) for n in both]),
        np.array(tails),
        centres,
        spread,
    )
    return scored, round(float(np.mean([len(others[n]) for n in both])))


def count_in_bins(queries: np.ndarray, gallery: Iterable[Block]) -> tuple[np.ndarray, np.ndarray, int]:
    """The KEPT best similarities of each query, the numbers of the others by bin, and the size of the gallery."""
    top = np.full((len(queries), KEPT), -np.inf, np.float32)
    tail = np.zeros((len(queries), BINS), np.int32)
    size = 0
    for _, features in gallery:
        size += len(features)
        merged = np.concatenate([top, queries @ features.T], axis=1)
        merged.partition(merged.shape[1] - KEPT, axis=1)
        top, rest = merged[:, -KEPT:], merged[:, :-KEPT]
        row, column = np.nonzero(np.isfinite(rest))
        bins = np.clip(((rest[row, column] + 1) * (BINS / 2)).astype(np.int64), 0, BINS - 1)
        np.add.at(tail, (row, bins), 1)
    return top.astype(np.float64), tail, size
