"""Attribution: the candidates that most resemble some images, with their influence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attrdb import search
from attrdb.errors import InvalidValue
from attrdb.influence import DEFAULT_LAM, DEFAULT_TAU, check_calibration, cut_off, influence
from attrdb.mapper import Mapper
from attrdb.snapshot import Snapshot

CANDIDATES = "role IN ('exemplar', 'pretraining')"
WIDEST = 65_536  # candidates that are kept of a query before its answer is called incomplete
QUERIES_A_PASS = 256


@dataclass(frozen=True)
class Attribution:
    """The candidates of one query, best first, ties by image_id.

    similarity, influence: (n,) float64. Influence is normalised over every candidate above the cut-off, so it does not
    depend on how many are returned; where more than WIDEST are above it, complete is false and missing_influence bounds
    the share of those left out.
    """

    ids: np.ndarray
    similarity: np.ndarray
    influence: np.ndarray
    complete: bool
    missing_influence: float

    def first(self, k: int | None) -> Attribution:
        """The first k candidates; for None all that have influence."""
        k = int(np.count_nonzero(self.influence)) if k is None else k
        return Attribution(self.ids[:k], self.similarity[:k], self.influence[:k], self.complete, self.missing_influence)


def attribute(
    snapshot: Snapshot,
    encoder_id: str,
    queries: np.ndarray,
    own_ids: Sequence[str | None],
    *,
    k: int | None = 10,
    tau: float = DEFAULT_TAU,
    lam: float = DEFAULT_LAM,
    mapper: Mapper | None = None,
) -> list[Attribution]:
    """The k candidates of each query, for k = None all that have influence.

    queries: (n_queries, dimension) float32, unit length, of the encoder; they are mapped here, as samples
    own_ids: the query's own image_id, which is no candidate of it; None for an image that is not stored
    raises:  InvalidValue for k < 1 or a wrong tau or lam
    source:  Wang et al. 2023, Eq. 6
    """
    if k is not None and k < 1:
        raise InvalidValue(f"k is {k}; at least one candidate must be asked for")
    check_calibration(tau, lam)
    answers: list[Attribution] = []
    for start in range(0, len(queries), QUERIES_A_PASS):
        part = slice(start, start + QUERIES_A_PASS)
        answers += _attribute(snapshot, encoder_id, queries[part], own_ids[part], k, tau, lam, mapper)
    return answers


def _attribute(
    snapshot: Snapshot,
    encoder_id: str,
    queries: np.ndarray,
    own_ids: Sequence[str | None],
    k: int | None,
    tau: float,
    lam: float,
    mapper: Mapper | None,
) -> list[Attribution]:
    size = snapshot.count(f"{CANDIDATES} AND `{encoder_id}` IS NOT NULL")
    answers: dict[int, Attribution] = {}
    width = max(k or 0, 256)
    open_queries = list(range(len(queries)))
    while open_queries:
        # One more than wanted: a query that is a candidate itself finds itself.
        gallery = snapshot.features(encoder_id, CANDIDATES)
        hits = search.top_k(gallery, queries[open_queries], width + 1, mapper=mapper)
        left = []
        for query, ids, similarity in zip(open_queries, hits.ids, hits.similarity, strict=True):
            others = ids != own_ids[query]
            n_others = size - int(not others.all())
            ids, similarity = ids[others][:width], similarity[others][:width]
            covered = len(ids) >= n_others or bool(similarity[-1] <= cut_off(similarity[0], tau, lam))
            if covered or width >= WIDEST:
                answers[query] = _answer(ids, similarity, n_others, covered, tau, lam).first(k)
            else:
                left.append(query)
        open_queries, width = left, min(4 * width, WIDEST)
    return [answers[query] for query in range(len(queries))]


def _answer(ids: np.ndarray, similarity: np.ndarray, size: int, covered: bool, tau: float, lam: float) -> Attribution:
    if not len(ids):
        return Attribution(ids, similarity, similarity, True, 0.0)
    shares = influence(similarity, tau, lam)
    missing = 0.0
    if not covered:
        last = float(shares[-1]) * (size - len(ids))
        missing = last / (1 + last)
        shares = shares * (1 - missing)
    return Attribution(ids, similarity, shares, covered, missing)
