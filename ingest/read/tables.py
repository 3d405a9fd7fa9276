"""Tables of pictures: Parquet files, and the Arrow files that Hugging Face's `datasets` writes.

A row is an image. Its picture is a column of bytes, or a struct of `bytes` and `path` as Hugging Face writes it. The layout
of attrdb's own is one of them: a column `name` that holds ids, and `image`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from attrdb.errors import InvalidValue
from attrdb.ingest.read.formats import SUFFIXES
from attrdb.ingest.read.pictures import read_picture, read_picture_file
from attrdb.ingest.read.side_fields import columns_of
from attrdb.ingest.read.sources import ARROW, PARQUET, Item, refused
from attrdb.ingest.read.text import as_text, clean
from attrdb.ingest.read.text_columns import is_text
from attrdb.ingest.read.walk import Fence
from attrdb.store.schema import OF_MODELS

BATCH_ROWS = 256
IMAGE_COLUMNS = ("image", "img", "picture", "photo", *(suffix.removeprefix(".") for suffix in sorted(SUFFIXES)))
KEY_COLUMNS = ("key", "__key__")  # ids of img2dataset and webdataset
CATEGORY_COLUMNS = ("category", "label")
KEPT = ("source", "split", "metadata")  # columns of attrdb's own layout that are stored as they are
FAILED = "failed"  # how img2dataset's word for an image that it could not fetch begins
DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError, OverflowError)  # ValueError: names that are not UTF-8


class Damaged(InvalidValue):
    """A table that cannot be read, or only in part."""


@dataclass(frozen=True)
class Table:
    """A file of rows, of which only the schema has been read."""

    path: Path

    @property
    def kind(self) -> str:
        return ARROW if self.path.suffix == ".arrow" else PARQUET

    @cached_property
    def schema(self) -> pa.Schema:
        """raises: Damaged, also for a file that is none of its kind"""
        try:
            schema = self._open().schema if self.kind == ARROW else pq.read_schema(self.path)
            _read_names(schema)
            return schema
        except DAMAGE as error:
            kind = self.kind.removesuffix(" files")
            raise Damaged(f"{self.path} is not a readable {kind} file: {_line(error)}; fetch it again") from error

    def _open(self) -> Any:
        """A reader of an Arrow file, which may be a stream or have an index at its end."""
        mapped = pa.memory_map(str(self.path))
        try:
            return pa.ipc.open_stream(mapped)
        except pa.ArrowInvalid:
            mapped.seek(0)
            return pa.ipc.open_file(mapped)

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """raises: Damaged"""
        try:
            if self.kind == PARQUET:
                with pq.ParquetFile(self.path) as file:
                    yield from file.iter_batches(BATCH_ROWS, columns=columns)
                return
            reader = self._open()
            if isinstance(reader, pa.RecordBatchFileReader):
                whole = (reader.get_batch(number) for number in range(reader.num_record_batches))
            else:
                whole = iter(reader)
            for batch in whole:
                batch.validate(full=True)  # Arrow trusts the offsets in such a file, and would read beyond its end
                chosen = batch.select(columns) if columns is not None else batch
                yield from (chosen.slice(first, BATCH_ROWS) for first in range(0, len(chosen), BATCH_ROWS))
        except DAMAGE as error:
            raise Damaged(f"{self.path} cannot be read: {_line(error)}; fetch it again") from error

    @cached_property
    def n_rows(self) -> int:
        if self.kind == PARQUET:
            return int(pq.read_metadata(self.path).num_rows)
        return sum(len(batch) for batch in self.batches([]))


def _read_names(fields: Iterable[pa.Field]) -> None:
    """raises: UnicodeDecodeError for a name that is not UTF-8, which would come up later"""
    for field in fields:
        _ = field.name
        if pa.types.is_struct(field.type):
            _read_names(field.type)


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@dataclass(frozen=True)
class Layout:
    """Which column of a table is what.

    image:    the picture; is_struct: it is a struct of `bytes` and `path`
    names:    ids are complete as they are, as in attrdb's own layout
    id:       the column that names a row, None: its position
    role:     there is a column of attrdb's roles, of which only pretraining images are read
    pictures: columns that hold pictures, which never become metadata
    labels:   of columns whose numbers stand for them, by Hugging Face's schema
    chosen:   our columns -> theirs, by the user's word
    """

    image: str
    is_struct: bool
    names: bool
    id: str | None
    role: bool
    pictures: frozenset[str]
    labels: Mapping[str, list[str]]
    chosen: Mapping[str, str]


def has_pictures(table: Table) -> bool:
    """Whether a table can be read and has a column that may hold pictures."""
    try:
        return any(_holds_bytes(column.type) for column in table.schema)
    except Damaged:
        return False


def layout_of(table: Table, chosen: Mapping[str, str], id_column: str | None) -> Layout:
    """raises: InvalidValue for a table without pictures, with several of which none is chosen, or without a chosen column"""
    schema = table.schema
    for name in [*chosen.values(), *([id_column] if id_column else [])]:
        if name not in schema.names:
            raise InvalidValue(f"{table.path} has no column {name!r}; it has: {', '.join(schema.names)}")
    pictures = [column.name for column in schema if _holds_bytes(column.type)]
    image = chosen.get("image") or next((name for name in IMAGE_COLUMNS if name in pictures), None)
    if image is None and len(pictures) == 1:
        image = pictures[0]
    if image is None and pictures:
        raise InvalidValue(
            f"{table.path} has pictures in several columns: {', '.join(pictures)}; choose one with --column image=NAME"
        )
    if image is None or image not in pictures:
        named = next((name for name in (image, *IMAGE_COLUMNS) if name in schema.names), None)
        what = f"column {named!r} is of type {schema.field(named).type}" if named else "no column holds pictures"
        raise InvalidValue(
            f"{table.path} has no pictures: {what}; encoded pictures are needed, as bytes, or as structs of bytes and path. "
            f"It has: {', '.join(schema.names)}"
        )
    is_struct = pa.types.is_struct(schema.field(image).type)
    names = id_column is None and not is_struct and "name" in schema.names
    if id_column is None:
        id_column = "name" if names else next((name for name in KEY_COLUMNS if name in schema.names), None)
    labels, theirs = _labels(schema), dict(chosen)
    if "category" not in theirs:
        category = next((name for name in CATEGORY_COLUMNS if name in schema.names), None)
        # A number that stands for nothing is no category.
        if category == "category" or category in labels or (category and is_text(schema.field(category).type)):
            theirs["category"] = category
    role = _has_roles(table)
    return Layout(image, is_struct, names, id_column, role, frozenset(pictures), labels, theirs)


def _holds_bytes(column: pa.DataType) -> bool:
    if pa.types.is_struct(column):
        return column.get_field_index("bytes") >= 0 and _holds_bytes(column.field("bytes").type)
    return pa.types.is_binary(column) or pa.types.is_large_binary(column) or pa.types.is_binary_view(column)


def _labels(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of class labels by column, as `datasets` keeps them beside the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: [str(label) for label in about["names"]] for name, about in features.items() if "names" in about}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _has_roles(table: Table) -> bool:
    """Whether the column `role` is attrdb's: it holds roles of images, and nothing else."""
    if "role" not in table.schema.names or not is_text(table.schema.field("role").type):
        return False
    roles = set[str]()
    for batch in table.batches(["role"]):
        roles.update(batch["role"].unique().to_pylist())
    return bool(roles - {None}) and roles <= {*OF_MODELS, "pretraining", None}


