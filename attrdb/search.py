"""Exact search: matrix products over Arrow batches streamed from Lance, in constant memory.

A gallery is given as an iterable of (ids, features) blocks, so that nothing here knows where they come from.
Similarity is the inner product of unit-length features, which is their cosine. Ties go to the smaller image_id.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import lance
import numpy as np

from attrdb.schema import feature_matrix

Block = tuple[np.ndarray, np.ndarray]  # image ids (n,) of str, features (n, dimension) float32

BLOCK_ROWS = 8192


def stream_features(dataset: lance.LanceDataset, encoder_id: str, where: str) -> Iterator[Block]:
    """Ids and features of the encoded rows that the predicate keeps, BLOCK_ROWS at a time."""
    batches = dataset.to_batches(
        columns=["image_id", encoder_id],
        filter=f"({where}) AND {encoder_id} IS NOT NULL",
        prefilter=True,
        batch_size=BLOCK_ROWS,
    )
    for batch in batches:
        if batch.num_rows:
            yield batch["image_id"].to_numpy(zero_copy_only=False), feature_matrix(batch[encoder_id])


@dataclass(frozen=True)
class Hits:
    """The best candidates of each query, best first. ids: (n_queries, k); similarity: same shape, float32."""

    ids: np.ndarray
    similarity: np.ndarray


def top_k(gallery: Iterable[Block], queries: np.ndarray, k: int) -> Hits:
    """The k most similar candidates of each query, fewer where the gallery is smaller.

    queries: (n_queries, dimension) float32, unit length
    """
    n_queries = len(queries)
    ids = np.empty((n_queries, 0), dtype=object)
    similarity = np.empty((n_queries, 0), dtype=np.float32)
    for block_ids, features in gallery:
        scores = queries @ features.T
        if scores.shape[1] > k:
            # Keep all that tie with the k-th best: which of them stays is for the ids to decide.
            kth = np.partition(scores, -k, axis=1)[:, -k]
            kept = np.flatnonzero((scores >= kth[:, None]).any(axis=0))
            scores, block_ids = scores[:, kept], block_ids[kept]
        ids = np.concatenate([ids, np.broadcast_to(block_ids, scores.shape)], axis=1)
        similarity = np.concatenate([similarity, scores], axis=1)
        order = np.stack([np.lexsort((i.astype(str), -s)) for i, s in zip(ids, similarity, strict=True)])[:, :k]
        ids = np.take_along_axis(ids, order, axis=1)
        similarity = np.take_along_axis(similarity, order, axis=1)
    return Hits(ids, similarity)


def count_above(
    gallery: Iterable[Block], queries: np.ndarray, similarity: np.ndarray, ids: np.ndarray
) -> tuple[np.ndarray, int]:
    """How many candidates rank before each given one, and how many candidates there are.

    queries:    (n_queries, dimension) float32, unit length
    similarity: (n_queries, m) float32: of m given candidates to each query; +inf where a query has fewer than m
    ids:        (n_queries, m): their image ids, which break ties
    returns:    (n_queries, m) int64, and the size of the gallery
    """
    counts = np.zeros(similarity.shape, dtype=np.int64)
    given = defaultdict(list)
    for query, column in np.ndindex(ids.shape):
        given[ids[query, column]].append((query, column))
    size = 0
    for block_ids, features in gallery:
        scores = queries @ features.T  # (n_queries, n)
        size += len(block_ids)
        # A given candidate that is met again keeps its given similarity: products of other shapes round differently.
        for candidate in np.flatnonzero([image_id in given for image_id in block_ids]):
            for query, column in given[block_ids[candidate]]:
                scores[query, candidate] = similarity[query, column]
        for column in range(similarity.shape[1]):
            threshold = similarity[:, column, None]
            counts[:, column] += (scores > threshold).sum(axis=1)
            for query, candidate in zip(*np.nonzero(scores == threshold), strict=True):
                counts[query, column] += block_ids[candidate] < ids[query, column]
    return counts, size
