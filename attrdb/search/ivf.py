"""Approximate search over an encoder's index: a query probes a few of its partitions, and its hits are compared exactly.

One index serves every mapper whose maps are linear but for a bias: similarity(x, x~) = (x . q + c) / n(x) with q = W^T s,
c = b . s, n(x) = |W x + b| and s = F~(x~) / |F~(x~)|. Candidates of similarity t and more are those with
x . q + c >= t n(x). Over the features of a gallery n(x) is nearly a plane a + g . x, so these are nearly the candidates
with the largest x . (q - t g). The index searches for those; its hits are mapped and compared exactly. t is the mean
similarity of the tenth candidates under the mapper; g is fitted (`attrdb.search.index_tuning`). (Ours, not from a paper.)
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
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

FETCHED = 65_536  # hits that are requested from Lance at a time, so that their features fit into memory
ROWS_PER_READ = 8_192
MIN_REFINE_HITS = 10  # an answer of fewer candidates is refined as one of so many, for which oversampling is tuned
PROBE_SAFETY = 4  # partitions that are probed hold, on average, so many times the hits that are requested
FOLDABLE = ("affine", "gain")  # forms of mappers


@dataclass(frozen=True)
class Index:
    """An index that attrdb built, and how it is searched; see the tables `indices` and `mapper_searches`.

    n_probes:            partitions that a query looks into
    oversampling:        hits that are compared exactly per candidate of the answer
    uncovered_fragments: fragments of images that it does not cover, because they or their features came after it
    filter_indexed:      whether the indices of other columns, which answer predicates, cover all that it covers
    norm_correction:     (dimension,) float32, of a mapper: t g, which is subtracted from its folded query
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
    """The name of the Lance index on an encoder's column: the one that Lance would choose itself."""
    return f"{encoder_id}_idx"


def n_hits(index: Index, k: int) -> int:
    """The number of hits that are compared exactly for an answer of k candidates."""
    return max(k, MIN_REFINE_HITS) * index.oversampling


def coverage(images: lance.LanceDataset, encoder_id: str) -> dict[str, Any]:
    """`uncovered_fragments` and `filter_indexed` of the encoder's index."""
    features = feature_columns(images.schema)
    covered: set[int] = set()
    covered_by_others = []
    for index in images.describe_indices():
        fragment_ids = {fragment_id for segment in index.segments for fragment_id in segment.fragment_ids}
        if index.name == index_name(encoder_id):
            covered = fragment_ids
        elif index.field_names[0] not in features:
            covered_by_others.append(fragment_ids)
    existing = {fragment.fragment_id for fragment in images.get_fragments()}
    covered &= existing
    return {
        "uncovered_fragments": tuple(sorted(existing - covered)),
        "filter_indexed": all(covered <= others for others in covered_by_others),
    }


def folded(queries: np.ndarray, mapper: Mapper | None, norm_correction: np.ndarray | None = None) -> np.ndarray:
    """(n_queries, dimension) float32, unit length: the queries to search for among features that are not mapped."""
    if mapper is None:
        return queries
    mapped = mapper.samples(queries)
    if mapper.form == "affine":
        directions = mapped @ mapper.parameters["exemplar.weight"]
    else:
        directions = mapped * mapper.parameters["exemplar.gain"]
    directions = directions - (0 if norm_correction is None else norm_correction)
    unit: np.ndarray = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    return unit


def top_k(
    images: lance.LanceDataset,
    index: Index,
    where: str,
    n_candidates: int,
    queries: np.ndarray,
    k: int,
    mapper: Mapper | None = None,
) -> exact_search.Hits:
    """Nearly the k most similar candidates of each query, with their exact similarity, in the form of `exact.top_k`.

    A query has fewer than k hits if the partitions that it looks into hold fewer candidates.
    queries:      (n_queries, dimension) float32, unit length, before they are mapped
    where:        a predicate that candidates fulfil; it is applied before the search, not to the hits
    n_candidates: about how many images fulfil it
    """
    request = _Request(images, index, where, n_hits(index, k), _n_probes(index, n_hits(index, k), n_candidates))
    directions = folded(queries, mapper, index.norm_correction)

    def search(part: slice) -> exact_search.Hits:
        pairs = request.pairs(directions[part])
        similarity = exact_search.exact_similarity(pairs.features, queries[part], pairs.candidate, pairs.query, mapper)
        return pairs.best(similarity, len(queries[part]), k)

    hits = exact_search.joined(_map_parts(search, len(queries), request.n_hits))
    if not index.uncovered_fragments:
        return hits
    # Lance would compare uncovered rows for one query after another.
    uncovered = stream(images, index.encoder_id, where, fragments=index.uncovered_fragments)
    return exact_search.merged([hits, exact_search.top_k(uncovered, queries, k, mapper=mapper)], k)


def _n_probes(index: Index, n_hits: int, n_candidates: int) -> int:
    """Partitions to look into: more than usual only where many hits are wanted from few candidates."""
    holding = math.ceil(PROBE_SAFETY * n_hits * index.n_partitions / max(1, n_candidates))
    return min(index.n_partitions, max(index.n_probes, holding))


