"""Calibrate influence: fit the temperature and cut-off that bring it closest to the exemplars' known shares.

    P^(x | x~) = ReLU(exp((s - s_max)/tau) - lambda) / SUM_j ReLU(exp((s_j - s_max)/tau) - lambda)
    fitted by minimising KL[S || P^], S = 1/|X+| on the exemplars and 0 elsewhere

The fit has a softplus in place of ReLU, so that an exemplar below the cut-off has a gradient; queries use ReLU
(`attrdb.attribution.influence`). A softplus is not zero on low similarities, so all candidates count: the exemplars and the
best candidates of each sample one by one, all others in narrow bins of similarity.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import torch
import torch.nn.functional as F

from attrdb.attribution.methods import load_method, resolve_method
from attrdb.attribution.protocol import Method
from attrdb.attribution.similarity import Similarity
from attrdb.database import Database
from attrdb.errors import InvalidValue
from attrdb.progress import Progress, no_progress
from attrdb.search.mapper import Mapper
from attrdb.store.features import Block
from attrdb.store.methods import DEFAULT_LAM, DEFAULT_TAU
from attrdb.store.predicates import among
from attrdb.training.checks import check_learned
from attrdb.training.evaluate import features_by_model

SHARPNESS = 100.0  # of the softplus, as in the released code
KEPT = 1000  # best candidates of a sample whose similarities are kept one by one
BINS = 4096  # of similarity, from -1 to 1, for all others
SAMPLES_PER_PASS = 512
# Temperatures and cut-offs that the fit may start from.
STARTS = tuple((tau, lam) for tau in (0.01, 0.02, DEFAULT_TAU, 0.1, 0.3, 1.0) for lam in (0.001, DEFAULT_LAM, 0.3))
EDGES = (0.0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the reliability table


@dataclass(frozen=True)
class Calibration:
    """tau and lam, and their divergence, on the samples of the fit.

    kl:          in nats, with tau and lam
    kl_before:   the same with tau_before (1 for cosines) and lam = 0
    reliability, reliability_before: one row per bin of influence, see `reliability`
    """

    tau: float
    lam: float
    kl: float
    tau_before: float
    kl_before: float
    n_samples: int
    gallery_size: int
    reliability: list[dict]
    reliability_before: list[dict]


@dataclass(frozen=True)
class Similarities:
    """Scores of the candidates of some samples, float64; cosines if the method is similarity.

    own:     (n_samples, m) of the exemplars of the sample's model; -inf beyond their number
    top:     (n_samples, KEPT) of the best pretraining images; -inf beyond their number
    tail:    (n_samples, BINS) numbers of the other pretraining images by bin of score
    centres: (BINS,) of the bins
    scale:   spread of the scores, which multiplies the temperatures of STARTS; 1 for cosines
    """

    own: np.ndarray
    top: np.ndarray
    tail: np.ndarray
    centres: np.ndarray = field(default_factory=lambda: _centres(-1.0, 1.0))
    scale: float = 1.0

    @property
    def n_own(self) -> np.ndarray:
        return np.isfinite(self.own).sum(axis=1)


def calibrate(
    db: Database,
    method: str | None = None,
    split: str = "val",
    report: Progress = no_progress,
) -> Calibration:
    """Fit tau and lambda on the samples of a split, and store them in `calibrations` in place of the method's former ones.

    The gallery is that of the evaluation: a sample's own exemplars and all pretraining images; with a stored method, those
    that have a score.
    method: a method_id, encoder_id or mapper_id; similarity of the first encoder for None
    raises: InvalidValue for a split that is kept for tests or has no model that the method scores, or without a corpus;
            NotFound for an unknown method
    source: Wang et al. 2023, Eq. 5 and 6; here the whole gallery counts, and the optimiser is another
    """
    check_learned(split)
    db.refresh()
    method_id = resolve_method(db.snapshot, method)
    loaded = load_method(db.snapshot, method_id)
    if isinstance(loaded, Similarity):
        scores, gallery_size = similarities(db, loaded.encoder_id, loaded.mapper, split, report)
    else:
        scores, gallery_size = stored_scores(db, loaded, split)
    tau, lam, kl = fit(scores)
    calibration = Calibration(
        tau,
        lam,
        kl,
        scores.scale,
        divergence_of(scores, scores.scale, 0.0),
        len(scores.own),
        gallery_size,
        reliability(scores, tau, lam),
        reliability(scores, scores.scale, 0.0),
    )
    row = {
        "method_id": method_id,
        "tau": tau,
        "lam": lam,
        "kl": kl,
        "kl_before": calibration.kl_before,
        "n_samples": calibration.n_samples,
        "gallery_size": gallery_size,
        "split": split,
        "reliability": json.dumps({"before": calibration.reliability_before, "fitted": calibration.reliability}),
        "images_version": db.version,
        "created_at": datetime.now(UTC),
    }
    db.writer.upsert("calibrations", [row])
    return calibration


def similarities(
    db: Database, encoder_id: str, mapper: Mapper | None, split: str, report: Progress
) -> tuple[Similarities, int]:
    """Of all samples of a split's models, and the size of the corpus, which is read once per SAMPLES_PER_PASS samples."""
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
        report("calibrate", start, len(queries))
        gallery = db.features(encoder_id, "role = 'pretraining'")
        part = queries[start : start + SAMPLES_PER_PASS]
        *top_and_tail, size = count_in_bins(part, mapper.candidates(gallery) if mapper else gallery)
        parts.append(top_and_tail)
    report("calibrate", len(queries), len(queries))
    if not size:
        raise InvalidValue(f"{db.path} has no pretraining image with a {encoder_id!r} feature; ingest a corpus first")
    top, tail = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Similarities(np.concatenate(rows), top, tail), size


