"""Exact search: matrix products over Arrow batches streamed from Lance, in constant memory.

A gallery is an iterable of (ids, features) blocks, so this module does not know where they come from. Similarity is the
inner product of unit-length features, which is their cosine. A mapper, if there is one, first maps queries as samples and
candidates as training images. Ties go to the smaller image_id.

The last digits of a float32 product depend on the shape of its matrices, so equal features would not tie. The product
therefore decides only what lies further than MARGIN from a decision. All else is computed again in float64 and rounded to
DIGITS.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from subprocess import SubprocessError
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attrdb.errors import InvalidValue
from attrdb.search.gemm import MARGIN, QUERIES_PER_PRODUCT, SCORES, ScoreKernel
from attrdb.search.mapper import Mapper
from attrdb.search.threads import map_blocks
from attrdb.store.features import Block

ROWS_PER_PRODUCT = 8192  # of blocks that are larger, with few queries
ROWS_PER_KERNEL = 1 << 17  # on an accelerator; half a GiB of scores
ROWS_COUNTED = 1 << 20  # the same for counting without a mapper, which keeps no scores
DIGITS = 12
PAIRS = 4096  # pairs of vectors that are held in float64 at a time


class _PairSimilarity:
    """Similarity in float64 of pairs of candidates and queries. Equal pairs have equal values, unlike in a matrix product."""

    def __init__(self, queries: np.ndarray, mapper: Mapper | None):
        self.queries = mapper.samples(queries, np.float64) if mapper else queries
        self.mapper = mapper

    def __call__(self, features: Any, candidate: np.ndarray, query: np.ndarray) -> np.ndarray:
        if self.mapper or not isinstance(features, np.ndarray):
            used, candidate = np.unique(candidate, return_inverse=True)
            features = features[used]
        if not isinstance(features, np.ndarray):
            features = features.cpu().numpy()
        if self.mapper:
            mapped = np.empty(features.shape)
            for at in range(0, len(features), PAIRS):
                mapped[at : at + PAIRS] = self.mapper.exemplars(features[at : at + PAIRS], np.float64)
            features = mapped
        similarity = np.empty(len(candidate))
        for at in range(0, len(candidate), PAIRS):
            part = slice(at, at + PAIRS)
            similarity[part] = np.einsum(
                "nd,nd->n", features[candidate[part]], self.queries[query[part]], dtype=np.float64
            )
        return np.round(similarity, DIGITS)


def exact_similarity(
    features: np.ndarray, queries: np.ndarray, candidate: np.ndarray, query: np.ndarray, mapper: Mapper | None = None
) -> np.ndarray:
    """(n,) float64: the similarity of n pairs, rounded to DIGITS.

    features, queries: (n_candidates, dimension) and (n_queries, dimension), unit length, before they are mapped
    candidate, query:  (n,) int64 each: the rows of features and of queries that make a pair
    """
    return _PairSimilarity(queries, mapper)(features, candidate, query)


@dataclass(frozen=True)
class Hits:
    """The best candidates of each query, best first: one array of ids and one of similarity (float64) per query."""

    ids: list[np.ndarray]
    similarity: list[np.ndarray]


def joined(parts: Sequence[Hits]) -> Hits:
    """The hits of several batches of queries, one batch after the other."""
    return Hits(
        [ids for part in parts for ids in part.ids],
        [similarity for part in parts for similarity in part.similarity],
    )


def merged(galleries: Sequence[Hits], k: int) -> Hits:
    """The best k of each query from several galleries that share no candidate."""
    n_queries = len(galleries[0].ids)
    best = TopHits(n_queries, k)
    for hits in galleries:
        if n_queries:
            query = np.repeat(np.arange(n_queries), [len(ids) for ids in hits.ids])
            best.add(query, np.concatenate(hits.similarity), pa.array(np.concatenate(hits.ids), pa.string()))
    return best.hits()


def recall(hits: Hits, exact: Hits, k: int, query_ids: Iterable[str | None]) -> float:
    """Mean share of each query's exact first k candidates that are among its hits; ties with the last of them count.

    hits, exact: k + 1 candidates per query
    query_ids:   the image that each query is, which does not count as a candidate; None for a query that is no image
    """
    shares = []
    for query_id, ids, similarity, exact_ids, exact_similarities in zip(
        query_ids, hits.ids, hits.similarity, exact.ids, exact.similarity, strict=True
    ):
        wanted, reached = exact_similarities[exact_ids != query_id][:k], similarity[ids != query_id][:k]
        shares.append(np.count_nonzero(reached >= wanted[-1]) / len(wanted) if len(wanted) else 1.0)
    return float(np.mean(shares))


def top_k(
    gallery: Iterable[Block], queries: np.ndarray, k: int, *, mapper: Mapper | None = None, device: str = "cpu"
) -> Hits:
    """The k most similar candidates of each query, fewer where the gallery is smaller.

    queries: (n_queries, dimension) float32, unit length, before they are mapped
    device:  of the matrix products: `cpu` (NumPy), or `cuda` (torch and Triton; see `accelerator`)
    """
    kernel, pair_similarity = _score_kernel(queries, mapper, device), _PairSimilarity(queries, mapper)
    best = TopHits(len(queries), k)

    def pairs_of(block: Block) -> list[tuple[np.ndarray, np.ndarray, pa.Array]]:
        """Query, similarity and id of all pairs that may be among the best."""
        block_ids, features = block
        pairs = []
        for first, scores in kernel.scores(features):
            query, candidate = scores.at_least(best.thresholds(scores, slice(first, first + scores.n_queries)))
            query += first
            pairs.append((query, pair_similarity(features, candidate, query), block_ids.take(pa.array(candidate))))
        return pairs

    for pairs in map_blocks(pairs_of, _cut(gallery, len(queries), device, ROWS_PER_KERNEL), device):
        for query, similarity, ids in pairs:
            best.add(query, similarity, ids)
    return best.hits()


class TopHits:
    """The best k candidates of every query among those that were added.

    Added pairs wait until there are as many as are kept, and are then merged in one sort. So at most twice the pairs that
    are kept are in memory, and merging costs little beside the matrix products.
    """

    def __init__(self, n_queries: int, k: int):
        self.n_queries, self.k = n_queries, k
        self.kth_similarity = np.full(n_queries, -np.inf)  # as of the last merge; -inf for fewer than k candidates
        self._kept = pa.table(
            {
                "query": pa.array([], pa.int64()),
                "similarity": pa.array([], pa.float64()),
                "id": pa.array([], pa.string()),
            }
        )
        self._waiting: list[pa.Table] = []
        self._n_waiting = 0

    def thresholds(self, scores: Any, queries: slice) -> np.ndarray:
        """(n_queries,) float32: no candidate with a lower score can be among the best k of its query.

        scores:  of the queries in the slice, see `gemm.Scores`; before a query has k candidates, they bound its k-th
        """
        kth = self.kth_similarity[queries]
        if np.isneginf(kth).any() and scores.n_candidates > self.k:
            kth = np.maximum(kth, scores.kth_best(self.k) - MARGIN)
        return (kth - MARGIN).astype(np.float32)

    def add(self, query: np.ndarray, similarity: np.ndarray, ids: pa.Array) -> None:
        """Add pairs.

        query, similarity, ids: (n,) int64, float64 and text
        """
        self._waiting.append(pa.table({"query": query, "similarity": similarity, "id": ids.cast(pa.string())}))
        self._n_waiting += len(query)
        if self._n_waiting >= self.n_queries * self.k:
            self._merge()

    def hits(self) -> Hits:
        """The best k of all that was added."""
        if not self.n_queries:
            return Hits([], [])
        self._merge()
        bounds = np.searchsorted(self._kept["query"].to_numpy(), np.arange(1, self.n_queries))
        ids, similarity = (self._kept[name].to_numpy() for name in ("id", "similarity"))
        return Hits(np.split(ids, bounds), np.split(similarity, bounds))

    def _merge(self) -> None:
        pairs = pa.concat_tables([self._kept, *self._waiting]).combine_chunks()
        order = [("query", "ascending"), ("similarity", "descending"), ("id", "ascending")]
        pairs = pairs.take(pc.sort_indices(pairs, order))
        query = pairs["query"].to_numpy()
        first = np.searchsorted(query, np.arange(self.n_queries + 1))
        rank = np.arange(len(query)) - first[query]
        self._kept = pairs.filter(pa.array(rank < self.k))
        full = np.diff(first) >= self.k
        self.kth_similarity[full] = pairs["similarity"].to_numpy()[first[:-1][full] + self.k - 1]
        self._waiting, self._n_waiting = [], 0


def count_above(
    gallery: Iterable[Block],
    queries: np.ndarray,
    similarity: np.ndarray,
    ids: np.ndarray,
    *,
    mapper: Mapper | None = None,
    device: str = "cpu",
) -> tuple[np.ndarray, int]:
    """The number of candidates that rank before each target, and the number of candidates.

    queries:    (n_queries, dimension) float32, unit length, before they are mapped
    similarity: (n_queries, m) float64 by `exact_similarity`: of m targets to each query; +inf for no target
    ids:        (n_queries, m): image ids of the targets, which break ties
    returns:    (n_queries, m) int64, and the size of the gallery
    """
    kernel, pair_similarity = _score_kernel(queries, mapper, device), _PairSimilarity(queries, mapper)

    def count(block: Block) -> tuple[np.ndarray, int]:
        block_ids, features = block
        counts = np.zeros(similarity.shape, dtype=np.int64)
        for query, column, candidate in kernel.count(features, similarity, counts):
            candidate_ids, target_ids = block_ids.take(pa.array(candidate)).to_numpy(False), ids[query, column]
            # Most are the targets themselves; mapped by another product, these may differ in the last digit.
            others = np.flatnonzero(candidate_ids != target_ids)
            if not len(others):
                continue
            query, column = query[others], column[others]
            ours, theirs = pair_similarity(features, candidate[others], query), similarity[query, column]
            is_before = (ours > theirs) | ((ours == theirs) & (candidate_ids[others] < target_ids[others]))
            np.add.at(counts, (query, column), is_before)
        return counts, len(block_ids)

    total, size = np.zeros(similarity.shape, dtype=np.int64), 0
    rows_per_kernel = ROWS_PER_KERNEL if mapper else ROWS_COUNTED
    for counts, n in map_blocks(count, _cut(gallery, len(queries), device, rows_per_kernel), device):
        total += counts
        size += n
    return total, size


def _cut(gallery: Iterable[Block], n_queries: int, device: str, rows_per_kernel: int) -> Iterator[Block]:
    """The gallery in blocks of no more rows than are multiplied at a time."""
    most = rows_per_kernel
    if device == "cpu":
        most = min(ROWS_PER_PRODUCT, SCORES // max(1, min(n_queries, QUERIES_PER_PRODUCT)))
    for ids, features in gallery:
        for at in range(0, len(ids), most):
            yield ids[at : at + most], features[at : at + most]


def _score_kernel(queries: np.ndarray, mapper: Mapper | None, device: str) -> Any:
    """The matrix products of the queries with blocks of features, on a device."""
    if device == "cpu":
        return ScoreKernel(queries, mapper)
    from attrdb.search import gemm_cuda

    return gemm_cuda.ScoreKernel(queries, mapper, device)


def accelerator(device: str) -> str:
    """The device that a word names: `auto` is the GPU if there is one, else the CPU.

    raises: InvalidValue if the word names a GPU and there is none that torch and Triton can use
    """
    if device == "cpu":
        return device
    missing = _missing_for_gpu()
    if missing is None:
        return "cuda"
    if device == "auto":
        return "cpu"
    raise InvalidValue(
        f"device is {device!r}, and there is no GPU that torch and Triton can use here ({missing}); give cpu or auto"
    )


def _missing_for_gpu() -> str | None:
    try:
        ctypes.CDLL("libcuda.so.1")  # looked for first, so that a machine without one does not wait for torch
        if not import_module("torch").cuda.is_available():
            return "torch finds none"
        import_module("triton").runtime.driver.active.get_current_target()  # compiles what it launches kernels with
    except (OSError, ImportError, RuntimeError, SubprocessError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None
