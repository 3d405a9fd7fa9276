"""A database from an export: a folder with one Parquet file per table becomes a new database, equal in every row.

What is no row is not in an export: indices, the weights of customized models, older versions. Rows that describe an index are
therefore left out. Results name the version of images that they were computed on; the new table counts on from the highest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import lance
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from attrdb.errors import InvalidValue, NotFound, StorageError
from attrdb.progress import Progress, no_progress
from attrdb.store.schema import TABLES, Row
from attrdb.store.tables import create_table
from attrdb.store.validation import check_ids
from attrdb.store.writer import TABLE_KEYS, Writer
from attrdb.upkeep.backup import part_of

OF_INDICES = ("indices", "mapper_searches")  # they describe files that an export does not have


def import_export(source: Path, path: Path, report: Progress = no_progress) -> dict[str, int]:
    """Make a new database of an export; the rows of each table. It appears when it is whole.

    raises: NotFound if there is no export, InvalidValue if there is something at the path, for an export of another schema
            version, and for rows that attrdb would not store; StorageError for a file that cannot be read, or a full disk
    """
    files = _checked(source)
    counts = {}
    with part_of(path) as part:
        for name in TABLES:
            create_table(part, name)
        writer = Writer(part)
        for encoder in _rows(files["encoders"]):
            writer.add_encoder(
                encoder["spec"],
                encoder["dimension"],
                json.loads(encoder["preprocessing"] or "{}"),
                encoder["weights_fingerprint"],
            )
        images = pq.ParquetFile(files["images"])
        ids = []
        for batch in _batches(images, files["images"]):
            writer.append_bulk(batch)
            ids.append(batch["image_id"])
            report("import images", sum(map(len, ids)), images.metadata.num_rows)
        if ids:
            check_ids(pa.chunked_array([chunk for column in ids for chunk in column.chunks]))
        counts["images"] = sum(map(len, ids))
        for name in sorted(TABLES.keys() - {"images", *OF_INDICES}):
            counts[name] = _import_table(writer, name, files[name], report)
        _count_on(part, writer)
    return counts


def _checked(source: Path) -> dict[str, Path]:
    """The file of each table.

    raises: as `import_export`
    """
    files = {name: source / f"{name}.parquet" for name in TABLES}
    if source.is_file():
        raise InvalidValue(
            f"{source} is a file; import reads a folder of Parquet files, as attrdb export DB FOLDER makes it"
        )
    if not files["images"].is_file():
        raise NotFound(f"{source} is no export of a database (no images.parquet in it)")
    for name, file in files.items():
        if not file.is_file():
            raise InvalidValue(
                f"{source} has no {file.name}: it is not whole, or of another schema version; upgrade the database "
                "that it was exported from and export it again"
            )
        try:
            names = set(pq.read_schema(file).names)
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"{file} cannot be read: {error}") from error
        wanted = set(TABLES[name].names)
        if name == "images":
            wanted -= {"image"}  # it may have been left out
            names |= {"image"}
        missing, unknown = wanted - names, names - set(TABLES[name].names)
        if missing or (unknown and name != "images"):
            raise InvalidValue(
                f"{file} is of another schema version: it {'lacks' if missing else 'also has'} the column "
                f"{min(missing or unknown)!r}; upgrade the database that it was exported from and export it again"
            )
    return files


def _rows(file: Path) -> list[Row]:
    rows: list[Row] = pq.read_table(file).to_pylist()
    return rows


def _batches(parquet: pq.ParquetFile, file: Path) -> Iterator[pa.Table]:
    try:
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group)
            if len(table):
                yield table
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"{file} cannot be read: {error}") from error


def _import_table(writer: Writer, name: str, file: Path, report: Progress) -> int:
    """The rows of a table in place of those that it has; their number."""
    parquet = pq.ParquetFile(file)
    writer.delete(name, "true")
    n_rows = 0
    for table in _batches(parquet, file):
        if TABLE_KEYS[name]:
            writer.upsert(name, table)
        else:
            writer.append_rows(name, table, writer.snapshot)
        n_rows += len(table)
        report(f"import {name}", n_rows, parquet.metadata.num_rows)
    return n_rows


def _count_on(path: Path, writer: Writer) -> None:
    """Bring images to a version above those that results name, so that none is taken for one of the new database."""
    writer.refresh()
    named = 0
    for name, schema in TABLES.items():
        if "images_version" in schema.names:
            versions = writer.snapshot.tables[name].to_table(columns=["images_version"])["images_version"]
            named = max(named, pc.max(versions).as_py() or 0)
    images = lance.dataset(str(path / "images.lance"))
    while images.version <= named:
        images.delete("false")
    images.cleanup_old_versions(timedelta(0), delete_unverified=True)
