"""What each gradient method makes of inner products: of a sample's gradient with those of its model's exemplars."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from attrdb.ingest.gradients import kernels
from attrdb.ingest.gradients.model_gradients import LOSS, SQUARE


@dataclass(frozen=True)
class Kernels:
    """Inner products by layer: of the exemplars (n_layers, n, n), of a sample with them (n_layers, n), and with itself."""

    exemplars: np.ndarray
    sample: np.ndarray
    sample_square: float
    sizes: np.ndarray

    @property
    def whole(self) -> tuple[np.ndarray, np.ndarray]:
        return self.exemplars.sum(axis=0), self.sample.sum(axis=0)


@dataclass(frozen=True)
class Formula:
    """What a method multiplies a sample's gradient by, and what it makes of the products.

    measured:  what is differentiated: LOSS or SQUARE
    exemplars: whether their gradients are those of this 'moment' of training, or of the whole 'run'
    """

    measured: str
    scores: Callable[[Kernels], np.ndarray]
    exemplars: str = "moment"


FORMULAS = {
    "in-run": Formula(LOSS, lambda k: k.whole[1], "run"),
    "gradient-dot": Formula(LOSS, lambda k: k.whole[1]),
    "trac-in": Formula(LOSS, lambda k: k.whole[1]),
    "gradient-cosine": Formula(LOSS, lambda k: kernels.cosine(*k.whole, k.sample_square**0.5)),
    "influence-function": Formula(LOSS, lambda k: kernels.inverse(*k.whole)),
    "d-trak": Formula(SQUARE, lambda k: kernels.inverse(*k.whole)),
    "d-trak-layers": Formula(SQUARE, lambda k: kernels.inverse_by_layer(k.exemplars, k.sample)),
    "data-inf": Formula(LOSS, lambda k: kernels.data_inf(k.exemplars, k.sample, k.sizes)),
}
AT_CHECKPOINTS = "trac-in"  # its scores are a mean over moments of training; the others' are those at its end


def shares_with(name: str) -> tuple[str, bool]:
    """Methods with the same value have the gradients of a sample in common."""
    return FORMULAS[name].measured, name == AT_CHECKPOINTS