def count_items(table: Table, layout: Layout) -> int:
    """How many items `table_items` gives."""
    if not layout.role:
        return table.n_rows
    return sum(batch["role"].to_pylist().count("pretraining") for batch in table.batches(["role"]))


@dataclass(frozen=True)
class Naming:
    """How the rows of a table are called.

    source: of the corpus; given: the user has named it, and it goes before ids of attrdb's own layout
    inside: the table's path in the corpus, without its ending; empty where the table is the corpus
    """

    source: str
    given: bool
    inside: str

    def by_position(self, row: int) -> str:
        return "/".join(filter(None, (self.source, self.inside, str(row))))


def table_items(table: Table, layout: Layout, naming: Naming, fence: Fence) -> Iterator[Item]:
    """The rows of a table. A row that cannot be used, and the rest of a damaged file, are items that say why."""
    first = 0
    try:
        for batch in table.batches():
            for number, row in enumerate(rows_of(batch), first):
                if layout.role and row["role"] != "pretraining":
                    continue
                where = f"{table.path} row {number}"
                try:
                    yield _row_item(where, number, row, table, layout, naming, fence)
                except InvalidValue as error:
                    yield refused(where, error, table.kind)
            first += len(batch)
    except InvalidValue as error:
        yield refused(f"{table.path} from row {first}", error, table.kind)


