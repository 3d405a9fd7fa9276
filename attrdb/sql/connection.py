"""SQL over one snapshot: DuckDB in-process, read-only and closed in."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import duckdb
import pyarrow as pa
from duckdb.func import FunctionNullHandling, PythonUDFType

from attrdb.attribution.methods import method_rows, resolve_method
from attrdb.attribution.query import Attribution, AttributionRequest, attribute_stored, check_enough
from attrdb.attribution.similarity import unit_features
from attrdb.errors import AttrdbError, NotFound, QueryRefused
from attrdb.search import planner
from attrdb.sql import user_tables
from attrdb.sql.arrow_types import exact
from attrdb.sql.changes import changes
from attrdb.sql.limits import UNLIMITED, Limits, any_left_behind, default_memory, limited, needs_more
from attrdb.sql.read_only import check_read_only
from attrdb.sql.relations import STORED, Relation, exemplars_before_8, features_view, older_view, relations
from attrdb.store.predicates import among
from attrdb.store.schema import SHOWN_WITH_MODEL, TABLES, Row
from attrdb.store.snapshot import Snapshot
from attrdb.text import check_text, first_line

_HIT = pa.struct([("rank", pa.int64()), ("image_id", pa.string()), ("similarity", pa.float64())])
_SHARE = pa.struct(
    [
        ("rank", pa.int64()),
        ("image_id", pa.string()),
        ("score", pa.float64()),
        ("similarity", pa.float64()),
        ("influence", pa.float64()),
        ("complete", pa.bool_()),
        ("missing_influence", pa.float64()),
    ]
)
_CHANGE = pa.struct(
    [
        *((name, pa.string()) for name in ("relation", "id", "role", "model_id", "change")),
        ("columns", pa.list_(pa.string())),
    ]
)
MAX_IDLE = 16  # connections that a snapshot keeps for its next statements


@contextmanager
def connect(
    snapshot: Snapshot, memory: int | None = None, tables: Mapping[str, pa.Table] | None = None
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection that sees the tables of the snapshot, its views and macros, and no file, network or setting.

    Views, macros and functions are made once for a snapshot, which takes some 20 ms, and shared by its connections.
    memory: bytes that all its connections with this limit may use together, see `Limits`
    tables: tables of the caller's own, see `user_tables`
    raises: InvalidValue for a table that has a name of the database
    """
    memory = _memory(snapshot, memory)
    idle = snapshot.once(_Idle(memory))
    try:
        cursor = idle.pop()
    except IndexError:
        cursor = limited(None, lambda: snapshot.once(_Catalog(memory)).cursor())
        limited(cursor, lambda: _register(cursor, snapshot))  # what is registered is a connection's own
    try:
        if tables:
            user_tables.register(cursor, tables)
        yield cursor
    except BaseException:
        if not any_left_behind():  # closing one that still computes would wait for it
            cursor.close()
        raise
    if tables or len(idle) >= MAX_IDLE:
        cursor.close()
    else:
        idle.append(cursor)


def _memory(snapshot: Snapshot, memory: int | None) -> int:
    return snapshot.once(_default_memory) if memory is None else memory


def _default_memory(snapshot: Snapshot) -> int:
    return default_memory()


def _register(connection: duckdb.DuckDBPyConnection, snapshot: Snapshot) -> None:
    """Show the tables under the names that views read them by."""
    for name, dataset in snapshot.tables.items():
        hidden = name in SHOWN_WITH_MODEL and snapshot.hidden_models
        connection.register(f"_{name}" if hidden else table_name(name, snapshot), dataset)
    connection.register("methods", snapshot.once(method_table))
    connection.register("unfinished_models", pa.table({"model_id": pa.array(snapshot.hidden_models, pa.string())}))


def table_name(name: str, snapshot: Snapshot) -> str:
    """The name under which views read a table: a table that is shown through a view of its own name has an underscore."""
    if name not in STORED:
        return name
    before = _older_than(name, snapshot)
    return f"_{name}_{before - 1}" if before else f"_{name}"


