"""Ingest a corpus: pretraining images from a folder or a Parquet file, encoded on the way in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from attrdb.database import Database
from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.encoders import Encoder, encode
from attrdb.ingest.pictures import Picture, image_files, read_picture, read_picture_file
from attrdb.schema import IMAGES, encoder_id_of, feature_array

CHUNK = 512  # images a commit
KEPT = ("source", "split", "category", "prompt", "uri", "creator", "license", "metadata")


@dataclass(frozen=True)
class Item:
    """An image that may be ingested; it is read only when its id is not stored yet."""

    image_id: str
    read: Callable[[], Picture]
    fields: dict


@dataclass
class CorpusResult:
    n_appended: int = 0
    n_stored: int = 0  # that were there already
    failures: list[str] = field(default_factory=list)


def folder_items(folder: Path, source: str) -> Iterator[Item]:
    """Images below a folder; a `.txt` of the same name is the caption."""
    for path in image_files(folder):
        inside = path.relative_to(folder).as_posix()
        caption = path.with_suffix(".txt")
        fields = {"source": source, "uri": path.resolve().as_uri()}
        if caption.is_file():
            fields["prompt"] = caption.read_text(encoding="utf-8").strip()
        yield Item(f"{source}/{inside}", lambda path=path: read_picture_file(path), fields)


def parquet_items(path: Path) -> Iterator[Item]:
    """Rows with the columns `name` and `image` (encoded bytes), and any of KEPT; exemplars are left out.

    raises: InvalidValue if one of the two columns is missing
    """
    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    missing = {"name", "image"} - set(names)
    if missing:
        raise InvalidValue(f"{path} has no column {' or '.join(sorted(missing))}; it has: {', '.join(names)}")
    for batch in file.iter_batches(CHUNK):
        for row in batch.to_pylist():
            if row.get("role", "pretraining") == "pretraining":
                name, encoded = row["name"], row["image"]
                fields = {column: row[column] for column in KEPT if column in row}
                yield Item(name, lambda name=name, encoded=encoded: read_picture(name, encoded), fields)


def count_items(path: Path) -> int:
    """How many images `ingest_corpus` will look at."""
    if path.is_dir():
        return sum(1 for _ in image_files(path))
    file = pq.ParquetFile(path)
    if "role" not in file.schema_arrow.names:
        return file.metadata.num_rows
    return sum(role == "pretraining" for role in file.read(["role"])["role"].to_pylist())


def register(db: Database, encoders: Sequence[Encoder]) -> None:
    """Check the encoders against those the database has, and add the new ones."""
    for encoder in encoders:
        db.add_encoder(encoder.spec, encoder.dimension, encoder.preprocessing, encoder.weights_fingerprint)


def image_rows(rows: list[dict], pictures: list[Picture], encoders: Sequence[Encoder]) -> pa.Table:
    """Rows for `Database.append_images`: the given fields, with what the pictures and encoders add."""
    full = [
        {
            **row,
            "sha256": picture.sha256,
            "width": picture.image.width,
            "height": picture.image.height,
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
    raises: NotFound if there is nothing at the path, InvalidValue for a file that is not Parquet, or an encoder mismatch
    """
    if not path.exists():
        raise NotFound(f"no folder or Parquet file {path}")
    if path.is_file() and path.suffix != ".parquet":
        raise InvalidValue(f"{path} is neither a folder of images nor a .parquet file")
    items = folder_items(path, source or path.resolve().name) if path.is_dir() else parquet_items(path)
    register(db, encoders)
    result = CorpusResult()
    seen: set[str] = set()
    while chunk := list(islice(items, CHUNK)):
        stored = db.stored_ids([item.image_id for item in chunk])
        rows, pictures = [], []
        for item in chunk:
            if item.image_id in stored or item.image_id in seen:
                result.n_stored += 1
                continue
            seen.add(item.image_id)
            try:
                pictures.append(item.read())
            except InvalidValue as error:
                result.failures.append(str(error))
                continue
            rows.append({"image_id": item.image_id, "role": "pretraining", **item.fields})
        if rows:
            appended = db.append_images(image_rows(rows, pictures, encoders))
            result.n_appended += appended.n_appended
            result.n_stored += appended.n_skipped
        report(len(chunk))
    if not result.n_appended and not result.n_stored and not result.failures:
        raise InvalidValue(f"{path} has no image in it; PNG, JPEG, WebP, BMP and GIF files are read")
    return result
