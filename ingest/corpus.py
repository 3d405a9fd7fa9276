"""Ingest a corpus: pretraining images from a folder or a Parquet file, encoded on the way in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pyarrow as pa

from attrdb.database import Database
from attrdb.errors import InvalidValue
from attrdb.ingest.encoders import Encoder, encode
from attrdb.ingest.pictures import Picture
from attrdb.ingest.sources import Item, check_corpus, folder_items, parquet_items
from attrdb.schema import IMAGES, encoder_id_of, feature_array

CHUNK = 256  # images a commit


@dataclass
class CorpusResult:
    n_appended: int = 0
    n_stored: int = 0  # that were there already
    failures: list[str] = field(default_factory=list)


def register(db: Database, encoders: Sequence[Encoder]) -> None:
    """Check the encoders against those the database has, and add the new ones.

    raises: InvalidValue for an encoder that differs from the stored one, or a new one once images are stored
    """
    identities = [(one.spec, one.dimension, one.preprocessing, one.weights_fingerprint) for one in encoders]
    new = [identity for identity in identities if not db.check_encoder(*identity)]
    if new and db.status()["n_images"]:
        known = ", ".join(row["spec"] for row in db.encoders.values())
        raise InvalidValue(
            f"encoder {new[0][0]!r} is new, and the images in {db.path} have no features of it; its encoders are: {known}"
        )
    for identity in new:
        db.add_encoder(*identity)


def image_rows(rows: list[dict], pictures: list[Picture], encoders: Sequence[Encoder]) -> pa.Table:
    """Rows for `Database.append_images`: the given fields, with what the pictures and encoders add."""
    full = [
        {
            **row,
            "sha256": picture.sha256,
            "width": picture.width,
            "height": picture.height,
            "image": picture.encoded,
        }
        for row, picture in zip(rows, pictures, strict=True)
    ]
    table = pa.Table.from_pylist(full, IMAGES)
    images = [picture.image for picture in pictures]
    for encoder in encoders:
        table = table.append_column(encoder_id_of(encoder.spec), feature_array(encode(encoder, images)))
    return table


def ingest_corpus(
    db: Database,
    path: Path,
    encoders: Sequence[Encoder],
    source: str | None = None,
    report: Callable[[int], None] = lambda n_items: None,
) -> CorpusResult:
    """Append the images at a path that are not stored yet, a commit for every CHUNK of them.

    An image that cannot be read is left out and listed; the others are stored. Given again, it goes on where it was.
    raises: NotFound or InvalidValue as `check_corpus`, and InvalidValue for an encoder as `register`
    """
    check_corpus(path)
    items = folder_items(path, source or path.resolve().name) if path.is_dir() else parquet_items(path, source)
    register(db, encoders)
    result = CorpusResult()
    while chunk := list(islice(items, CHUNK)):
        stored = db.stored([item.image_id for item in chunk])
        rows: dict[str, dict] = {}
        pictures = []
        for item in chunk:
            try:
                if known := stored.get(item.image_id) or rows.get(item.image_id):
                    _check_same(item, known)
                    result.n_stored += 1
                    continue
                picture = item.read()
                row = {"image_id": item.image_id, "role": "pretraining", "sha256": picture.sha256, **item.fields()}
            except InvalidValue as error:
                result.failures.append(str(error))
                continue
            rows[item.image_id] = row
            pictures.append(picture)
        if rows:
            appended = db.append_images(image_rows(list(rows.values()), pictures, encoders))
            result.n_appended += appended.n_appended
            result.n_stored += appended.n_skipped
        report(len(chunk))
    return result


def _check_same(item: Item, stored: dict) -> None:
    """raises: InvalidValue if another picture is stored under the item's id"""
    if item.uri is not None and item.uri == stored.get("uri"):
        return
    if item.read().sha256 != stored["sha256"]:
        raise InvalidValue(
            f"image {item.image_id!r} is stored already, with other content, from {stored.get('uri')}; "
            "give this corpus another --source"
        )
