"""Attributions of many samples, stored in the table `attributions`, from which analysts aggregate without searching again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attrdb.attribution.query import DEFAULT_K, Attribution, attribute
from attrdb.database import Database
from attrdb.errors import NotFound
from attrdb.store import jobs
from attrdb.store.ids import lock_file
from attrdb.store.locks import alone
from attrdb.store.schema import feature_matrix
from attrdb.store.snapshot import among, literal

SAMPLES_A_COMMIT = 1024

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
    raises:  InvalidValue for a predicate that Lance does not take, and as `query.attribute`; NotFound if no encoded
             sample fulfils it; Busy if another process attributes by the same encoder and mapper
    """
    db.refresh()
    snapshot = db.snapshot
    encoder_id, mapper = snapshot.compared(encoder_id, mapper_id)
    tau, lam = snapshot.calibration(encoder_id, mapper_id, tau, lam)
    scope = f"encoder_id = {literal(encoder_id)} AND mapper_id = {literal(mapper_id or '')}"
    wanted = _wanted(db, samples, encoder_id)
    if not wanted:
        raise NotFound(f"no sample of {db.path} with a {encoder_id!r} feature fulfils {samples!r}")
    shared = {
        "encoder_id": encoder_id,
        "mapper_id": mapper_id or "",
        "k": k,
        "exact": exact,
        "tau": tau,
        "lam": lam,
        "images_version": snapshot.version,
    }
    settings = {"samples": samples, **{name: shared[name] for name in ("k", "exact", "tau", "lam")}}
    lock = lock_file(db.path, "attribute", encoder_id, mapper_id or "")
    with (
        alone(lock, f"samples of {db.path} are being attributed by {mapper_id or encoder_id}"),
        jobs.running(db, "attribute", f"{encoder_id}/{mapper_id or ''}", settings) as job,
    ):
        stored = db.snapshot.tables["attributions"].to_table(columns=["sample_id", *shared], filter=scope)
        same = reduce(pc.and_, [pc.equal(stored[name], value) for name, value in shared.items()])
        done = set(stored.filter(same)["sample_id"].to_pylist())
        old = set(stored["sample_id"].to_pylist()) - done
        left = [sample_id for sample_id in wanted if sample_id not in done]
        for start in range(0, len(left), SAMPLES_A_COMMIT):
            report(len(wanted) - len(left) + start, len(wanted))
            part = left[start : start + SAMPLES_A_COMMIT]
            features = snapshot.images(among("image_id", part), ["image_id", encoder_id])
            ids = features["image_id"].to_pylist()
            queries = feature_matrix(features[encoder_id])
            found = attribute(snapshot, encoder_id, queries, ids, k=k, tau=tau, lam=lam, mapper=mapper, exact=exact)
            stale = f"{scope} AND {among('sample_id', part)}" if old.intersection(part) else None
            db.append_attributions(_rows(ids, found, shared), stale)
            job.n_done += len(part)
        report(len(wanted), len(wanted))
    return Attributed(len(left), len(wanted) - len(left))


def _rows(ids: list[str], found: list[Attribution], shared: dict[str, Any]) -> pa.Table:
    """The answers to some samples as rows of `attributions`."""
    sizes = [len(one.ids) for one in found]
    columns = {
        "sample_id": np.repeat(np.array(ids, dtype=object), sizes),
        "rank": np.concatenate([np.arange(1, size + 1) for size in sizes]),
        "candidate_id": np.concatenate([one.ids for one in found]),
        "similarity": np.concatenate([one.similarity for one in found]),
        "influence": np.concatenate([one.influence for one in found]),
        "complete": np.repeat([one.complete for one in found], sizes),
        "missing_influence": np.repeat([one.missing_influence for one in found], sizes),
    }
    return pa.table(columns | {name: [value] * sum(sizes) for name, value in shared.items()})


def _wanted(db: Database, samples: str, encoder_id: str) -> list[str]:
    db.snapshot.check_predicate("samples", samples)
    where = f"role = 'sample' AND `{encoder_id}` IS NOT NULL AND ({samples})"
    return sorted(db.images(where, ["image_id"])["image_id"].to_pylist())
