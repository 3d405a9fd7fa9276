"""What retraining found, kept in a file, so that a method that comes later is measured against it without retraining.

It holds for the same models alone: for weights and samples with the digests that they had. The same machine makes them again
bit for bit; another one may not, and finds the truth by itself.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from attrdb.database import Database
from attrdb.store.schema import TABLES

FILE = Path(__file__).parent / "truth.parquet"
DIGESTS = "digests"  # column: of the weights, and of the samples that were measured
OWN = ("sample_id", "loss")  # columns of `counterfactuals`, in lists here
RETRAININGS = """\
SELECT retrainings.*, list(sample_id ORDER BY sample_id) AS sample_id, list(loss ORDER BY sample_id) AS loss
FROM retrainings
JOIN counterfactuals USING (retraining_id)
GROUP BY ALL
ORDER BY retraining_id
"""


def keep(db: Database, file: Path = FILE) -> int:
    """Write all retrainings of a database; returns how many."""
    rows = db.sql(RETRAININGS).to_pylist()
    known = _known(db)
    for row in rows:
        row[DIGESTS] = _digests(row, known)
    types = {name: TABLES["counterfactuals"].field(name).type for name in OWN}
    fields = [*TABLES["retrainings"], *(pa.field(name, pa.list_(type)) for name, type in types.items())]
    schema = pa.schema([*fields, pa.field(DIGESTS, pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema), file, compression="zstd")
    return len(rows)


def restore(db: Database, file: Path = FILE) -> tuple[int, int]:
    """Store those that are missing, of models and samples that are the same; returns how many, and how many are of others."""
    stored = {row["retraining_id"] for row in db.snapshot.rows("retrainings", columns=["retraining_id"])}
    known = _known(db)
    rows = [row for row in pq.read_table(file).to_pylist() if row["retraining_id"] not in stored]
    same = [row for row in rows if row[DIGESTS] == _digests(row, known)]
    losses = [
        {"retraining_id": row["retraining_id"], "model_id": row["model_id"], "sample_id": sample_id, "loss": loss}
        for row in same
        for sample_id, loss in zip(*(row[name] for name in OWN), strict=True)
    ]
    db.writer.append_rows("counterfactuals", pa.Table.from_pylist(losses, TABLES["counterfactuals"]), db.snapshot)
    db.writer.upsert("retrainings", [{name: row[name] for name in TABLES["retrainings"].names} for row in same])
    db.refresh()
    return len(same), len(rows) - len(same)


def _known(db: Database) -> dict[str, str]:
    """Digests of weights by model_id, and of samples by image_id."""
    models = db.sql("SELECT model_id AS id, weights_hash AS digest FROM models").to_pylist()
    samples = db.sql("SELECT image_id AS id, sha256 AS digest FROM samples").to_pylist()
    return {row["id"]: row["digest"] for row in models + samples}


def _digests(row: dict, known: dict[str, str]) -> str:
    digests = [known.get(each) or "" for each in (row["model_id"], *row["sample_id"])]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
