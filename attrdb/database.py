"""The database: one directory of Lance tables, read at a pinned version and appended to atomically."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lance.commit import CommitConflictError

from attrdb import attribution, health, queries, search, sql
from attrdb.conform import conform_images
from attrdb.errors import InvalidValue, StorageError
from attrdb.mapper import Mapper
from attrdb.schema import SCHEMA_VERSION, TABLES, encoder_id_of, encoder_name, feature_columns, feature_type
from attrdb.snapshot import STAMP, Snapshot, among, literal, made, open_snapshot, storage

CONFLICT_RETRIES = 30  # of a commit that another writer preempted
DESCRIBED = ["role", "model_id", "source", "category", "creator", "license"]


def create(path: str | Path) -> Database:
    """A new, empty database; one whose creation was interrupted is completed.

    raises: InvalidValue if there is something else at the path
    """
    path = Path(path)
    ours = {f"{name}.lance" for name in TABLES}
    if made(path / "images.lance"):
        raise InvalidValue(f"{path} is an attrdb database already; open it")
    strange = path.exists() and (not path.is_dir() or any(entry.name not in ours for entry in path.iterdir()))
    if strange or any(path.glob("*.lance/data/*")):
        raise InvalidValue(f"{path} exists and is not an empty directory; choose a path of its own for the database")
    # 'images' comes last: a directory without it is not a database yet.
    for name in sorted(TABLES, key=lambda name: name == "images"):
        create_table(path, name)
    return Database(path)


def open_or_create(path: str | Path) -> Database:
    """The database at a path, made if there is none yet or its making was killed; another process may make it too.

    raises: InvalidValue if there is something else at the path, NotFound and InvalidValue as `Database`
    """
    try:
        return create(path)
    except InvalidValue:
        if not made(Path(path) / "images.lance"):
            raise
        return Database(path)


def create_table(path: Path, name: str) -> None:
    """An empty table of the schema, unless it is there."""
    table = path / f"{name}.lance"
    if made(table):
        return
    stamped = TABLES[name].with_metadata({STAMP.decode(): str(SCHEMA_VERSION)})
    try:
        with storage(path):
            lance.write_dataset(stamped.empty_table(), str(table))
    except StorageError:
        if not made(table):  # by another process, meanwhile
            raise


LONGEST_ENCODER_ID = 80  # characters of a new one: files are named after it


def _encoder_row(spec: str, dimension: int, preprocessing: dict, weights_fingerprint: str) -> dict:
    return {
        "encoder_id": encoder_id_of(spec),
        "spec": spec,
        "dimension": dimension,
        "preprocessing": json.dumps(preprocessing, sort_keys=True),
        "weights_fingerprint": weights_fingerprint,
    }


@dataclass(frozen=True)
class Appended:
    """What an append did. version: of the images table afterwards."""

    n_appended: int
    n_skipped: int
    version: int


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
        self.path = Path(path)
        self.query_folders = tuple(query_folders)
        self.read_only = read_only or at is not None
        self._at = at
        self._snapshot = open_snapshot(self.path, at)

    def refresh(self) -> None:
        """Move on to the newest version of every table; a database opened at an older moment stays there.

        raises: NotFound if a table is gone
        """
        if self._at is None:
            self._snapshot = open_snapshot(self.path)

    @property
    def snapshot(self) -> Snapshot:
        """The tables as they are being read."""
        return self._snapshot

    @property
    def version(self) -> int:
        """The version of the images table that is being read."""
        return self._snapshot.version

    @property
    def encoders(self) -> dict[str, dict]:
        """The rows of `encoders`, by encoder_id, in the order in which they were added."""
        return self._snapshot.encoders

    def images(self, where: str, columns: list[str]) -> pa.Table:
        """Columns of the images that a predicate keeps."""
        return self._snapshot.images(where, columns)

    def features(self, encoder_id: str, where: str) -> Iterator[search.Block]:
        """Ids and features of the encoded images that a predicate keeps, streamed in blocks."""
        return self._snapshot.features(encoder_id, where)

    # --- SQL ---------------------------------------------------------------------------------------------------------

    def sql(self, statement: str, parameters: dict[str, Any] | None = None) -> pa.Table:
        """The result of one SELECT over the pinned tables; its schema metadata names the images version.

        raises: QueryRefused with DuckDB's words, or if the statement is not one SELECT or asks for files or the network,
                StorageError for a damaged file
        """
        return self._select(self._snapshot, statement, parameters)

    def _select(self, snapshot: Snapshot, statement: str, parameters: dict[str, Any] | None) -> pa.Table:
        with storage(self.path), sql.connect(snapshot) as connection:
            return _versioned(sql.run(connection, statement, parameters), snapshot)

    def query(self, name: str, **parameters: Any) -> pa.Table:
        """The result of a named query, such as `db.query("recall_at_k", k=10)`.

        A query's encoder_id is the database's first encoder where none is given.
        raises: NotFound for an unknown query, encoder or image, InvalidValue for a wrong parameter
        """
        snapshot = self._snapshot
        query, given = self._named(snapshot, name, parameters)
        return self._select(snapshot, query.sql, given)

    def bound_query(self, name: str, **parameters: Any) -> tuple[str, dict[str, Any]]:
        """The SQL of a named query and all its parameters, for a caller that runs it itself; raises as `query`."""
        query, given = self._named(self._snapshot, name, parameters)
        return query.sql, given

    def stream_query(self, name: str, rows: int = 8192, **parameters: Any) -> Iterator[pa.RecordBatch]:
        """The result of a named query in batches of some rows, in constant memory; raises as `query`."""
        snapshot = self._snapshot
        query, given = self._named(snapshot, name, parameters)
        with storage(self.path), sql.connect(snapshot) as connection:
            yield from sql.stream(connection, query.sql, given, rows)

    def _named(
        self, snapshot: Snapshot, name: str, parameters: dict[str, Any]
    ) -> tuple[queries.NamedQuery, dict[str, Any]]:
        """A named query, and all its parameters."""
        query = queries.load(name, self.query_folders)
        names = {parameter.name for parameter in query.parameters}
        if "encoder_id" in names:
            asked = (parameters.get("encoder_id"), parameters.get("mapper_id"))
            parameters["encoder_id"], _ = snapshot.compared(*asked)
        if {"encoder_id", "image_id"} <= names and isinstance(parameters.get("image_id"), str):
            snapshot.feature(parameters["image_id"], parameters["encoder_id"])
        return query, query.bind(parameters)

    # --- attribution --------------------------------------------------------------------------------------------------

    def encoder_id(self, encoder_id: str | None = None) -> str:
        """The given encoder's id, or the first one's.

        raises: NotFound if this database has no such encoder, or none at all
        """
        return self._snapshot.encoder_id(encoder_id)

    def feature(self, image_id: str, encoder_id: str | None = None) -> np.ndarray:
        """The stored feature of an image, (dimension,) float32.

        raises: NotFound if there is no such image, or it has not been encoded
        """
        return self._snapshot.feature(image_id, self.encoder_id(encoder_id))

    def attribute(
        self,
        query: str | np.ndarray,
        *,
        k: int = 10,
        encoder_id: str | None = None,
        mapper_id: str | None = None,
        tau: float | None = None,
        lam: float | None = None,
        candidates: str | None = None,
        exact: bool = False,
    ) -> pa.Table:
        """The k candidates that most resemble an image, with their influence, best first.

        query:      the id of a stored image, or a feature (dimension,) of the encoder
        tau, lam:   of influence; as calibrated where they are left out, see `snapshot.Snapshot.calibration`
        candidates: an SQL predicate on the columns of images, such as "license = 'CC0'"; only what fulfils it is searched
        exact:      compare every candidate, also where the encoder has an index
        returns: rank, image_id, role, model_id, source, category, creator, license, similarity (cosine), influence,
                 complete, missing_influence (see `attribution.Attribution`). Influence is an estimate, not a causal share.
        raises:  NotFound for an unknown image, encoder or mapper, or if there is no candidate; InvalidValue for k < 1 or
                 above the number of candidates, a wrong tau, lam or predicate, a mapper of another encoder, or a feature of
                 another length
        source:  Wang et al. 2023, Eq. 6
        """
        snapshot = self._snapshot
        encoder_id, mapper = snapshot.compared(encoder_id, mapper_id)
        tau, lam = snapshot.calibration(encoder_id, mapper_id, tau, lam)
        if isinstance(query, str):
            own_id, feature = query, snapshot.feature(query, encoder_id)
        else:
            own_id, feature = None, _unit(query, encoder_id, snapshot.encoders[encoder_id]["dimension"])
        [found] = attribution.attribute(
            snapshot,
            encoder_id,
            feature[None],
            [own_id],
            k=k,
            tau=tau,
            lam=lam,
            mapper=mapper,
            candidates=candidates,
            exact=exact,
        )
        known = snapshot.images(among("image_id", found.ids), ["image_id", *DESCRIBED])
        position = {image_id: row for row, image_id in enumerate(known["image_id"].to_pylist())}
        n = len(found.ids)
        answer = known.take([position[image_id] for image_id in found.ids])
        answer = answer.add_column(0, "rank", pa.array(range(1, n + 1), pa.int64()))
        for name, values in (
            ("similarity", found.similarity),
            ("influence", found.influence),
            ("complete", [found.complete] * n),
            ("missing_influence", [found.missing_influence] * n),
        ):
            answer = answer.append_column(name, pa.array(values))
        return _versioned(answer, snapshot)

    def mapper(self, mapper_id: str) -> Mapper:
        """A stored mapper.

        raises: NotFound, with the nearest ids
        """
        return self._snapshot.mapper(mapper_id)

    def status(self) -> dict[str, Any]:
        """What the database holds and how well it is kept, see `health.status`."""
        return health.status(self._snapshot)

    # --- appending ----------------------------------------------------------------------------------------------------

    def check_encoder(self, spec: str, dimension: int, preprocessing: dict, weights_fingerprint: str) -> bool:
        """Whether the encoder is registered; where its checkpoint lies does not matter.

        Of features that were imported only name and dimension are known, so only those are compared.
        raises: InvalidValue if the registered encoder of that id differs in name, dimension, preprocessing or weights
        """
        row = _encoder_row(spec, dimension, preprocessing, weights_fingerprint)
        stored = self.encoders.get(row["encoder_id"])
        if stored is None:
            return False
        known = ["spec", "dimension"]
        if stored["weights_fingerprint"]:
            known += ["preprocessing", "weights_fingerprint"]
        for what in known:
            ours, theirs = (encoder_name(one[what]) if what == "spec" else one[what] for one in (row, stored))
            if ours != theirs:
                raise InvalidValue(
                    f"encoder {row['encoder_id']!r} has {what.replace('_', ' ')} {row[what]!r}, its stored features were "
                    f"made with {stored[what]!r}; use that encoder or open another database"
                )
        return True

    def add_encoder(self, spec: str, dimension: int, preprocessing: dict, weights_fingerprint: str) -> str:
        """Register an encoder and add its column to images, null so far; the id of the encoder.

        One that is registered already is checked instead, and what is new about it is noted: where its checkpoint lies
        now, and the preprocessing and weights behind features that were imported, which are checked from then on.
        raises: as `check_encoder`; InvalidValue for a new one with a long name
        """
        row = _encoder_row(spec, dimension, preprocessing, weights_fingerprint)
        encoder_id = row["encoder_id"]

        def add() -> None:
            self.refresh()
            if self.check_encoder(spec, dimension, preprocessing, weights_fingerprint):
                if self.encoders[encoder_id] != row and weights_fingerprint:
                    self.upsert("encoders", [row], on="encoder_id")
                return
            if len(encoder_id) > LONGEST_ENCODER_ID:
                raise InvalidValue(
                    f"encoder {spec!r} would be called {encoder_id!r}, {len(encoder_id)} characters; give its file a name "
                    f"that makes at most {LONGEST_ENCODER_ID}"
                )
            images = self.snapshot.tables["images"]
            columns = feature_columns(images.schema)
            if columns.get(encoder_id) != dimension:
                if encoder_id in columns:  # left by a call that was interrupted before the encoder's row
                    images.drop_columns([encoder_id])
                images.add_columns(pa.field(encoder_id, feature_type(dimension)))
            self.upsert("encoders", [row], on="encoder_id", update=False)

        self.commit(add)
        return encoder_id

    def stored(self, ids: Iterable[str]) -> dict[str, dict]:
        """Those of the ids that images has, at the version being read, with their uri and sha256."""
        ids = list(ids)
        found: dict[str, dict] = {}
        for start in range(0, len(ids), 512):
            part = among("image_id", ids[start : start + 512])
            with storage(self.path):
                rows = self.snapshot.tables["images"].to_table(columns=["image_id", "uri", "sha256"], filter=part)
            found |= {row["image_id"]: row for row in rows.to_pylist()}
        return found

    def append_images(self, rows: pa.Table) -> Appended:
        """Append the images that are not stored yet, in one commit; all of them are visible afterwards, or none.

        raises: InvalidValue, with the row named, for what `conform.conform_images` refuses
        """
        self._check_writable()
        self.refresh()
        images = self.snapshot.tables["images"]
        table = conform_images(rows, images.schema)
        stored = self.stored(table["image_id"].to_pylist())
        n_appended = 0
        if len(stored) < len(table):
            # merge_insert and not append: what another process stored since the look-up is skipped too.
            # Without the index on image_id: with it Lance (pylance 14.0) commits no keys, and two writers that have not seen
            # each other's rows both insert an id (tests/test_concurrency.py).
            insert = images.merge_insert("image_id").when_not_matched_insert_all().use_index(False)
            insert = insert.conflict_retries(CONFLICT_RETRIES)
            n_appended = self.commit(lambda: insert.execute(table))["num_inserted_rows"]
        return Appended(n_appended, len(table) - n_appended, self.version)

    def absent(self, ids: pa.Array) -> pa.BooleanArray:
        """Which of the ids images does not have yet; quick for thousands of ids that lie close together.

        Where the ids are indexed only those between the first and the last are read.
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
        """Append images in one commit, at the speed of a plain append: none of their ids is looked up.

        The caller has found them `absent`, and sees to it that no other process makes the same ids meanwhile.
        raises: as `append_images`
        """
        self._check_writable()
        table = conform_images(rows, self.snapshot.tables["images"].schema)
        self.commit(lambda: lance.write_dataset(table, str(self.path / "images.lance"), mode="append"))
        return Appended(len(table), 0, self.version)

    def append_model(self, rows: pa.Table, model: dict) -> Appended:
        """Append a customized model: its exemplars and samples in one commit, then its row in `models`.

        Both steps skip what is stored, so a call that was interrupted between them is completed by the next; until then
        nothing of the model is shown.
        raises: InvalidValue for a refused image, or if a row does not belong to the model
        """
        strangers = set(rows["model_id"].to_pylist()) - {model["model_id"]}
        if strangers:
            raise InvalidValue(f"images of model {strangers.pop()!r} among those of model {model['model_id']!r}")
        roles = rows["role"].to_pylist()
        self._drop_abandoned(rows, model["model_id"])
        appended = self.append_images(rows)
        counted = {"n_exemplars": roles.count("exemplar"), "n_samples": roles.count("sample")}
        self.upsert("models", [{**model, **counted}], on="model_id", update=False)
        return appended

    def _drop_abandoned(self, rows: pa.Table, model_id: str) -> None:
        """Take out what an earlier attempt at a model left that never got its row, unless it is what is given now."""
        self.refresh()
        if model_id not in self.snapshot.hidden_models:
            return
        said = ["image_id", "sha256", "prompt", "seed"]
        where = f"model_id = {literal(model_id)}"
        with storage(self.path):
            stored = self.snapshot.tables["images"].to_table(columns=said, filter=where)
        given = conform_images(rows, self.snapshot.tables["images"].schema).select(said)
        if {tuple(row.values()) for row in stored.to_pylist()} != {tuple(row.values()) for row in given.to_pylist()}:
            self.delete("images", where)

    def replace_exemplar_ranks(self, rows: pa.Table, encoder_id: str, mapper_id: str, gallery: str) -> None:
        """Store the ranks of one encoder, mapper (empty: none) and gallery in place of those there are."""
        scope = " AND ".join(
            f"{name} = {literal(value)}"
            for name, value in (("encoder_id", encoder_id), ("mapper_id", mapper_id), ("gallery", gallery))
        )
        key = ["encoder_id", "mapper_id", "gallery", "sample_id", "exemplar_id"]
        table = rows.select(TABLES["exemplar_ranks"].names).cast(TABLES["exemplar_ranks"])
        self.commit(
            lambda: (
                lance.dataset(str(self.path / "exemplar_ranks.lance"))
                .merge_insert(key)
                .when_matched_update_all()
                .when_not_matched_insert_all()
                .when_not_matched_by_source_delete(scope)
                .execute(table)
            )
        )

    def append_attributions(self, rows: pa.Table, stale: str | None) -> None:
        """Store rows of `attributions`; those that the predicate stale keeps are taken out first."""
        if stale is not None:
            self.delete("attributions", stale)
        table = rows.select(TABLES["attributions"].names).cast(TABLES["attributions"])
        self.commit(lambda: lance.write_dataset(table, str(self.path / "attributions.lance"), mode="append"))

    def upsert(self, table: str, rows: list[dict], on: str, *, update: bool = True) -> None:
        """Store rows of one of the small tables by their key; with update=False what is stored stays as it is."""

        def merge() -> None:
            insert = lance.dataset(str(self.path / f"{table}.lance")).merge_insert(on).when_not_matched_insert_all()
            if update:
                insert = insert.when_matched_update_all()
            insert.conflict_retries(CONFLICT_RETRIES).execute(pa.Table.from_pylist(rows, schema=TABLES[table]))

        self.commit(merge)

    def delete(self, table: str, where: str) -> None:
        """Take the rows that a predicate keeps out of one of the small tables."""
        self.commit(lambda: lance.dataset(str(self.path / f"{table}.lance")).delete(where))

    def commit(self, write: Callable[[], Any]) -> Any:
        """Run a write and move on to what it made; once more where another writer came first.

        raises: InvalidValue if the database was opened read-only, StorageError for a full or read-only disk
        """
        self._check_writable()
        with storage(self.path):
            for attempt in range(CONFLICT_RETRIES):
                try:
                    result = write()
                    break
                except OSError as error:  # CommitConflictError is one
                    # merge_insert gives up with words of its own after its retries.
                    if not isinstance(error, CommitConflictError) and "concurrent" not in str(error).lower():
                        raise
                    if attempt == CONFLICT_RETRIES - 1:
                        raise StorageError(f"too many others write to {self.path}; give the command again") from error
                    time.sleep(random.uniform(0, 0.05 * (attempt + 1)))
        self.refresh()
        return result

    def _check_writable(self) -> None:
        if self.read_only:
            raise InvalidValue(f"{self.path} was opened read-only; open it without read_only and at to change it")


def _versioned(answer: pa.Table, snapshot: Snapshot) -> pa.Table:
    """The table with the images version that it came from in its schema metadata."""
    return answer.replace_schema_metadata({b"attrdb.images_version": str(snapshot.version).encode()})


def _unit(feature: np.ndarray, encoder_id: str, dimension: int) -> np.ndarray:
    feature = np.asarray(feature, dtype=np.float32)
    if feature.shape != (dimension,):
        raise InvalidValue(f"the feature has shape {feature.shape}, encoder {encoder_id!r} makes ({dimension},)")
    norm = np.linalg.norm(feature)
    if not (np.isfinite(norm) and norm > 0):
        raise InvalidValue(f"the feature has length {norm}; it must point somewhere")
    return feature / norm
