"""Rows as text: CSV, JSON, Markdown. Each function yields the text in parts."""

from __future__ import annotations

import csv
import io
import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from attrdb.formats.values import values
from attrdb.text import plain, shown

BATCH_ROWS = 1024
# A table for reading shows less than this as 0, if its greatest number is so much greater: it is what sums leave.
NOISE, NOISE_RATIO = 1e-15, 1e-12

# What Markdown or HTML would read as markup; an underscore only at the edge of a word, so that ids stay as they are.
_MARKUP = re.compile(r"[\\`*|\[\]]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows, with values as JSON can hold them."""
    for batch in table.to_batches(BATCH_ROWS):
        for row in zip(*map(values, batch.columns), strict=True):
            yield dict(zip(table.column_names, map(plain, row), strict=True))


def cell(value: Any) -> Any:
    """A plain value as one cell can hold it: lists and structs as JSON text."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value


def cells(table: pa.Table, null: str = "-") -> Iterator[list[str]]:
    """The rows as a person reads them: numbers rounded, what only rounding has left as 0."""
    noise = min(NOISE, NOISE_RATIO * _greatest(table))
    for row in rows(table):
        yield [
            null if value is None else shown(0.0 if isinstance(value, float) and abs(value) <= noise else value)
            for value in row.values()
        ]


def _greatest(table: pa.Table) -> float:
    """The greatest magnitude among the fractional numbers of a table; 0 for none."""
    greatest = 0.0
    for column in table.columns:
        if pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
            magnitudes = pc.abs(column.cast(pa.float64()))
            magnitudes = magnitudes.filter(pc.is_finite(magnitudes))
            greatest = max(greatest, pc.max(magnitudes).as_py() or 0.0)
    return greatest


def is_number(column: pa.DataType) -> bool:
    return any(test(column) for test in (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal))


def csv_parts(table: pa.Table) -> Iterator[str]:
    """CSV in UTF-8, a header first; null is an empty field."""
    text = io.StringIO(newline="")
    # With this line end the csv module quotes a field that holds a carriage return, too.
    writer = csv.writer(text, lineterminator="\r\n")

    def line(values: list[Any]) -> str:
        writer.writerow(values)
        written = text.getvalue().removesuffix("\r\n") + "\n"
        text.seek(0)
        text.truncate()
        return written

    yield line(table.column_names)
    for row in rows(table):
        yield line([cell(value) for value in row.values()])


def json_parts(table: pa.Table) -> Iterator[str]:
    """A JSON list of objects."""
    start = "["
    for row in rows(table):
        yield start + "\n" + textwrap.indent(json.dumps(row, indent=2), "  ")
        start = ","
    yield "[]\n" if start == "[" else "\n]\n"


def nl_parts(table: pa.Table) -> Iterator[str]:
    """One JSON object per line."""
    for row in rows(table):
        yield json.dumps(row) + "\n"


def markdown_parts(table: pa.Table) -> Iterator[str]:
    """A Markdown table; values are rounded as in a table for reading, and what would be markup is escaped."""
    yield _markdown_line([_escaped(name) for name in table.column_names])
    yield _markdown_line(["---:" if is_number(field.type) else "---" for field in table.schema])
    for row in cells(table, null=""):
        yield _markdown_line([_escaped(cell) for cell in row])


def _markdown_line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _escaped(text: str) -> str:
    text = _MARKUP.sub(lambda found: "\\" + found[0], text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "<br>".join(text.splitlines())
