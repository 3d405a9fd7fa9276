"""Augmentation of a mapper's training images: further views of each, encoded once.

Source: Wang et al. 2023, Fig. 7, where mild or strong augmentation makes little difference. The text that we have does not
state the views; ours are those of customization, see `attrdb.ingest.customize.augmentation`.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa

from attrdb.database import Database
from attrdb.errors import InvalidValue
from attrdb.ingest.customize.augmentation import VIEWS, views
from attrdb.ingest.encode import encode, load_encoder
from attrdb.ingest.read.pictures import read_picture
from attrdb.store.predicates import among

AUGMENTS = ("none", "mild", "strong")  # a feature has no prompt that would say where a view is placed
SIDE = 128  # pixels of a view, before the encoder's own preprocessing
AT_ONCE = 64  # images whose views are encoded together


def augmented(db: Database, encoder_id: str, ids: pa.Array, augment: str, seed: int, file: Path) -> np.ndarray:
    """(images, views, dimension) float32, unit length, in the order of the ids, mapped from a file; an existing file is kept.

    augment: 'mild' or 'strong', of `attrdb.ingest.customize.augmentation.VIEWS`
    raises:  InvalidValue for an image whose picture is not stored; as `load_encoder`
    """
    shape = (len(ids), VIEWS[augment], db.encoders[encoder_id]["dimension"])
    if not file.exists():
        encoder = load_encoder(db.encoders[encoder_id]["spec"])
        db.writer.check_encoder(encoder.spec, encoder.dimension, encoder.preprocessing, encoder.weights_fingerprint)
        part = file.with_suffix(".part")
        with part.open("wb") as opened:
            for start in range(0, len(ids), AT_ONCE):
                wanted = ids[start : start + AT_ONCE].to_pylist()
                rows = db.images(among("image_id", wanted), ["image_id", "image"]).to_pylist()
                stored = {row["image_id"]: row["image"] for row in rows}
                if without := [image_id for image_id in wanted if stored[image_id] is None]:
                    raise InvalidValue(
                        f"image {without[0]!r} of {db.path} is stored without its picture, so it has no views to encode; "
                        "train without augmentation (augment)"
                    )
                pictures = [
                    view.picture
                    for image_id in wanted
                    for view in views(
                        read_picture(image_id, stored[image_id]).image,
                        augment,
                        SIDE,
                        random.Random(f"{seed}/{image_id}"),
                    )
                ]
                opened.write(encode(encoder, pictures).tobytes())
        part.replace(file)
    return np.memmap(file, np.float32, "r", shape=shape)
