"""Attribution: the candidates that an image owes most to, with their influence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from attrdb.attribution.influence import Calibrated, check_calibration, cut_off, influence
from attrdb.attribution.methods import calibrations_of, load_method, resolve_method
from attrdb.attribution.protocol import Method, Queries
from attrdb.errors import InvalidValue, NotFound
from attrdb.store.predicates import literal
from attrdb.store.snapshot import Snapshot

DEFAULT_K = 10  # a smaller gallery than this answers with all it has; asked for more than it has, it refuses
FIRST_WIDTH = 256  # candidates that are looked at before it is known how many have influence
MAX_WIDTH = 65_536  # candidates that are kept of a query before its answer is called incomplete
PAIR_BUFFER = 4 << 20  # pairs of a query and a candidate that are held at a time


@dataclass(frozen=True)
class AttributionRequest:
    """What is asked: for an image, by a method, for some candidates.

    query:      the image_id of a stored image, or a feature (dimension,) of the method's encoder
    k:          how many candidates; None: all that have influence
    method:     a method_id, encoder_id or mapper_id; similarity of the database's first encoder for None
    tau, lam:   temperature and cut-off of influence; None: as calibrated, else as the method's row has them. Where one is
                given, nothing is left unattributed
    candidates: an SQL predicate on the columns of images, such as "license = 'CC0'"; only what fulfils it is searched, and
                influence is shared among what is searched
    exact:      look at every candidate, also where an index would do
    """

    query: str | np.ndarray | None = None
    k: int | None = DEFAULT_K
    method: str | None = None
    tau: float | None = None
    lam: float | None = None
    candidates: str | None = None
    exact: bool = False


@dataclass(frozen=True)
class Attribution:
    """The candidates of one query, best first, ties by image_id.

    score, influence: (n,) float64. Influence is normalised over every candidate above the cut-off, so it does not depend on
    how many are returned: over all of them it sums to 1 - missing_influence. That is what the method cannot attribute, as
    calibrated; and, where more than MAX_WIDTH are above the cut-off and complete is false, a bound of the share of those
    left out. Candidates that an index does not find, as its recall says, are in neither.
    """

    ids: np.ndarray
    score: np.ndarray
    influence: np.ndarray
    complete: bool
    missing_influence: float
    calibrated: Calibrated

    def first(self, k: int | None) -> Attribution:
        """The first k candidates; for None all that have influence."""
        k = int(np.count_nonzero(self.influence)) if k is None else k
        # Copies, so that the many that were looked at are let go.
        ids, score, influence = (part[:k].copy() for part in (self.ids, self.score, self.influence))
        return replace(self, ids=ids, score=score, influence=influence)


def attribute(snapshot: Snapshot, request: AttributionRequest) -> Attribution:
    """The answer to one request.

    raises: NotFound for an unknown image or method, or if there is no candidate; InvalidValue for k < 1 or above the number
            of candidates, a wrong tau, lam or predicate, or a feature that cannot be used
    source: Wang et al. 2023, Eq. 6
    """
    method = load_method(snapshot, resolve_method(snapshot, request.method))
    if request.query is None:
        raise InvalidValue("no image to attribute; give an image_id or a feature")
    if isinstance(request.query, str):
        queries = stored_query(snapshot, method, request.query)
    else:
        queries = method.feature_query(snapshot, request.query)
    [answer] = _attribute(snapshot, method, queries, request)
    return answer


def check_attributable(snapshot: Snapshot, image_id: str, by: str) -> None:
    """raises: NotFound unless an image is stored and the method of that id can attribute it"""
    stored_query(snapshot, load_method(snapshot, by), image_id)


def stored_query(snapshot: Snapshot, method: Method, image_id: str) -> Queries:
    """A stored image, as a method is asked about it.

    raises: NotFound if there is no such image, or the method cannot attribute it
    """
    queries = method.stored_queries(snapshot, [image_id])
    if not queries.ids:
        if not snapshot.count(f"image_id = {literal(image_id)}"):
            raise NotFound(f"no image {image_id!r} in {snapshot.path}")
        raise NotFound(f"image {image_id!r} has no {method.scored} yet")
    return queries


def attribute_stored(
    snapshot: Snapshot, image_ids: Sequence[str], request: AttributionRequest
) -> dict[str, Attribution]:
    """The answers for some stored images, by image_id; images that cannot be attributed have none. Raises as `attribute`."""
    method = load_method(snapshot, resolve_method(snapshot, request.method))
    queries = method.stored_queries(snapshot, image_ids)
    if not queries.ids:
        return {}
    answers = _attribute(snapshot, method, queries, request)
    return {image_id: answer for image_id, answer in zip(queries.ids, answers, strict=True) if image_id is not None}


def _attribute(snapshot: Snapshot, method: Method, queries: Queries, request: AttributionRequest) -> list[Attribution]:
    """Answers in the order of the queries. The search is widened for those that have influence beyond what was looked at."""
    k, candidates = request.k, request.candidates
    if k is not None and k < 1:
        raise InvalidValue(f"k is {k}; at least one candidate must be asked for")
    calibrated = calibrations_of(snapshot, method.method_id, queries.ids, request.tau, request.lam)
    for distinct in set(calibrated):
        check_calibration(*distinct)
    answers: dict[int, Attribution] = {}
    # One more than wanted: a query that is a candidate itself finds itself.
    width = max(k or 0, FIRST_WIDTH) + 1
    left = list(range(len(queries.ids)))
    while left:
        uncovered: list[int] = []
        for part in _parts(left, max(1, PAIR_BUFFER // width)):
            hits = method.nearest(snapshot, queries.part(part), width, candidates, request.exact)
            for query, ids, scores in zip(part, hits.ids, hits.similarity, strict=True):
                others = ids != queries.ids[query]
                all_found = len(ids) < width
                ids, scores = ids[others], scores[others]
                if k is not None:
                    check_enough(snapshot, method.scored, candidates, k, len(ids))
                tau, lam, _ = calibrated[query]
                covered = all_found or bool(scores[-1] <= cut_off(scores[0], tau, lam))
                if not covered and width <= MAX_WIDTH:
                    uncovered.append(query)
                    continue
                n = len(ids) if covered else method.n_scored(snapshot, queries.ids[query], candidates)
                answers[query] = _answer(ids, scores, n, calibrated[query]).first(k)
        left, width = uncovered, min(4 * width, MAX_WIDTH + 1)
    return [answers[query] for query in range(len(queries.ids))]


def _parts(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def check_enough(snapshot: Snapshot, scored: str, candidates: str | None, k: int, n: int) -> None:
    """See that as many candidates were found as were asked for; a gallery below DEFAULT_K may answer with all it has.

    scored: what candidates have, such as "'pixels_8' feature"
    raises: NotFound if none was found, InvalidValue if fewer were than k, unless k is at most DEFAULT_K
    """
    condition = f" that fulfils {candidates!r}" if candidates else ""
    if not n:
        cure = "give another predicate" if candidates else "ingest a corpus or a model first"
        raise NotFound(f"{snapshot.path} has no candidate with a {scored}{condition}; {cure}")
    if n < k and k > DEFAULT_K:
        them = f"candidates with a {scored}{condition.replace('fulfils', 'fulfil')}"
        raise InvalidValue(f"k is {k}, {snapshot.path} has {n:,} {them}; ask for {n} at most")


def _answer(ids: np.ndarray, scores: np.ndarray, n_scored: int, calibrated: Calibrated) -> Attribution:
    """Influence of the candidates that were looked at, where n_scored have a score."""
    if not len(ids):
        return Attribution(ids, scores, scores, True, 0.0, calibrated)
    shares = influence(scores, *calibrated)
    # Each of those left out scores at most as high as the last that was looked at.
    attributed = 1 - calibrated.unattributed
    most = float(shares[-1]) / attributed * max(0, n_scored - len(ids))
    return Attribution(ids, scores, shares / (1 + most), n_scored <= len(ids), 1 - attributed / (1 + most), calibrated)
