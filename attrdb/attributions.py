"""Attributions of many samples, stored in the table `attributions`, from which analysts aggregate without searching again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from attrdb import jobs
from attrdb.attribution import DEFAULT_K, attribute
from attrdb.database import Database
from attrdb.errors import NotFound
from attrdb.schema import TABLES, feature_matrix
from attrdb.snapshot import literal

SAMPLES_A_COMMIT = 1024
KEY = ["encoder_id", "mapper_id", "sample_id", "rank"]

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Attributed:
    """How many samples were attributed, and how many were already, with the same settings and the same images."""

    n_attributed: int
    n_stored: int


def attribute_samples(
    db: Database,
    samples: str = "true",
    *,
    k: int = DEFAULT_K,
    encoder_id: str | None = None,
    mapper_id: str | None = None,
    tau: float | None = None,
    lam: float | None = None,
    exact: bool = False,
    report: Report = lambda done, total: None,
) -> Attributed:
    """Attribute the samples that a predicate keeps, a commit for every SAMPLES_A_COMMIT of them.

    Given again, it goes on where it was: samples that are stored with these settings, and for the images as they are now,
    are passed over; what was stored otherwise is replaced.
    samples: an SQL predicate on the columns of images
    raises:  InvalidValue for a predicate that Lance does not take, and as `attribution.attribute`; NotFound if no encoded
             sample fulfils it
    """
    db.refresh()
    snapshot = db.snapshot
    encoder_id, mapper = snapshot.compared(encoder_id, mapper_id)
    tau, lam = snapshot.calibration(encoder_id, mapper_id, tau, lam)
    scope = f"encoder_id = {literal(encoder_id)} AND mapper_id = {literal(mapper_id or '')}"
    wanted = _wanted(db, samples, encoder_id)
    if not wanted:
        raise NotFound(f"no sample of {db.path} with a {encoder_id!r} feature fulfils {samples!r}")
    same = f"{scope} AND k = {k} AND tau = {tau!r} AND lam = {lam!r} AND images_version = {snapshot.version}"
    with jobs.running(db, "attribute", f"{encoder_id}/{mapper_id or ''}", {"samples": samples, "k": k}) as job:
        stored = snapshot.tables["attributions"].to_table(columns=["sample_id"], filter=same)["sample_id"]
        done = set(stored.to_pylist())
        left = [sample_id for sample_id in wanted if sample_id not in done]
        shared = {
            "encoder_id": encoder_id,
            "mapper_id": mapper_id or "",
            "k": k,
            "tau": tau,
            "lam": lam,
            "images_version": snapshot.version,
        }
        for start in range(0, len(left), SAMPLES_A_COMMIT):
            report(len(wanted) - len(left) + start, len(wanted))
            part = left[start : start + SAMPLES_A_COMMIT]
            listed = ", ".join(map(literal, part))
            features = snapshot.images(f"image_id IN ({listed})", ["image_id", encoder_id])
            ids = features["image_id"].to_pylist()
            found = attribute(
                snapshot,
                encoder_id,
                feature_matrix(features[encoder_id]),
                ids,
                k=k,
                tau=tau,
                lam=lam,
                mapper=mapper,
                exact=exact,
            )
            rows = [
                shared
                | {
                    "sample_id": sample_id,
                    "rank": rank,
                    "candidate_id": candidate_id,
                    "similarity": similarity,
                    "influence": influence,
                    "complete": one.complete,
                    "missing_influence": one.missing_influence,
                }
                for sample_id, one in zip(ids, found, strict=True)
                for rank, (candidate_id, similarity, influence) in enumerate(
                    zip(one.ids, one.similarity, one.influence, strict=True), 1
                )
            ]
            these = f"{scope} AND sample_id IN ({listed})"
            db.replace("attributions", pa.Table.from_pylist(rows, TABLES["attributions"]), KEY, these)
            job.n_done += len(part)
        report(len(wanted), len(wanted))
    return Attributed(len(left), len(wanted) - len(left))


def _wanted(db: Database, samples: str, encoder_id: str) -> list[str]:
    db.snapshot.check_predicate("samples", samples)
    where = f"role = 'sample' AND `{encoder_id}` IS NOT NULL AND ({samples})"
    return sorted(db.images(where, ["image_id"])["image_id"].to_pylist())
