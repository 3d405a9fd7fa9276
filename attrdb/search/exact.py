"""Exact search: matrix products over Arrow batches streamed from Lance, in constant memory.

A gallery is given as an iterable of (ids, features) blocks, so that nothing here knows where they come from.
Similarity is the inner product of unit-length features, which is their cosine; a mapper, where one is given, maps queries
as samples and candidates as training images first. Ties go to the smaller image_id.

A matrix product decides what it can: its last digits depend on its shape, so that equal features would not tie. What it does
not decide is computed again in float64, rounded to DIGITS.
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
ROWS_COUNTED = 1 << 20  # there, without a mapper: no scores are kept
DIGITS = 12
PAIRS = 4096  # pairs of vectors that are held in float64 at a time


class _Exact:
    """Similarity in float64 of pairs of candidates and queries, equal for equal pairs, which a matrix product is not."""

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
        found = np.empty(len(candidate))
        for at in range(0, len(candidate), PAIRS):
            part = slice(at, at + PAIRS)
            ours, theirs = features[candidate[part]], self.queries[query[part]]
            found[part] = np.einsum("nd,nd->n", ours, theirs, dtype=np.float64)
        return np.round(found, DIGITS)


def exact_similarity(
    features: np.ndarray, queries: np.ndarray, candidate: np.ndarray, query: np.ndarray, mapper: Mapper | None = None
) -> np.ndarray:
    """(n,) float64: the similarity of the candidates and queries at those places, rounded to DIGITS.

    features, queries: (n_candidates, dimension) and (n_queries, dimension), unit length, before they are mapped
    """
    return _Exact(queries, mapper)(features, candidate, query)


@dataclass(frozen=True)
class Hits:
    """The best candidates of each query, best first: ids and similarity (float64), an array a query."""

    ids: list[np.ndarray]
    similarity: list[np.ndarray]


def merged(found: Sequence[Hits], k: int) -> Hits:
    """The best k of each query from several galleries that share no candidate."""
    n_queries = len(found[0].ids)
    best = Best(n_queries, k)
    for hits in found:
        if n_queries:
            query = np.repeat(np.arange(n_queries), [len(ids) for ids in hits.ids])
            best.add(query, np.concatenate(hits.similarity), pa.array(np.concatenate(hits.ids), pa.string()))
    return best.hits()


def recall(found: Hits, exact: Hits, k: int, own_ids: Iterable[str | None]) -> float:
    """Mean share of each query's exact first k candidates that were found; what ties with the last of them counts.

    found, exact: k + 1 candidates a query, of which its own image, if it is among them, does not count
    """
    shares = []
    for own, ids, similarity, best_ids, best in zip(
        own_ids, found.ids, found.similarity, exact.ids, exact.similarity, strict=True
    ):
        best, hits = best[best_ids != own][:k], similarity[ids != own][:k]
        shares.append(np.count_nonzero(hits >= best[-1]) / len(best) if len(best) else 1.0)
    return float(np.mean(shares))


def top_k(
    gallery: Iterable[Block], queries: np.ndarray, k: int, *, mapper: Mapper | None = None, device: str = "cpu"
) -> Hits:
    """The k most similar candidates of each query, fewer where the gallery is smaller.

    queries: (n_queries, dimension) float32, unit length, before they are mapped
    device:  of the matrix products: `cpu` (NumPy), or `cuda` (torch and Triton; see `accelerator`)
    """
    kernel, exact = _score_kernel(queries, mapper, device), _Exact(queries, mapper)
    best = Best(len(queries), k)

    def of_block(block: Block) -> list[tuple[np.ndarray, np.ndarray, pa.Array]]:
        block_ids, features = block
        found = []
        for first, scores in kernel.scores(features):
            query, candidate = scores.at_least(best.needed(scores, slice(first, first + scores.n_queries)))
            query += first
            found.append((query, exact(features, candidate, query), block_ids.take(pa.array(candidate))))
        return found

    for found in map_blocks(of_block, _cut(gallery, len(queries), device, ROWS_PER_KERNEL), device):
        for one in found:
            best.add(*one)
    return best.hits()


class Best:
    """The best k candidates so far of every query, and those that are not yet merged into them."""

    def __init__(self, n_queries: int, k: int):
        self.n_queries, self.k = n_queries, k
        self.kth = np.full(n_queries, -np.inf)
        self.kept = pa.table(
            {
                "query": pa.array([], pa.int64()),
                "similarity": pa.array([], pa.float64()),
                "id": pa.array([], pa.string()),
            }
        )
        self.waiting: list[pa.Table] = []
        self.n_waiting = 0

    def needed(self, scores: Any, part: slice) -> np.ndarray:
        """The float32 similarity below which a candidate of some queries cannot be among their best."""
        kth = self.kth[part]
        if np.isneginf(kth).any() and scores.n_candidates > self.k:
            kth = np.maximum(kth, scores.kth_best(self.k) - MARGIN)
        return (kth - MARGIN).astype(np.float32)

    def add(self, query: np.ndarray, similarity: np.ndarray, ids: pa.Array) -> None:
        self.waiting.append(pa.table({"query": query, "similarity": similarity, "id": ids.cast(pa.string())}))
        self.n_waiting += len(query)
        # So at most as many wait as are kept, and merging costs little beside the products.
        if self.n_waiting >= self.n_queries * self.k:
            self._merge()

    def _merge(self) -> None:
        table = pa.concat_tables([self.kept, *self.waiting]).combine_chunks()
        order = [("query", "ascending"), ("similarity", "descending"), ("id", "ascending")]
        table = table.take(pc.sort_indices(table, order))
        query = table["query"].to_numpy()
        first = np.searchsorted(query, np.arange(self.n_queries + 1))
        place = np.arange(len(query)) - first[query]
        self.kept = table.filter(pa.array(place < self.k))
        full = np.diff(first) >= self.k
        self.kth[full] = table["similarity"].to_numpy()[first[:-1][full] + self.k - 1]
        self.waiting, self.n_waiting = [], 0

    def hits(self) -> Hits:
        if not self.n_queries:
            return Hits([], [])
        self._merge()
        bounds = np.searchsorted(self.kept["query"].to_numpy(), np.arange(1, self.n_queries))
        ids, similarity = (self.kept[name].to_numpy() for name in ("id", "similarity"))
        return Hits(np.split(ids, bounds), np.split(similarity, bounds))


def count_above(
    gallery: Iterable[Block],
    queries: np.ndarray,
    similarity: np.ndarray,
    ids: np.ndarray,
    *,
    mapper: Mapper | None = None,
    device: str = "cpu",
) -> tuple[np.ndarray, int]:
    """How many candidates rank before each given one, and how many candidates there are.

    queries:    (n_queries, dimension) float32, unit length, before they are mapped
    similarity: (n_queries, m) float64 by `exact_similarity`: of m given candidates to each query; +inf for no candidate
    ids:        (n_queries, m): their image ids, which break ties
    returns:    (n_queries, m) int64, and the size of the gallery
    """
    kernel, exact = _score_kernel(queries, mapper, device), _Exact(queries, mapper)

    def of_block(block: Block) -> tuple[np.ndarray, int]:
        block_ids, features = block
        counts = np.zeros(similarity.shape, dtype=np.int64)
        for query, column, candidate in kernel.count(features, similarity, counts):
            names, given = block_ids.take(pa.array(candidate)).to_numpy(False), ids[query, column]
            # Most are the given candidates themselves; mapped by another product, these may differ in the last digit.
            others = np.flatnonzero(names != given)
            if not len(others):
                continue
            query, column, names, given = query[others], column[others], names[others], given[others]
            found, threshold = exact(features, candidate[others], query), similarity[query, column]
            np.add.at(counts, (query, column), (found > threshold) | ((found == threshold) & (names < given)))
        return counts, len(block_ids)

    counts, size = np.zeros(similarity.shape, dtype=np.int64), 0
    rows_per_kernel = ROWS_PER_KERNEL if mapper else ROWS_COUNTED
    for of_one, n in map_blocks(of_block, _cut(gallery, len(queries), device, rows_per_kernel), device):
        counts += of_one
        size += n
    return counts, size


def _cut(gallery: Iterable[Block], n_queries: int, device: str, rows_per_kernel: int) -> Iterator[Block]:
    """The gallery in blocks of no more rows than are multiplied at a time."""
    most = rows_per_kernel
    if device == "cpu":
        most = min(ROWS_PER_PRODUCT, SCORES // max(1, min(n_queries, QUERIES_PER_PRODUCT)))
    for ids, features in gallery:
        for at in range(0, len(ids), most):
            yield ids[at : at + most], features[at : at + most]


def _score_kernel(queries: np.ndarray, mapper: Mapper | None, device: str) -> Any:
    """What multiplies blocks of features with some queries there."""
    if device == "cpu":
        return ScoreKernel(queries, mapper)
    from attrdb.search import gemm_cuda

    return gemm_cuda.ScoreKernel(queries, mapper, device)


def accelerator(device: str) -> str:
    """The device that a word stands for: `auto` is the GPU where there is one, else the CPU.

    raises: InvalidValue for a GPU where there is none that torch and Triton can use
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
