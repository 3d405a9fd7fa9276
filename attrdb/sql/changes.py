"""What has changed between two moments of a database: images and models that were added, removed or altered."""

from __future__ import annotations

import duckdb

from attrdb.errors import InvalidValue
from attrdb.store.schema import TABLES, Row
from attrdb.store.snapshot import Snapshot, open_snapshot

COMPARED = {"images": "image_id", "models": "model_id"}  # table -> id
NOT_COMPARED = {"image"}  # a picture that was replaced has another sha256


def changes(snapshot: Snapshot, since: str) -> list[Row]:
    """A row per image and model that differs between an older moment and this one, by table and id.

    since:   a version of images, or a time, see `history.tables_at`
    returns: relation, id, role and model_id (null for models), change ('added', 'removed' or 'changed'), columns (those that
             differ, of a changed one)
    raises:  NotFound if that moment is not kept, InvalidValue for one that is not older
    """
    older = open_snapshot(snapshot.path, since)
    if older.version > snapshot.version:
        raise InvalidValue(
            f"version {older.version} is newer than version {snapshot.version}, which is read; name an older one"
        )
    return [row for table in COMPARED for row in _changed_rows(table, older, snapshot)]


def _changed_rows(table: str, older: Snapshot, newer: Snapshot) -> list[Row]:
    key = COMPARED[table]
    stored = set(older.tables[table].schema.names) & set(newer.tables[table].schema.names)
    columns = [name for name in TABLES[table].names if name in stored - NOT_COMPARED - {key}]
    differing = ", ".join(f"CASE WHEN older.{name} IS DISTINCT FROM newer.{name} THEN '{name}' END" for name in columns)
    told = ("role", "model_id") if table == "images" else ()
    described = "".join(f", coalesce(newer.{name}, older.{name}) AS {name}" for name in told)
    with duckdb.connect() as connection:
        for name, snapshot in (("_older", older), ("_newer", newer)):
            connection.register(name, snapshot.tables[table])
            shown = snapshot.visible("true") if table == "images" else "true"
            listed = ", ".join([key, *columns])
            connection.execute(f"CREATE VIEW {name.removeprefix('_')} AS SELECT {listed} FROM {name} WHERE {shown}")
        rows: list[Row] = (
            connection.sql(f"""
                SELECT '{table}' AS relation, coalesce(newer.{key}, older.{key}) AS id{described},
                    CASE
                        WHEN older.{key} IS NULL THEN 'added'
                        WHEN newer.{key} IS NULL THEN 'removed'
                        ELSE 'changed'
                    END AS change,
                    CASE
                        WHEN older.{key} IS NOT NULL AND newer.{key} IS NOT NULL
                            THEN list_filter([{differing}], lambda name: name IS NOT NULL)
                    END AS columns
                FROM older FULL JOIN newer ON older.{key} = newer.{key}
                WHERE columns IS NULL OR len(columns) > 0
                ORDER BY id""")
            .to_arrow_table()
            .to_pylist()
        )
    return rows
