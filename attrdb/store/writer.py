"""The writer: all changes of a database go through it. It checks them and makes atomic commits."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import local
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lance.commit import CommitConflictError

from attrdb.errors import Busy, InvalidValue, StorageError
from attrdb.store.blocklist import blocklist
from attrdb.store.checksums import CHANGED
from attrdb.store.concepts import concept_rows
from attrdb.store.dictionary import DICTIONARY
from attrdb.store.lance_errors import storage
from attrdb.store.locks import WRITERS_LOCK, waiting_lock
from attrdb.store.methods import similarity_row
from attrdb.store.predicates import literal
from attrdb.store.schema import (
    SHOWN_WITH_MODEL,
    TABLES,
    Row,
    encoder_id_of,
    encoder_name,
    feature_columns,
    feature_type,
)
from attrdb.store.snapshot import Snapshot, open_snapshot
from attrdb.store.validation import conform_images

CONFLICT_RETRIES = 30  # of a commit that another writer preempted
TABLE_KEYS = {name: table.key for name, table in DICTIONARY.items()}
LONGEST_ENCODER_ID = 80  # characters of a new one: files are named after it


@dataclass(frozen=True)
class Appended:
    """The result of an append. version: of the images table afterwards"""

    n_appended: int
    n_skipped: int
    version: int


class Writer:
    """Writes to a database, and holds the snapshot of it that is being read.

    snapshot: moves on with `refresh` and with every write of this writer's own
    raises:   NotFound if the path is no attrdb database, or keeps no such moment, InvalidValue for another schema version
    """

    def __init__(self, path: Path, read_only: bool = False, at: int | str | datetime | None = None):
        self.path = path
        self.read_only = read_only or at is not None
        self._at = at
        self._holds = local()  # lock: whether this thread has the lock of writers
        self.snapshot = open_snapshot(path, at)

    def refresh(self) -> None:
        """Read the newest version of every table from now on; a database opened at an older moment stays there.

        raises: NotFound if a table is gone
        """
        if self._at is None:
            self.snapshot = self.snapshot.newest()

    def check_encoder(self, spec: str, dimension: int, preprocessing: dict[str, Any], weights_fingerprint: str) -> bool:
        """Whether the encoder is registered; the folder of its checkpoint does not matter.

        Of an encoder whose features were imported, only name and dimension are known and compared.
        raises: InvalidValue if the registered encoder of that id differs in name, dimension, preprocessing or weights
        """
        row = _encoder_row(spec, dimension, preprocessing, weights_fingerprint)
        stored = self.snapshot.encoders.get(row["encoder_id"])
        if stored is None:
            return False
        known = ["spec", "dimension"]
        if stored["weights_fingerprint"]:
            known += ["preprocessing", "weights_fingerprint"]
        for column in known:
            ours, theirs = (encoder_name(of[column]) if column == "spec" else of[column] for of in (row, stored))
            if ours != theirs:
                raise InvalidValue(
                    f"encoder {row['encoder_id']!r} has {column.replace('_', ' ')} {row[column]!r}, its stored features "
                    f"were made with {stored[column]!r}; use that encoder or open another database"
                )
        return True

    def add_encoder(self, spec: str, dimension: int, preprocessing: dict[str, Any], weights_fingerprint: str) -> str:
        """Register an encoder and add its column to images, null at first; its encoder_id.

        An encoder that is registered already is checked instead. Its row takes what is new: the folder of its checkpoint,
        and for imported features preprocessing and weights, which are checked from then on.
        raises: as `check_encoder`; InvalidValue for a new encoder with a long name
        """
        row = _encoder_row(spec, dimension, preprocessing, weights_fingerprint)
        encoder_id: str = row["encoder_id"]

        def add() -> None:
            self.refresh()
            if self.check_encoder(spec, dimension, preprocessing, weights_fingerprint):
                if self.snapshot.encoders[encoder_id] != row and weights_fingerprint:
                    self.upsert("encoders", [row])
                return
            if len(encoder_id) > LONGEST_ENCODER_ID:
                raise InvalidValue(
                    f"encoder {spec!r} would be called {encoder_id!r}, {len(encoder_id)} characters; give its file a name "
                    f"that makes at most {LONGEST_ENCODER_ID}"
                )
            images = self._dataset("images")
            columns = feature_columns(images.schema)
            if columns.get(encoder_id) != dimension:
                if encoder_id in columns:  # left by a call that was interrupted before the encoder's row
                    images.drop_columns([encoder_id])
                images.add_columns(pa.field(encoder_id, feature_type(dimension)))
            self.upsert("methods", [similarity_row(encoder_id)], update=False)
            self.upsert("encoders", [row], update=False)

        self.commit(add)
        return encoder_id

    def append_images(self, rows: pa.Table) -> Appended:
        """Append the images that are not stored yet, in one commit; all of them are visible afterwards, or none.

        raises: InvalidValue, with the row named, for what `validation.conform_images` refuses, or `attrdb remove` has blocked
        """
        with self.writing():  # nothing is taken out, blocked or purged meanwhile
            self.refresh()
            table = self._conformed_images(rows)
            stored = self.snapshot.stored(table["image_id"].to_pylist())
            n_appended = 0
            if len(stored) < len(table):
                # merge_insert and not append, to skip also what another process stored since the look-up. Without the index
                # on image_id: with it Lance (pylance 14.0) commits no keys, so two writers that have not read each other's
                # rows can insert the same id (tests/test_concurrency.py).
                insert = self._dataset("images").merge_insert("image_id").when_not_matched_insert_all().use_index(False)
                insert = insert.conflict_retries(CONFLICT_RETRIES)
                n_appended = self.commit(lambda: insert.execute(table))["num_inserted_rows"]
        return Appended(n_appended, len(table) - n_appended, self.snapshot.version)

    def _conformed_images(self, rows: pa.Table) -> pa.Table:
        """raises: InvalidValue for what `validation.conform_images` refuses, and for a picture that was taken out for good"""
        for refusal in blocklist(self.snapshot).refusals(rows).values():
            raise InvalidValue(refusal)
        return conform_images(rows, self.snapshot.tables["images"].schema)

    def absent(self, ids: pa.Array) -> pa.BooleanArray:
        """(n,) whether each id is missing from images; fast for thousands of ids that are close to each other.

        If ids are indexed, only those between the smallest and the largest are read.
        """
        self.refresh()
        images = self.snapshot.tables["images"]
        ends = pc.min_max(ids)
        if not ends["min"].is_valid:
            return pa.array(np.ones(len(ids), bool))
        where = f"image_id >= {literal(ends['min'].as_py())} AND image_id <= {literal(ends['max'].as_py())}"
        with storage(self.path):
            stored = images.to_table(columns=["image_id"], filter=where)["image_id"]
        return pc.invert(pc.is_in(ids, stored))

    def append_bulk(self, rows: pa.Table) -> Appended:
        """Append images in one commit, as fast as a plain append, because their ids are not looked up.

        The caller must know that they are `absent`, and that no other process adds the same ids meanwhile.
        raises: as `append_images`
        """
        with self.writing():
            self.refresh()
            table = self._conformed_images(rows)
            self.commit(lambda: lance.write_dataset(table, self._path("images"), mode="append"))
        return Appended(len(table), 0, self.snapshot.version)

    def append_model(
        self,
        rows: pa.Table,
        model: Row,
        concepts: Sequence[Row] = (),
        monitored: Mapping[str, pa.Table] | None = None,
    ) -> Appended:
        """Append a customized model: its exemplars and samples in one commit, its concepts, what was monitored, then its row
        in `models`.

        No step stores anything twice, so the next call completes one that was interrupted between them. Until then the model
        is not visible.
        concepts:  rows of a model of several, see `concept_rows`
        monitored: rows of the tables of monitoring, see `attrdb.ingest.monitor`
        raises:    InvalidValue for a refused image, or if a row does not belong to the model
        """
        others = set(rows["model_id"].to_pylist()) - {model["model_id"]}
        if others:
            raise InvalidValue(f"images of model {others.pop()!r} among those of model {model['model_id']!r}")
        roles = rows["role"].to_pylist()
        counts = {"n_exemplars": roles.count("exemplar"), "n_samples": roles.count("sample")}
        with self.writing():  # a removal in between would take the images for those of an abandoned model
            self._drop_abandoned(rows, model["model_id"])
            appended = self.append_images(rows)
            if stored_concepts := concept_rows(model, rows, concepts):
                self.upsert("concepts", stored_concepts, update=False)
            for table, monitored_rows in (monitored or {}).items():
                own = f"model_id = {literal(model['model_id'])}"
                self.append_rows(table, monitored_rows, self.snapshot, stale=own)
            self.upsert("models", [{**model, **counts}], update=False)
        return appended

    def _drop_abandoned(self, rows: pa.Table, model_id: str) -> None:
        """Delete what an earlier attempt at a model without a row has left, but for images that are those of the new one."""
        self.refresh()
        if model_id not in self.snapshot.hidden_models:
            return
        compared = ["image_id", "sha256", "prompt", "seed", "concept_id"]
        where = f"model_id = {literal(model_id)}"
        for table in SHOWN_WITH_MODEL:
            if table != "images":
                self.delete(table, where)
        with storage(self.path):
            stored = self.snapshot.tables["images"].to_table(columns=compared, filter=where)
        new = conform_images(rows, self.snapshot.tables["images"].schema).select(compared)
        if {tuple(row.values()) for row in stored.to_pylist()} != {tuple(row.values()) for row in new.to_pylist()}:
            self.delete("images", where)

    def add_method(self, method: Row) -> None:
        """Register an attribution method, or replace its row."""
        self.upsert("methods", [method | {"created_at": datetime.now(UTC)}])

    def add_mapper(self, mapper: Row) -> None:
        """Store a mapper and its method; a stored one is not changed."""
        self.upsert("methods", [similarity_row(mapper["encoder_id"], mapper["mapper_id"])], update=False)
        self.upsert("mappers", [mapper], update=False)

    def replace_exemplar_ranks(self, rows: pa.Table, method_id: str, gallery: str) -> None:
        """Store the ranks of one method and gallery, computed on this writer's snapshot, in place of those that are stored.

        raises: Busy if images were taken out since
        """
        scope = f"method_id = {literal(method_id)} AND gallery = {literal(gallery)}"
        with self.writing():
            self._check_no_removal_since(self.snapshot)
            self._merge("exemplar_ranks", ["method_id", "gallery", "sample_id", "exemplar_id"], rows, scope=scope)

    def replace_calibrations(self, rows: list[Row], method_id: str) -> None:
        """Store the calibrations of a method, one per kind of models, in place of those that are stored."""
        self._merge("calibrations", ["calibration_id"], rows, scope=f"method_id = {literal(method_id)}")

    def append_rows(self, table: str, rows: pa.Table, computed_on: Snapshot, stale: str | None = None) -> None:
        """Append to one of the tables whose rows have no id; rows that the predicate `stale` keeps are deleted first.

        computed_on: the snapshot whose images the rows are about
        raises:      InvalidValue for another table, Busy if images were taken out since
        """
        if TABLE_KEYS[table] is not None:
            raise InvalidValue(f"the rows of {table} have an id; they are stored with upsert")
        conformed = _conformed(table, rows)
        with self.writing():
            self._check_no_removal_since(computed_on)
            if stale is not None:
                self.delete(table, stale)
            self.commit(lambda: lance.write_dataset(conformed, self._path(table), mode="append"))

    def upsert(self, table: str, rows: list[Row] | pa.Table, *, update: bool = True) -> None:
        """Store rows of a small table by their key; with update=False stored rows are not changed.

        raises: InvalidValue for a table without a key, for images, an unknown column or a required one without a value
        """
        key = TABLE_KEYS[table]
        if key is None or table == "images":
            raise InvalidValue(f"rows of {table} cannot be stored by their key; use the method of Writer made for them")
        self._merge(table, [key], rows, update)

    def _merge(
        self, name: str, on: list[str], rows: list[Row] | pa.Table, update: bool = True, scope: str | None = None
    ) -> None:
        """Store rows in one commit; `on` tells them from each other. Of stored rows that `scope` keeps, the others go."""
        conformed = _conformed(name, rows)

        def merge() -> None:
            insert = self._dataset(name).merge_insert(on).when_not_matched_insert_all()
            if update:
                insert = insert.when_matched_update_all()
            if scope is not None:
                insert = insert.when_not_matched_by_source_delete(scope)
            insert.conflict_retries(CONFLICT_RETRIES).execute(conformed)

        self.commit(merge)

    def update(self, table: str, where: str, values: dict[str, str]) -> None:
        """Set text columns of the rows of a table that a predicate keeps, in one commit."""
        assignments = {column: literal(value) for column, value in values.items()}
        self.commit(lambda: self._dataset(table).update(assignments, where))

    def delete(self, table: str, where: str) -> None:
        """Delete the rows of a table that a predicate keeps."""
        self.commit(lambda: self._dataset(table).delete(where))

    def delete_matching(self, table: str, keys: pa.Table) -> int:
        """Delete, in one commit, the rows of a table that have the values of a row of keys; the number of rows.

        Unlike a predicate, the keys are not written into the log of the table.
        keys: one or more of the table's columns, with distinct rows
        """
        names: Sequence[str] = keys.column_names
        source = keys.cast(pa.schema([TABLES[table].field(name) for name in names]))
        if not len(source):
            return 0

        def delete() -> Any:
            matched = self._dataset(table).merge_insert(list(names)).when_matched_delete().use_index(False)
            return matched.conflict_retries(CONFLICT_RETRIES).execute(source)

        n_deleted: int = self.commit(delete)["num_deleted_rows"]
        return n_deleted

    def _path(self, table: str) -> str:
        return str(self.path / f"{table}.lance")

    def _dataset(self, table: str) -> lance.LanceDataset:
        """The newest version of a table, to write to: a write moves a dataset on, and those of a snapshot never change."""
        return lance.dataset(self._path(table))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Every write happens inside this block, which waits for a writer that is `exclusive`."""
        self._check_writable()
        with self._lock(exclusive=False):
            yield

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait until no process writes, and let no other process or thread write inside the block."""
        self._check_writable()
        with self._lock(exclusive=True):
            yield

    @contextmanager
    def _lock(self, *, exclusive: bool) -> Iterator[None]:
        """Held by a thread once: waiting a second time, behind one who waits for the first to end, would never end."""
        if getattr(self._holds, "lock", False):
            yield
            return
        with waiting_lock(self.path / WRITERS_LOCK, exclusive=exclusive):
            self._holds.lock = True
            try:
                yield
            finally:
                self._holds.lock = False

    def commit(self, write: Callable[[], Any]) -> Any:
        """Run a write and read its version from now on; the write is repeated if another writer was first.

        raises: InvalidValue if the database was opened read-only, StorageError for a full or read-only disk
        """
        with storage(self.path), self.writing():
            for attempt in range(CONFLICT_RETRIES):
                try:
                    result = write()
                    break
                except OSError as error:  # CommitConflictError is one
                    # After its retries, merge_insert raises an error with a text of its own.
                    if not isinstance(error, CommitConflictError) and "concurrent" not in str(error).lower():
                        raise
                    if attempt == CONFLICT_RETRIES - 1:
                        raise StorageError(f"too many others write to {self.path}; rerun the command") from error
                    time.sleep(random.uniform(0, 0.05 * (attempt + 1)))
        CHANGED.add(self.path)
        self.refresh()
        return result

    def _check_no_removal_since(self, computed_on: Snapshot) -> None:
        if computed_on.is_before_removal():
            raise Busy(f"images were taken out of {self.path} while this was computed; rerun the command")

    def _check_writable(self) -> None:
        if self.read_only:
            raise InvalidValue(f"{self.path} was opened read-only; open it without read_only and at to change it")


def _conformed(table: str, rows: pa.Table | list[Row]) -> pa.Table:
    """The rows in the columns of a table's schema, absent columns null.

    raises: InvalidValue for a column that the table does not have, or a required one that is absent or null
    """
    schema = TABLES[table]
    names = set(rows.column_names) if isinstance(rows, pa.Table) else {name for row in rows for name in row}
    if unknown := names - set(schema.names):
        raise InvalidValue(f"table {table} has no column {min(unknown)!r}; it has: {', '.join(schema.names)}")
    if isinstance(rows, pa.Table):
        columns = [
            rows[field.name].cast(field.type) if field.name in names else pa.nulls(len(rows), field.type)
            for field in schema
        ]
        conformed = pa.table(columns, schema=schema)
    else:
        conformed = pa.Table.from_pylist(rows, schema=schema)
    for field in schema:
        if not field.nullable and conformed[field.name].null_count:
            raise InvalidValue(f"table {table} needs a value in {field.name!r} of every row")
    return conformed


def _encoder_row(spec: str, dimension: int, preprocessing: dict[str, Any], weights_fingerprint: str) -> Row:
    return {
        "encoder_id": encoder_id_of(spec),
        "spec": spec,
        "dimension": dimension,
        "preprocessing": json.dumps(preprocessing, sort_keys=True),
        "weights_fingerprint": weights_fingerprint,
    }
