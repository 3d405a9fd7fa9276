"""The fit of influence to known shares, and how far influence can be relied upon.

    P(x | x~) = (1 - u) ReLU(exp((s - s_max)/tau) - lambda) / SUM_j ReLU(exp((s_j - s_max)/tau) - lambda)  +  u / N
    fitted by minimising KL[S || P] over tau, lambda and u, S = 1/|X+| on the exemplars and 0 elsewhere

The first term is influence, as queries give it. u is the share that the method cannot attribute. It is spread evenly over all
N candidates: it is what exemplars get whose scores are at or below the cut-off, like those of most candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from attrdb.attribution.influence import Calibrated
from attrdb.store.methods import DEFAULT_LAM, DEFAULT_TAU

KEPT = 1000  # best candidates of a sample whose scores are kept one by one
BINS = 4096  # of score, from the lowest to the highest, for all others
# Temperatures and cut-offs that the fit may start from.
STARTS = tuple((tau, lam) for tau in (0.01, 0.02, DEFAULT_TAU, 0.1, 0.3, 1.0) for lam in (0.001, DEFAULT_LAM, 0.3))
N_STARTS = 3  # of them, the best, that it does start from
LEAST_LAM, MOST_LAM = 0.001, 0.99
# Candidates that may have influence on a sample, in the mean: a share of them, or so many. Without this bound a large
# temperature would spread influence over all of them, which says as little as the unattributed share does.
NAMED_SHARE, NAMED = 0.01, 100
LEAST_UNATTRIBUTED, MOST_UNATTRIBUTED = 1e-6, 0.999  # so that the divergence is finite, and some influence is left
FIRST_STEP, LAST_STEP = 0.5, 0.02  # of the search, in the logarithms of tau and of the reach of influence
GAIN = 1e-6  # nats by which a step of the search must be better
EDGES = (0.0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the reliability table


def bin_centres(low: float, high: float) -> np.ndarray:
    """(BINS,) middles of the bins of scores from low to high."""
    return low + (np.arange(BINS) + 0.5) * ((high - low) / BINS)


@dataclass(frozen=True)
class Scores:
    """Scores of the candidates of some samples, float64; cosines if the method is similarity.

    models:  (n_samples,) model ids
    own:     (n_samples, m) of the exemplars of the sample's model; -inf beyond their number
    top:     (n_samples, KEPT) of the best pretraining images; -inf beyond their number
    tail:    (n_samples, BINS) numbers of the other pretraining images by bin of score
    centres: (BINS,) of the bins
    scale:   spread of the scores, which multiplies the temperatures of STARTS; 1 for cosines
    """

    models: np.ndarray
    own: np.ndarray
    top: np.ndarray
    tail: np.ndarray
    centres: np.ndarray = field(default_factory=lambda: bin_centres(-1.0, 1.0))
    scale: float = 1.0

    @property
    def n_own(self) -> np.ndarray:
        return np.isfinite(self.own).sum(axis=1)

    @property
    def n(self) -> np.ndarray:
        """(n_samples,) numbers of candidates."""
        return self.n_own + np.isfinite(self.top).sum(axis=1) + self.tail.sum(axis=1)

    @property
    def best(self) -> np.ndarray:
        """(n_samples, 1) highest scores."""
        return np.maximum(self.own.max(axis=1), self.top.max(axis=1))[:, None]

    def of(self, models: Iterable[str]) -> Scores:
        """Those of the samples of some models."""
        kept = np.isin(self.models, list(models))
        return replace(self, models=self.models[kept], own=self.own[kept], top=self.top[kept], tail=self.tail[kept])


def fit(scores: Scores) -> tuple[Calibrated, float]:
    """What minimises the divergence, and the divergence: a pattern search in tau and lambda from the best of STARTS.

    There may be several minima, and where an exemplar reaches the cut-off the divergence has an edge. The unattributed share
    is the best one for tau and lambda. In the mean over the samples, at most NAMED candidates have influence, or NAMED_SHARE
    of all, whichever is more.
    """
    evaluate = _Divergence(scores)
    found = sorted(evaluate(scores.scale * tau, lam) for tau, lam in STARTS)
    _, best = min(_searched(evaluate, start) for _, start in found[:N_STARTS])
    return best, evaluate.of(best)


def _searched(
    evaluate: Callable[[float, float], tuple[float, Calibrated]], start: Calibrated
) -> tuple[float, Calibrated]:
    """The end of a pattern search in tau and the reach of influence: a step to any side, half as long when none is better."""
    best, step = evaluate(start.tau, start.lam), FIRST_STEP
    while step >= LAST_STEP:
        tau, lam, _ = best[1]
        reach = -tau * math.log(lam)  # the best score less the cut-off
        sides = [(math.exp(x), math.exp(y)) for x in (-step, 0, step) for y in (-step, 0, step) if x or y]
        better = min(evaluate(tau * x, math.exp(-reach * y / (tau * x))) for x, y in sides)
        if better[0] < best[0] - GAIN:
            best = better
        else:
            step /= 2
    return best


class _Divergence:
    """The divergence for tau and lambda with the unattributed share that is best for them."""

    def __init__(self, scores: Scores):
        self.scores, self.best, self.n = scores, scores.best, scores.n[:, None]
        self.is_own = np.isfinite(scores.own)
        self.weight = (1 / scores.n_own / len(scores.own))[:, None] * self.is_own  # of an exemplar; together 1
        self.even = np.broadcast_to(1 / self.n, self.is_own.shape)[self.is_own]
        self.entropy = float(np.log(scores.n_own).mean())
        used = np.flatnonzero(scores.tail.any(axis=0))
        self.tail, self.centres = scores.tail[:, used], scores.centres[used]

    def __call__(self, tau: float, lam: float) -> tuple[float, Calibrated]:
        """Infinite where too many candidates have influence."""
        lam = min(max(lam, LEAST_LAM), MOST_LAM)
        named, n_named = self.named(tau, lam)
        named, weight = named[self.is_own], self.weight[self.is_own]
        unattributed = _best_unattributed(named, self.even, weight)
        is_allowed = n_named <= max(NAMED, NAMED_SHARE * self.n.mean())
        divergence = self._of(named, unattributed) if is_allowed else math.inf
        return divergence, Calibrated(tau, lam, unattributed)

    def named(self, tau: float, lam: float) -> tuple[np.ndarray, float]:
        """Influence of the exemplars (n_samples, m), with nothing unattributed; how many candidates have some (mean)."""
        within = self.centres > (float(self.best.min()) + tau * math.log(lam) if lam > 0 else -np.inf)
        own, top, tail = (
            _weight(scores, self.best, tau, lam)
            for scores in (self.scores.own, self.scores.top, self.centres[None, within])
        )
        counts = self.tail[:, within]
        total = own.sum(axis=1) + top.sum(axis=1) + (tail * counts).sum(axis=1)
        n_named = (own > 0).sum() + (top > 0).sum() + ((tail > 0) * counts).sum()
        return own / total[:, None], float(n_named) / len(own)

    def of(self, calibrated: Calibrated) -> float:
        return self._of(self.named(calibrated.tau, calibrated.lam)[0][self.is_own], calibrated.unattributed)

    def _of(self, named: np.ndarray, unattributed: float) -> float:
        with np.errstate(divide="ignore"):  # infinite where an exemplar has nothing
            shares = np.log((1 - unattributed) * named + unattributed * self.even)
        return float(-(self.weight[self.is_own] * shares).sum() - self.entropy)


def _weight(scores: np.ndarray, best: np.ndarray, tau: float, lam: float) -> np.ndarray:
    """ReLU(exp((s - s_max)/tau) - lambda). A bin in which a sample has no candidate may lie above its best one."""
    weight: np.ndarray = np.maximum(np.exp(np.minimum(scores - best, 0) / tau) - lam, 0)
    return weight


def _best_unattributed(named: np.ndarray, even: np.ndarray, weight: np.ndarray) -> float:
    """Where the divergence, which is convex in the unattributed share, is least: the root of its slope, by bisection."""
    low, high = LEAST_UNATTRIBUTED, MOST_UNATTRIBUTED
    for _ in range(40):
        u = (low + high) / 2
        slope = float((weight * (named - even) / ((1 - u) * named + u * even)).sum())
        low, high = (low, u) if slope > 0 else (u, high)
    return (low + high) / 2


def divergence_of(scores: Scores, calibrated: Calibrated) -> float:
    """The mean of KL[S || P] over the samples, in nats; infinite where an exemplar has no influence and nothing is
    unattributed."""
    return _Divergence(scores).of(calibrated)


def held_out_reliability(scores: Scores) -> list[dict]:
    """`reliability` on each half of the models, every second by id, with what is fitted on the other half.

    Empty for a single model.
    """
    models = sorted(set(scores.models))
    halves = [scores.of(models[::2]), scores.of(models[1::2])]
    if len(models) < 2:
        return []
    return _merged([reliability(one, fit(other)[0]) for one, other in (halves, halves[::-1])])


def _merged(tables: list[list[dict]]) -> list[dict]:
    """Several reliability tables as one."""
    rows = []
    for least, most in zip((0.0, *EDGES), EDGES, strict=False):
        of_bin = [row for table in tables for row in table if (row["least"], row["most"]) == (least, most)]
        n = sum(row["n"] for row in of_bin)
        if n:
            mean = {name: sum(row["n"] * row[name] for row in of_bin) / n for name in ("influence", "share")}
            rows.append({"least": least, "most": most, "n": n, **mean})
    return rows


def reliability(scores: Scores, calibrated: Calibrated) -> list[dict]:
    """Influence beside the known share: one row per bin of EDGES that holds a candidate.

    returns: least, most (edges of the bin; the first bin is 0 alone), n (candidates), influence (their mean), share (mean
             of S). n times share, over the number of samples, is the part of the exemplars' share that is in the bin
    """
    best = scores.best
    tau, lam, unattributed = calibrated

    def weight(similarity: np.ndarray) -> np.ndarray:
        return _weight(similarity, best, tau, lam)

    own, top, binned = weight(scores.own), weight(scores.top), weight(scores.centres[None])
    total = (own.sum(axis=1) + top.sum(axis=1) + (binned * scores.tail).sum(axis=1))[:, None] / (1 - unattributed)
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
