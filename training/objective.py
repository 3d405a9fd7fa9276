"""The objective of a mapper: the contrastive loss over pairs, the regularizer, and the two maps as torch modules."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from attrdb.errors import InvalidValue
from attrdb.search.mapper import ARRAYS, FORMS, SIDES

HIDDEN = 256  # of the form mlp


class Map(torch.nn.Module):
    """One side of a mapper, see `attrdb.search.mapper.Mapper`; it starts at the identity."""

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
        self.form = form
        for name in ARRAYS[form]:
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
        identity = torch.eye(len(self.weight), dtype=self.weight.dtype, device=self.weight.device)
        return (self.weight.T @ self.weight - identity).norm()


class Maps(torch.nn.ModuleDict):
    """Both sides of a mapper: h as 'exemplar' and h~ as 'sample'.

    raises: InvalidValue for an unknown form
    """

    def __init__(self, form: str, dimension: int, seed: int = 0):
        if form not in FORMS:
            raise InvalidValue(f"form is {form!r}; it must be {', '.join(FORMS)}")
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            super().__init__({side: Map(form, dimension) for side in SIDES})
        self.form = form

    def arrays(self) -> dict[str, np.ndarray]:
        """The `parameters` of `attrdb.search.mapper.Mapper`."""
        return {name: value.detach().cpu().numpy().copy() for name, value in self.state_dict().items()}


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
