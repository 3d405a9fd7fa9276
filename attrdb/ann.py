"""Approximate search over an encoder's index: a query looks into a few of its cells, and what it hits is compared exactly.

One index serves every mapper: similarity(x, x~) = (x . q + c) / n(x) with q = W^T s, c = b . s, n(x) = |W x + b| and
s = F~(x~) / |F~(x~)|. c is the same for all candidates and n(x) nearly so, so that the best candidates are among those
with the largest x . q; more of them are fetched than asked for, mapped, and compared exactly. (Ours, not of a paper.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from attrdb import search
from attrdb.mapper import Mapper
from attrdb.schema import feature_matrix

FETCHED = 65_536  # hits that Lance is asked for at a time, so that their features fit into memory
ROWS_A_READ = 8_192
FEW = 10  # hits: oversampling is chosen for as many
FOLDED = 4  # times as many hits for a mapper, whose n(x) the search does not know


@dataclass(frozen=True)
class Index:
    """An index that attrdb built, and how it is asked; see the table `indices`."""

    encoder_id: str
    kind: str
    n_partitions: int
    n_probes: int
    oversampling: int

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Index:
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})

    @property
    def name(self) -> str:
        return index_name(self.encoder_id)


def index_name(encoder_id: str) -> str:
    """Of the Lance index on an encoder's column: the name that Lance would give it itself."""
    return f"{encoder_id}_idx"


def can_serve(mapper: Mapper | None) -> bool:
    """Whether an index over features can be asked for a mapper's candidates: where the mapper folds into the query."""
    return mapper is None or mapper.form in ("affine", "gain")


def folded(queries: np.ndarray, mapper: Mapper | None) -> np.ndarray:
    """(n_queries, dimension) float32, unit length: what to look for among features that are not mapped."""
    if mapper is None:
        return queries
    own = mapper.samples(queries)
    weight = mapper.parameters["exemplar.weight" if mapper.form == "affine" else "exemplar.gain"]
    own = own @ weight if mapper.form == "affine" else own * weight
    return own / np.linalg.norm(own, axis=1, keepdims=True)


def top_k(
    images: lance.LanceDataset, index: Index, where: str, queries: np.ndarray, k: int, mapper: Mapper | None = None
) -> search.Hits:
    """Nearly the k most similar candidates of each query, with their exact similarity, as `search.top_k` gives them all.

    queries: (n_queries, dimension) float32, unit length, before they are mapped
    where:   a predicate that candidates fulfil; it is applied before the search, not to what the search has found
    """
    ids: list[np.ndarray] = []
    similarity: list[np.ndarray] = []
    wanted = max(k, FEW) * index.oversampling * (FOLDED if mapper else 1)
    together = max(1, FETCHED // wanted)
    asked = folded(queries, mapper)
    for first in range(0, len(queries), together):
        part = slice(first, first + together)
        query, row = _hits(images, index, where, asked[part], wanted)
        unique, candidate = np.unique(row, return_inverse=True)
        row_ids, features = _rows(images, index.encoder_id, unique)
        best = search.Best(len(asked[part]), k)
        exact = search.exact_similarity(features, queries[part], candidate, query, mapper)
        best.add(query, exact, row_ids.take(pa.array(candidate)))
        found = best.hits()
        ids += found.ids
        similarity += found.similarity
    return search.Hits(ids, similarity)


def _hits(
    images: lance.LanceDataset, index: Index, where: str, asked: np.ndarray, wanted: int
) -> tuple[np.ndarray, np.ndarray]:
    """Queries and row ids of what the index finds; more cells than usual are looked into where a predicate keeps few."""
    found = images.to_table(
        columns=["_distance"],
        filter=where,
        prefilter=True,
        with_row_id=True,
        nearest={
            "column": index.encoder_id,
            "q": asked if len(asked) > 1 else asked[0],
            "k": wanted,
            "minimum_nprobes": index.n_probes,
            "maximum_nprobes": index.n_partitions,
        },
    )
    query = found["query_index"].to_numpy() if len(asked) > 1 else np.zeros(len(found), np.int64)
    return query.astype(np.int64), found["_rowid"].to_numpy()


def _rows(images: lance.LanceDataset, encoder_id: str, rows: np.ndarray) -> tuple[pa.Array, np.ndarray]:
    """Ids and features of rows by their row ids, in the order given."""
    parts = [
        images.to_table(
            columns=["image_id", encoder_id],
            filter=f"_rowid IN ({', '.join(map(str, rows[at : at + ROWS_A_READ].tolist()))})",
            with_row_id=True,
        )
        for at in range(0, len(rows), ROWS_A_READ)
    ]
    found = pa.concat_tables(parts).sort_by("_rowid").combine_chunks()
    return found["image_id"].chunk(0), feature_matrix(found[encoder_id])
