"""Attributions of many samples, stored in the table `attributions`, which analysts aggregate without searching again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from attrdb.attribution.influence import Calibrated
from attrdb.attribution.methods import calibrations_of, load_method, resolve_method
from attrdb.attribution.query import Attribution, AttributionRequest, attribute_stored
from attrdb.errors import NotFound
from attrdb.progress import Progress, no_progress
from attrdb.store import jobs
from attrdb.store.ids import lock_file
from attrdb.store.jobs import JobResult
from attrdb.store.locks import exclusive_lock
from attrdb.store.predicates import among, literal
from attrdb.store.snapshot import Snapshot
from attrdb.store.writer import Writer

SAMPLES_PER_COMMIT = 1024


def attribute_samples(
    writer: Writer,
    samples: str,
    request: AttributionRequest,
    report: Progress = no_progress,
) -> JobResult:
    """Attribute the samples that a predicate keeps, in commits of SAMPLES_PER_COMMIT.

    A rerun resumes: samples that are stored with these settings, and for the images as they are now, are skipped; what was
    stored otherwise is replaced.
    samples: an SQL predicate on the columns of images
    request: its query is not used, and all candidates are attributed to: `attributions` does not say which were left out
    raises:  InvalidValue for a predicate that Lance does not take, and as `query.attribute`; NotFound if no sample that
             fulfils it can be attributed; Busy if another process attributes by the same method, or images are taken out
             meanwhile
    """
    writer.refresh()
    snapshot = writer.snapshot
    by = resolve_method(snapshot, request.method)
    request = replace(request, method=by, candidates=None)
    wanted = _wanted(snapshot, samples, by)
    shared = {"method_id": by, "images_version": snapshot.version, "k": request.k, "exact": request.exact}
    calibrated = dict(zip(wanted, calibrations_of(snapshot, by, wanted, request.tau, request.lam), strict=True))
    settings = {"samples": samples} | {name: getattr(request, name) for name in ("k", "exact", "tau", "lam")}
    with (
        exclusive_lock(
            lock_file(snapshot.path, "attribute", by), f"samples of {snapshot.path} are being attributed by {by}"
        ),
        jobs.running(writer, "attribute", by, settings) as job,
    ):
        same, others = _stored(writer.snapshot, shared, calibrated)
        left = [sample_id for sample_id in wanted if sample_id not in same]
        job.n_stored = len(wanted) - len(left)
        for start in range(0, len(left), SAMPLES_PER_COMMIT):
            report("attribute", job.n_stored + start, len(wanted))
            part = left[start : start + SAMPLES_PER_COMMIT]
            answers = attribute_stored(snapshot, part, request)
            replaced = (
                f"method_id = {literal(by)} AND {among('sample_id', part)}" if others.intersection(part) else None
            )
            writer.append_rows("attributions", _rows(answers, shared), snapshot, replaced)
            job.n_done += len(part)
        report("attribute", len(wanted), len(wanted))
    return job.result()


def _wanted(snapshot: Snapshot, samples: str, by: str) -> list[str]:
    """The ids of the samples that a predicate keeps and that the method can attribute, in order."""
    snapshot.check_predicate("samples", samples)
    method = load_method(snapshot, by)
    wanted = method.attributable(snapshot, samples)
    if not wanted:
        raise NotFound(f"no sample of {snapshot.path} with a {method.scored} fulfils {samples!r}")
    return sorted(wanted)


def _stored(snapshot: Snapshot, shared: dict[str, Any], calibrated: dict[str, Calibrated]) -> tuple[set[str], set[str]]:
    """The samples whose stored attributions by a method have the same settings, and those that have others."""
    where = f"method_id = {literal(shared['method_id'])}"
    columns = [*shared, *Calibrated._fields]
    stored = snapshot.tables["attributions"].to_table(columns=["sample_id", *columns], filter=where)
    first = stored.group_by("sample_id", use_threads=False).aggregate([(name, "first") for name in columns])
    same: set[str] = set()
    others: set[str] = set()
    for row in first.to_pylist():
        settings = {name: row[f"{name}_first"] for name in columns}
        settings["unattributed"] = settings["unattributed"] or 0.0
        wanted = calibrated.get(row["sample_id"])
        is_same = wanted is not None and settings == shared | wanted._asdict()
        (same if is_same else others).add(row["sample_id"])
    return same, others


def _rows(answers: dict[str, Attribution], shared: dict[str, Any]) -> pa.Table:
    """The answers to some samples as rows of `attributions`."""
    sizes = [len(answer.ids) for answer in answers.values()]
    columns = {
        "sample_id": np.repeat(np.array(list(answers), dtype=object), sizes),
        "rank": np.concatenate([np.arange(1, size + 1) for size in sizes]),
        "candidate_id": np.concatenate([answer.ids for answer in answers.values()]),
        "score": np.concatenate([answer.score for answer in answers.values()]),
        "influence": np.concatenate([answer.influence for answer in answers.values()]),
        "complete": np.repeat([answer.complete for answer in answers.values()], sizes),
        "missing_influence": np.repeat([answer.missing_influence for answer in answers.values()], sizes),
    }
    for name in Calibrated._fields:
        columns[name] = np.repeat([getattr(answer.calibrated, name) for answer in answers.values()], sizes)
    return pa.table(columns | {name: [value] * sum(sizes) for name, value in shared.items()})