def shown_relations(snapshot: Snapshot) -> list[Relation]:
    """Views and macros in the order in which they are made; those of an older moment have the columns of today."""
    older = [older_view(name, before) for name in STORED if (before := _older_than(name, snapshot))]
    replaced = {} if "concept_id" in snapshot.tables["images"].schema.names else {"exemplars": exemplars_before_8()}
    return [*older, *(replaced.get(relation.name, relation) for relation in relations())]


def _older_than(name: str, snapshot: Snapshot) -> int | None:
    """The schema version that changed the columns of a table after the moment of the snapshot; None if none did."""
    missing = {*TABLES[name].names} - {*snapshot.tables[name].schema.names}
    return (6 if "method_id" in missing else 10) if missing else None


def method_table(snapshot: Snapshot) -> pa.Table:
    """The methods as SQL shows them, see `methods.method_rows`."""
    return pa.Table.from_pylist(list(method_rows(snapshot).values()), schema=TABLES["methods"])


@dataclass(frozen=True)
class _Catalog:
    """Makes the views, macros and functions of a snapshot, in a DuckDB of so many bytes of memory."""

    memory: int

    def __call__(self, snapshot: Snapshot) -> duckdb.DuckDBPyConnection:
        return _catalog(snapshot, self.memory)


@dataclass(frozen=True)
class _Idle:
    """The connections of a snapshot that wait for a statement: to show a new one all tables takes 20 ms."""

    memory: int

    def __call__(self, snapshot: Snapshot) -> list[duckdb.DuckDBPyConnection]:
        return []


def _catalog(snapshot: Snapshot, memory: int) -> duckdb.DuckDBPyConnection:
    # Without the last, DuckDB lets SQL read and write in its temporary folder, and a CTE may hold a COPY.
    closed: dict[str, str | bool | int | float | list[str]] = {
        "enable_external_access": "false",
        "autoload_known_extensions": "false",
        "temp_directory": "",
    }
    connection = duckdb.connect(config=closed)
    _register(connection, snapshot)
    if snapshot.hidden_models:
        for name in (name for name in SHOWN_WITH_MODEL if name in snapshot.tables):
            connection.execute(f"CREATE VIEW {name} AS FROM _{name} WHERE {snapshot.visible('true')}")
    connection.execute(features_view(snapshot.tables["images"].schema))
    # The snapshot keeps the catalog; were its functions to keep the snapshot, neither would ever be let go.
    owner: Callable[[], Any] = weakref.ref(snapshot)
    # DuckDB counts the parameters of a function, so that they have to be spelled out here.
    connection.create_function(
        "_nearest",
        lambda feature, k, encoder_id, candidates, exact: _batched(
            partial(_nearest, owner()), _HIT, feature, k, encoder_id, candidates, exact
        ),
        ["FLOAT[]", "BIGINT", "VARCHAR", "VARCHAR", "BOOLEAN"],
        _sql_type(_HIT),
        type=PythonUDFType.ARROW,
        null_handling=FunctionNullHandling.SPECIAL,
    )
    connection.create_function(
        "_attribute",
        lambda sample, k, method, encoder_id, mapper_id, tau, lam, candidates, exact: _batched(
            partial(_attribute, owner()), _SHARE, sample, k, method, encoder_id, mapper_id, tau, lam, candidates, exact
        ),
        ["VARCHAR", "BIGINT", "VARCHAR", "VARCHAR", "VARCHAR", "DOUBLE", "DOUBLE", "VARCHAR", "BOOLEAN"],
        _sql_type(_SHARE),
        type=PythonUDFType.ARROW,
        null_handling=FunctionNullHandling.SPECIAL,
    )
    connection.create_function(
        "_sample_ids",
        lambda predicates: pa.array(
            [_sample_ids(owner(), one) for one in predicates.to_pylist()], pa.list_(pa.string())
        ),
        ["VARCHAR"],
        "VARCHAR[]",
        type=PythonUDFType.ARROW,
        null_handling=FunctionNullHandling.SPECIAL,
    )
    connection.create_function(
        "_changes",
        lambda moments: pa.array([changes(owner(), one) for one in moments.to_pylist()], pa.list_(_CHANGE)),
        ["VARCHAR"],
        _sql_type(_CHANGE),
        type=PythonUDFType.ARROW,
    )
    for relation in shown_relations(snapshot):
        connection.execute(relation.create)
    connection.execute(f"SET memory_limit = '{memory}B'")
    connection.execute("SET lock_configuration = true")
    return connection


