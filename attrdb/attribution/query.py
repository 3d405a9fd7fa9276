"""Attribution: the candidates that most resemble some images, with their influence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attrdb.attribution.influence import DEFAULT_LAM, DEFAULT_TAU, check_calibration, cut_off, influence
from attrdb.errors import InvalidValue, NotFound
from attrdb.search import exact as exact_search
from attrdb.search import ivf
from attrdb.search.mapper import Mapper
from attrdb.store.snapshot import Snapshot, storage

# Said by what they are not: Lance tests rows against a short list of others in three quarters of the time.
CANDIDATES = "role <> 'sample'"
DEFAULT_K = 10  # a smaller gallery than this answers with all it has; asked for more than it has, it refuses
FIRST_WIDTH = 256  # candidates that are looked at before it is known how many have influence
WIDEST = 65_536  # candidates that are kept of a query before its answer is called incomplete
HIT = 8  # times what a candidate takes in a scan, which reads one after the other
TOGETHER = 128  # queries whose products with a candidate take as long as reading it
HITS_A_PASS = 4 << 20  # of all queries that are searched for together
FEW = 20_000  # candidates of which all are compared, whether there is an index or not


@dataclass(frozen=True)
class Attribution:
    """The candidates of one query, best first, ties by image_id.

    similarity, influence: (n,) float64. Influence is normalised over every candidate above the cut-off, so it does not
    depend on how many are returned; where more than WIDEST are above it, complete is false and missing_influence bounds
    the share of those left out. What an index does not find, as its recall says, is in neither.
    """

    ids: np.ndarray
    similarity: np.ndarray
    influence: np.ndarray
    complete: bool
    missing_influence: float

    def first(self, k: int | None) -> Attribution:
        """The first k candidates; for None all that have influence."""
        k = int(np.count_nonzero(self.influence)) if k is None else k
        # Copies, so that the many that were looked at are let go.
        first = (part[:k].copy() for part in (self.ids, self.similarity, self.influence))
        return Attribution(*first, self.complete, self.missing_influence)


def nearest(
    snapshot: Snapshot,
    encoder_id: str,
    queries: np.ndarray,
    k: int,
    *,
    mapper: Mapper | None = None,
    candidates: str | None = None,
    exact: bool = False,
) -> exact_search.Hits:
    """The k most similar candidates of each query, by the encoder's index where there is one; fewer if there are fewer.

    With a mapper all candidates are compared, unless the index was found to serve it.

    queries:    (n_queries, dimension) float32, unit length, before they are mapped
    candidates: an SQL predicate on the columns of images; only candidates that fulfil it are searched
    exact:      do without the index
    raises:     InvalidValue for a predicate that Lance does not take
    """
    if candidates is not None:
        snapshot.check_predicate("candidates", candidates)
    where = _where(candidates)
    index = None if exact else snapshot.index(encoder_id, mapper)
    n_candidates = count(snapshot, candidates) if index else 0
    if index is None or n_candidates <= max(FEW, k) or not _worthwhile(index, n_candidates, len(queries), k):
        return exact_search.top_k(snapshot.features(encoder_id, where), queries, k, mapper=mapper)
    with storage(snapshot.path):
        visible = snapshot.visible(where)
        found = ivf.top_k(snapshot.tables["images"], index, visible, n_candidates, queries, k, mapper)
    short = [query for query, ids in enumerate(found.ids) if len(ids) < k]
    if short:
        whole = exact_search.top_k(snapshot.features(encoder_id, where), queries[short], k, mapper=mapper)
        for query, ids, similarity in zip(short, whole.ids, whole.similarity, strict=True):
            found.ids[query], found.similarity[query] = ids, similarity
    return found


def _worthwhile(index: ivf.Index, n_candidates: int, n_queries: int, k: int) -> bool:
    """Whether looking for hits takes less than comparing all candidates, whose reading many queries share."""
    hits = ivf.n_hits(index, k)
    return hits <= ivf.FETCHED and n_queries * hits * HIT < n_candidates * (1 + n_queries / TOGETHER)


def count(snapshot: Snapshot, candidates: str | None = None) -> int:
    """How many candidates there are that fulfil a predicate that has been checked, whether they have a feature or not."""
    return snapshot.count(_where(candidates))


def _where(candidates: str | None) -> str:
    return CANDIDATES if candidates is None else f"{CANDIDATES} AND ({candidates})"


def attribute(
    snapshot: Snapshot,
    encoder_id: str,
    queries: np.ndarray,
    own_ids: Sequence[str | None],
    *,
    k: int | None = DEFAULT_K,
    tau: float = DEFAULT_TAU,
    lam: float = DEFAULT_LAM,
    mapper: Mapper | None = None,
    candidates: str | None = None,
    exact: bool = False,
) -> list[Attribution]:
    """The k candidates of each query, for k = None all that have influence.

    queries:    (n_queries, dimension) float32, unit length, of the encoder; they are mapped here, as samples
    own_ids:    the query's own image_id, which is no candidate of it; None for an image that is not stored
    candidates, exact: as in `nearest`; influence is shared among the candidates that are searched
    raises:     InvalidValue for k < 1 or above the number of candidates, a wrong tau or lam, or a wrong predicate; NotFound
                if there is no candidate
    source:     Wang et al. 2023, Eq. 6
    """
    if k is not None and k < 1:
        raise InvalidValue(f"k is {k}; at least one candidate must be asked for")
    check_calibration(tau, lam)
    answers: dict[int, Attribution] = {}
    # One more than wanted: a query that is a candidate itself finds itself.
    width = max(k or 0, FIRST_WIDTH) + 1
    left = list(range(len(queries)))
    while left:
        wider: list[int] = []
        together = max(1, HITS_A_PASS // width)
        for start in range(0, len(left), together):
            part = left[start : start + together]
            hits = nearest(
                snapshot, encoder_id, queries[part], width, mapper=mapper, candidates=candidates, exact=exact
            )
            for query, ids, similarity in zip(part, hits.ids, hits.similarity, strict=True):
                others = ids != own_ids[query]
                everyone = len(ids) < width
                ids, similarity = ids[others], similarity[others]
                if k is not None:
                    check_enough(snapshot, encoder_id, candidates, k, len(ids))
                covered = everyone or bool(similarity[-1] <= cut_off(similarity[0], tau, lam))
                if covered or width > WIDEST:
                    size = len(ids) if covered else _n_features(snapshot, encoder_id, candidates)
                    answers[query] = _answer(ids, similarity, size, covered, tau, lam).first(k)
                else:
                    wider.append(query)
        left, width = wider, min(4 * width, WIDEST + 1)
    return [answers[query] for query in range(len(queries))]


def _n_features(snapshot: Snapshot, encoder_id: str, candidates: str | None) -> int:
    """How many candidates have a feature; reads all of them, and is asked for incomplete answers alone."""
    return snapshot.count(f"{_where(candidates)} AND `{encoder_id}` IS NOT NULL")


def check_enough(snapshot: Snapshot, encoder_id: str, candidates: str | None, k: int, n: int) -> None:
    """raises: NotFound if no candidate was found, InvalidValue if fewer were than k, unless k is as small as the default"""
    that = f" that fulfils {candidates!r}" if candidates else ""
    if not n:
        cure = "give another predicate" if candidates else "ingest a corpus or a model first"
        raise NotFound(f"{snapshot.path} has no candidate with a {encoder_id!r} feature{that}; {cure}")
    if n < k and k > DEFAULT_K:
        them = f"candidates with a {encoder_id!r} feature{that.replace('fulfils', 'fulfil')}"
        raise InvalidValue(f"k is {k}, {snapshot.path} has {n:,} {them}; ask for {n} at most")


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
