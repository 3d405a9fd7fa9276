"""Stored scores as an attribution method: the table `scores` says which candidates an image owes something to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attrdb.attribution.protocol import Queries
from attrdb.errors import InvalidValue
from attrdb.search import planner
from attrdb.search.exact import Hits
from attrdb.store.lance_errors import storage
from attrdb.store.predicates import among, literal
from attrdb.store.snapshot import Snapshot


@dataclass(frozen=True)
class Stored:
    """Candidates without a score are not looked at: they are neither in answers nor in ranks."""

    method_id: str

    @property
    def scored(self) -> str:
        return f"score by {self.method_id!r}"

    def attributable(self, snapshot: Snapshot, samples: str) -> list[str]:
        known = snapshot.images(f"role = 'sample' AND ({samples})", ["image_id"])["image_id"].to_pylist()
        with storage(snapshot.path):
            where = f"method_id = {literal(self.method_id)}"
            scores = snapshot.tables["scores"].to_table(columns=["sample_id"], filter=where)
        scored = set(pc.unique(scores["sample_id"]).to_pylist())
        return [sample_id for sample_id in known if sample_id in scored]

    def stored_queries(self, snapshot: Snapshot, image_ids: Sequence[str]) -> Queries:
        scored = set(pc.unique(self._scores(snapshot, image_ids)["sample_id"]).to_pylist())
        return Queries([image_id for image_id in image_ids if image_id in scored])

    def feature_query(self, snapshot: Snapshot, feature: np.ndarray) -> Queries:
        raise InvalidValue(
            f"method {self.method_id!r} has scores of stored samples only; give the image_id of a sample, or attribute by an "
            "encoder or a mapper"
        )

    def nearest(self, snapshot: Snapshot, queries: Queries, k: int, candidates: str | None, exact: bool) -> Hits:
        scores = self._scores(snapshot, [image_id for image_id in queries.ids if image_id is not None])
        if candidates is not None:
            snapshot.check_predicate("candidates", candidates)
            where = f"{planner.candidates_predicate(candidates)} AND {among('image_id', _distinct(scores))}"
            allowed = snapshot.images(where, ["image_id"])["image_id"]
            scores = scores.filter(pc.is_in(scores["candidate_id"], allowed.combine_chunks()))
        order = [("sample_id", "ascending"), ("score", "descending"), ("candidate_id", "ascending")]
        scores = scores.sort_by(order)
        samples, bounds = np.unique(scores["sample_id"].to_numpy(), return_index=True)
        first = dict(zip(samples, bounds, strict=True))
        last = dict(zip(samples, [*bounds[1:], len(scores)], strict=True))
        parts = [slice(first.get(image_id, 0), last.get(image_id, 0)) for image_id in queries.ids]
        ids, values = scores["candidate_id"].to_numpy(), scores["score"].to_numpy()
        return Hits([ids[part][:k] for part in parts], [values[part][:k] for part in parts])

    def n_scored(self, snapshot: Snapshot, image_id: str | None, candidates: str | None) -> int:
        [ids] = self.nearest(snapshot, Queries([image_id]), 2**31, candidates, True).ids
        return len(ids)

    def _scores(self, snapshot: Snapshot, image_ids: Sequence[str]) -> pa.Table:
        where = f"method_id = {literal(self.method_id)} AND {among('sample_id', image_ids)}"
        with storage(snapshot.path):
            return snapshot.tables["scores"].to_table(columns=["sample_id", "candidate_id", "score"], filter=where)


def _distinct(scores: pa.Table) -> list[str]:
    ids: list[str] = pc.unique(scores["candidate_id"]).to_pylist()
    return ids