_SQL_TYPES = {
    pa.list_(pa.string()): "VARCHAR[]",
    pa.int64(): "BIGINT",
    pa.string(): "VARCHAR",
    pa.float64(): "DOUBLE",
    pa.bool_(): "BOOLEAN",
}


def _sql_type(item: pa.StructType) -> str:
    """A list of such structs, in DuckDB's words."""
    return f"STRUCT({', '.join(f'{field.name} {_SQL_TYPES[field.type]}' for field in item)})[]"


def _batched(answer: Callable[..., list[list[Row] | None]], item: pa.StructType, *columns: pa.Array) -> pa.Array:
    """What DuckDB calls with a block of rows: those that ask with the same settings are answered together."""
    rows = list(zip(*(column.to_pylist() for column in columns), strict=True))
    answers: list[list[Row] | None] = [None] * len(rows)
    alike: dict[tuple[Any, ...], list[int]] = {}
    for number, (query, *settings) in enumerate(rows):
        if query is not None:
            alike.setdefault(tuple(settings), []).append(number)
    for shared, numbers in alike.items():
        answered = answer([rows[number][0] for number in numbers], *shared)
        for number, items in zip(numbers, answered, strict=True):
            answers[number] = items
    return pa.array(answers, pa.list_(item))


def _nearest(
    snapshot: Snapshot,
    features: list[list[float]],
    k: int | None,
    encoder_id: str | None,
    candidates: str | None,
    exact: bool | None,
) -> list[list[Row] | None]:
    encoder_id = snapshot.encoder_id(encoder_id)
    if k is None or k < 1:
        raise QueryRefused(f"nearest: k is {k}; at least one candidate must be asked for")
    queries = unit_features(snapshot, encoder_id, features)
    hits = planner.nearest(snapshot, encoder_id, queries, k, candidates=candidates, exact=bool(exact))
    for ids in hits.ids:
        check_enough(snapshot, f"{encoder_id!r} feature", candidates, k, len(ids))
    return [
        [
            {"rank": rank, "image_id": image_id, "similarity": similarity}
            for rank, (image_id, similarity) in enumerate(zip(ids, similarities, strict=True), 1)
        ]
        for ids, similarities in zip(hits.ids, hits.similarity, strict=True)
    ]


def _attribute(
    snapshot: Snapshot,
    samples: list[str],
    k: int | None,
    method: str | None,
    encoder_id: str | None,
    mapper_id: str | None,
    tau: float | None,
    lam: float | None,
    candidates: str | None,
    exact: bool | None,
) -> list[list[Row] | None]:
    by = resolve_method(snapshot, method, encoder_id, mapper_id)
    request = AttributionRequest(None, k, by, tau, lam, candidates, bool(exact))
    answers = attribute_stored(snapshot, list(dict.fromkeys(samples)), request)
    is_similarity = method_rows(snapshot)[by]["kind"] == "similarity"
    if unanswered := set(samples) - answers.keys():
        stored = snapshot.images(among("image_id", unanswered), ["image_id"])["image_id"].to_pylist()
        if unknown := unanswered - set(stored):
            raise NotFound(f"no image {min(unknown)!r} in {snapshot.path}")
    rows = {sample: _share_rows(answer, is_similarity) for sample, answer in answers.items()}
    return [rows.get(sample) for sample in samples]


def _sample_ids(snapshot: Snapshot, predicate: str | None) -> list[str]:
    """The samples that a predicate keeps; all for None."""
    where = "role = 'sample'"
    if predicate is not None:
        snapshot.check_predicate("samples", predicate)
        where += f" AND ({predicate})"
    ids: list[str] = snapshot.images(where, ["image_id"])["image_id"].to_pylist()
    if predicate is not None and not ids:
        raise NotFound(f"no sample of {snapshot.path} fulfils {predicate!r}")
    return ids


