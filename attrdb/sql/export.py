"""Export: a database for people without attrdb, as Parquet files or as one DuckDB file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb
import lance
import pyarrow as pa
import pyarrow.parquet as pq

from attrdb import formats
from attrdb.errors import AttrdbError, InvalidValue, StorageError
from attrdb.progress import Progress, no_progress
from attrdb.sql.connection import method_table, shown_relations, table_name
from attrdb.sql.relations import VALUE_MACROS
from attrdb.store.lance_errors import storage
from attrdb.store.predicates import literal
from attrdb.store.schema import SHOWN_WITH_MODEL, feature_columns
from attrdb.store.snapshot import Snapshot
from attrdb.text import first_line

FORMATS = ("parquet", "duckdb")
DUCKDB_SUFFIXES = (".duckdb", ".db", ".ddb")
# The oldest DuckDB that opens an export. Without it, DuckDB 2 writes a form that no 1.x opens.
DUCKDB_STORAGE = "v1.4.0"
BATCH_ROWS = 1024
BATCHES_AHEAD = 2  # that Lance reads before they are asked for; its own choice would hold sixteen batches of pictures
# A Parquet file's row group: as large as readers like it, but no more bytes than may be held.
GROUP_ROWS, GROUP_BYTES = 65_536, 64 * 2**20
DUCKDB_MEMORY = "512MB"  # its own choice is most of the machine's


def export(
    snapshot: Snapshot,
    target: str | Path,
    *,
    form: str = "parquet",
    vectors: bool = True,
    images: bool = True,
    report: Progress = no_progress,
) -> dict[str, int]:
    """Write every table to a new place; the rows of each.

    target: a folder for 'parquet', which gets a file a table; a file for 'duckdb', which also gets the views by role
    vectors, images: whether features and encoded images go with the rest
    raises: InvalidValue for another form, if there is something at the target already, or if it lies in the database;
            StorageError if the target cannot be written

    Rows are streamed. The target appears when it is whole.
    """
    target = Path(target)
    if form not in FORMATS:
        raise InvalidValue(f"form is {form!r}; it must be {' or '.join(FORMATS)}")
    _check_suffix(target, form)
    if target.exists():
        raise InvalidValue(f"{target} exists already; name a new {'folder' if form == 'parquet' else 'file'}")
    if target.resolve().is_relative_to(snapshot.path.resolve()):
        raise InvalidValue(f"{target} lies inside the database {snapshot.path}; name a place outside it")
    left_out = (set() if vectors else set(feature_columns(snapshot.tables["images"].schema))) | (
        set() if images else {"image"}
    )
    write = _write_parquet if form == "parquet" else _write_duckdb
    with _part_of(target) as part:
        return write(snapshot, part, left_out, report)


def _check_suffix(target: Path, form: str) -> None:
    """raises: InvalidValue for a name that promises another format"""
    suffix = target.suffix.lower()
    if form == "parquet" and suffix in DUCKDB_SUFFIXES:
        raise InvalidValue(f"{target} is named like a DuckDB file; add --duckdb, or name a new folder")
    if suffix in formats.SUFFIXES:
        raise InvalidValue(
            f"{target} is named like a file of rows, and an export has several tables; name a new folder, which gets a "
            "Parquet file per table (or a file, with --duckdb). Rows of one table: attrdb sql DB 'FROM models' "
            f"-o {target.name}"
        )


@contextmanager
def _part_of(target: Path) -> Iterator[Path]:
    """A place beside the target that becomes it at the end, and is gone if there is no such end."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            yield Path(folder) / target.name
            (Path(folder) / target.name).replace(target)
    except (OSError, UnicodeError, pa.ArrowException, duckdb.Error) as error:
        if isinstance(error, AttrdbError):
            raise
        raise StorageError(f"{target} could not be written, and nothing is left there: {first_line(error)}") from error


def _stream(
    snapshot: Snapshot, name: str, left_out: set[str], report: Progress
) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The schema of a table without what is left out, and its rows in batches."""
    if name == "methods":  # those without a row, too
        methods = method_table(snapshot)
        return methods.schema, iter(methods.to_batches())
    table: lance.LanceDataset = snapshot.tables[name]
    shown = snapshot.visible("true") if name in SHOWN_WITH_MODEL and snapshot.hidden_models else None
    columns = [column for column in table.schema.names if column not in left_out]
    with storage(snapshot.path):
        total = table.count_rows(shown)
        scanner = table.scanner(
            columns=columns, filter=shown, batch_size=BATCH_ROWS, batch_readahead=BATCHES_AHEAD, fragment_readahead=1
        )

    def batches() -> Iterator[pa.RecordBatch]:
        done = 0
        with storage(snapshot.path):
            for batch in scanner.to_batches():
                done += len(batch)
                report(f"export {name}", done, total)
                yield batch

    return scanner.projected_schema, batches()


def _write_parquet(snapshot: Snapshot, folder: Path, left_out: set[str], report: Progress) -> dict[str, int]:
    folder.mkdir()
    counts = {}
    for name in snapshot.tables:
        schema, batches = _stream(snapshot, name, left_out, report)
        with pq.ParquetWriter(folder / f"{name}.parquet", schema, compression="zstd") as writer:
            for group in _groups(batches):
                writer.write_table(pa.Table.from_batches(group, schema), row_group_size=GROUP_ROWS)
        counts[name] = pq.read_metadata(folder / f"{name}.parquet").num_rows
    return counts


def _groups(batches: Iterator[pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    group: list[pa.RecordBatch] = []
    for batch in batches:
        group.append(batch)
        if sum(map(len, group)) >= GROUP_ROWS or sum(one.nbytes for one in group) >= GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group


def _write_duckdb(snapshot: Snapshot, file: Path, left_out: set[str], report: Progress) -> dict[str, int]:
    counts = {}
    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": DUCKDB_MEMORY,
        "temp_directory": str(file.with_name("spill")),  # beside the file, with which it goes
    }
    with duckdb.connect(config=settings) as connection:
        connection.execute(f"ATTACH {literal(str(file))} AS exported (STORAGE_VERSION '{DUCKDB_STORAGE}')")
        connection.execute("USE exported")
        for name in snapshot.tables:
            schema, batches = _stream(snapshot, name, left_out, report)
            raised: list[BaseException] = []
            connection.register("_rows", pa.RecordBatchReader.from_batches(schema, _watched(batches, raised)))
            try:
                connection.execute(f'CREATE TABLE "{table_name(name, snapshot)}" AS FROM _rows')
            except duckdb.Error:
                # What is raised while DuckDB reads the stream, Ctrl-C too, comes back as an error of its own.
                if raised:
                    raise raised[0] from None
                raise
            connection.unregister("_rows")
            counts[name] = connection.sql(f'SELECT count(*) FROM "{table_name(name, snapshot)}"').fetchall()[0][0]
        for view in shown_relations(snapshot):
            if not view.arguments or view.name in VALUE_MACROS:
                connection.execute(view.create)
    return counts


def _watched(batches: Iterator[pa.RecordBatch], raised: list[BaseException]) -> Iterator[pa.RecordBatch]:
    """The batches; what they raise is kept."""
    try:
        yield from batches
    except GeneratorExit:  # DuckDB let go of them
        raise
    except BaseException as error:
        raised.append(error)
        raise
