"""Calibrated influence: from scores to shares of the candidates of a query."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from attrdb.errors import InvalidValue
from attrdb.store.methods import DEFAULT_LAM, DEFAULT_TAU


class Calibrated(NamedTuple):
    """How scores become influence.

    tau, lam:     temperature and cut-off
    unattributed: share that no candidate gets: what calibration found that the method cannot attribute
    """

    tau: float
    lam: float
    unattributed: float = 0.0


def check_calibration(tau: float, lam: float, unattributed: float = 0.0) -> None:
    """raises: InvalidValue unless tau > 0, 0 <= lam < 1 and 0 <= unattributed < 1"""
    if tau is None or not (tau > 0 and math.isfinite(tau)):
        raise InvalidValue(f"tau is {tau}; it must be a positive number")
    if lam is None or not 0 <= lam < 1:
        raise InvalidValue(f"lambda is {lam}; it must be at least 0 and below 1")
    if not 0 <= unattributed < 1:
        raise InvalidValue(f"unattributed is {unattributed}; it must be at least 0 and below 1")


def cut_off(s_max: float, tau: float, lam: float) -> float:
    """The score at or below which influence is exactly 0: s_max + tau * ln(lam); -inf for lam = 0."""
    check_calibration(tau, lam)
    return s_max + tau * math.log(lam) if lam > 0 else -math.inf


def influence(
    scores: np.ndarray, tau: float = DEFAULT_TAU, lam: float = DEFAULT_LAM, unattributed: float = 0.0
) -> np.ndarray:
    """Influence of the candidates of each query, an estimate and not a causal share.

    scores:       (..., n_candidates); all candidates above the cut-off must be among them
    unattributed: share that no candidate gets
    returns:      same shape, float64; each row >= 0 and sums to 1 - unattributed
    raises:       InvalidValue if tau <= 0, or lam or unattributed is outside [0, 1)
    source:       Wang et al. 2023, Eq. 6; the unattributed share is ours
    """
    check_calibration(tau, lam, unattributed)
    scores = np.asarray(scores, dtype=np.float64)
    excess = np.exp((scores - scores.max(axis=-1, keepdims=True)) / tau) - lam
    raw = np.maximum(excess, 0.0)
    shares: np.ndarray = raw / raw.sum(axis=-1, keepdims=True) * (1 - unattributed)
    return shares
