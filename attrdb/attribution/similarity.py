"""Similarity as an attribution method: the cosine of an encoder's features, mapped by a mapper where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attrdb.attribution.protocol import Queries
from attrdb.errors import InvalidValue
from attrdb.search import planner
from attrdb.search.exact import Hits
from attrdb.search.mapper import Mapper
from attrdb.store.predicates import among
from attrdb.store.schema import feature_matrix
from attrdb.store.snapshot import Snapshot


def unit_features(
    snapshot: Snapshot, encoder_id: str, features: Sequence[Sequence[float]] | Sequence[np.ndarray]
) -> np.ndarray:
    """(n, dimension) float32: features from outside, made unit length, as stored ones are.

    raises: InvalidValue for another shape than the encoder makes, or a length that is zero or not finite
    """
    dimension = snapshot.encoders[encoder_id]["dimension"]
    rows = [np.asarray(feature, dtype=np.float32) for feature in features]
    for row in rows:
        if row.shape != (dimension,):
            raise InvalidValue(f"the feature has shape {row.shape}, encoder {encoder_id!r} makes ({dimension},)")
    table = np.stack(rows)
    norms = np.linalg.norm(table, axis=1, keepdims=True)
    unusable = ~(np.isfinite(norms) & (norms > 0))
    if unusable.any():
        raise InvalidValue(f"the feature has length {norms[unusable][0]}; it must be finite and not zero")
    unit: np.ndarray = table / norms
    return unit


@dataclass(frozen=True)
class Similarity:
    """source: Wang et al. 2023, section 4 (with a mapper)"""

    method_id: str
    encoder_id: str
    mapper: Mapper | None = None

    @property
    def scored(self) -> str:
        return f"{self.encoder_id!r} feature"

    def attributable(self, snapshot: Snapshot, samples: str) -> list[str]:
        where = f"role = 'sample' AND `{self.encoder_id}` IS NOT NULL AND ({samples})"
        ids: list[str] = snapshot.images(where, ["image_id"])["image_id"].to_pylist()
        return ids

    def stored_queries(self, snapshot: Snapshot, image_ids: Sequence[str]) -> Queries:
        # Not null is tested afterwards: a test in the predicate would make Lance read the features of all images.
        rows = snapshot.images(among("image_id", image_ids), ["image_id", self.encoder_id])
        rows = rows.filter(rows[self.encoder_id].is_valid())
        return Queries(rows["image_id"].to_pylist(), feature_matrix(rows[self.encoder_id]) if len(rows) else None)

    def feature_query(self, snapshot: Snapshot, feature: np.ndarray) -> Queries:
        return Queries([None], unit_features(snapshot, self.encoder_id, [feature]))

    def nearest(self, snapshot: Snapshot, queries: Queries, k: int, candidates: str | None, exact: bool) -> Hits:
        assert queries.features is not None  # those of this method have them
        return planner.nearest(
            snapshot, self.encoder_id, queries.features, k, mapper=self.mapper, candidates=candidates, exact=exact
        )

    def n_scored(self, snapshot: Snapshot, image_id: str | None, candidates: str | None) -> int:
        return snapshot.count(f"{planner.candidates_predicate(candidates)} AND `{self.encoder_id}` IS NOT NULL")
