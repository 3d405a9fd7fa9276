"""What is said of an image beside it: JSON files, tables of captions, members of a tar; and which columns it fills."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from attrdb.errors import InvalidValue
from attrdb.ingest.read.text import MAX_TEXT, as_text, clean, first_text, json_text, plain_json
from attrdb.ingest.read.walk import OTHER_FILES, File, Skipped
from attrdb.text import decode

Fields = dict[str, Any]  # by the names that the data set has for them

# Our columns, and the names that data sets have for them, in lower case; the first that has text is taken.
NAMES = {
    "prompt": ("prompt", "caption", "text"),
    "uri": ("uri", "url"),
    "license": ("license", "licence"),
    "creator": ("creator", "author", "artist"),
}
LABEL_TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # as the image folders of Hugging Face have them
FILE_NAMES = ("file_name", "filename")
MAX_TABLE = 2**30  # bytes of a table of captions
BAD_LABELS = "tables of captions, or lines of them, that cannot be read"


def columns_of(
    fields: Fields, caption: str | None = None, chosen: Mapping[str, str] | None = None
) -> dict[str, str | None]:
    """The columns of images that an image's fields fill; what fills none, or is more than one value, goes into metadata.

    caption: from a file of its own, which goes before the fields
    chosen:  our columns, by the names of the fields that fill them, before the known names
    """
    rest, row = dict(fields), dict[str, str | None]()
    by_lower = {name.lower(): name for name in reversed(fields)}
    for column in {**NAMES, **(chosen or {})}:
        known = (by_lower[name] for name in NAMES.get(column, ()) if name in by_lower)
        for name in [chosen[column]] if chosen and column in chosen else known:
            value = fields.get(name)
            text = first_text(value) if column == "prompt" else as_text(value)
            if text and column == "prompt" and caption is not None:
                if text == caption:
                    del rest[name]
                break  # the caption's file is what a model was trained on
            if text:
                row[column] = text
                if not isinstance(value, list):
                    del rest[name]
                break
    if caption is not None:
        row["prompt"] = caption or None
    row["metadata"] = json_text(rest)
    return row


def parse_fields(encoded: bytes, where: str) -> Fields:
    """The fields in a JSON object.

    where:  what the bytes are, for the error
    raises: InvalidValue if they are no text or no JSON object
    """
    text = decode(encoded, where)
    try:
        # NaN is no JSON, but Python's writer puts it there; null is what it says.
        fields = json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise InvalidValue(f"{where} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidValue(f"{where} must be a JSON object, found {type(fields).__name__}")
    return fields


def fields_of(path: Path) -> Fields:
    """The fields in a JSON file beside a picture. One that cannot be read does not keep the picture out; it is noted."""
    try:
        if path.stat().st_size > MAX_TEXT:
            raise InvalidValue(f"{path.name} has more than {MAX_TEXT:,} bytes")
        return parse_fields(path.read_bytes(), path.name)
    except InvalidValue as error:
        return {"side_file": str(error)}
    except OSError as error:
        return {"side_file": f"{path.name} cannot be read: {error.strerror}"}


class LabelTables:
    """The tables of captions in a folder: fields of its pictures, by the pictures' paths in the folder."""

    def __init__(self) -> None:
        self._fields: dict[str, Fields] = {}

    def add(self, file: File, skipped: Skipped) -> None:
        """Read a table; it counts as another file if it names no files, and lines that cannot be read are counted."""
        folder, n_before = posixpath.dirname(file.inside), len(self._fields)
        try:
            if file.path.stat().st_size > MAX_TABLE:
                raise InvalidValue(f"it has more than {MAX_TABLE:,} bytes")
            rows = READERS[file.suffix](file.path.read_bytes(), file.inside)
        except (ValueError, OSError, pa.ArrowException) as error:
            skipped.add(BAD_LABELS, f"{file.inside} ({error})")
            return
        n_bad = 0
        for number, row in rows:
            if row is None:
                n_bad += 1
                skipped.add(BAD_LABELS, f"{file.inside} line {number}")
                continue
            key = next((name for name in FILE_NAMES if isinstance(row.get(name), str)), None)
            if key:
                name = posixpath.normpath(posixpath.join(folder, row.pop(key).strip()))
                self._fields[name] = plain_json(row)
        if len(self._fields) == n_before and not n_bad:
            skipped.add(OTHER_FILES, file.inside)

    def fields(self, inside: str) -> Fields:
        return dict(self._fields.get(inside, {}))


Rows = Iterator[tuple[int, Fields | None]]  # number of the line and its fields, None for one that cannot be read


def _json_lines(encoded: bytes, where: str) -> Rows:
    return _parsed_lines(decode(encoded, where))


def _parsed_lines(text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line, parse_constant=lambda _: None)
            except (ValueError, RecursionError):
                row = None
            yield number, row if isinstance(row, dict) else None


def _csv_lines(encoded: bytes, where: str) -> Rows:
    return _parsed_csv(decode(encoded, where))


def _parsed_csv(text: str) -> Rows:
    reader = csv.DictReader(io.StringIO(text.replace("\0", ""), newline=""), skipinitialspace=True)
    while True:
        try:
            row = next(reader, None)
        except csv.Error:
            yield reader.line_num, None
            continue
        if row is None:
            return
        yield reader.line_num, {clean(name): value for name, value in row.items() if name and value}


def _parquet_rows(encoded: bytes, _where: str) -> Rows:
    return iter(list(enumerate(pq.read_table(pa.BufferReader(encoded)).to_pylist(), 1)))


READERS: dict[str, Callable[[bytes, str], Rows]] = {
    ".jsonl": _json_lines,
    ".csv": _csv_lines,
    ".parquet": _parquet_rows,
}