def rows_of(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows of a batch. A value that Python cannot hold, such as text that is not UTF-8, is null."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    except Exception:  # of text, of times beyond Python's, of structs with a name twice
        columns = zip(*([_value(cell) for cell in column] for column in batch.columns), strict=True)
        return [dict(zip(batch.schema.names, values, strict=True)) for values in columns]


def _value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except Exception:
        return None


def _row_item(
    where: str, number: int, row: dict[str, Any], table: Table, layout: Layout, naming: Naming, fence: Fence
) -> Item:
    image_id = _image_id(where, number, row, layout, naming)
    rest = {name: value for name, value in row.items() if name not in layout.pictures and name != layout.id}
    for name, labels in layout.labels.items():
        if isinstance(label := rest.get(name), int):
            rest[name] = labels[label] if 0 <= label < len(labels) else None
    status = rest.get("status")
    picture = row[layout.image]
    encoded, path = (picture.get("bytes"), picture.get("path")) if isinstance(picture, dict) else (picture, None)
    if not encoded and isinstance(status, str) and status.startswith(FAILED):
        raise InvalidValue(f"{where} was not fetched: {status}, {rest.get('error_message') or 'no reason given'}")
    columns: dict[str, Any] = {}
    if layout.names:
        columns = {name: as_text(rest.pop(name)) for name in KEPT if isinstance(rest.get(name), str)}
        if layout.role:
            del rest["role"]
    columns = columns_of(rest, chosen={k: v for k, v in layout.chosen.items() if k != "image"}) | columns
    if naming.given or not layout.names:
        columns["source"] = naming.source
    if not layout.names:
        columns.setdefault("uri", f"{table.path.resolve().as_uri()}#{number}")
    if encoded:
        read = partial(read_picture, where, encoded)
    elif path:
        read = partial(read_picture_file, _picture_path(where, path, table, fence))
    else:
        raise InvalidValue(f"{where} has no picture: its column {layout.image!r} is empty")
    return Item(image_id, read, lambda: columns, columns.get("uri"), table.kind)


def _image_id(where: str, number: int, row: dict[str, Any], layout: Layout, naming: Naming) -> str:
    if layout.id is None:
        return naming.by_position(number)
    value = row[layout.id]
    name = clean(value) if isinstance(value, str) else None if layout.names else as_text(value)
    if not name:
        needed = "an id, which is text" if layout.names else "an id"
        raise InvalidValue(f"{where}: {layout.id} must be {needed}, found {value!r}")
    return f"{naming.source}/{name}" if naming.given or not layout.names else name


def _picture_path(where: str, path: str, table: Table, fence: Fence) -> Path:
    """The file that a row names in place of bytes.

    raises: InvalidValue for one outside the folder that the user named
    """
    file = table.path.parent / path
    refusal = "\0" in path or not os.path.exists(file) or fence.refusal(str(file))
    if refusal:
        raise InvalidValue(
            f"{where} has no bytes, and its path {path!r} leads to no file in {fence.root}; put the file there, or save the "
            "data set with its pictures embedded"
        )
    return file
