"""Image folders and Parquet files as a stream of items that are read only when needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from attrdb.errors import InvalidValue
from attrdb.ingest.read.pictures import Picture, image_files, read_picture, read_picture_file, read_text

BATCH_ROWS = 256
KEPT = ("source", "split", "category", "prompt", "uri", "creator", "license", "metadata")


@dataclass(frozen=True)
class Item:
    """An image that may be ingested; it is read only when it has to be."""

    image_id: str
    read: Callable[[], Picture]
    fields: Callable[[], dict]
    uri: str | None


def folder_items(folder: Path, source: str) -> Iterator[Item]:
    """Images below a folder; a `.txt` of the same name is the caption."""
    for path in image_files(folder):
        inside = path.relative_to(folder).as_posix()
        shown = inside.encode("utf-8", "replace").decode("utf-8")
        if shown != inside:
            yield refused(f"{source}/{shown}", InvalidValue(f"{folder / shown}: its name is not UTF-8; rename it"))
            continue
        uri = path.resolve().as_uri()

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
    for batch in batches_of(path):
        for number, row in enumerate(batch.to_pylist(), first):
            if row.get("role", "pretraining") == "pretraining":
                where = f"{path} row {number}"
                try:
                    yield _parquet_item(where, row, source)
                except InvalidValue as error:
                    yield refused(where, error)
        first += len(batch)


def refused(image_id: str, error: InvalidValue) -> Item:
    """An item that cannot be read, and why."""

    def read() -> NoReturn:
        raise error

    return Item(image_id, read, dict, None)


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


def batches_of(path: Path) -> Iterator[pa.RecordBatch]:
    """raises: InvalidValue for a damaged file"""
    try:
        yield from pq.ParquetFile(path).iter_batches(BATCH_ROWS)
    except (pa.ArrowException, OSError) as error:
        raise InvalidValue(f"{path} cannot be read: {str(error).splitlines()[0]}; fetch it again") from error


def count_rows(path: Path) -> int:
    """How many rows of a Parquet file `parquet_items` gives.

    raises: InvalidValue if it is no Parquet file, or lacks a column
    """
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
