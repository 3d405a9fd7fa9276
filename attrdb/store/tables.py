"""Single tables of a database directory: create them, stamp them with a schema version, open them at a version."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import lance

from attrdb.errors import InvalidValue, NotFound, StorageError
from attrdb.store.lance_errors import by_lance, cause_of, storage, words_of
from attrdb.store.schema import SCHEMA_VERSION, TABLES
from attrdb.text import check_text

STAMP = b"attrdb.schema_version"


def schema_version(dataset: lance.LanceDataset) -> int:
    """The schema version a table is stamped with, 0 for none."""
    return int((dataset.schema.metadata or {}).get(STAMP, b"0"))


def database_path(path: str | Path) -> Path:
    """The path of a database, such that Lance takes no colon in it for the end of an address's scheme.

    raises: InvalidValue for an address, such as s3://bucket/some.attrdb, and for a path that is not UTF-8
    """
    text = os.fspath(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise InvalidValue(f"{text} is an address; a database is a directory on this machine: name its path")
    check_text("path", text)
    path = Path(text)
    return Path.cwd() / path if ":" in text and not path.is_absolute() else path


def table_exists(table: Path) -> bool:
    """Whether a table exists, whole or damaged; a table whose creation was killed has neither a version nor data."""
    return any(next(table.glob(files), None) for files in ("_versions/*.manifest", "data/*"))


def check_schema_version(path: Path, version: int) -> None:
    if version > SCHEMA_VERSION:
        raise InvalidValue(
            f"{path} has schema version {version}, this attrdb reads {SCHEMA_VERSION}; install a newer attrdb"
        )
    if version == 0:
        raise NotFound(f"{path} has an images table that attrdb did not make; make a database with: attrdb init PATH")
    if version < SCHEMA_VERSION:
        raise InvalidValue(
            f"{path} has schema version {version}, this attrdb reads {SCHEMA_VERSION}; bring it up with: "
            f"attrdb upgrade {path}"
        )


def open_table(path: Path, name: str, **options: Any) -> lance.LanceDataset:
    try:
        table = lance.dataset(str(path / f"{name}.lance"), **options)
        _ = table.schema  # Lance reads a damaged one with a panic
        return table
    except BaseException as error:
        if not (isinstance(error, ValueError) or by_lance(error)):
            raise
        if cause := cause_of(path, error):
            raise cause from error
        # Lance numbers its manifests downwards.
        newest = min((path / f"{name}.lance" / "_versions").glob("*.manifest"), default=None)
        cure = f"; restore {newest} from a copy of the directory" if newest else ""
        raise NotFound(
            f"{path} is not a whole attrdb database: its table {name} cannot be opened ({words_of(error)}){cure}"
        ) from error


def create_table(path: Path, name: str) -> None:
    """Create an empty table of the schema, unless it exists."""
    table = path / f"{name}.lance"
    if table_exists(table):
        return
    stamped = TABLES[name].with_metadata({STAMP.decode(): str(SCHEMA_VERSION)})
    try:
        with storage(path):
            lance.write_dataset(stamped.empty_table(), str(table))
    except StorageError:
        if not table_exists(table):  # another process may have created it meanwhile
            raise
