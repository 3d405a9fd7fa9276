"""A small database with all that hangs on images: results of three kinds, models with settings, stored pictures."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from conftest import TOY, angle, rows

import attrdb
from attrdb.attribution.batch import attribute_samples
from attrdb.attribution.query import AttributionRequest
from attrdb.database import Database
from attrdb.training.evaluate import evaluate
from attrdb.upkeep import health


def content(name: str) -> bytes:
    """The bytes of the picture of an image, by the last part of its id."""
    return b"encoded bytes of " + name.encode()


def sha(name: str) -> str:
    return hashlib.sha256(content(name)).hexdigest()


def settings(**more: object) -> str:
    return json.dumps({"exemplars": [sha("e0"), sha("e40")], "regularization": ["p10", "p20"], **more})


def described(entries: list[tuple[str, str, str | None, float]]) -> pa.Table:
    """Images from (image_id, role, model_id, degrees), each with a picture, a caption, an address and a creator."""
    names = [name for name, *_ in entries]
    return rows(
        entries,
        creator=["Ada" if name == "p90" else "Bo" for name in names],
        uri=[f"https://pictures.example/{name}.png" for name in names],
        sha256=[sha(name.rpartition("/")[2]) for name in names],
        image=[content(name.rpartition("/")[2]) for name in names],
        prompt=[f"caption of {name}" for name in names],
    )


def build(path: Path) -> Path:
    """The toy of conftest with a second model, pictures, ranks, attributions, and scores of a stored method."""
    db = attrdb.create(path)
    db.writer.add_encoder(**TOY)
    db.writer.append_images(described([(f"p{n}", "pretraining", None, n) for n in (10, 20, 90)]))
    model = [("m/e0", "exemplar", "m", 0), ("m/e40", "exemplar", "m", 40), ("m/0/1", "sample", "m", 2)]
    model += [("m/0/2", "sample", "m", 35)]
    db.writer.append_model(described(model), {"model_id": "m", "kind": "style", "settings": settings()})
    other = [("o/e60", "exemplar", "o", 60), ("o/1/3", "sample", "o", 61)]
    db.writer.append_model(described(other), {"model_id": "o", "kind": "object"})
    evaluate(db, gallery="own")
    evaluate(db, gallery="all")
    method = {
        "method_id": "given",
        "kind": "stored",
        "unit": "x",
        "lowest": 0.0,
        "highest": 1.0,
        "tau": 0.1,
        "lam": 0.05,
    }
    db.writer.add_method(method)
    scores = {
        "method_id": ["given"] * 4,
        "sample_id": ["m/0/1", "m/0/1", "m/0/2", "o/1/3"],
        "candidate_id": ["p10", "m/e0", "m/e0", "o/e60"],
        "score": [0.5, 0.75, 0.5, 0.25],
    }
    db.writer.append_rows("scores", pa.table(scores), db.snapshot)
    attribute_samples(db.writer, "true", AttributionRequest(k=3))
    return path


def files(path: Path) -> dict[str, bytes]:
    """The content of every file, by path."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def needles(image_id: str, degrees: float) -> dict[str, bytes]:
    """What tells of an image, and could stand in a file."""
    name = image_id.rpartition("/")[2]
    return {
        "id": image_id.encode(),
        "bytes": content(name),
        "caption": f"caption of {image_id}".encode(),
        "address": f"https://pictures.example/{image_id}.png".encode(),
        "hash": sha(name).encode(),
        "feature": np.array(angle(degrees), np.float32).tobytes(),
    }


def places(path: Path, image_id: str, degrees: float) -> dict[str, list[str]]:
    """Where each of the needles stands."""
    found: dict[str, list[str]] = {}
    for file, data in files(path).items():
        for what, needle in needles(image_id, degrees).items():
            if needle in data:
                found.setdefault(what, []).append(file)
    return found


EVERYTHING = {"id", "bytes", "caption", "address", "hash", "feature"}


def consistent(reader: Database) -> None:
    """A reader sees no result that is about an image it does not see, and only the removal is unfinished."""
    found = {finding.check for finding in health.check(reader.snapshot)}
    assert found <= {"unfinished_removals", "unfinished_models"}
    for table, column in (
        ("exemplar_ranks", "sample_id"),
        ("exemplar_ranks", "exemplar_id"),
        ("attributions", "candidate_id"),
        ("scores", "candidate_id"),
    ):
        assert reader.sql(f"SELECT {column} FROM {table} ANTI JOIN images ON image_id = {column}").num_rows == 0
    for model_id in reader.sql("SELECT model_id FROM models")["model_id"].to_pylist():
        statement = "SELECT n_samples = (SELECT count(*) FROM samples WHERE model_id = $id) AS is_right FROM models "
        [row] = reader.sql(statement + "WHERE model_id = $id", {"id": model_id}).to_pylist()
        assert row["is_right"]
