"""Rows as an Excel workbook. Text stays text: no cell becomes a formula, a link or a number."""

from __future__ import annotations

import io
from decimal import Decimal
from tempfile import TemporaryDirectory
from typing import IO, Any

import pyarrow as pa
import xlsxwriter
from xlsxwriter.exceptions import FileCreateError
from xlsxwriter.worksheet import Worksheet

from attrdb.errors import InvalidValue
from attrdb.formats.text import cell, is_number, rows

# What Excel can hold.
MAX_ROWS, MAX_COLUMNS, MAX_CHARACTERS, MAX_DIGITS = 1_048_576, 16_384, 32_767, 15
NO_GUESSING = {"strings_to_formulas": False, "strings_to_numbers": False, "strings_to_urls": False}


def write_xlsx(table: pa.Table, stream: IO[bytes]) -> None:
    """Write a table as the only sheet of a workbook, its column names in the first row.

    raises: InvalidValue for more rows, columns or characters than Excel can hold, OSError if the stream cannot be written
    """
    if len(table) >= MAX_ROWS or table.num_columns > MAX_COLUMNS:
        raise InvalidValue(
            f"the result has {len(table):,} rows and {table.num_columns:,} columns; xlsx holds {MAX_ROWS - 1:,} and "
            f"{MAX_COLUMNS:,}: write csv or parquet"
        )
    written = io.BytesIO()
    with TemporaryDirectory(prefix="attrdb-") as folder:
        book = xlsxwriter.Workbook(written, {"constant_memory": True, "tmpdir": folder, **NO_GUESSING})
        _write_sheet(book, table)
        try:
            book.close()
        except FileCreateError as error:  # a full disk under the temporary folder
            raise OSError(str(error)) from error
    stream.write(written.getbuffer())


def _write_sheet(book: xlsxwriter.Workbook, table: pa.Table) -> None:
    sheet = book.add_worksheet("rows")
    sheet.freeze_panes(1, 0)
    bold = book.add_format({"bold": True})
    for column, name in enumerate(table.column_names):
        sheet.write_string(0, column, name, bold)
    numbers = [is_number(field.type) for field in table.schema]
    for number, row in enumerate(rows(table), 1):
        for column, (name, value) in enumerate(row.items()):
            _write_cell(sheet, number, column, name, cell(value), numbers[column])


def _write_cell(sheet: Worksheet, row: int, column: int, name: str, value: Any, number: bool) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        sheet.write_boolean(row, column, value)
    elif isinstance(value, float) or (number and _fits(Decimal(value))):
        sheet.write_number(row, column, float(value))
    elif len(text := str(value)) > MAX_CHARACTERS:
        raise InvalidValue(
            f"row {row}, column {name!r} has {len(text):,} characters; a cell of xlsx holds {MAX_CHARACTERS:,}: write csv "
            "or parquet, or leave the column out"
        )
    else:
        sheet.write_string(row, column, text)


def _fits(value: Decimal) -> bool:
    """Whether a number of Excel is exactly this value."""
    return value.is_finite() and len(value.as_tuple().digits) <= MAX_DIGITS