def stored_scores(db: Database, method: Method, split: str) -> tuple[Similarities, int]:
    """Of all scored samples of a split's models, and the mean number of pretraining images that have a score."""
    table = db.query("stored_scores", method=method.method_id, split=split)
    samples, first = np.unique(table["sample_id"].to_numpy(), return_index=True)
    if not len(samples):
        raise InvalidValue(
            f"no model in split {split!r} of {db.path} has a sample with a {method.scored}; name another split with "
            "--split"
        )
    scores, is_own = table["score"].to_numpy(), table["is_own"].to_numpy()
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
    centres = _centres(low, high)
    width = (high - low) / BINS or 1.0
    tails = [
        np.bincount(np.clip((others[n][KEPT:] - low) // width, 0, BINS - 1).astype(int), minlength=BINS) for n in both
    ]
    spread = float(np.mean([max(own[n][0], others[n][0]) - np.median(others[n]) for n in both])) or 1.0
    scored = Similarities(
        np.array([np.pad(own[n], (0, most - len(own[n])), constant_values=-np.inf) for n in both]),
        np.array([np.pad(others[n][:KEPT], (0, max(0, KEPT - len(others[n]))), constant_values=-np.inf) for n in both]),
        np.array(tails),
        centres,
        spread,
    )
    return scored, round(float(np.mean([len(others[n]) for n in both])))


def _centres(low: float, high: float) -> np.ndarray:
    return low + (np.arange(BINS) + 0.5) * ((high - low) / BINS)


def count_in_bins(queries: np.ndarray, gallery: Iterable[Block]) -> tuple[np.ndarray, np.ndarray, int]:
    """The KEPT best similarities of each query, the numbers of the others by bin, and the size of the gallery."""
    top = np.full((len(queries), KEPT), -np.inf, np.float32)
    tail = np.zeros((len(queries), BINS), np.int64)
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


def fit(scores: Similarities) -> tuple[float, float, float]:
    """tau, lambda and their divergence: descent from the best of STARTS, since there may be several minima."""
    tensors = _tensors(scores)

    def divergence(tau: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        return _divergence(*tensors, tau, lam)

    starts = [(scores.scale * tau, lam) for tau, lam in STARTS]
    with torch.no_grad():
        start = min(starts, key=lambda point: divergence(*torch.tensor(point, dtype=torch.float64)).item())
    tau, lam = start
    parameters = torch.tensor([math.log(tau), math.log(lam / (1 - lam))], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = divergence(parameters[0].exp(), parameters[1].sigmoid())
        loss.backward()
        return loss

    optimizer.step(closure)
    ends = [start, (parameters[0].exp().item(), parameters[1].sigmoid().item())]
    kl, (tau, lam) = min((divergence_of(scores, *end), end) for end in ends)
    return tau, lam, kl


def divergence_of(scores: Similarities, tau: float, lam: float) -> float:
    """The mean of KL[S || P^] over the samples, in nats, with a softplus in place of ReLU."""
    parameters = (torch.tensor(value, dtype=torch.float64) for value in (tau, lam))
    with torch.no_grad():
        return _divergence(*_tensors(scores), *parameters).item()


def _tensors(scores: Similarities) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """own, top, and the bins of the tail that hold a candidate of any sample: numbers and centres."""
    used = np.flatnonzero(scores.tail.any(axis=0))
    own, top = torch.from_numpy(scores.own), torch.from_numpy(scores.top)
    tail, centres = scores.tail[:, used].astype(np.float64), scores.centres[used]
    return own, top, torch.from_numpy(tail), torch.from_numpy(centres)


def _divergence(
    own: torch.Tensor,
    top: torch.Tensor,
    tail: torch.Tensor,
    centres: torch.Tensor,
    tau: torch.Tensor,
    lam: torch.Tensor,
) -> torch.Tensor:
    best = torch.maximum(own.amax(dim=1), top.amax(dim=1))[:, None]

    def weight(similarity: torch.Tensor) -> torch.Tensor:
        # No candidate is above the best one. A bin with no candidate of this sample may be, and would give infinity times 0.
        return F.softplus(torch.exp((similarity - best).clamp(max=0) / tau) - lam, beta=SHARPNESS)

    def weights(similarity: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether there is a candidate, and its weight; 1 for no candidate, so that no infinity has a gradient."""
        exists = similarity.isfinite()
        return exists, torch.where(exists, weight(torch.where(exists, similarity, best)), 1.0)

    is_own, own_weight = weights(own)
    is_top, top_weight = weights(top)
    tail_weight = weight(centres[None]) * tail
    total = (own_weight * is_own).sum(dim=1) + (top_weight * is_top).sum(dim=1) + tail_weight.sum(dim=1)
    n = is_own.sum(dim=1)
    return (total.log() - own_weight.log().sum(dim=1) / n - n.log()).mean()


def reliability(scores: Similarities, tau: float, lam: float) -> list[dict]:
    """Influence, with ReLU, beside the known share: one row per bin of EDGES that holds a candidate.

    returns: least, most (edges of the bin; the first bin is 0 alone), n (candidates), influence (their mean), share (mean
             of S)
    """
    best = np.maximum(scores.own.max(axis=1), scores.top.max(axis=1))[:, None]

    def weight(similarity: np.ndarray) -> np.ndarray:
        return np.maximum(np.exp(np.minimum(similarity - best, 0) / tau) - lam, 0)

    own, top, binned = weight(scores.own), weight(scores.top), weight(scores.centres[None])
    total = (own.sum(axis=1) + top.sum(axis=1) + (binned * scores.tail).sum(axis=1))[:, None]
    is_own = np.isfinite(scores.own)
    n_own = scores.n_own[:, None]
    influence = np.concatenate(
        [(own / total)[is_own], (top / total)[np.isfinite(scores.top)], (binned / total).ravel()]
    )
    share = np.concatenate([(is_own / n_own)[is_own], np.zeros(len(influence) - is_own.sum())])
    n = np.concatenate([np.ones(len(influence) - scores.tail.size), scores.tail.ravel()])
    rows = []
    for least, most in zip((None, *EDGES), EDGES, strict=False):
        inside = (influence <= 0) if least is None else (influence > least) & (influence <= most)
        count = float(n[inside].sum())
        if count:
            mean = {
                name: float((values[inside] * n[inside]).sum() / count)
                for name, values in (("influence", influence), ("share", share))
            }
            rows.append({"least": 0.0 if least is None else least, "most": most, "n": int(count), **mean})
    return rows
