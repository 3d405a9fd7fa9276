"""Approximate search over an encoder's index: a query probes a few of its partitions, and its hits are compared exactly.

One index serves every mapper whose maps are linear but for a bias: similarity(x, x~) = (x . q + c) / n(x) with q = W^T s,
c = b . s, n(x) = |W x + b| and s = F~(x~) / |F~(x~)|. Candidates of similarity t and more are those with
x . q + c >= t n(x). Over the features of a gallery n(x) is nearly a plane a + g . x, so that they are nearly those with
the largest x . (q - t g): the index is asked for these, and what it hits is mapped and compared exactly. t is where the
tenth candidates of a mapper are, g is fitted (`attrdb.search.index_tuning`). (Ours, not of a paper.)
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from attrdb.search import exact as exact_search
from attrdb.search.mapper import Mapper
from attrdb.store.features import stream
from attrdb.store.schema import feature_columns, feature_matrix

FETCHED = 65_536  # hits that Lance is asked for at a time, so that their features fit into memory
ROWS_PER_READ = 8_192
MIN_REFINE_HITS = 10  # hits: oversampling is chosen for as many
PROBE_SAFETY = 4
FOLDABLE = ("affine", "gain")  # forms of mappers


@dataclass(frozen=True)
class Index:
    """An index that attrdb built, and how it is asked; see the tables `indices` and `mapper_searches`.

    later:           the fragments of images that it does not cover: they came after it, or their features did
    filtered:        whether the indices of other columns, which predicates are answered by, cover all that it covers
    norm_correction: (dimension,) float32, of a mapper: t g, which is subtracted from its folded query
    """

    encoder_id: str
    kind: str
    n_partitions: int
    n_probes: int
    oversampling: int
    uncovered_fragments: tuple[int, ...] = ()
    filter_indexed: bool = False
    norm_correction: np.ndarray | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        return index_name(self.encoder_id)


def index_name(encoder_id: str) -> str:
    """Of the Lance index on an encoder's column: the name that Lance would give it itself."""
    return f"{encoder_id}_idx"


def n_hits(index: Index, k: int) -> int:
    """How many hits are compared exactly for an answer of k candidates."""
    return max(k, MIN_REFINE_HITS) * index.oversampling


def coverage(images: lance.LanceDataset, encoder_id: str) -> dict[str, Any]:
    """`later` and `filtered` of the encoder's index."""
    features = feature_columns(images.schema)
    own, others = set(), []
    for one in images.describe_indices():
        covered = {fragment_id for segment in one.segments for fragment_id in segment.fragment_ids}
        if one.name == index_name(encoder_id):
            own = covered
        elif one.field_names[0] not in features:
            others.append(covered)
    there = {one.fragment_id for one in images.get_fragments()}
    own &= there
    return {"uncovered_fragments": tuple(sorted(there - own)), "filter_indexed": all(own <= one for one in others)}


def folded(queries: np.ndarray, mapper: Mapper | None, norm_correction: np.ndarray | None = None) -> np.ndarray:
    """(n_queries, dimension) float32, unit length: what to look for among features that are not mapped."""
    if mapper is None:
        return queries
    own = mapper.samples(queries)
    own = (
        own @ mapper.parameters["exemplar.weight"]
        if mapper.form == "affine"
        else own * mapper.parameters["exemplar.gain"]
    )
    own = own - (0 if norm_correction is None else norm_correction)
    asked: np.ndarray = own / np.linalg.norm(own, axis=1, keepdims=True)
    return asked


def top_k(
    images: lance.LanceDataset,
    index: Index,
    where: str,
    n_candidates: int,
    queries: np.ndarray,
    k: int,
    mapper: Mapper | None = None,
) -> exact_search.Hits:
    """Nearly the k most similar candidates of each query, with their exact similarity, as `exact.top_k` gives them all.

    Where the partitions that are looked into hold fewer than k candidates, fewer come back.
    queries:      (n_queries, dimension) float32, unit length, before they are mapped
    where:        a predicate that candidates fulfil; it is applied before the search, not to what the search has found
    n_candidates: about how many do
    """
    wanted = n_hits(index, k)
    # As many partitions as hold, on average, several times what is wanted; more than usual only where very much is.
    holding = math.ceil(PROBE_SAFETY * wanted * index.n_partitions / max(1, n_candidates))
    n_probes = min(index.n_partitions, max(index.n_probes, holding))
    asked = folded(queries, mapper, index.norm_correction)

    def of_part(part: slice) -> exact_search.Hits:
        query, candidate, ids, features = _hits(images, index, where, asked[part], wanted, n_probes)
        exact = exact_search.exact_similarity(features, queries[part], candidate, query, mapper)
        if len(asked[part]) == 1:  # an Arrow sort takes longer than it
            names = ids.to_pylist()
            first = sorted(range(len(names)), key=lambda place: (-exact[place], names[place]))[:k]
            return exact_search.Hits([ids.take(pa.array(first, pa.int64())).to_numpy(False)], [exact[first]])
        best = exact_search.Best(len(asked[part]), k)
        best.add(query, exact, ids.take(pa.array(candidate)))
        return best.hits()

    # Lance keeps one core busy with a search, of however many queries.
    n_cores = max(1, min(os.cpu_count() or 1, FETCHED // wanted))
    together = max(1, min(FETCHED // wanted // n_cores, math.ceil(len(queries) / n_cores)))
    parts = [slice(first, first + together) for first in range(0, len(queries), together)]
    if len(parts) == 1:
        found = of_part(parts[0])
    else:
        with ThreadPoolExecutor(n_cores) as pool:
            of_parts = list(pool.map(of_part, parts))
        found = exact_search.Hits(
            [ids for one in of_parts for ids in one.ids],
            [similarity for one in of_parts for similarity in one.similarity],
        )
    if not index.uncovered_fragments:
        return found
    # Lance would compare what the index does not cover for one query after the other.
    blocks = stream(images, index.encoder_id, where, fragments=index.uncovered_fragments)
    return exact_search.merged([found, exact_search.top_k(blocks, queries, k, mapper=mapper)], k)


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
        # Leaves out what the index does not cover, and what another index that Lance filters by does not.
        fast_search=bool(index.uncovered_fragments),
        use_scalar_index=index.filter_indexed or not index.uncovered_fragments,
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
        _, once = np.unique(found["_rowid"].to_numpy(), return_index=True)  # see below
        if len(once) < len(found):
            found = found.take(np.sort(once))
        place = np.arange(len(found))
        return np.zeros_like(place), place, *_described(found, index.encoder_id)
    rows, candidate = np.unique(found["_rowid"].to_numpy(), return_inverse=True)
    parts = [
        images.to_table(
            columns=described,
            filter=f"_rowid IN ({', '.join(map(str, rows[at : at + ROWS_PER_READ].tolist()))})",
            with_row_id=True,
        )
        for at in range(0, len(rows), ROWS_PER_READ)
    ]
    read = pa.concat_tables(parts).sort_by("_rowid")
    query = found["query_index"].to_numpy().astype(np.int64)
    # An index in several segments may give a row twice.
    _, once = np.unique(query * len(rows) + candidate, return_index=True)
    return query[once], candidate[once], *_described(read, index.encoder_id)


def _described(rows: pa.Table, encoder_id: str) -> tuple[pa.Array, np.ndarray]:
    rows = rows.combine_chunks()
    return rows["image_id"].chunk(0), feature_matrix(rows[encoder_id])
