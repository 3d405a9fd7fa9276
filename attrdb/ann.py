"""Approximate search over an encoder's index: a query looks into a few of its cells, and what it hits is compared exactly.

One index could serve every mapper: similarity(x, x~) = (x . q + c) / n(x) with q = W^T s, c = b . s, n(x) = |W x + b| and
s = F~(x~) / |F~(x~)|. c is the same for all candidates and n(x) nearly so, so that the best candidates are among those
with the largest x . q; more of them are fetched than asked for, mapped, and compared exactly. (Ours, not of a paper.) How
well that works depends on the mapper, so that searches of attrdb do not do it yet; benchmarks/search.py measures it.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
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
ROOM = 4
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


def n_hits(index: Index, k: int, mapper: Mapper | None) -> int:
    """How many hits are compared exactly for an answer of k candidates."""
    return max(k, FEW) * index.oversampling * (FOLDED if mapper else 1)


def folded(queries: np.ndarray, mapper: Mapper | None) -> np.ndarray:
    """(n_queries, dimension) float32, unit length: what to look for among features that are not mapped."""
    if mapper is None:
        return queries
    own = mapper.samples(queries)
    weight = mapper.parameters["exemplar.weight" if mapper.form == "affine" else "exemplar.gain"]
    own = own @ weight if mapper.form == "affine" else own * weight
    return own / np.linalg.norm(own, axis=1, keepdims=True)


def top_k(
    images: lance.LanceDataset,
    index: Index,
    where: str,
    n_candidates: int,
    queries: np.ndarray,
    k: int,
    mapper: Mapper | None = None,
) -> search.Hits:
    """Nearly the k most similar candidates of each query, with their exact similarity, as `search.top_k` gives them all.

    Where the cells that are looked into hold fewer than k candidates, fewer come back.
    queries:      (n_queries, dimension) float32, unit length, before they are mapped
    where:        a predicate that candidates fulfil; it is applied before the search, not to what the search has found
    n_candidates: about how many do
    """
    wanted = n_hits(index, k, mapper)
    # As many cells as hold, on average, several times what is wanted; more than usual only where very much is.
    holding = math.ceil(ROOM * wanted * index.n_partitions / max(1, n_candidates))
    n_probes = min(index.n_partitions, max(index.n_probes, holding))
    asked = folded(queries, mapper)

    def of_part(part: slice) -> search.Hits:
        query, candidate, ids, features = _hits(images, index, where, asked[part], wanted, n_probes)
        exact = search.exact_similarity(features, queries[part], candidate, query, mapper)
        best = search.Best(len(asked[part]), k)
        best.add(query, exact, ids.take(pa.array(candidate)))
        return best.hits()

    # Lance keeps one core busy with a search, of however many queries.
    n_cores = os.cpu_count() or 1
    together = max(1, min(FETCHED // wanted // n_cores, math.ceil(len(queries) / n_cores)))
    parts = [slice(first, first + together) for first in range(0, len(queries), together)]
    if len(parts) == 1:
        return of_part(parts[0])
    with ThreadPoolExecutor(n_cores) as pool:
        found = list(pool.map(of_part, parts))
    return search.Hits(
        [ids for one in found for ids in one.ids], [similarity for one in found for similarity in one.similarity]
    )


def _hits(
    images: lance.LanceDataset, index: Index, where: str, asked: np.ndarray, wanted: int, n_probes: int
) -> tuple[np.ndarray, np.ndarray, pa.Array, np.ndarray]:
    """What the index finds: pairs of a query and a candidate, and the ids and features of the candidates."""
    alone = len(asked) == 1
    described = ["image_id", index.encoder_id]
    found = images.to_table(
        # Of several queries candidates are read together afterwards, which takes less time; for one query it would take more.
        columns=[*(described if alone else []), "_distance"],
        filter=where,
        prefilter=True,
        with_row_id=True,
        nearest={
            "column": index.encoder_id,
            "q": asked[0] if alone else asked,
            "k": wanted,
            "nprobes": n_probes,  # the least and the most: left to look further, Lance takes more than twice the time
        },
    )
    if not len(found):
        nothing = np.empty(0, np.int64)
        return nothing, nothing, pa.array([], pa.string()), np.empty((0, asked.shape[1]), np.float32)
    if alone:
        place = np.arange(len(found))
        return np.zeros_like(place), place, *_described(found, index.encoder_id)
    rows, candidate = np.unique(found["_rowid"].to_numpy(), return_inverse=True)
    parts = [
        images.to_table(
            columns=described,
            filter=f"_rowid IN ({', '.join(map(str, rows[at : at + ROWS_A_READ].tolist()))})",
            with_row_id=True,
        )
        for at in range(0, len(rows), ROWS_A_READ)
    ]
    read = pa.concat_tables(parts).sort_by("_rowid")
    return found["query_index"].to_numpy().astype(np.int64), candidate, *_described(read, index.encoder_id)


def _described(rows: pa.Table, encoder_id: str) -> tuple[pa.Array, np.ndarray]:
    rows = rows.combine_chunks()
    return rows["image_id"].chunk(0), feature_matrix(rows[encoder_id])
