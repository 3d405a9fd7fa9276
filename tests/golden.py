"""What a database of known contents answers: every named query, the attributions in Python and in SQL, the stored tables.

python tests/golden.py        writes tests/golden.json anew; only where results are meant to change
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from key_sets import store_answers
from learnable import DIMENSION, TELLING, build, features, table

from attrdb import queries
from attrdb.attribution.batch import attribute_samples
from attrdb.attribution.query import AttributionRequest
from attrdb.search.mapper import Mapper
from attrdb.store.schema import TABLES
from attrdb.training.evaluate import evaluate

FILE = Path(__file__).parent / "golden.json"
ROWS = 40  # of each result that are kept, beside their number
PARAMETERS = {
    "influence": {"image_id": "m84/0/0"},
    "influence_by_creator": {"image_id": "m84/1/0", "mapper_id": "halved", "tau": 1.0, "lam": 0.0},
    "influence_by_license": {"image_id": "m84/1/0", "tau": 1.0, "lam": 0.0},
    "influence_by_model": {"image_id": "m85/2/0", "tau": 0.2, "lam": 0.01},
    "influence_by_source": {"image_id": "m85/2/0", "mapper_id": "halved", "tau": 1.0, "lam": 0.0},
    "top_candidates": {"image_id": "m86/3/0"},
    "compare_mappers": {"mapper_id": "halved", "n_replicates": 200},
    "recall_intervals": {"n_replicates": 200},
    "source_confidence": {"key_set": "k"},
    "source_metrics": {"key_set": "k", "n_replicates": 200},
    "source_null": {"key_set": "k"},
}


def add_key_set(db, rng):
    """A key set of five keys, and answers of six innocent models, two infringing ones, and one of which nothing is known."""
    labels = {f"i{n}": "innocent" for n in range(6)} | {"f0": "infringing", "f1": "infringing", "unknown": None}
    models = {
        name: (0.5 * rng.random((5, 2)) + 0.4 * (label != "infringing"), label, None) for name, label in labels.items()
    }
    store_answers(db, models, 5, 2)


def database(path: Path):
    """`learnable`, with sets of unrelated images, creators, a mapper, a calibration, ranks and stored attributions."""
    db = build(path)
    rng = np.random.default_rng(1)
    for number in range(4):
        model_id, telling = f"set{number}", rng.standard_normal((3, TELLING))
        own = table([f"{model_id}/e{n}" for n in range(3)], "exemplar", features(rng, telling), model_id)
        near = features(rng, np.repeat(telling, 2, axis=0) + 0.1 * rng.standard_normal((6, TELLING)))
        samples = table([f"{model_id}/{n}/0" for n in range(6)], "sample", near, model_id, ["caption"] * 6)
        db.writer.append_model(
            pa.concat_tables([own, samples]), {"model_id": model_id, "kind": "mixed", "split": "test"}
        )
    named = table([f"q{n:02d}" for n in range(30)], "pretraining", features(rng, rng.standard_normal((30, TELLING))))
    for name, values in (
        ("creator", ["ana", "bo", None]),
        ("license", ["CC0", "MIT", None]),
        ("source", ["one", "other", None]),
    ):
        named = named.append_column(name, pa.array([values[n % 3] for n in range(30)], pa.string()))
    db.writer.append_images(named)
    add_key_set(db, rng)
    scale = np.where(np.arange(DIMENSION) < TELLING, 1.0, 0.5).astype(np.float32)
    bias = np.zeros(DIMENSION, np.float32)
    arrays = {
        f"{side}.{name}": value for side in ("exemplar", "sample") for name, value in (("gain", scale), ("bias", bias))
    }
    mapper = Mapper("halved", "toy_12", "gain", arrays)
    blank = dict.fromkeys(TABLES["mappers"].names)
    db.writer.add_mapper(blank | mapper.row() | {"metrics": "{}"})
    blank = dict.fromkeys(TABLES["calibrations"].names)
    known = {"calibration_id": "toy_12", "method_id": "toy_12", "tau": 0.07, "lam": 0.02}
    db.writer.upsert("calibrations", [blank | known])
    for mapper_id in (None, "halved"):
        for gallery in ("own", "all"):
            evaluate(db, mapper_id or "toy_12", gallery)
        request = AttributionRequest(k=5, method=mapper_id or "toy_12")
        attribute_samples(db.writer, "model_id = 'm84' OR model_id = 'set1'", request)
    return db


def answers(db) -> dict[str, dict]:
    """The number of rows, and the first of them, of everything that is asked."""
    asked = {
        f"query {name}": db.query(name, **PARAMETERS.get(name, {}))
        for name, query in queries.own_queries().items()
        if query.group != "monitoring"  # of what this database does not have
    }
    for mapper_id in (None, "halved"):
        for sample in ("m84/0/0", "set1/2/0"):
            asked[f"attribute {sample} {mapper_id}"] = db.attribute(sample, k=12, mapper_id=mapper_id)
    asked["attribute CC0"] = db.attribute("m85/0/0", candidates="license = 'CC0'", tau=0.3, lam=0.0, exact=True)
    asked["attribute feature"] = db.attribute(db.feature("p007"), k=3)
    for name, statement in {
        "sql attribute": "FROM attribute('m84/2/0', k := 7, mapper_id := 'halved')",
        "sql attribute all": "FROM attribute('m84/2/0', k := NULL)",
        "sql nearest": "SELECT f.image_id AS sample_id, hits.* FROM features AS f, nearest(f.feature, k := 3) AS hits "
        "WHERE f.model_id = 'set2' AND f.role = 'sample' ORDER BY f.image_id, hits.rank",
        "sql ranks": "SELECT * EXCLUDE (images_version) FROM exemplar_ranks "
        "ORDER BY encoder_id, mapper_id, gallery, sample_id, exemplar_id",
        "sql rank sums": "SELECT encoder_id, mapper_id, gallery, count(*) AS n, sum(rank)::BIGINT AS ranks, "
        "sum(gallery_size)::BIGINT AS sizes FROM exemplar_ranks GROUP BY ALL ORDER BY ALL",
        "sql attributions": "SELECT * EXCLUDE (images_version) FROM attributions ORDER BY mapper_id, sample_id, rank",
        "sql calibrations": "SELECT encoder_id, mapper_id, tau, lam FROM calibrations ORDER BY ALL",
        "sql scores": "FROM sample_scores(3) ORDER BY mapper_id, gallery, sample_id",
    }.items():
        asked[name] = db.sql(statement)
    return {
        name: {"n": len(rows), "rows": [_plain(row) for row in _ordered(name, rows)]} for name, rows in asked.items()
    }


def _ordered(name: str, rows: pa.Table) -> list[dict]:
    if name == "query training_features":  # has no order
        rows = rows.sort_by("image_id")
    return rows.slice(0, ROWS).to_pylist()


def _plain(row: dict) -> dict:
    return {name: str(value) if hasattr(value, "isoformat") else value for name, value in row.items()}


def difference(before: object, now: object, place: str = "") -> str | None:
    """Where the answers differ; columns may have been added, and floats may differ as two machines' do."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name, value in before.items():
            if name not in now:
                return f"{place}/{name} is gone"
            if found := difference(value, now[name], f"{place}/{name}"):
                return found
        return None
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return next(
            (found for n in range(len(before)) if (found := difference(before[n], now[n], f"{place}/{n}"))), None
        )
    if isinstance(before, float) and isinstance(now, float) and math.isclose(before, now, rel_tol=1e-9, abs_tol=1e-12):
        return None
    return None if before == now and type(before) is type(now) else f"{place}: {before!r} before, {now!r} now"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = answers(database(Path(folder) / "golden.attrdb"))
    FILE.write_text("{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(found[name])}" for name in found) + "\n}\n")
    sys.stderr.write(f"wrote {FILE}, {sum(one['n'] for one in found.values())} rows\n")
