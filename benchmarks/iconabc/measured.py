"""What is measured of a method: exact ranks, and calibrations with their reliability on test models.

Ranks and calibrations are stored in the database, reliability on test models in WORK/held-out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from frozen import load_relatives

import attrdb
from attrdb.attribution.influence import Calibrated
from attrdb.attribution.methods import calibration
from attrdb.database import Database
from attrdb.store.files import write_whole
from attrdb.training.calibrate import calibrate, scores_of
from attrdb.training.evaluate import evaluate
from attrdb.training.influence_fit import Scores, divergence_of, reliability

GALLERY = "own"
UNCALIBRATED = Calibrated(1.0, 0.0)
PLACES = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)  # of candidates in the order of their influence

TESTS = """\
SELECT kind, split, list(model_id ORDER BY model_id) AS models
FROM models WHERE kind IN ('object', 'style') AND starts_with(split, 'test') GROUP BY ALL ORDER BY ALL
"""


def rank(db: Database, method_id: str) -> bool:
    """Rank the exemplars of all samples; False if that is stored."""
    if _count(db, "exemplar_ranks", method_id):
        return False
    evaluate(db, method_id, GALLERY)
    db.refresh()
    return True


def fit(db: Database, method_id: str) -> bool:
    """Calibrate on validation models, on all and per kind; False if that is stored."""
    if _count(db, "calibrations", method_id):
        return False
    calibrate(db, method_id)
    db.refresh()
    return True


def _count(db: Database, table: str, method_id: str) -> int:
    rows = db.sql(f"SELECT count(*) AS n FROM {table} WHERE method_id = $method_id", {"method_id": method_id})
    return rows["n"][0].as_py()


def held_out_file(work: Path, method_id: str) -> Path:
    return work / "held-out" / f"{method_id.replace('/', '--')}.json"


def hold_out(db: Database, method_id: str, file: Path) -> bool:
    """Write what a calibrated method's influence is worth on test models, a row per kind and split; False if it is stored."""
    if file.exists():
        return False
    cases = db.sql(TESTS).to_pylist()
    scores = {split: scores_of(db, method_id, split)[0] for split in sorted({case["split"] for case in cases})}
    rows = []
    for case in cases:
        of_case = scores[case["split"]].of(case["models"])
        fitted = calibration(db.snapshot, method_id, kind=case["kind"])
        rows.append(
            {
                "method_id": method_id,
                "kind": case["kind"],
                "split": case["split"],
                "kl": divergence_of(of_case, fitted),
                "reliability": reliability(of_case, fitted),
                "sorted_before": sorted_influence(of_case, UNCALIBRATED),
                "sorted": sorted_influence(of_case, fitted),
            }
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, lambda part: part.write_text(json.dumps(rows)))
    return True


def sorted_influence(scores: Scores, calibrated: Calibrated) -> list[float]:
    """Mean influence over the samples of the candidates at PLACES, fewer if there are fewer candidates."""

    def weight(of: np.ndarray) -> np.ndarray:
        return np.maximum(np.exp(np.minimum(of - scores.best, 0) / calibrated.tau) - calibrated.lam, 0)

    listed = np.concatenate([weight(scores.own), weight(scores.top)], axis=1)
    total = listed.sum(axis=1) + (weight(scores.centres[None]) * scores.tail).sum(axis=1)
    shares = (np.sort(listed, axis=1)[:, ::-1] / total[:, None]).mean(axis=0) * (1 - calibrated.unattributed)
    n = int(scores.n.min())
    return [float(shares[place - 1]) for place in PLACES if place <= min(n, len(shares))]


def worth(table: Collection[dict[str, Any]]) -> dict[str, float]:
    """Two figures of a reliability table, between 0 (right) and 1 (wrong).

    misplaced: half the sum, over its bins, of what influence and known share differ by, per sample
    at_zero:   the part of the exemplars' share that has an influence of exactly 0
    """
    n_samples = sum(row["n"] * row["share"] for row in table)  # the shares of a sample are 1 together
    differences = sum(row["n"] * abs(row["influence"] - row["share"]) for row in table)
    missed = sum(row["n"] * row["share"] for row in table if row["most"] == 0)
    return {"misplaced": differences / n_samples / 2, "at_zero": missed / n_samples}


def with_relatives(db: Database, method_ids: Collection[str], icons: Path, frozen_files: Path) -> Database:
    """A copy of the database without ranks, whose gallery has further icons of the styles' sets too.

    A copy that knows all these methods is kept. No other process may write to the database meanwhile.
    """
    path = db.path.with_name(f"{db.path.stem}-relatives.attrdb")
    if path.exists() and set(method_ids) <= attrdb.open(path).methods.keys():
        return attrdb.open(path)
    part = path.with_name(f"{path.stem}.part.attrdb")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(db.path, part)
    copy = attrdb.open(part)
    copy.writer.delete("exemplar_ranks", "true")
    load_relatives(copy, icons, frozen_files)
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)
    return attrdb.open(path)
