"""Ingest a corpus: pretraining images from a folder or a Parquet file, encoded on the way in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from attrdb.database import Database
from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.encoders import Encoder, encode
from attrdb.ingest.pictures import Picture, image_files, read_picture, read_picture_file, read_text
from attrdb.schema import IMAGES, encoder_id_of, feature_array

CHUNK = 256  # images a commit
KEPT = ("source", "split", "category", "prompt", "uri", "creator", "license", "metadata")


@dataclass(frozen=True)
class Item:
    """An image that may be ingested; it is read only when it has to be."""

    image_id: str
    read: Callable[[], Picture]
    fields: Callable[[], dict]
    uri: str | None


@dataclass
class CorpusResult:
    n_appended: int = 0
    n_stored: int = 0  # that were there already
    failures: list[str] = field(default_factory=list)


def folder_items(folder: Path, source: str) -> Iterator[Item]:
    """Images below a folder; a `.txt` of the same name is the caption."""
    for path in image_files(folder):
        inside, uri = path.relative_to(folder).as_posix(), path.resolve().as_uri()

        def fields(path: Path = path, uri: str = uri) -> dict:
            caption = path.with_suffix(".txt")
            found = {"source": source, "uri": uri}
            return found | {"prompt": read_text(caption).strip()} if caption.is_file() else found

        yield Item(f"{source}/{inside}", partial(read_picture_file, path), fields, uri)


def parquet_items(path: Path, source: str | None) -> Iterator[Item]:
    """Rows with the columns `name` and `image` (encoded bytes), and any of KEPT; exemplars are left out.

    A source that is given replaces the rows' own, and goes before their names.
    """
    first = 0
    for batch in pq.ParquetFile(path).iter_batches(CHUNK):
        for number, row in enumerate(batch.to_pylist(), first):
            if row.get("role", "pretraining") == "pretraining":
                yield _parquet_item(f"{path} row {number}", row, source)
        first += len(batch)


def _parquet_item(where: str, row: dict, source: str | None) -> Item:
    name, encoded = row["name"], row["image"]
    if not isinstance(name, str) or not isinstance(encoded, bytes):
        raise InvalidValue(f"{where}: name must be text and image bytes, found {name!r} and {type(encoded).__name__}")
    fields = {column: row[column] for column in KEPT if column in row}
    for column, value in fields.items():
        if not isinstance(value, str | None):
            raise InvalidValue(f"{where}: {column} must be text, found {value!r}")
    if source:
        name, fields["source"] = f"{source}/{name}", source
    return Item(name, partial(read_picture, name, encoded), lambda: fields, fields.get("uri"))


def check_corpus(path: Path) -> int:
    """How many images `ingest_corpus` will look at.

    raises: NotFound if there is nothing at the path, InvalidValue if it is no corpus or has no image in it
    """
    if not path.exists():
        raise NotFound(f"no folder or Parquet file {path}")
    if path.is_dir():
        n_images = sum(1 for _ in image_files(path))
    elif path.suffix != ".parquet":
        raise InvalidValue(f"{path} is neither a folder of images nor a .parquet file")
    else:
        n_images = _count_rows(path)
    if not n_images:
        raise InvalidValue(f"{path} has no image in it; PNG, JPEG, WebP, BMP and GIF files are read")
    return n_images


def _count_rows(path: Path) -> int:
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        roles = file.read(["role"])["role"].to_pylist() if "role" in names else None
    except pa.ArrowException as error:
        raise InvalidValue(f"{path} is not a readable Parquet file: {error}") from error
    missing = {"name", "image"} - set(names)
    if missing:
        raise InvalidValue(f"{path} has no column {' or '.join(sorted(missing))}; it has: {', '.join(names)}")
    return file.metadata.num_rows if roles is None else roles.count("pretraining")


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
