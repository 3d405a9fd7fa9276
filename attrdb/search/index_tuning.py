"""How an index is searched: measured against an exact search, for an encoder's features and for each of its mappers.

The settings chosen are those of least work that find RECALL_WANTED of the exact first K.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum

import numpy as np

from attrdb.errors import Busy, InvalidValue
from attrdb.progress import Progress, no_progress
from attrdb.search import exact as exact_search
from attrdb.search import ivf, planner, sampling
from attrdb.search.mapper import Mapper, stored_mapper
from attrdb.store.locks import exclusive_lock
from attrdb.store.predicates import CANDIDATES, among, literal
from attrdb.store.schema import Row
from attrdb.store.snapshot import Snapshot
from attrdb.store.writer import Writer

K = 10
RECALL_WANTED = 0.99
OVERSAMPLING = (4, 16, 64)  # one bit per dimension says little about short features
MAPPER_TRIES = ((1, 1), (1, 2), (2, 4), (4, 8), (8, 16))  # partitions and hits, as multiples of those without a mapper
MIDDLE_TRY = MAPPER_TRIES[2]  # decides whether a mapper's norm correction helps
ROWS_FITTED = 20_000  # features that the plane of a mapper's n(x) is fitted on
RIDGE = 1e-6  # of that fit, so that it does not follow noise


class Unmeasured(Enum):
    """Why the searches of a mapper were not measured. They compare all candidates then."""

    NOT_FOLDABLE = "its form cannot be folded into a query"
    NO_INDEX = "its encoder has no index"
    INDEX_BEHIND = "the index does not cover all rows; optimize covers them, and then measures"
    BROKEN = "it makes features that are zero or not finite"
    NO_ANSWERS = "no query has an answer"


@dataclass(frozen=True)
class Trial:
    """Queries with their exact answers, with which the answers of an index are compared.

    exact: K + 1 candidates per query
    """

    snapshot: Snapshot
    queries: sampling.QuerySample
    exact: exact_search.Hits
    mapper: Mapper | None

    @classmethod
    def of(cls, snapshot: Snapshot, encoder_id: str, mapper: Mapper | None = None) -> Trial:
        """raises: InvalidValue for a mapper that makes a feature that is zero or not finite"""
        queries = sampling.queries(snapshot, encoder_id)
        gallery = snapshot.features(encoder_id, CANDIDATES)
        return cls(snapshot, queries, exact_search.top_k(gallery, queries.features, K + 1, mapper=mapper), mapper)

    def recall(self, index: ivf.Index) -> float:
        """Mean share of the exact first K that the index finds."""
        hits = ivf.top_k(
            self.snapshot.tables["images"],
            index,
            self.snapshot.visible(CANDIDATES),
            planner.count(self.snapshot),
            self.queries.features,
            K + 1,
            self.mapper,
        )
        return exact_search.recall(hits, self.exact, K, self.queries.ids)


def measure(writer: Writer, entry: Row, report: Progress = no_progress) -> Row:
    """Choose how many partitions a query looks into and how many hits are compared exactly; store both and their recall.

    They are the least that find RECALL_WANTED of the exact first K, or the most that were tried if nothing does. Then the
    encoder's mappers are measured, see `measure_mapper`.
    """
    snapshot = writer.snapshot
    encoder_id, n_partitions = entry["encoder_id"], entry["n_partitions"]
    report("recall", 0, 1)
    trial = Trial.of(snapshot, encoder_id)
    probes = sorted({min(2**power, n_partitions) for power in range(2, n_partitions.bit_length() + 1)})
    coverage = ivf.coverage(snapshot.tables["images"], encoder_id)
    tries = [
        ivf.Index(encoder_id, entry["kind"], n_partitions, n_probes, oversampling, **coverage)
        for n_probes in probes
        for oversampling in OVERSAMPLING
    ]
    index, recall = _least(tries, trial, "recall", report)
    row = entry | _measured(trial, index, recall) | {"queries": trial.queries.source}
    writer.upsert("indices", [row])
    for mapper_id in _mapper_ids(writer.snapshot, encoder_id):
        measure_mapper(writer, mapper_id, report)
    return row


def measure_mapper(writer: Writer, mapper_id: str, report: Progress = no_progress) -> Row | Unmeasured:
    """Choose how a mapper, folded into the query, searches its encoder's index, and store that with its recall.

    The settings are the least that find RECALL_WANTED of the exact first K. If even the most do not, searches with this
    mapper compare all candidates.
    returns: the row of `mapper_searches`, or why there is none
    """
    writer.refresh()
    snapshot = writer.snapshot
    mapper = stored_mapper(snapshot, mapper_id)
    index = planner.indices(snapshot).get(mapper.encoder_id)
    if mapper.form not in ivf.FOLDABLE:
        return Unmeasured.NOT_FOLDABLE
    if index is None:
        return Unmeasured.NO_INDEX
    if index.uncovered_fragments:
        return Unmeasured.INDEX_BEHIND
    stage = f"recall of {mapper_id}"
    report(stage, 0, 1)
    try:
        trial = Trial.of(snapshot, mapper.encoder_id, mapper)
    except InvalidValue:  # reported by the searches with it
        return Unmeasured.BROKEN
    if not any(map(len, trial.exact.ids)):
        return Unmeasured.NO_ANSWERS
    tries = _mapper_tries(trial, index, _norm_correction(snapshot, mapper, trial.exact))
    most = tries[-1]
    recall = trial.recall(most)
    if used := recall >= RECALL_WANTED:
        chosen, recall = _least(tries, trial, stage, report)
    else:
        chosen = most
    row = {
        "mapper_id": mapper_id,
        "encoder_id": mapper.encoder_id,
        "used": used,
        "norm_correction": chosen.norm_correction,
        **_measured(trial, chosen, recall),
    }
    writer.upsert("mapper_searches", [row])
    return row


def _mapper_tries(trial: Trial, index: ivf.Index, norm_correction: np.ndarray) -> list[ivf.Index]:
    """The index as a mapper may search it, by ascending work: with its norm correction, or with none if that finds more."""

    def settings(probes: int, hits: int, correction: np.ndarray) -> ivf.Index:
        n_probes = min(probes * index.n_probes, index.n_partitions)
        return replace(index, n_probes=n_probes, oversampling=hits * index.oversampling, norm_correction=correction)

    corrections = (norm_correction, np.zeros_like(norm_correction))
    better = max(corrections, key=lambda correction: trial.recall(settings(*MIDDLE_TRY, correction)))
    return [settings(probes, hits, better) for probes, hits in MAPPER_TRIES]


def _measured(trial: Trial, index: ivf.Index, recall: float) -> Row:
    """The columns that `indices` and `mapper_searches` share."""
    return {
        "n_probes": index.n_probes,
        "oversampling": index.oversampling,
        "recall": recall,
        "n_queries": len(trial.queries.features),
        "images_version": trial.snapshot.version,
        "created_at": datetime.now(UTC),
    }


def measure_trained(writer: Writer, mapper_id: str) -> None:
    """`measure_mapper` for a new mapper; left to `optimize` if maintenance runs already."""
    with suppress(Busy), exclusive_lock(writer.path / ".maintenance.lock", f"{writer.path} is being maintained"):
        measure_mapper(writer, mapper_id)


def measure_missing(writer: Writer, report: Progress = no_progress) -> None:
    """Measure the mappers of indexed encoders that have no row in `mapper_searches`: a job may have been killed."""
    measured = set(writer.snapshot.tables["mapper_searches"].to_table(columns=["mapper_id"])["mapper_id"].to_pylist())
    for encoder_id in planner.indices(writer.snapshot):
        for mapper_id in _mapper_ids(writer.snapshot, encoder_id):
            if mapper_id not in measured:
                measure_mapper(writer, mapper_id, report)


def _least(tries: list[ivf.Index], trial: Trial, stage: str, report: Progress) -> tuple[ivf.Index, float]:
    """The first of the tries that finds RECALL_WANTED, or else the last, and its recall."""
    for number, index in enumerate(tries):
        report(stage, number, len(tries))
        recall = trial.recall(index)
        if recall >= RECALL_WANTED:
            break
    report(stage, len(tries), len(tries))
    return index, recall


def _mapper_ids(snapshot: Snapshot, encoder_id: str) -> list[str]:
    """The encoder's mappers that can be folded into a query."""
    where = f"encoder_id = {literal(encoder_id)} AND {among('form', ivf.FOLDABLE)}"
    return sorted(snapshot.tables["mappers"].to_table(columns=["mapper_id"], filter=where)["mapper_id"].to_pylist())


def _norm_correction(snapshot: Snapshot, mapper: Mapper, exact: exact_search.Hits) -> np.ndarray:
    """(dimension,) float32: t g, where n(x) is nearly a + g . x, and t is the mean similarity of the K-th candidates."""
    n_rows = sampling.n_features(snapshot, mapper.encoder_id)
    x = sampling.features(snapshot, mapper.encoder_id, ROWS_FITTED, n_rows).astype(np.float64)
    n = mapper.norms(x)
    centre = x.mean(axis=0)
    x -= centre
    square = x.T @ x
    square[np.diag_indices_from(square)] += RIDGE * (1 + np.trace(square) / len(square))
    g = np.linalg.solve(square, x.T @ (n - n.mean()))
    t = np.mean([similarity[:K][-1] for similarity in exact.similarity if len(similarity)])
    correction: np.ndarray = (t * g).astype(np.float32)
    return correction
