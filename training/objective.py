"""The objective of a mapper: the contrastive loss over pairs, the regularizer, and the two maps as torch modules."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx

from attrdb.errors import InvalidValue
from attrdb.search.mapper import ARRAYS, SIDES

# The form that a mapper is stored in, by the form that is trained. The released ones are those of the authors' code, whose
# ablation is Wang et al. 2023, Fig. 7: a gain without a bias, and two layers that do not start at the identity.
STORED_FORMS = {"affine": "affine", "gain": "gain", "mlp": "mlp", "released-gain": "gain", "released-mlp": "mlp"}
HIDDEN = 256  # of the form mlp
RELEASED_WIDTHS = (512, 256)  # hidden, and of what comes out


class _Deviation(torch.autograd.Function):
    """||W^T W - I||_F of a square W. W^T W - I is symmetric, so its derivative takes one product of matrices, not two."""

    @staticmethod
    def forward(ctx: FunctionCtx, weight: torch.Tensor) -> torch.Tensor:
        excess = weight.T @ weight
        excess.diagonal().sub_(1)
        norm = excess.norm()
        ctx.save_for_backward(weight, excess, norm)
        return norm

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        weight, excess, norm = ctx.saved_tensors
        unit = excess / norm.clamp(min=torch.finfo(norm.dtype).tiny)  # 0 at the identity
        return weight @ unit * (2 * gradient)


class Map(torch.nn.Module):
    """One side of a mapper of a form but released-mlp, see `attrdb.search.mapper.Mapper`; it starts at the identity."""

    def __init__(self, form: str, dimension: int):
        super().__init__()
        start = {
            "weight": torch.eye(dimension),
            "gain": torch.ones(dimension),
            "bias": torch.zeros(dimension),
            # The hidden layer starts as in torch.nn.Linear; `down` multiplies its result by zero at first.
            "up": torch.empty(HIDDEN, dimension).uniform_(-1, 1) / dimension**0.5,
            "up_bias": torch.zeros(HIDDEN),
            "down": torch.zeros(dimension, HIDDEN),
        }
        self.form = STORED_FORMS[form]
        for name in ARRAYS[self.form]:
            if (form, name) == ("released-gain", "bias"):
                self.register_buffer(name, start[name])
            else:
                self.register_parameter(name, torch.nn.Parameter(start[name]))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(n, dimension) features to (n, dimension), unit length."""
        mapped = (features * self.gain if self.form == "gain" else features @ self.weight.T) + self.bias
        if self.form == "mlp":
            mapped = mapped + F.linear(F.linear(features, self.up, self.up_bias).relu(), self.down)
        return F.normalize(mapped, dim=1)

    def deviation(self) -> torch.Tensor:
        """||W^T W - I||_F, where W is the matrix of the map; for `gain` a diagonal matrix."""
        if self.form == "gain":
            return (self.gain**2 - 1).norm()
        return _Deviation.apply(self.weight)

    def arrays(self) -> dict[str, torch.Tensor]:
        """By name, see `attrdb.search.mapper.ARRAYS`."""
        return {name: getattr(self, name) for name in ARRAYS[self.form]}


class ReleasedMlp(torch.nn.Module):
    """One side of a mapper of form released-mlp: two layers with batch normalization between them, started at random."""

    def __init__(self, dimension: int):
        super().__init__()
        hidden, out = RELEASED_WIDTHS[0], min(RELEASED_WIDTHS[1], dimension)
        self.first, self.norm = torch.nn.Linear(dimension, hidden), torch.nn.BatchNorm1d(hidden)
        self.second = torch.nn.Linear(hidden, out)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(n, dimension) features to (n, 256), or fewer if the dimension is; unit length."""
        return F.normalize(self.second(self.norm(self.first(features)).relu()), dim=1)

    def deviation(self) -> torch.Tensor:
        """0: no matrix of it could be the identity."""
        return self.first.weight.new_zeros(())

    def arrays(self) -> dict[str, torch.Tensor]:
        """Those of the form mlp that map the same, with zeros after the values that come out."""
        dimension, out = self.first.in_features, self.second.out_features
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        empty = self.first.weight.new_zeros
        return {
            "weight": empty(dimension, dimension),
            "bias": torch.cat([self.second.bias, empty(dimension - out)]),
            "up": self.first.weight * scale[:, None],
            "up_bias": (self.first.bias - self.norm.running_mean) * scale + self.norm.bias,
            "down": torch.cat([self.second.weight, empty(dimension - out, self.second.in_features)]),
        }


class Maps(torch.nn.ModuleDict):
    """Both sides of a mapper: h as 'exemplar' and h~ as 'sample'.

    raises: InvalidValue for an unknown form
    """

    def __init__(self, form: str, dimension: int, seed: int = 0):
        if form not in STORED_FORMS:
            raise InvalidValue(f"form is {form!r}; it must be {', '.join(STORED_FORMS)}")
        make = ReleasedMlp if form == "released-mlp" else partial(Map, form)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            super().__init__({side: make(dimension) for side in SIDES})
        self.form, self.starts_at_identity = STORED_FORMS[form], form != "released-mlp"

    def arrays(self) -> dict[str, np.ndarray]:
        """The `parameters` of `attrdb.search.mapper.Mapper`, whose form is `form`."""
        return {
            f"{side}.{name}": value.detach().cpu().numpy().copy()
            for side in SIDES
            for name, value in self[side].arrays().items()
        }


def contrastive_loss(exemplars: torch.Tensor, samples: torch.Tensor, temperature: float) -> torch.Tensor:
    """The mean of L_cont^i over a batch of pairs.

    exemplars, samples: (n, dimension) of unit length: t_i and s_i of n distinct models
    temperature:        v > 0
    source:             Wang et al. 2023, Eq. 3: -log of the share of s_i among the samples for t_i, and of t_i among the
                        exemplars for s_i, added
    """
    similarity = exemplars @ samples.T / temperature  # (n exemplars, n samples)
    pair = torch.arange(len(similarity), device=similarity.device)
    return F.cross_entropy(similarity, pair) + F.cross_entropy(similarity.T, pair)


def regularizer(maps: Maps) -> torch.Tensor:
    """L_reg = 1/2 (||W^T W - I||_F + ||W~^T W~ - I||_F).

    source: Wang et al. 2023, Eq. 4
    """
    return (maps["exemplar"].deviation() + maps["sample"].deviation()) / 2
