"""Columns of text from outside, made clean as `text.clean` does it for single values, but a whole column at a time."""

from __future__ import annotations

import math
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

# What `text.CONTROL` has, for the regular expressions of Arrow.
CONTROL = r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0b-\x1f\x{7f}-\x{9f}\x{feff}]"


def is_text(column: pa.DataType) -> bool:
    if pa.types.is_dictionary(column):
        column = column.value_type
    return pa.types.is_string(column) or pa.types.is_large_string(column) or pa.types.is_string_view(column)


def valid_text(table: pa.Table) -> pa.Table:
    """The table with bytes that are not UTF-8 replaced in its columns of text."""
    try:
        table.validate(full=True)
    except pa.ArrowInvalid:
        for position, field in enumerate(table.schema):
            if is_text(field.type):
                encoded = table[position].cast(pa.binary()).to_pylist()
                repaired = [None if value is None else value.decode("utf-8", "replace") for value in encoded]
                table = table.set_column(position, field, pa.array(repaired, field.type))
    return table


def clean_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of text without control characters; any other column as it is."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not is_text(column.type) or not pc.any(pc.match_substring_regex(column, CONTROL)).as_py():
        return column
    return pc.replace_substring_regex(column, CONTROL, "")


def json_column(table: pa.Table) -> pa.ChunkedArray:
    """Every row as strict JSON text: clean text, null for NaN and infinity."""
    columns = [_finite(clean_column(column)) for column in table.columns]
    rows = pa.table({"row": pa.table(columns, names=table.column_names).to_struct_array()})
    with duckdb.connect() as connection:
        connection.register("metadata", rows)
        return connection.sql('SELECT to_json("row")::VARCHAR AS line FROM metadata').to_arrow_table()["line"]


def _finite(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column with null for NaN and infinity, also within lists and structs."""
    if pa.types.is_floating(column.type):
        return pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
    if pa.types.is_nested(column.type) and any(name in str(column.type) for name in ("float", "double")):
        return pa.chunked_array([pa.array([_finite_value(value) for value in column.to_pylist()], column.type)])
    return column


def _finite_value(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite_value(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_value(part) for part in value]
    return value
