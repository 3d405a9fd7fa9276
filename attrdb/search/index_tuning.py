"""How well an index answers: measured against an exact search, for an encoder's features and for each of its mappers.

What is chosen is the least work with which RECALL_WANTED of the exact first K are found.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime

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
OVERSAMPLING = (4, 16, 64)  # one bit a dimension says little of short features
MAPPER_TRIES = ((1, 1), (1, 2), (2, 4), (4, 8), (8, 16))  # times as many partitions and hits as without it
MIDDLE_TRY = MAPPER_TRIES[2]  # with which it is seen whether a mapper's norm correction helps
ROWS_FITTED = 20_000  # features that a mapper's n(x) is fitted on
RIDGE = 1e-6  # of that fit, so that it does not follow noise


def measure(writer: Writer, entry: Row, report: Progress = no_progress) -> Row:
    """Choose how many partitions a query looks into and how many hits are compared exactly, and store that with its recall.

    The least that finds RECALL_WANTED of the exact first K; where nothing does, all that was tried. Then the same for the
    encoder's mappers, see `measure_mapper`.
    """
    snapshot = writer.snapshot
    encoder_id, n_partitions = entry["encoder_id"], entry["n_partitions"]
    said, ids, queries = sampling.queries(snapshot, encoder_id)
    report("recall", 0, 1)
    exact = exact_search.top_k(snapshot.features(encoder_id, CANDIDATES), queries, K + 1)
    probes = sorted({min(2**power, n_partitions) for power in range(2, n_partitions.bit_length() + 1)})
    covers = ivf.coverage(snapshot.tables["images"], encoder_id)
    tries = [
        ivf.Index(encoder_id, entry["kind"], n_partitions, n_probes, oversampling, **covers)
        for n_probes in probes
        for oversampling in OVERSAMPLING
    ]
    index, recall = _least(tries, lambda index: _recall_of(snapshot, index, ids, queries, exact), "recall", report)
    row = entry | {
        "n_probes": index.n_probes,
        "oversampling": index.oversampling,
        "recall": recall,
        "n_queries": len(queries),
        "queries": said,
        "images_version": snapshot.version,
        "created_at": datetime.now(UTC),
    }
    writer.upsert("indices", [row])
    for mapper_id in _mapper_ids(writer.snapshot, encoder_id):
        measure_mapper(writer, mapper_id, report)
    return row


def measure_mapper(writer: Writer, mapper_id: str, report: Progress = no_progress) -> Row | None:
    """See what a mapper, folded into the query, finds through its encoder's index, and store how it is asked for that.

    With the norm correction that is fitted, or with none where more is found so; the least that finds RECALL_WANTED of the
    exact first K. Where not even the most does, all candidates are compared.
    returns: the row of `mapper_searches`; None where there is no index, or rows that it does not cover yet (`optimize`
             measures then), or nothing to ask, or a mapper that cannot be folded or is broken
    """
    writer.refresh()
    snapshot = writer.snapshot
    mapper = stored_mapper(snapshot, mapper_id)
    own = planner.indices(snapshot).get(mapper.encoder_id)
    if own is None or own.uncovered_fragments or mapper.form not in ivf.FOLDABLE:
        return None
    stage = f"recall of {mapper_id}"
    report(stage, 0, 1)
    _, ids, queries = sampling.queries(snapshot, mapper.encoder_id)
    try:
        exact = exact_search.top_k(snapshot.features(mapper.encoder_id, CANDIDATES), queries, K + 1, mapper=mapper)
    except InvalidValue:  # said when it is searched with
        return None
    if not any(map(len, exact.ids)):
        return None

    def asked(more: int, hits: int, correction: np.ndarray) -> ivf.Index:
        n_probes = min(more * own.n_probes, own.n_partitions)
        return replace(own, n_probes=n_probes, oversampling=hits * own.oversampling, norm_correction=correction)

    def recall_of(index: ivf.Index) -> float:
        return _recall_of(snapshot, index, ids, queries, exact, mapper)

    fitted = _norm_correction(snapshot, mapper, exact)
    correction = max((fitted, np.zeros_like(fitted)), key=lambda correction: recall_of(asked(*MIDDLE_TRY, correction)))
    tries = [asked(more, hits, correction) for more, hits in MAPPER_TRIES]
    # The most is tried first: it says whether anything else need be.
    index, recall = tries[-1], recall_of(tries[-1])
    if used := recall >= RECALL_WANTED:
        index, recall = _least(tries, recall_of, stage, report)
    row = {
        "mapper_id": mapper_id,
        "encoder_id": mapper.encoder_id,
        "used": used,
        "n_probes": index.n_probes,
        "oversampling": index.oversampling,
        "norm_correction": correction,
        "recall": recall,
        "n_queries": len(queries),
        "images_version": snapshot.version,
        "created_at": datetime.now(UTC),
    }
    writer.upsert("mapper_searches", [row])
    return row


def measure_trained(writer: Writer, mapper_id: str) -> None:
    """`measure_mapper` for a new mapper; left to `optimize` where maintenance runs already."""
    with suppress(Busy), exclusive_lock(writer.path / ".maintenance.lock", f"{writer.path} is being maintained"):
        measure_mapper(writer, mapper_id)


def measure_missing(writer: Writer, report: Progress = no_progress) -> None:
    """Measure the mappers of indexed encoders that are not measured: the job that should have was killed."""
    done = set(writer.snapshot.tables["mapper_searches"].to_table(columns=["mapper_id"])["mapper_id"].to_pylist())
    for encoder_id in planner.indices(writer.snapshot):
        for mapper_id in _mapper_ids(writer.snapshot, encoder_id):
            if mapper_id not in done:
                measure_mapper(writer, mapper_id, report)


def _least(
    tries: list[ivf.Index], recall_of: Callable[[ivf.Index], float], stage: str, report: Progress
) -> tuple[ivf.Index, float]:
    """The first of the tries, or else the last, with which RECALL_WANTED is found, and what is found with it."""
    for number, index in enumerate(tries):
        report(stage, number, len(tries))
        recall = recall_of(index)
        if recall >= RECALL_WANTED:
            break
    report(stage, len(tries), len(tries))
    return index, recall


def _mapper_ids(snapshot: Snapshot, encoder_id: str) -> list[str]:
    """Of the encoder's mappers that can be folded."""
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


def _recall_of(
    snapshot: Snapshot,
    index: ivf.Index,
    ids: np.ndarray,
    queries: np.ndarray,
    exact: exact_search.Hits,
    mapper: Mapper | None = None,
) -> float:
    where = snapshot.visible(CANDIDATES)
    found = ivf.top_k(snapshot.tables["images"], index, where, planner.count(snapshot), queries, K + 1, mapper)
    return exact_search.recall(found, exact, K, ids)
