"""The formats in which rows are written, and how a file gets them: whole, or not at all.

pyarrow is imported late, because `attrdb --help` reads the names of the formats from here.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from attrdb.errors import AttrdbError, InvalidValue, MissingExtra, NotFound, StorageError
from attrdb.text import visible

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = ("table", "json", "nl", "csv", "markdown", "parquet", "xlsx")
SUFFIXES = {
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "nl",
    ".markdown": "markdown",
    ".md": "markdown",
    ".ndjson": "nl",
    ".nl": "nl",
    ".parquet": "parquet",
    ".txt": "table",
    ".xlsx": "xlsx",
}


def format_of(file: Path) -> str:
    """The format that a file's suffix names.

    raises: InvalidValue
    """
    try:
        return SUFFIXES[file.suffix.lower()]
    except KeyError:
        raise InvalidValue(
            f"{file} has the suffix {file.suffix!r}, which names no format; use one of {', '.join(SUFFIXES)}, or name a "
            f"format ({', '.join(FORMATS)})"
        ) from None


def check_stdout(form: str, cure: str = "name a file with --output") -> None:
    """raises: InvalidValue if the format cannot be written to standard output, with the cure"""
    if form == "xlsx":
        raise InvalidValue(f"xlsx is written to a file only; {cure}")
    if form == "parquet" and sys.stdout.isatty():
        raise InvalidValue(f"parquet is binary and standard output is a terminal; {cure}, or use a pipe")


def check_file(file: Path, form: str, database: Path | None = None) -> None:
    """See that rows can be written to a file, before the work of making them begins.

    raises: NotFound if its folder is not there, InvalidValue if it is no file or lies in the database, MissingExtra
    """
    if form == "xlsx":
        _xlsxwriter()
    if file.exists() and not file.is_file():
        kind = "a folder" if file.is_dir() else "no regular file"
        raise InvalidValue(f"{file} is {kind}; name a file")
    if not file.parent.is_dir():
        raise NotFound(f"no folder {file.parent} to write {file.name} into; make it first")
    if database is not None and file.resolve().is_relative_to(database.resolve()):
        raise InvalidValue(f"{file} lies inside the database {database}; name a file outside it")


def write_file(table: pa.Table, form: str, file: Path) -> None:
    """Write a table to a file in one of FORMATS; an earlier file stays as it is unless all is written.

    raises: InvalidValue for a table that the format cannot hold, StorageError if the file cannot be written
    """
    with replacing(file) as stream:
        if form in BINARY_WRITERS:
            BINARY_WRITERS[form](table, stream)
        else:
            _write_text(table, form, lambda text: stream.write(text.encode()))


def written(file: Path, table: pa.Table) -> str:
    """What to tell of a file that was written."""
    return f"wrote {file}: {len(table):,} row{'' if len(table) == 1 else 's'}"


def write_stdout(table: pa.Table, form: str) -> None:
    """Write a table to standard output in one of FORMATS.

    raises: InvalidValue for a table or an output that the format cannot go to
    """
    check_stdout(form)
    if form in BINARY_WRITERS:
        BINARY_WRITERS[form](table, sys.stdout.buffer)
    else:
        terminal = sys.stdout.isatty()
        # A table has its own colours, and its cells are shown so already. To click, color means: hand on what it is given.
        shown = visible if terminal and form != "table" else str
        _write_text(table, form, lambda text: click.echo(shown(text), nl=False, color=True), terminal=terminal)


def _write_text(table: pa.Table, form: str, put: Callable[[str], Any], *, terminal: bool = False) -> None:
    """Hand a table to `put`, part by part, in one of the formats that are text."""
    from attrdb.formats import text as text_formats
    from attrdb.formats.grid import grid_parts

    parts: dict[str, Callable[[pa.Table], Iterable[str]]] = {
        "csv": text_formats.csv_parts,
        "json": text_formats.json_parts,
        "markdown": text_formats.markdown_parts,
        "nl": text_formats.nl_parts,
        "table": partial(grid_parts, terminal=terminal),
    }
    for part in parts[form](table):
        put(part)


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """A new file beside `file` that takes its place at the end, and is gone if an error comes first.

    raises: StorageError if it cannot be written
    """
    target = file.resolve()  # what a link points to is replaced, not the link
    part = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as stream:
            if target.exists():
                os.chmod(part, target.stat().st_mode & 0o777)
            yield stream
        os.replace(part, target)
    except OSError as error:
        if isinstance(error, AttrdbError):
            raise
        raise StorageError(
            f"{file} could not be written, and is as it was before: {error.strerror or error}"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _write_parquet(table: pa.Table, stream: IO[bytes]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.write_table(table, stream, compression="zstd")
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise InvalidValue(f"Parquet cannot hold this result: {error}; cast the column to another type") from error


def _write_xlsx(table: pa.Table, stream: IO[bytes]) -> None:
    _xlsxwriter()
    from attrdb.formats.xlsx import write_xlsx

    write_xlsx(table, stream)


def _xlsxwriter() -> None:
    try:
        import xlsxwriter  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra("xlsx needs XlsxWriter, which is not installed: pip install 'attrdb[xlsx]'") from error


BINARY_WRITERS: dict[str, Callable[[Any, IO[bytes]], None]] = {"parquet": _write_parquet, "xlsx": _write_xlsx}
