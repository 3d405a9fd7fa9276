"""The database: one directory of Lance tables, read at a pinned version and appended to atomically."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from attrdb import queries, sql
from attrdb.attribution.methods import load_method, method_rows, resolve_method
from attrdb.attribution.query import DEFAULT_K, AttributionRequest, attribute, check_attributable, stored_query
from attrdb.errors import InvalidValue
from attrdb.formats.notebook import database_html
from attrdb.progress import Progress, no_progress
from attrdb.search.mapper import Mapper, stored_mapper
from attrdb.sql.limits import UNLIMITED, Limits, parse_size
from attrdb.store.checksums import CHANGED
from attrdb.store.features import Block
from attrdb.store.lance_errors import storage
from attrdb.store.predicates import among, literal
from attrdb.store.schema import OF_TESTS, ROLES, TABLES, Row
from attrdb.store.snapshot import Snapshot
from attrdb.store.tables import create_table, database_path, table_exists
from attrdb.store.writer import Writer
from attrdb.upkeep import health
from attrdb.upkeep.removal.choose import RemovalRequest
from attrdb.upkeep.removal.remove import Removal, remove

SIMILARITY = ("encoder_id", "mapper_id")  # they name a method, see `resolve_method`
PICTURES_SHOWN = 8  # in a notebook
DESCRIBED = ["role", "model_id", "source", "category", "creator", "license"]


def create(path: str | Path) -> Database:
    """A new, empty database; one whose creation was interrupted is completed.

    raises: InvalidValue if there is something else at the path
    """
    path = database_path(path)
    ours = {f"{name}.lance" for name in TABLES}
    if table_exists(path / "images.lance"):
        raise InvalidValue(f"{path} is an attrdb database already; open it")
    strange = path.exists() and (not path.is_dir() or any(entry.name not in ours for entry in path.iterdir()))
    if strange or any(path.glob("*.lance/data/*")):
        raise InvalidValue(f"{path} exists and is not an empty directory; choose a path of its own for the database")
    # 'images' comes last: a directory without it is not a database yet.
    for name in sorted(TABLES, key=lambda name: name == "images"):
        create_table(path, name)
    CHANGED.add(path)
    return Database(path)


def open_or_create(path: str | Path) -> Database:
    """The database at a path, made if there is none yet or its making was killed; another process may make it too.

    raises: InvalidValue if there is something else at the path, NotFound and InvalidValue as `Database`
    """
    try:
        return create(path)
    except InvalidValue:
        if not table_exists(database_path(path) / "images.lance"):
            raise
        return Database(path)


class Database:
    """An open database. What it reads stays as it was when it was opened, until `refresh()` or its own append.

    Reads may run in several threads at once: each works on the snapshot it finds when it begins.

    at:     reads an older moment, see `attrdb.open`; such a database is read-only
    raises: NotFound if the path is no attrdb database, or keeps no such version, InvalidValue for another schema version
    """

    def __init__(
        self,
        path: str | Path,
        *,
        read_only: bool = False,
        at: int | str | datetime | None = None,
        query_folders: Sequence[str | Path] = (),
    ):
        self.path = database_path(path)
        self.query_folders = tuple(query_folders)
        self.writer = Writer(self.path, read_only, at)

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing: a database holds no file or lock open between its calls."""

    def __repr__(self) -> str:
        return f"<attrdb.Database {str(self.path)!r}, version {self.version}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: rows by role, models, encoders, and the first pictures that are stored."""
        snapshot = self.snapshot
        counts = {role: snapshot.count(f"role = {literal(role)}") for role in ROLES}
        rows: dict[str, object] = {role: n for role, n in counts.items() if n or role not in OF_TESTS}
        rows["models"] = len(snapshot.rows("models", columns=["model_id"]))
        rows["encoders"] = ", ".join(self.encoders) or "none"
        pictures = snapshot.first_pictures(PICTURES_SHOWN)
        return database_html(f"{self.path}, version {self.version}", rows, pictures)

    def refresh(self) -> None:
        """Move on to the newest version of every table; a database opened at an older moment stays there.

        raises: NotFound if a table is gone
        """
        self.writer.refresh()

    @property
    def snapshot(self) -> Snapshot:
        """The tables as they are being read."""
        return self.writer.snapshot

    @property
    def version(self) -> int:
        """The version of the images table that is being read."""
        return self.snapshot.version

    @property
    def encoders(self) -> dict[str, Row]:
        """The rows of `encoders`, by encoder_id, in the order in which they were added."""
        return self.snapshot.encoders

    @property
    def methods(self) -> dict[str, Row]:
        """The rows of `methods`, by method_id: similarity by encoders and mappers first."""
        return method_rows(self.snapshot)

    def images(self, where: str, columns: list[str]) -> pa.Table:
        """Columns of the images that a predicate keeps."""
        return self.snapshot.images(where, columns)

    def features(self, encoder_id: str, where: str) -> Iterator[Block]:
        """Ids and features of the encoded images that a predicate keeps, streamed in blocks."""
        return self.snapshot.features(encoder_id, where)

    # --- SQL ---------------------------------------------------------------------------------------------------------

    def sql(
        self,
        statement: str,
        parameters: dict[str, Any] | None = None,
        relations: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        memory: int | str | None = None,
        rows: int | None = None,
    ) -> pa.Table:
        """The result of one SELECT over the pinned tables; its schema metadata names the images version.

        relations: tables of your own that the statement may name: name -> Arrow table, data frame or path of a file, see
                   `sql.load_tables`
        timeout:   seconds after which the statement is ended; None for no limit
        memory:    bytes that it may use, or a text such as "4GB"; None for half of the free memory
        rows:      only so many of its first rows; None for all
        raises:    QueryRefused with DuckDB's words, if the statement is not one SELECT, asks for files or the network, or
                   takes too long; OutOfMemory, InvalidValue for a limit that is none, StorageError for a damaged file, and
                   as `sql.load_tables`
        """
        limits = Limits(timeout, parse_size(memory) if isinstance(memory, str) else memory, rows)
        return self._select(self.snapshot, statement, parameters, relations, limits)

    def _select(
        self,
        snapshot: Snapshot,
        statement: str,
        parameters: dict[str, Any] | None,
        relations: Mapping[str, Any] | None,
        limits: Limits = UNLIMITED,
    ) -> pa.Table:
        tables = sql.load_tables(relations)
        with storage(self.path):
            return _versioned(sql.select(snapshot, statement, parameters, limits, tables), snapshot)

    def query(self, name: str, *, relations: Mapping[str, Any] | None = None, **parameters: Any) -> pa.Table:
        """The result of a named query, such as `db.query("recall_at_k", k=10)`.

        A query's `method` may be given as encoder_id and mapper_id too; without any it is similarity of the first encoder.
        relations: as of `sql`
        raises: NotFound for an unknown query, encoder or image, InvalidValue for a wrong parameter
        """
        snapshot = self.snapshot
        query, given = self._named(snapshot, name, parameters)
        return self._select(snapshot, query.sql, given, relations)

    def bound_query(self, name: str, **parameters: Any) -> tuple[str, dict[str, Any]]:
        """The SQL of a named query and all its parameters, for a caller that runs it itself; raises as `query`."""
        query, given = self._named(self.snapshot, name, parameters)
        return query.sql, given

    def stream_query(self, name: str, rows: int = 8192, **parameters: Any) -> Iterator[pa.RecordBatch]:
        """The result of a named query in batches of some rows, in constant memory; raises as `query`."""
        snapshot = self.snapshot
        query, given = self._named(snapshot, name, parameters)
        with storage(self.path), sql.connect(snapshot) as connection:
            yield from sql.stream(connection, query.sql, given, rows)

    def _named(
        self, snapshot: Snapshot, name: str, parameters: dict[str, Any]
    ) -> tuple[queries.NamedQuery, dict[str, Any]]:
        """A named query, and all its parameters."""
        query = queries.load(name, self.query_folders)
        parameters = dict(parameters)
        names = {parameter.name for parameter in query.parameters}
        encoder_id, mapper_id, image_id = (parameters.get(name) for name in ("encoder_id", "mapper_id", "image_id"))
        by = None
        if "method" in names:
            # Similarity may be named by encoder and mapper in the place of a method.
            by = parameters["method"] = resolve_method(snapshot, parameters.get("method"), encoder_id, mapper_id)
            parameters = {name: value for name, value in parameters.items() if name in names or name not in SIMILARITY}
        elif "encoder_id" in names:
            by = resolve_method(snapshot, None, encoder_id, mapper_id)
            parameters["encoder_id"] = method_rows(snapshot)[by]["encoder_id"]
        if "other" in names:
            parameters["other"] = resolve_method(snapshot, parameters.get("other"))
        if by and "image_id" in names and isinstance(image_id, str):
            check_attributable(snapshot, image_id, by)
        return query, query.bind(parameters)

    # --- attribution --------------------------------------------------------------------------------------------------

    def encoder_id(self, encoder_id: str | None = None) -> str:
        """The given encoder's id, or the first one's.

        raises: NotFound if this database has no such encoder, or none at all
        """
        return self.snapshot.encoder_id(encoder_id)

    def feature(self, image_id: str, encoder_id: str | None = None) -> np.ndarray:
        """The stored feature of an image, (dimension,) float32.

        raises: NotFound if there is no such image, or it has not been encoded
        """
        snapshot = self.snapshot
        queries = stored_query(snapshot, load_method(snapshot, snapshot.encoder_id(encoder_id)), image_id)
        assert queries.features is not None  # similarity has them
        feature: np.ndarray = queries.features[0]
        return feature

    def attribute(
        self,
        query: str | np.ndarray,
        *,
        k: int = DEFAULT_K,
        method: str | None = None,
        encoder_id: str | None = None,
        mapper_id: str | None = None,
        tau: float | None = None,
        lam: float | None = None,
        candidates: str | None = None,
        exact: bool = False,
    ) -> pa.Table:
        """The k candidates that an image owes most to, with their influence, best first.

        encoder_id, mapper_id: similarity of that encoder, with that mapper; in the place of a method
        the others: see `attribution.query.AttributionRequest`
        returns: rank, image_id, role, model_id, source, category, creator, license, score (in the method's unit), similarity
                 (the same where the method is similarity, else null), influence, complete, missing_influence (see
                 `attribution.query.Attribution`). Influence is an estimate, not a causal share.
        raises:  as `attribution.query.attribute`
        source:  Wang et al. 2023, Eq. 6
        """
        snapshot = self.snapshot
        by = resolve_method(snapshot, method, encoder_id, mapper_id)
        answer = attribute(snapshot, AttributionRequest(query, k, by, tau, lam, candidates, exact))
        known = snapshot.images(among("image_id", answer.ids), ["image_id", *DESCRIBED])
        position = {image_id: row for row, image_id in enumerate(known["image_id"].to_pylist())}
        n = len(answer.ids)
        rows = known.take([position[image_id] for image_id in answer.ids])
        rows = rows.add_column(0, "rank", pa.array(range(1, n + 1), pa.int64()))
        is_similarity = method_rows(snapshot)[by]["kind"] == "similarity"
        for name, values in (
            ("score", pa.array(answer.score)),
            ("similarity", pa.array(answer.score) if is_similarity else pa.nulls(n, pa.float64())),
            ("influence", pa.array(answer.influence)),
            ("complete", pa.array([answer.complete] * n)),
            ("missing_influence", pa.array([answer.missing_influence] * n)),
        ):
            rows = rows.append_column(name, values)
        return _versioned(rows, snapshot)

    def mapper(self, mapper_id: str) -> Mapper:
        """A stored mapper.

        raises: NotFound, with the nearest ids
        """
        return stored_mapper(self.snapshot, mapper_id)

    # --- taking out ---------------------------------------------------------------------------------------------------

    def remove(
        self,
        *,
        where: str | None = None,
        creator: str | None = None,
        ids: Iterable[str] | None = None,
        reason: str | None = None,
        models: str = "list",
        purge: bool = False,
        drop_tags: bool = False,
        block: bool = False,
        dry_run: bool = False,
        report: Progress = no_progress,
    ) -> Removal:
        """Take images out, with their features and all results that they were part of; what was, or would be, taken out.

        where, creator, ids, reason, models, purge, drop_tags, block: see `RemovalRequest`; one of the first three is given
        dry_run: take nothing out
        raises:  as `upkeep.removal.remove.remove`
        """
        if isinstance(ids, str):
            raise InvalidValue(f"ids is the text {ids!r}; give a list of image ids, addresses or sha256")
        named = None if ids is None else tuple(dict.fromkeys(ids))
        request = RemovalRequest(where, creator, named, reason, models, purge, drop_tags, block)
        return remove(self.writer, request, dry_run=dry_run, report=report)

    def status(self) -> dict[str, Any]:
        """What the database holds and how well it is kept, see `health.status`."""
        return health.status(self.snapshot)


def _versioned(answer: pa.Table, snapshot: Snapshot) -> pa.Table:
    """The table with the images version that it came from in its schema metadata."""
    return answer.replace_schema_metadata({b"attrdb.images_version": str(snapshot.version).encode()})
