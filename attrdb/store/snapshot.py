"""A snapshot: every table of a database at one pinned version. It never changes, so threads may share it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from pathlib import Path
from threading import RLock
from types import MappingProxyType
from typing import Any, TypeVar

import lance
import pyarrow as pa

from attrdb.errors import InvalidValue, NotFound
from attrdb.store import features
from attrdb.store.history import tables_at
from attrdb.store.lance_errors import by_lance, storage, words_of
from attrdb.store.predicates import among, among_parts, fault_of, literal, shortened
from attrdb.store.schema import OF_MODELS, TABLES, Row, feature_columns
from attrdb.store.tables import check_schema_version, open_table, schema_version

OF_MODELS_ROWS = among("role", OF_MODELS)
COUNTS = 100  # predicates whose counts are remembered
IDS_PER_LOOKUP = 512
ATTEMPTS = 20  # at a moment at which no images are being taken out; each takes some 20 ms

Derived = TypeVar("Derived")


class Snapshot:
    """The tables of a database as they were at one moment.

    A customized model is valid only once its row in `models` exists. Images that a job appended before that, and whether it
    still runs or was killed, are hidden.
    """

    def __init__(self, path: Path, tables: dict[str, lance.LanceDataset], stamp: tuple[int, int]):
        self.path = path
        self.tables = tables
        self._versions = {name: table.version for name, table in tables.items()}
        self._stamp = stamp  # of the directory, when the tables were opened
        self._counts: dict[str, int] = {}
        self._derived: dict[Callable[[Snapshot], Any], Any] = {}
        self._lock = RLock()

    @property
    def version(self) -> int:
        """The version of the images table."""
        return self.tables["images"].version

    def is_before_removal(self) -> bool:
        """Whether images are being taken out, or were, since the tables were opened."""
        removals = self.tables["removals"]
        return bool(removals.latest_version != removals.version)

    def newest(self) -> Snapshot:
        """The tables as they are now; this snapshot, with all that was derived from it, if none has changed.

        A table that has not changed is not opened again: 24 tables take 12 ms to open, and 0.5 ms to ask for their versions.
        raises: as `open_snapshot`
        """
        if _stamp(self.path) != self._stamp:  # deleted, and perhaps made anew
            return open_snapshot(self.path)
        # A write by way of a dataset moves it on; attrdb writes to others.
        unmoved = {name: table for name, table in self.tables.items() if table.version == self._versions[name]}
        tables = pinned_tables(self.path, TABLES, unmoved)
        if all(tables[name] is table for name, table in self.tables.items()):
            return self
        check_schema_version(self.path, schema_version(tables["images"]))
        return Snapshot(self.path, tables, self._stamp)

    def once(self, derive: Callable[[Snapshot], Derived]) -> Derived:
        """derive(snapshot), computed on the first call and kept with the snapshot; for values that other rooms derive."""
        with self._lock:
            if derive not in self._derived:
                self._derived[derive] = derive(self)
            derived: Derived = self._derived[derive]
        return derived

    @cached_property
    def encoders(self) -> dict[str, Row]:
        """The rows of `encoders`, by encoder_id, in the order in which they were added."""
        rows = {row["encoder_id"]: row for row in self.rows("encoders")}
        # The columns of images keep that order; rows of a table may move when one is updated.
        return {name: rows[name] for name in feature_columns(self.tables["images"].schema) if name in rows}

    @cached_property
    def hidden_models(self) -> tuple[str, ...]:
        """Models that have images and no row in `models`."""
        with storage(self.path):
            models = self.tables["models"].to_table(columns=["model_id", "n_exemplars", "n_samples"]).to_pylist()
            counted = sum((row["n_exemplars"] or 0) + (row["n_samples"] or 0) for row in models)
            # In the usual case there is no such model. A count shows that without reading the ids of all samples.
            if self.tables["images"].count_rows(OF_MODELS_ROWS) == counted:
                return ()
            scan = self.tables["images"].to_batches(columns=["model_id"], filter=OF_MODELS_ROWS)
            stored = {model_id for batch in scan for model_id in batch["model_id"].unique().to_pylist()}
        return tuple(sorted(stored - {None} - {row["model_id"] for row in models}))

    def visible(self, where: str) -> str:
        """The predicate, with hidden models left out."""
        if not self.hidden_models:
            return where
        return f"({where}) AND (model_id IS NULL OR model_id NOT IN ({', '.join(map(literal, self.hidden_models))}))"

    def check_predicate(self, name: str, predicate: str, table: str = "images") -> None:
        """Check that a text from outside is a complete predicate, before it becomes part of a longer one.

        name:   of the parameter, for the error
        table:  whose columns it is about
        raises: InvalidValue
        """
        cause: BaseException | None = None
        fault = fault_of(predicate)
        if fault is None:
            try:
                columns = TABLES[table].names[:1]
                self.tables[table].scanner(columns=columns, filter=f"({predicate})").explain_plan()
            except BaseException as error:  # Lance raises many kinds
                if not isinstance(error, Exception) and not by_lance(error):
                    raise
                cause, fault = error, words_of(error)
        if fault is not None:
            raise InvalidValue(
                f"{name} is {shortened(predicate)}; it must be an SQL predicate on the columns of {table}: {fault}"
            ) from cause

    def rows(self, table: str, where: str | None = None, columns: list[str] | None = None) -> list[Row]:
        """The rows of a small table that a predicate keeps; None for all."""
        with storage(self.path):
            rows: list[Row] = self.tables[table].to_table(columns=columns, filter=where).to_pylist()
        return rows

    def images(self, where: str, columns: list[str]) -> pa.Table:
        """Columns of the images that a predicate keeps."""
        with storage(self.path):
            return self.tables["images"].to_table(columns=columns, filter=self.visible(where))

    def first_pictures(self, n: int) -> list[tuple[str, bytes]]:
        """image_id and encoded bytes of the first images that are stored with their bytes."""
        with storage(self.path):
            rows = self.tables["images"].to_table(
                columns=["image_id", "image"], filter=self.visible("image IS NOT NULL"), limit=n
            )
        return list(zip(rows["image_id"].to_pylist(), rows["image"].to_pylist(), strict=True))

    def count(self, where: str) -> int:
        """The number of images that a predicate keeps; remembered, since every search of an index needs it."""
        n = self._counts.get(where)
        if n is None:
            with storage(self.path):
                # count_rows of the table does not heed Ctrl-C
                scan = self.tables["images"].scanner(columns=[], filter=self.visible(where), with_row_id=True)
                n = scan.count_rows()
            if len(self._counts) >= COUNTS:
                self._counts.clear()
            self._counts[where] = n
        return n

    def stored(self, ids: Iterable[str]) -> dict[str, Row]:
        """Those of the ids that images has, with their uri and sha256."""
        rows = [
            row
            for where in among_parts("image_id", list(ids), IDS_PER_LOOKUP)
            for row in self.rows("images", where, ["image_id", "uri", "sha256"])
        ]
        return {row["image_id"]: row for row in rows}

    def features(self, encoder_id: str, where: str) -> Iterator[features.Block]:
        """Ids and features of the encoded images that a predicate keeps, streamed in blocks."""
        with storage(self.path):
            yield from features.stream(self.tables["images"], encoder_id, self.visible(where))

    def encoder_id(self, encoder_id: str | None = None) -> str:
        """The encoder_id, if there is such an encoder; the first encoder's for None.

        raises: NotFound if this database has no such encoder, or none at all
        """
        known = list(self.encoders)
        if not known:
            raise NotFound(f"{self.path} has no encoder yet; ingest a corpus or a model first")
        if encoder_id is not None and encoder_id not in known:
            raise NotFound(f"no encoder {encoder_id!r} in {self.path}; it has: {', '.join(known)}")
        return encoder_id or known[0]


def open_snapshot(path: Path, at: int | str | datetime | None = None) -> Snapshot:
    """The newest versions of all tables, or those of an older moment.

    at:     see `history.tables_at`
    raises: NotFound if there is no database, or no such version, InvalidValue for another schema version or a text that is
            no time
    """
    if not (path / "images.lance").is_dir():
        problem = "is not an attrdb database (no images.lance in it)" if path.exists() else "does not exist"
        raise NotFound(f"{path} {problem}; make one with: attrdb init {path}")
    stamp = _stamp(path)
    check_schema_version(path, schema_version(open_table(path, "images")))
    tables = pinned_tables(path, TABLES)
    return Snapshot(path, tables if at is None else tables_at(path, tables, at), stamp)


def _stamp(path: Path) -> tuple[int, int]:
    """What tells a database from another one that takes its place, whose tables may have the same versions."""
    try:
        folder = (path / "images.lance").stat()
    except OSError:
        return 0, 0
    return folder.st_ino, folder.st_mtime_ns


def pinned_tables(
    path: Path, names: Iterable[str], before: Mapping[str, lance.LanceDataset] = MappingProxyType({})
) -> dict[str, lance.LanceDataset]:
    """The newest versions of some tables that belong together; of tables that were opened before, those that are newest."""
    # models before images: a model that is seen has its images, as they are committed first. Where images are taken out it
    # is the other way round, and `removals` is written to in between.
    ordered = sorted(names, key=lambda name: name == "images")
    for _ in range(ATTEMPTS):
        first = {name: _newest_table(path, name, before) for name in ordered if name == "removals"}
        tables = {name: first[name] if name in first else _newest_table(path, name, before) for name in ordered}
        if all(removals.latest_version == removals.version for removals in first.values()):
            break
    return tables


def _newest_table(path: Path, name: str, before: Mapping[str, lance.LanceDataset]) -> lance.LanceDataset:
    if (table := before.get(name)) is not None:
        with suppress(OSError, ValueError):  # `open_table` says what is wrong
            if table.latest_version == table.version:
                return table
    return open_table(path, name)
