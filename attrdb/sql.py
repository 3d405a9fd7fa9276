"""SQL over one snapshot: DuckDB in-process, read-only and closed in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import duckdb
import lance
import pyarrow as pa

from attrdb.errors import QueryRefused
from attrdb.schema import feature_columns

_ROLE_VIEWS = {"exemplars": "exemplar", "samples": "sample", "pretraining_images": "pretraining"}


def connect(snapshot: Mapping[str, lance.LanceDataset]) -> duckdb.DuckDBPyConnection:
    """A connection that sees the tables of the snapshot and views on them, and no file, network or setting.

    Views: a table each, `exemplars`, `samples` and `pretraining_images` by role, and `features` (image_id, role,
    model_id, encoder_id, feature): a row per image and encoder that has encoded it.
    """
    connection = duckdb.connect(config={"enable_external_access": "false", "autoload_known_extensions": "false"})
    for name, dataset in snapshot.items():
        connection.register(name, dataset)
    for view, role in _ROLE_VIEWS.items():
        connection.execute(f"CREATE VIEW {view} AS FROM images WHERE role = '{role}'")
    connection.execute(f"CREATE VIEW features AS {_features(snapshot['images'].schema)}")
    connection.execute("SET lock_configuration = true")
    return connection


def _features(images: pa.Schema) -> str:
    # The null test reads the cast column: DuckDB would push one on the column itself down, and Lance's Arrow bridge
    # cannot filter a vector column (pylance 14.0: 'No match for FieldRef').
    nothing = "SELECT image_id, role, model_id, '' AS encoder_id, NULL::FLOAT[] AS feature FROM images WHERE false"
    parts = [
        f"SELECT image_id, role, model_id, '{encoder}' AS encoder_id, \"{encoder}\"::FLOAT[] AS feature FROM images "
        f'WHERE "{encoder}"::FLOAT[] IS NOT NULL'
        for encoder in feature_columns(images)
    ]
    return " UNION ALL ".join(parts or [nothing])


def run(connection: duckdb.DuckDBPyConnection, statement: str, parameters: Mapping[str, Any] | None = None) -> pa.Table:
    """The result of one SELECT; a column name that stands twice gets a number, so that no format loses one.

    raises: QueryRefused with DuckDB's own words, or for anything but one SELECT
    """
    try:
        parsed = connection.extract_statements(statement)
        if len(parsed) != 1 or parsed[0].type != duckdb.StatementType.SELECT:
            found = ", ".join(one.type.name for one in parsed) or "nothing"
            raise QueryRefused(f"one SELECT is needed, found: {found}; attrdb's tables change through attrdb ingest")
        result = connection.sql(statement, params=dict(parameters or {})).to_arrow_table()
    except duckdb.PermissionException as error:
        raise QueryRefused(
            f"SQL in attrdb reads the database's own tables, not files or the network: {_first_line(error)}"
        ) from error
    except duckdb.Error as error:
        if "No match for FieldRef" in str(error):
            raise QueryRefused('Lance cannot filter on a vector column: write "column"::FLOAT[] IS NOT NULL') from error
        raise QueryRefused(str(error)) from error
    return result.rename_columns(_distinct(result.column_names))


def _distinct(names: list[str]) -> list[str]:
    taken: list[str] = []
    for name in names:
        number = 0
        while (candidate := f"{name}_{number}" if number else name) in taken:
            number += 1
        taken.append(candidate)
    return taken


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
