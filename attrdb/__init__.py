"""attrdb: an embedded vector database that says which training images shaped a generated image, and how much.

    import attrdb

    db = attrdb.open("my.attrdb")
    db.sql("SELECT role, count(*) FROM images GROUP BY role")
    db.query("recall_at_k", k=10)
    db.attribute("vase-03/0/1", k=10)

Results are Arrow tables. `attrdb.create` makes a new database.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrdb.errors import AttrdbError, InvalidValue, MissingExtra, NotFound, QueryRefused

if TYPE_CHECKING:
    from pathlib import Path

    from attrdb.database import Database

__version__ = "0.1.0"
__all__ = ["AttrdbError", "InvalidValue", "MissingExtra", "NotFound", "QueryRefused", "create", "open"]


# lance and duckdb take a third of a second to import: `attrdb --help` must not wait for them.


def open(path: str | Path) -> Database:
    """The database at a path, at its newest version.

    raises: NotFound if there is none
    """
    from attrdb.database import Database

    return Database(path)


def create(path: str | Path) -> Database:
    """A new, empty database.

    raises: InvalidValue if there is something at the path already
    """
    from attrdb.database import create

    return create(path)
