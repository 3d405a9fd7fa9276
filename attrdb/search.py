"""Exact search: matrix products over Arrow batches streamed from Lance, in constant memory.

A gallery is given as an iterable of (ids, features) blocks, so that nothing here knows where they come from.
Similarity is the inner product of unit-length features, which is their cosine. Ties go to the smaller image_id.

A float32 matrix product decides what it can: its last digits depend on the shape of the product, so that equal features
would not tie. What lies within MARGIN of a decision is computed again in float64, rounded to DIGITS.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import lance
import numpy as np

from attrdb.schema import feature_matrix

Block = tuple[np.ndarray, np.ndarray]  # image ids (n,) of str, features (n, dimension) float32

BLOCK_ROWS = 8192
MARGIN = 1e-5  # far above the error of a float32 product of unit vectors of a few thousand elements
DIGITS = 12
PAIRS = 4096  # pairs of vectors that are held in float64 at a time


def stream_features(dataset: lance.LanceDataset, encoder_id: str, where: str) -> Iterator[Block]:
    """Ids and features of the encoded rows that the predicate keeps, BLOCK_ROWS at a time."""
    batches = dataset.to_batches(
        columns=["image_id", encoder_id],
        filter=f"({where}) AND `{encoder_id}` IS NOT NULL",
        prefilter=True,
        batch_size=BLOCK_ROWS,
    )
    for batch in batches:
        if batch.num_rows:
            yield batch["image_id"].to_numpy(zero_copy_only=False), feature_matrix(batch[encoder_id])


def exact_similarity(features: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """(n,) float64: the similarity of each row of one matrix to the same row of the other, equal for equal rows."""
    parts = [
        np.einsum("nd,nd->n", features[at : at + PAIRS], queries[at : at + PAIRS], dtype=np.float64)
        for at in range(0, len(features), PAIRS)
    ]
    return np.round(np.concatenate(parts) if parts else np.empty(0), DIGITS)


@dataclass(frozen=True)
class Hits:
    """The best candidates of each query, best first: ids and similarity (float64), an array a query."""

    ids: list[np.ndarray]
    similarity: list[np.ndarray]


def top_k(gallery: Iterable[Block], queries: np.ndarray, k: int) -> Hits:
    """The k most similar candidates of each query, fewer where the gallery is smaller.

    queries: (n_queries, dimension) float32, unit length
    """
    ids = [np.empty(0, dtype=object) for _ in queries]
    similarity = [np.empty(0) for _ in queries]
    for block_ids, features in gallery:
        scores = queries @ features.T
        if scores.shape[1] > k:
            kth = np.partition(scores, -k, axis=1)[:, -k]
            of_query, candidates = np.nonzero(scores >= kth[:, None] - 2 * MARGIN)
        else:
            of_query, candidates = np.indices(scores.shape).reshape(2, -1)
        exact = exact_similarity(features[candidates], queries[of_query])
        bounds = np.searchsorted(of_query, np.arange(len(queries) + 1))
        for query, (first, end) in enumerate(pairwise(bounds)):
            merged_ids = np.concatenate([ids[query], block_ids[candidates[first:end]]])
            merged = np.concatenate([similarity[query], exact[first:end]])
            order = np.lexsort((merged_ids.astype(str), -merged))[:k]
            ids[query], similarity[query] = merged_ids[order], merged[order]
    return Hits(ids, similarity)


def count_above(
    gallery: Iterable[Block], queries: np.ndarray, similarity: np.ndarray, ids: np.ndarray
) -> tuple[np.ndarray, int]:
    """How many candidates rank before each given one, and how many candidates there are.

    queries:    (n_queries, dimension) float32, unit length
    similarity: (n_queries, m) float64 by `exact_similarity`: of m given candidates to each query; +inf for no candidate
    ids:        (n_queries, m): their image ids, which break ties
    returns:    (n_queries, m) int64, and the size of the gallery
    """
    counts = np.zeros(similarity.shape, dtype=np.int64)
    size = 0
    for block_ids, features in gallery:
        scores = queries @ features.T  # (n_queries, n)
        size += len(block_ids)
        for column in range(similarity.shape[1]):
            threshold = similarity[:, column]
            high = scores >= (threshold - MARGIN).astype(np.float32)[:, None]
            clear = scores > (threshold + MARGIN).astype(np.float32)[:, None]
            counts[:, column] += clear.sum(axis=1)
            query, candidate = np.nonzero(high & ~clear)
            exact = exact_similarity(features[candidate], queries[query])
            before = exact > threshold[query]
            before |= (exact == threshold[query]) & (block_ids[candidate] < ids[query, column])
            np.add.at(counts[:, column], query[before], 1)
    return counts, size
