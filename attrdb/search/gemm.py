"""Matrix products of queries with blocks of features, by NumPy: what exact searches spend their time on.

A float32 product decides what lies further than MARGIN from a decision; the rest is left to the caller.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from attrdb.search.mapper import Mapper

QUERIES_PER_PRODUCT = 1024
SCORES = QUERIES_PER_PRODUCT * 4096  # of a product: 16 MiB per worker, whatever the number of queries
MARGIN = 1e-5  # far above the error of a float32 product of unit vectors of a few thousand elements
FEW_QUERIES = 0.25  # share of the queries; up to it, their scores are copied, and only these are compared

Undecided = tuple[np.ndarray, np.ndarray, np.ndarray]  # (n,) each: query, column of the thresholds, candidate


class ScoreKernel:
    """queries: (n_queries, dimension) float32, unit length, before they are mapped."""

    def __init__(self, queries: np.ndarray, mapper: Mapper | None):
        self.queries, self.mapper = np.ascontiguousarray(mapper.samples(queries) if mapper else queries), mapper

    def scores(self, features: np.ndarray) -> Iterator[tuple[int, Scores]]:
        """Scores of all features with a block of queries, and the number of its first query; block after block."""
        for first, queries, candidates in self._factors(features):
            yield first, Scores(candidates @ queries.T)

    def count(self, features: np.ndarray, thresholds: np.ndarray, counts: np.ndarray) -> Iterator[Undecided]:
        """Add to `counts` the features that surely score above each threshold; yield the pairs too close to decide.

        thresholds, counts: (n_queries, m) float64, +inf for none, and int64
        """
        # One row per query, unlike in `scores`: each is compared with a number of its own, which takes half the time.
        for first, queries, candidates in self._factors(features):
            scores = queries @ candidates.T
            for column in range(thresholds.shape[1]):
                (finite,) = np.nonzero(np.isfinite(thresholds[first : first + len(queries), column]))
                if not len(finite):
                    continue
                rows = scores if len(finite) == len(scores) else scores[finite]
                threshold = thresholds[first + finite, column]
                above, (near, candidate) = _count(rows, threshold - MARGIN, threshold + MARGIN)
                counts[first + finite, column] += above
                yield first + finite[near], np.full(len(near), column), candidate

    def _factors(self, features: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        if self.mapper:
            features = self.mapper.exemplars(features)
        for first in range(0, len(self.queries), QUERIES_PER_PRODUCT):
            yield first, self.queries[first : first + QUERIES_PER_PRODUCT], features


class Scores:
    """scores: (n_candidates, n_queries) float32; the product takes up to a tenth less than the other way round."""

    def __init__(self, scores: np.ndarray):
        self.scores = scores
        self.n_candidates, self.n_queries = scores.shape

    def kth_best(self, k: int) -> np.ndarray:
        """(n_queries,): the k-th highest score of each query."""
        return np.partition(self.scores.T, -k, axis=1)[:, -k]

    def at_least(self, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Queries and candidates of the scores that reach the threshold of their query."""
        candidate, query = np.divmod(np.flatnonzero(self.scores >= thresholds), self.n_queries)
        return query, candidate


def _count(scores: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Per query, a row of scores: how many are above high; and the rows and columns of those between low and high."""
    low, high = low.astype(np.float32)[:, None], high.astype(np.float32)[:, None]
    n_reach, n_above = _count_true(scores >= low), np.zeros(len(scores), np.int64)
    # A comparison reads all that the product has written. So the second leaves out the queries that do not need it, if
    # they are many.
    (reaching,) = np.nonzero(n_reach)
    compared = reaching if len(reaching) < FEW_QUERIES * len(scores) else slice(None)
    n_above[compared] = _count_true(scores[compared] > high[compared])
    (unsure,) = np.nonzero(n_reach > n_above)
    near, candidate = np.nonzero((scores[unsure] >= low[unsure]) & (scores[unsure] <= high[unsure]))
    return n_above, (unsure[near], candidate)


def _count_true(rows: np.ndarray) -> np.ndarray:
    """(n,) int64: the number of true values in each row; several times as fast as a sum, which widens every value."""
    packed = np.packbits(rows, axis=1)
    whole = packed.shape[1] // 8 * 8
    words = np.ascontiguousarray(packed[:, :whole]).view(np.uint64)
    counts: np.ndarray = np.bitwise_count(words).sum(axis=1, dtype=np.int64)
    counts += np.bitwise_count(packed[:, whole:]).sum(axis=1, dtype=np.int64)
    return counts
