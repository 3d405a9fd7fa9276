"""Tables of the caller's own, which a statement reads beside those of the database.

The caller names them. They are loaded before a statement runs, so that the statement itself opens no file.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from attrdb.errors import InvalidValue, NotFound
from attrdb.sql.limits import closing_unless_busy, limited
from attrdb.text import decode, first_line

COMPRESSED = (".gz", ".zst")  # which CSV and JSON may be as well
SEPARATORS = (",", ";", "\t", "|")  # of CSV


def load_tables(relations: Mapping[str, Any] | None) -> dict[str, pa.Table]:
    """Name -> table, of tables, data frames and files.

    relations: name -> a file (CSV, Parquet, Arrow or JSON), or what Arrow can read: a pyarrow table, a data frame of pandas
               or Polars, a dictionary of columns
    raises:    NotFound for a file that is not there, InvalidValue for a name that SQL would not take without quotes, a name
               that appears twice, or what is no table
    """
    tables: dict[str, pa.Table] = {}
    for name, value in (relations or {}).items():
        check_name(name)
        if name.lower() in map(str.lower, tables):
            raise InvalidValue(f"{name!r} names two tables; names are the same in upper and lower case")
        tables[name] = read_file(Path(value)) if isinstance(value, (str, Path)) else _as_table(name, value)
    return tables


def check_name(name: str) -> None:
    """raises: InvalidValue unless SQL takes it as the name of a table without quotes"""
    if not name.isidentifier() or name.startswith("_"):  # attrdb's own hidden relations begin so
        raise InvalidValue(
            f"{name!r} cannot name a table; use letters, digits and underscores, with a letter first, such as contracts"
        )
    try:
        with duckdb.connect() as connection:
            connection.extract_statements(f"SELECT * FROM {name}")
    except duckdb.ParserException as error:
        raise InvalidValue(f"{name!r} cannot name a table, because it is a word of SQL; use another name") from error


def register(connection: duckdb.DuckDBPyConnection, tables: Mapping[str, pa.Table]) -> None:
    """Show tables to the statements of a connection.

    raises: InvalidValue for a name that the database uses itself, and for columns of a type that SQL has not
    """
    taken = {
        name.lower(): kind
        for name, kind in connection.execute(
            "SELECT view_name, 'view' FROM duckdb_views() UNION ALL SELECT table_name, 'table' FROM duckdb_tables() "
            "UNION ALL SELECT function_name, 'macro' FROM duckdb_functions() WHERE function_type = 'table_macro'"
        ).fetchall()
    }
    for name, table in tables.items():
        if name.lower() in taken:
            raise InvalidValue(f"{name!r} is a {taken[name.lower()]} of the database already; use another name")
        try:
            connection.register(name, table)
            connection.execute(f"FROM {name} LIMIT 0")
        except (duckdb.Error, pa.ArrowException) as error:
            raise InvalidValue(f"table {name!r} has a column that SQL cannot read: {first_line(error)}") from error


def read_file(file: Path) -> pa.Table:
    """The rows of a file in the format that its suffix names.

    raises: NotFound, InvalidValue for another suffix, and for a file that is not in that format
    """
    suffix = file.suffix.lower()
    if suffix in COMPRESSED and (inner := file.with_suffix("").suffix.lower()) in TEXT_READERS:
        suffix = inner
    read = READERS.get(suffix)
    if not file.exists():
        raise NotFound(f"no file {file}")
    if not file.is_file():
        raise InvalidValue(f"{file} is {'a folder' if file.is_dir() else 'no regular file'}; name a file")
    if read is None:
        raise InvalidValue(
            f"{file} has the suffix {file.suffix!r}; a table of your own is a file with one of {', '.join(READERS)}"
        )
    try:
        if not file.stat().st_size:
            raise InvalidValue(f"{file} is empty; it needs at least the names of its columns")
        table = read(file)
    except OSError as error:
        raise InvalidValue(f"{file} cannot be read: {error.strerror or first_line(error)}") from error
    except pa.ArrowException as error:
        raise InvalidValue(_refusal(file, str(error))) from error
    return table


def _reader(function: str, arguments: str) -> Callable[[Path], pa.Table]:
    """A reader by a function of DuckDB."""

    def read(file: Path) -> pa.Table:
        # Under a name of ours: DuckDB would take *, ? and [] in the name of a file for a pattern.
        with TemporaryDirectory(prefix="attrdb-") as folder, closing_unless_busy(duckdb.connect()) as connection:
            alias = Path(folder, "rows" + "".join(file.suffixes[-2:]).lower())
            alias.symlink_to(file.resolve())

            def rows() -> pa.Table:
                statement = f"FROM {function}($file, {arguments})"
                return connection.sql(statement, params={"file": str(alias)}).to_arrow_table()

            try:
                try:
                    table = limited(connection, rows)
                except duckdb.Error as error:
                    if "utf-8" not in str(error).lower() or file.suffix.lower() in COMPRESSED:
                        raise
                    alias.unlink()
                    alias.write_text(decode(file.read_bytes(), str(file)), encoding="utf-8")
                    table = limited(connection, rows)
            except duckdb.Error as error:
                raise InvalidValue(_refusal(file, str(error).replace(str(alias), str(file)))) from error
            if function == "read_csv" and table.num_columns == 1 and file.suffix.lower() not in COMPRESSED:
                _check_fields(file, alias, table.column_names[0])
            return table

    return read


def _check_fields(file: Path, text: Path, header: str) -> None:
    """DuckDB takes lines whose numbers of fields differ for single fields.

    raises: InvalidValue that names the first line with another number of fields than the header
    """
    for separator in SEPARATORS:
        if separator not in header:
            continue
        with text.open(encoding="utf-8-sig", newline="") as stream:
            lines = csv.reader(stream, delimiter=separator)
            n_names = len(next(lines))
            for line in lines:
                if line and len(line) != n_names:
                    words = f"line {lines.line_num} has {len(line)} fields, the first line has {n_names} names"
                    raise InvalidValue(f"{file} cannot be read as CSV: {words}")


def _refusal(file: Path, words: str) -> str:
    """What is wrong with a file, in the words of a library without its advice."""
    form = (file.with_suffix("") if file.suffix.lower() in COMPRESSED else file).suffix[1:].upper()
    words = re.sub(r"^[\w ]+ Error: |\s(?:Possible|Try)\b.*", "", " ".join(words.split()))
    return f"{file} cannot be read as {form}: {words}"


def _read_parquet(file: Path) -> pa.Table:
    with pq.ParquetFile(file) as parquet:
        return parquet.read()


def _read_arrow(file: Path) -> pa.Table:
    """Both forms of Arrow: files, which Feather is, and streams."""
    with pa.OSFile(str(file)) as source:
        try:
            return pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            return pa.ipc.open_stream(source).read_all()


def _as_table(name: str, value: Any) -> pa.Table:
    try:
        return value if isinstance(value, pa.Table) else pa.table(value)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise InvalidValue(
            f"relation {name!r} is a {type(value).__name__}, which is no table: {first_line(error)}; give an Arrow table, a "
            "data frame, or the path of a file"
        ) from error


# Types are guessed from all rows. Without skip, lines above one of another length would be left out in silence.
_read_csv = _reader("read_csv", "header = true, skip = 0, sample_size = -1")
_read_json = _reader("read_json", "records = true, sample_size = -1")
TEXT_READERS = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
}
READERS = TEXT_READERS | {".parquet": _read_parquet, ".arrow": _read_arrow, ".feather": _read_arrow}
