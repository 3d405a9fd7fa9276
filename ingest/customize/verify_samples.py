"""Stored samples made again from a model's stored weights, and compared with what is stored."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
from PIL import Image

from attrdb.database import Database
from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.models.ingest_one import regenerate
from attrdb.ingest.spread import spread
from attrdb.models import describe
from attrdb.progress import Progress, no_progress
from attrdb.store.predicates import among

SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("equal", pa.bool_()),  # every pixel
        ("max_difference", pa.int32()),  # of a pixel's channel, 0 to 255; null if the sizes differ
        ("mean_difference", pa.float64()),
    ]
)


def compare(
    db: Database,
    model_id: str,
    n_samples: int,
    base_model: str | None = None,
    report: Progress = no_progress,
) -> pa.Table:
    """Some samples of a model, spread over its schemes and prompts, made again: a row of SCHEMA each.

    base_model: where the base model is now, if not where the model's row says
    raises:     NotFound for an unknown model, or one without a stored sample, InvalidValue for one whose weights are not
                stored, and as `regenerate`
    """
    model = describe(db, model_id)
    if not model["weights_path"]:
        raise InvalidValue(
            f"model {model_id!r} was imported without its weights; only models that attrdb ingest model made can draw their "
            "samples again"
        )
    ids = spread([row["image_id"] for row in model["samples"]], n_samples)
    where = f"{among('image_id', ids)} AND image IS NOT NULL"
    rows = db.images(where, ["image_id", "image"]).to_pylist()
    stored = {row["image_id"]: row["image"] for row in rows}
    if not stored:
        raise NotFound(f"model {model_id!r} has no sample whose picture is stored, so there is nothing to compare with")
    wanted = [image_id for image_id in ids if image_id in stored]
    compared = []
    report("regenerate", 0, len(wanted))
    for image_id, image in regenerate(db, model_id, wanted, base_model=base_model):
        compared.append({"image_id": image_id, **difference(stored[image_id], image)})
        report("regenerate", len(compared), len(wanted))
    return pa.Table.from_pylist(compared, SCHEMA)


def difference(encoded: bytes, image: Image.Image) -> dict:
    """How far a picture is from a stored one, by pixel and channel."""
    before = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"), np.int16)
    after = np.asarray(image.convert("RGB"), np.int16)
    if before.shape != after.shape:
        return {"equal": False, "max_difference": None, "mean_difference": None}
    apart = np.abs(before - after)
    return {
        "equal": not apart.any(),
        "max_difference": int(apart.max()),
        "mean_difference": float(apart.mean()),
    }
