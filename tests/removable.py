"""A small database with all that hangs on images: results of three kinds, models with settings, stored pictures."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
from conftest import TOY, rows

import attrdb
from attrdb.attribution.batch import attribute_samples
from attrdb.attribution.query import AttributionRequest
from attrdb.training.evaluate import evaluate


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
