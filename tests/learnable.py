"""A database that a mapper can learn from: telling exemplars apart takes leaving out what is noise."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

import attrdb
from attrdb.store.schema import feature_array
from attrdb.upkeep import optimize

DIMENSION, TELLING = 12, 4  # of a feature: all, and those that say which exemplar a sample comes from


def features(rng, telling):
    """Rows whose last elements are noise, larger than what tells."""
    noise = 1.5 * rng.standard_normal((len(telling), DIMENSION - TELLING))
    x = np.concatenate([telling, noise], axis=1)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def table(ids, role, matrix, model_id=None, schemes=None):
    n = len(ids)
    return pa.table(
        {
            "image_id": ids,
            "role": [role] * n,
            "model_id": pa.array([model_id] * n, pa.string()),
            "prompt_scheme": pa.array(schemes or [None] * n, pa.string()),
            "toy_12": feature_array(matrix),
        }
    )


def build(path):
    """72 models to train on, 12 to validate and 6 to test, of both kinds, 4 samples each, and 200 pretraining images."""
    rng = np.random.default_rng(0)
    db = attrdb.create(path)
    db.writer.add_encoder("toy:12", DIMENSION, {}, "none")
    corpus = features(rng, rng.standard_normal((200, TELLING)))
    db.writer.append_images(table([f"p{n:03d}" for n in range(200)], "pretraining", corpus))
    for number in range(90):
        split = "train" if number < 72 else "val" if number < 84 else "test"
        kind = "style" if number % 3 == 0 else "object"
        model_id = f"m{number:02d}"
        telling = rng.standard_normal((1 + 2 * (kind == "style"), TELLING))
        own = table([f"{model_id}/e{n}" for n in range(len(telling))], "exemplar", features(rng, telling), model_id)
        near = telling[np.arange(4) % len(telling)] + 0.2 * rng.standard_normal((4, TELLING))
        drawn = features(rng, near)
        schemes = ["gpt", "procedural"] * 2
        samples = table([f"{model_id}/{n}/0" for n in range(4)], "sample", drawn, model_id, schemes)
        row = {"model_id": model_id, "kind": kind, "split": split}
        db.writer.append_model(pa.concat_tables([own, samples]), row)
    optimize.optimize(db.writer)  # a query would read 91 fragments
    return db