def _share_rows(answer: Attribution, is_similarity: bool) -> list[Row]:
    return [
        {
            "rank": rank,
            "image_id": image_id,
            "score": score,
            "similarity": score if is_similarity else None,
            "influence": share,
            "complete": answer.complete,
            "missing_influence": answer.missing_influence,
        }
        for rank, (image_id, score, share) in enumerate(zip(answer.ids, answer.score, answer.influence, strict=True), 1)
    ]


def select(
    snapshot: Snapshot,
    statement: str,
    parameters: Mapping[str, Any] | None = None,
    limits: Limits = UNLIMITED,
    tables: Mapping[str, pa.Table] | None = None,
) -> pa.Table:
    """The result of one SELECT within limits, over tables of the caller's own too; raises as `connect` and `run`."""
    limits = replace(limits, memory=_memory(snapshot, limits.memory))
    with connect(snapshot, limits.memory, tables) as connection:
        return run(connection, statement, parameters, limits)


def run(
    connection: duckdb.DuckDBPyConnection,
    statement: str,
    parameters: Mapping[str, Any] | None = None,
    limits: Limits = UNLIMITED,
) -> pa.Table:
    """The result of one SELECT; a column name that stands twice gets a number, so that no format loses one.

    limits: of time and rows, and of the memory of the process; the memory of DuckDB is that of the connection
    raises: QueryRefused with DuckDB's own words, for anything but one SELECT, or if it takes too long; OutOfMemory;
            OSError for a damaged file
    """

    def result() -> pa.Table:
        relation = exact(_asked(connection, statement, parameters))
        return (relation if limits.rows is None else relation.limit(limits.rows)).to_arrow_table()

    with _refused(connection):
        table = limited(connection, result, limits)
    return table.rename_columns(_distinct(table.column_names))


def stream(
    connection: duckdb.DuckDBPyConnection, statement: str, parameters: Mapping[str, Any], rows: int
) -> Iterator[pa.RecordBatch]:
    """The result of one SELECT in batches of some rows, in constant memory; raises as `run`."""
    with _refused(connection):
        reader = limited(connection, lambda: _asked(connection, statement, parameters).to_arrow_reader(rows))
        while (batch := limited(connection, partial(next, reader, None))) is not None:
            yield batch


def _asked(
    connection: duckdb.DuckDBPyConnection, statement: str, parameters: Mapping[str, Any] | None
) -> duckdb.DuckDBPyRelation:
    check_text("statement", statement)
    check_read_only(connection, statement)
    return connection.sql(statement, params=dict(parameters or {}))


@contextmanager
def _refused(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Turns what DuckDB says into QueryRefused or OutOfMemory, or OSError for a damaged file."""
    try:
        yield
    except (duckdb.OutOfMemoryException, MemoryError) as error:
        if isinstance(error, AttrdbError):
            raise
        [(memory,)] = connection.sql("SELECT current_setting('memory_limit')").fetchall()
        raise needs_more(memory) from error
    except duckdb.PermissionException as error:
        raise QueryRefused(
            f"SQL in attrdb reads the database's own tables, not files or the network: {first_line(error)}; a file of yours "
            "is read if the command names it: --with NAME=FILE, in Python relations={'NAME': 'FILE'}"
        ) from error
    except duckdb.Error as error:
        if damaged := re.search(r"reading the stream registered as '_?(\w+)' failed: (.*)", str(error)):
            raise OSError(f"table {damaged[1]}: {damaged[2]}") from error
        if "No match for FieldRef" in str(error):
            raise QueryRefused('Lance cannot filter on a vector column: write "column"::FLOAT[] IS NOT NULL') from error
        # An error of attrdb's own, raised inside nearest() or attribute(), comes back wrapped in DuckDB's words.
        _, _, own = str(error).partition("while executing the UDF: ")
        raise QueryRefused(own.partition(": ")[2] or str(error)) from error


def _distinct(names: list[str]) -> list[str]:
    taken: list[str] = []
    for name in names:
        number = 0
        while (candidate := f"{name}_{number}" if number else name) in taken:
            number += 1
        taken.append(candidate)
    return taken
