"""Upgrade steps: from every schema version to the next. A step is never edited once it has been released."""

from __future__ import annotations

from pathlib import Path

from attrdb.database import create_table
from attrdb.errors import NotFound
from attrdb.store.schema import SCHEMA_VERSION, TABLES
from attrdb.store.snapshot import STAMP, check_schema_version, open_table, schema_version, storage


def _to_2(path: Path) -> None:
    """Jobs and their failures are kept."""
    create_table(path, "jobs")
    create_table(path, "failures")


def _to_3(path: Path) -> None:
    """Mappers and calibrations are kept."""
    create_table(path, "mappers")
    create_table(path, "calibrations")


def _to_4(path: Path) -> None:
    """Stored attributions and the indices of features are kept."""
    create_table(path, "attributions")
    create_table(path, "indices")


def _to_5(path: Path) -> None:
    """How mappers are searched for is kept."""
    create_table(path, "mapper_searches")


STEPS = {2: _to_2, 3: _to_3, 4: _to_4, 5: _to_5}
BEGAN = {
    "jobs": 2,
    "failures": 2,
    "mappers": 3,
    "calibrations": 3,
    "attributions": 4,
    "indices": 4,
    "mapper_searches": 5,
}  # the version that made a table, where it was not the first


def upgrade(path: str | Path) -> tuple[int, int]:
    """Bring a database to the schema version of this attrdb; the versions before and after.

    A call that is interrupted is completed by the next: every step may be run again.
    raises: NotFound if there is no database, InvalidValue if a newer attrdb made it
    """
    path = Path(path)
    if not (path / "images.lance").is_dir():
        raise NotFound(f"{path} is not an attrdb database (no images.lance in it)")
    with storage(path):
        found = schema_version(open_table(path, "images"))
        if not 0 < found <= SCHEMA_VERSION:
            check_schema_version(path, found)
        for version in range(found + 1, SCHEMA_VERSION + 1):
            STEPS[version](path)
            # 'images' is stamped last: it says which version the directory has.
            there = [name for name in TABLES if BEGAN.get(name, 1) <= version]
            for name in sorted(there, key=lambda name: name == "images"):
                table = open_table(path, name)
                if schema_version(table) != version:
                    table.update_schema_metadata({STAMP.decode(): str(version)})
    return found, SCHEMA_VERSION
