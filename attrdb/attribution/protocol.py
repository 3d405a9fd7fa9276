"""What an attribution method is: the questions that attribution asks of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from attrdb.search.exact import Hits
from attrdb.store.snapshot import Snapshot


@dataclass(frozen=True)
class Queries:
    """The images to attribute.

    ids:      image_id of each; None for an image that is not stored. No image is a candidate of itself
    features: (n_queries, dimension) float32, unit length, of the method's encoder; None for a method that needs none
    """

    ids: Sequence[str | None]
    features: np.ndarray | None = None

    def part(self, numbers: Sequence[int]) -> Queries:
        features = None if self.features is None else self.features[list(numbers)]
        return Queries([self.ids[number] for number in numbers], features)


class Method(Protocol):
    """One way of scoring candidates. A higher score means more influence; equal scores go to the smaller image_id."""

    @property
    def method_id(self) -> str: ...

    @property
    def scored(self) -> str:
        """What a scored candidate has, for errors, such as "'pixels_8' feature"."""
        ...

    def attributable(self, snapshot: Snapshot, samples: str) -> list[str]:
        """The ids of the samples that a predicate keeps and that the method can attribute."""
        ...

    def stored_queries(self, snapshot: Snapshot, image_ids: Sequence[str]) -> Queries:
        """Those of some stored images that can be attributed, in any order."""
        ...

    def feature_query(self, snapshot: Snapshot, feature: np.ndarray) -> Queries:
        """An image that is not stored, by its feature.

        raises: InvalidValue for a feature of another length or without a direction, or by a method that takes none
        """
        ...

    def nearest(self, snapshot: Snapshot, queries: Queries, k: int, candidates: str | None, exact: bool) -> Hits:
        """The k best candidates of each query, best first; fewer where fewer have a score.

        candidates: an SQL predicate on the columns of images that they must fulfil
        exact:      look at every candidate, also where an index would do
        raises:     InvalidValue for a predicate that Lance does not take
        """
        ...

    def n_scored(self, snapshot: Snapshot, image_id: str | None, candidates: str | None) -> int:
        """How many candidates of an image have a score; may read all of them."""
        ...
