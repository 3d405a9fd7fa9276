"""What SQL can ask of a snapshot: its tables, views and macros, each with its columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

from attrdb import sql
from attrdb.sql.relations import FEATURES_GRAIN, STORED, UNFINISHED_GRAIN
from attrdb.sql.relations import relations as sql_relations
from attrdb.store.dictionary import DICTIONARY
from attrdb.store.snapshot import Snapshot


@dataclass(frozen=True)
class Described:
    """A table, view or macro. grain: what a row is; arguments: of a macro; columns: name -> SQL type."""

    name: str
    kind: str  # 'tables', 'views', 'macros' or 'your tables'
    grain: str
    arguments: str
    columns: dict[str, str]

    @property
    def call(self) -> str:
        return f"{self.name}({self.arguments})" if self.arguments else self.name


def relations(snapshot: Snapshot, user_tables: Mapping[str, pa.Table]) -> dict[str, Described]:
    """Everything that can stand in FROM, by name; nothing is read but the schemas."""
    # A table that SQL sees through a view of its name is described as that view.
    shown = [(name, "tables", table.grain, "") for name, table in DICTIONARY.items() if name not in STORED]
    shown += [
        (one.name, "macros" if one.arguments else "views", one.grain, one.signature)
        for one in sql_relations()
        if not one.returns
    ]
    shown += [("features", "views", FEATURES_GRAIN, ""), ("unfinished_models", "views", UNFINISHED_GRAIN, "")]
    shown += [(name, "your tables", f"{len(table):,} rows", "") for name, table in user_tables.items()]
    described = {}
    with sql.connect(snapshot, tables=user_tables) as connection:
        for name, kind, grain, arguments in shown:
            required = [argument for argument in arguments.split(", ") if argument and ":=" not in argument]
            call = f"{name}({', '.join('NULL' for _ in required)})" if arguments else name
            relation = connection.sql(f"FROM {call}")
            columns = dict(zip(relation.columns, map(str, relation.types), strict=True))
            described[name] = Described(name, kind, grain, arguments, columns)
    return described


def meanings(name: str) -> dict[str, str]:
    """What the columns of a table mean, as far as the schema says it; views by role have the columns of images."""
    table = DICTIONARY.get(name) or DICTIONARY["images"]
    return {column.name: column.meaning for column in table.columns}
