"""Trained weights as one long vector: few operations on all of them, in place of many on each."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch

from attrdb.ingest.customize.observer import Tensors


class Flat:
    """The order of some weights in a vector. shapes: by parameter"""

    def __init__(self, weights: Mapping[str, torch.Tensor]):
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        ends = list(accumulate(weight.numel() for weight in weights.values()))
        self.size = ends[-1]
        self.slices = {
            name: slice(end - self.shapes[name].numel(), end) for name, end in zip(self.shapes, ends, strict=True)
        }

    def views(self, vectors: torch.Tensor) -> Tensors:
        """(n, *shape) by parameter, of n vectors (n, size): views, not copies."""
        return {name: vectors[:, part].unflatten(1, self.shapes[name]) for name, part in self.slices.items()}