def _map_parts(
    search: Callable[[slice], exact_search.Hits], n_queries: int, n_hits: int
) -> Sequence[exact_search.Hits]:
    """The hits of the queries in parts of at most FETCHED hits together, one part per core at a time.

    Lance keeps one core busy with a search, of however many queries.
    """
    n_cores = max(1, min(os.cpu_count() or 1, FETCHED // n_hits))
    size = max(1, min(FETCHED // n_hits // n_cores, math.ceil(n_queries / n_cores)))
    parts = [slice(first, first + size) for first in range(0, n_queries, size)]
    if len(parts) == 1:
        return [search(parts[0])]
    with ThreadPoolExecutor(n_cores) as pool:
        return list(pool.map(search, parts))


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a query and a candidate that an index hit.

    query, candidate: (n_pairs,) int64: the number of the query, and the row in ids and features
    ids, features:    (n_candidates,) text, (n_candidates, dimension) float32
    """

    query: np.ndarray
    candidate: np.ndarray
    ids: pa.Array
    features: np.ndarray

    def best(self, similarity: np.ndarray, n_queries: int, k: int) -> exact_search.Hits:
        """The best k candidates of each query, by the similarity of the pairs."""
        if n_queries == 1:  # an Arrow sort of so few takes longer
            ids = self.ids.to_pylist()
            order = sorted(range(len(ids)), key=lambda row: (-similarity[row], ids[row]))[:k]
            return exact_search.Hits([self.ids.take(pa.array(order, pa.int64())).to_numpy(False)], [similarity[order]])
        best = exact_search.TopHits(n_queries, k)
        best.add(self.query, similarity, self.ids.take(pa.array(self.candidate)))
        return best.hits()


@dataclass(frozen=True)
class _Request:
    """A search of an index; n_hits and n_probes (hits and partitions) are per query."""

    images: lance.LanceDataset
    index: Index
    where: str
    n_hits: int
    n_probes: int

    def pairs(self, queries: np.ndarray) -> _Pairs:
        """queries: (n_queries, dimension) float32, as `folded` makes them"""
        return self._pairs_of_one(queries[0]) if len(queries) == 1 else self._pairs_of_many(queries)

    def _pairs_of_one(self, query: np.ndarray) -> _Pairs:
        """Ids and features come with the hits: for one query, a second read takes longer."""
        hits = self._hits(query, self._columns)
        _, first = np.unique(hits["_rowid"].to_numpy(), return_index=True)
        if len(first) < len(hits):  # an index of several segments may return a row twice
            hits = hits.take(np.sort(first))
        candidate = np.arange(len(hits))
        return _Pairs(np.zeros_like(candidate), candidate, *self._described(hits))

    def _pairs_of_many(self, queries: np.ndarray) -> _Pairs:
        """Ids and features are read afterwards, once for all queries that hit a candidate, which takes less time."""
        hits = self._hits(queries, [])
        rows, candidate = np.unique(hits["_rowid"].to_numpy(), return_inverse=True)
        query = hits["query_index"].to_numpy().astype(np.int64)
        _, first = np.unique(query * len(rows) + candidate, return_index=True)  # a row may be returned twice, as above
        return _Pairs(query[first], candidate[first], *self._described(self._read(rows)))

    def _hits(self, queries: np.ndarray, columns: list[str]) -> pa.Table:
        """The columns of the rows that the index returns, `_rowid` among them; of several queries, `query_index` too."""
        return self.images.to_table(
            columns=[*columns, "_distance"],
            filter=self.where,
            prefilter=True,
            # Leaves out rows that the index, or an index that Lance filters by, does not cover.
            fast_search=bool(self.index.uncovered_fragments),
            use_scalar_index=self.index.filter_indexed or not self.index.uncovered_fragments,
            with_row_id=True,
            nearest={
                "column": self.index.encoder_id,
                "q": queries,
                "k": self.n_hits,
                "nprobes": self.n_probes,  # least and most; free to probe further, Lance takes more than twice the time
            },
        )

    def _read(self, rows: np.ndarray) -> pa.Table:
        """Ids and features of rows, given by ascending row id, in their order."""
        if not len(rows):
            return self.images.schema.empty_table()
        parts = [
            self.images.to_table(
                columns=self._columns,
                filter=f"_rowid IN ({', '.join(map(str, rows[at : at + ROWS_PER_READ].tolist()))})",
                with_row_id=True,
            )
            for at in range(0, len(rows), ROWS_PER_READ)
        ]
        return pa.concat_tables(parts).sort_by("_rowid")

    @property
    def _columns(self) -> list[str]:
        return ["image_id", self.index.encoder_id]

    def _described(self, rows: pa.Table) -> tuple[pa.Array, np.ndarray]:
        """Ids and features of rows."""
        return rows["image_id"].combine_chunks(), feature_matrix(rows[self.index.encoder_id])
