"""Export: a database for people without attrdb, as Parquet files or as one DuckDB file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import lance
import pyarrow as pa
import pyarrow.parquet as pq

from attrdb import sql
from attrdb.errors import InvalidValue
from attrdb.schema import feature_columns
from attrdb.snapshot import Snapshot, storage

FORMATS = ("parquet", "duckdb")
BATCH_ROWS = 1024

Report = Callable[[str, int, int], None]


def export(
    snapshot: Snapshot,
    target: str | Path,
    *,
    form: str = "parquet",
    vectors: bool = True,
    images: bool = True,
    report: Report = lambda stage, done, total: None,
) -> dict[str, int]:
    """Write every table to a new place; the rows of each.

    target: a folder for 'parquet', which gets a file a table; a file for 'duckdb', which also gets the views by role
    vectors, images: whether features and encoded images go with the rest
    raises: InvalidValue for another form, or if there is something at the target already

    Rows are streamed. The target appears when it is whole.
    """
    target = Path(target)
    if form not in FORMATS:
        raise InvalidValue(f"form is {form!r}; it must be {' or '.join(FORMATS)}")
    if target.exists():
        raise InvalidValue(f"{target} exists already; name a new {'folder' if form == 'parquet' else 'file'}")
    part = target.with_name(f"{target.name}.part")
    if part.is_dir():  # left by an export that was interrupted
        shutil.rmtree(part)
    part.unlink(missing_ok=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    left_out = (set() if vectors else set(feature_columns(snapshot.tables["images"].schema))) | (
        set() if images else {"image"}
    )
    write = _write_parquet if form == "parquet" else _write_duckdb
    with storage(snapshot.path):
        counts = write(snapshot, part, left_out, report)
    part.replace(target)
    return counts


def _stream(snapshot: Snapshot, name: str, left_out: set[str]) -> pa.RecordBatchReader:
    table: lance.LanceDataset = snapshot.tables[name]
    shown = snapshot.visible("true") if name == "images" and snapshot.hidden_models else None
    columns = [column for column in table.schema.names if column not in left_out]
    return table.scanner(columns=columns, filter=shown, batch_size=BATCH_ROWS).to_reader()


def _counted(batches: pa.RecordBatchReader, name: str, total: int, report: Report) -> Iterator[pa.RecordBatch]:
    done = 0
    for batch in batches:
        done += len(batch)
        report(f"export {name}", done, total)
        yield batch


def _write_parquet(snapshot: Snapshot, folder: Path, left_out: set[str], report: Report) -> dict[str, int]:
    folder.mkdir()
    counts = {}
    for name, table in snapshot.tables.items():
        batches = _stream(snapshot, name, left_out)
        with pq.ParquetWriter(folder / f"{name}.parquet", batches.schema, compression="zstd") as writer:
            for batch in _counted(batches, name, table.count_rows(), report):
                writer.write_batch(batch)
        counts[name] = pq.read_metadata(folder / f"{name}.parquet").num_rows
    return counts


def _write_duckdb(snapshot: Snapshot, file: Path, left_out: set[str], report: Report) -> dict[str, int]:
    counts = {}
    with duckdb.connect(str(file)) as connection:
        for name, table in snapshot.tables.items():
            batches = _stream(snapshot, name, left_out)
            counted = _counted(batches, name, table.count_rows(), report)
            connection.register("_rows", pa.RecordBatchReader.from_batches(batches.schema, counted))
            connection.execute(f'CREATE TABLE "{name}" AS FROM _rows')
            connection.unregister("_rows")
            counts[name] = connection.sql(f'SELECT count(*) FROM "{name}"').fetchall()[0][0]
        for view in sql.RELATIONS:
            if not view.arguments:
                connection.execute(f"CREATE VIEW {view.name} AS {view.sql}")
    return counts
