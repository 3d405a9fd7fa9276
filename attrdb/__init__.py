"""attrdb: an embedded vector database that says which training images shaped a generated image, and how much.

    import attrdb

    db = attrdb.open("my.attrdb")
    db.sql("SELECT role, count(*) FROM images GROUP BY role")
    db.query("recall_at_k", k=10)
    db.attribute("vase-03/0/1", k=10)

Results are Arrow tables. `attrdb.create` makes a new database.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrdb.errors import AttrdbError, Busy, InvalidValue, MissingExtra, NotFound, QueryRefused, StorageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from pathlib import Path

    from attrdb.database import Database

__version__ = "0.1.0"  # the only place; pyproject.toml reads this line
__all__ = [
    "AttrdbError",
    "Busy",
    "Database",
    "InvalidValue",
    "MissingExtra",
    "NotFound",
    "QueryRefused",
    "StorageError",
    "create",
    "open",
]


# lance and duckdb take a third of a second to import: `attrdb --help` must not wait for them.


def __getattr__(name: str) -> Any:
    if name == "Database":
        from attrdb.database import Database

        return Database
    raise AttributeError(f"module 'attrdb' has no attribute {name!r}")


def open(
    path: str | Path,
    *,
    read_only: bool = False,
    at: int | str | datetime | None = None,
    query_folders: Sequence[str | Path] = (),
) -> Database:
    """The database at a path, as it is now, until `refresh()`.

    read_only:     refuses every write; for applications that only ask
    at:            opens an older moment, read-only: a version of images, or a time (datetime or ISO 8601 text, UTC where it
                   names no zone)
    query_folders: folders of query files of your own, for `query`
    raises:        NotFound if there is no database, or no such version, InvalidValue for another schema version
    """
    from attrdb.database import Database

    return Database(path, read_only=read_only, at=at, query_folders=query_folders)


def create(path: str | Path) -> Database:
    """A new, empty database.

    raises: InvalidValue if there is something at the path already
    """
    from attrdb.database import create

    return create(path)
