"""The database: one directory of Lance tables, read at a pinned version and appended to atomically."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from attrdb import queries, search, sql
from attrdb.errors import InvalidValue, NotFound
from attrdb.influence import DEFAULT_LAM, DEFAULT_TAU, check_calibration, cut_off, influence
from attrdb.schema import (
    SCHEMA_VERSION,
    TABLES,
    conform_images,
    encoder_id_of,
    feature_columns,
    feature_matrix,
    feature_type,
)

CANDIDATES = "role IN ('exemplar', 'pretraining')"
WIDEST = 65_536  # candidates that attribute() keeps before it calls an answer incomplete


def literal(text: str) -> str:
    """The text as an SQL string."""
    return "'" + text.replace("'", "''") + "'"


def create(path: str | Path) -> Database:
    """A new, empty database; one whose creation was interrupted is completed.

    raises: InvalidValue if there is something else at the path
    """
    path = Path(path)
    ours = {f"{name}.lance" for name in TABLES}
    if path.exists() and (not path.is_dir() or any(entry.name not in ours for entry in path.iterdir())):
        raise InvalidValue(f"{path} exists and is not an empty directory; choose a path of its own for the database")
    if (path / "images.lance").exists():
        raise InvalidValue(f"{path} is an attrdb database already; open it")
    # 'images' comes last: a directory without it is not a database yet.
    for name, schema in sorted(TABLES.items(), key=lambda table: table[0] == "images"):
        if not (path / f"{name}.lance").exists():
            stamped = schema.with_metadata({"attrdb.schema_version": str(SCHEMA_VERSION)})
            lance.write_dataset(stamped.empty_table(), str(path / f"{name}.lance"))
    return Database(path)


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

    raises: NotFound if the path is no attrdb database
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / "images.lance").is_dir():
            what = "is not an attrdb database (no images.lance in it)" if self.path.exists() else "does not exist"
            raise NotFound(f"{self.path} {what}; make one with: attrdb init {self.path}")
        self.refresh()
        for name, dataset in self._tables.items():
            found = (dataset.schema.metadata or {}).get(b"attrdb.schema_version", b"none").decode()
            if found != str(SCHEMA_VERSION):
                raise InvalidValue(
                    f"table {name} of {self.path} has schema version {found}, this attrdb reads {SCHEMA_VERSION}; "
                    "use the attrdb release that made it"
                )

    def refresh(self) -> None:
        """Move on to the newest version of every table.

        raises: NotFound if a table is gone
        """
        tables = {}
        for name in TABLES:
            try:
                tables[name] = lance.dataset(str(self.path / f"{name}.lance"))
            except ValueError as error:
                raise NotFound(
                    f"{self.path} is not a whole attrdb database: its table {name} cannot be read"
                ) from error
        self._tables = tables

    @property
    def version(self) -> int:
        """The version of the images table that is being read."""
        return self._tables["images"].version

    @property
    def encoders(self) -> dict[str, dict]:
        """The rows of `encoders`, by encoder_id, in the order in which they were added."""
        return {row["encoder_id"]: row for row in self._tables["encoders"].to_table().to_pylist()}

    def images(self, where: str, columns: list[str]) -> pa.Table:
        """Columns of the images that a predicate keeps."""
        return self._tables["images"].to_table(columns=columns, filter=where)

    def features(self, encoder_id: str, where: str) -> Iterator[search.Block]:
        """Ids and features of the encoded images that a predicate keeps, streamed in blocks."""
        return search.stream_features(self._tables["images"], encoder_id, where)

    # --- SQL ---------------------------------------------------------------------------------------------------------

    def sql(self, statement: str, parameters: dict[str, Any] | None = None) -> pa.Table:
        """The result of one SELECT over the pinned tables; its schema metadata names the images version.

        raises: QueryRefused with DuckDB's words, or if the statement is not one SELECT or asks for files or the network
        """
        with sql.connect(self._tables) as connection:
            result = sql.run(connection, statement, parameters)
        metadata = {**(result.schema.metadata or {}), b"attrdb.images_version": str(self.version).encode()}
        return result.replace_schema_metadata(metadata)

    def query(self, name: str, **parameters: Any) -> pa.Table:
        """The result of a named query, such as `db.query("recall_at_k", k=10)`.

        A query's encoder_id is the database's first encoder where none is given.
        raises: NotFound for an unknown query, encoder or image, InvalidValue for a wrong parameter
        """
        query = queries.load(name)
        names = {parameter.name for parameter in query.parameters}
        if "encoder_id" in names:
            parameters["encoder_id"] = self.encoder_id(parameters.get("encoder_id"))
        if {"encoder_id", "image_id"} <= names and "image_id" in parameters:
            self.feature(parameters["image_id"], parameters["encoder_id"])
        return self.sql(query.sql, query.bind(parameters))

    # --- attribution --------------------------------------------------------------------------------------------------

    def encoder_id(self, encoder_id: str | None = None) -> str:
        """The given encoder's id, or the first one's.

        raises: NotFound if this database has no such encoder, or none at all
        """
        known = list(self.encoders)
        if not known:
            raise NotFound(f"{self.path} has no encoder yet; ingest a corpus or a model first")
        if encoder_id is not None and encoder_id not in known:
            raise NotFound(f"no encoder {encoder_id!r} in {self.path}; it has: {', '.join(known)}")
        return encoder_id or known[0]

    def feature(self, image_id: str, encoder_id: str | None = None) -> np.ndarray:
        """The stored feature of an image, (dimension,) float32.

        raises: NotFound if there is no such image, or it has not been encoded
        """
        encoder_id = self.encoder_id(encoder_id)
        found = self.images(f"image_id = {literal(image_id)}", [encoder_id])[encoder_id]
        if not len(found):
            raise NotFound(f"no image {image_id!r} in {self.path}")
        if found.null_count:
            raise NotFound(f"image {image_id!r} has no {encoder_id!r} feature yet")
        return feature_matrix(found)[0]

    def attribute(
        self,
        query: str | np.ndarray,
        *,
        k: int = 10,
        encoder_id: str | None = None,
        tau: float = DEFAULT_TAU,
        lam: float = DEFAULT_LAM,
    ) -> pa.Table:
        """The k candidates that most resemble an image, with their influence, best first.

        query:   the id of a stored image, or a feature (dimension,) of the encoder
        returns: rank, image_id, role, model_id, source, category, creator, license, similarity (cosine), influence,
                 complete, missing_influence. Influence is an estimate, not a causal share. It is normalised over every
                 candidate above the cut-off, so it does not depend on k; where more than WIDEST candidates are above it,
                 complete is false and missing_influence bounds the share of those left out.
        raises:  NotFound for an unknown image or encoder, InvalidValue for k < 1, a wrong tau or lam, or a feature of
                 another length
        source:  Wang et al. 2023, Eq. 6 with fixed tau and lambda
        """
        if k < 1:
            raise InvalidValue(f"k is {k}; at least one candidate must be asked for")
        check_calibration(tau, lam)
        encoder_id = self.encoder_id(encoder_id)
        where = CANDIDATES
        if isinstance(query, str):
            feature = self.feature(query, encoder_id)
            where += f" AND image_id <> {literal(query)}"
        else:
            feature = np.asarray(query, dtype=np.float32)
            dimension = self.encoders[encoder_id]["dimension"]
            if feature.shape != (dimension,):
                raise InvalidValue(
                    f"the feature has shape {feature.shape}, encoder {encoder_id!r} makes ({dimension},)"
                )
            norm = np.linalg.norm(feature)
            if not (np.isfinite(norm) and norm > 0):
                raise InvalidValue(f"the feature has length {norm}; it must point somewhere")
            feature = feature / norm

        size = self._tables["images"].count_rows(f"({where}) AND `{encoder_id}` IS NOT NULL")
        width = max(k, 256)
        while True:
            hits = search.top_k(self.features(encoder_id, where), feature[None], width)
            ids, similarity = hits.ids[0], hits.similarity[0]
            covered = len(ids) >= size or bool(similarity[-1] <= cut_off(similarity[0], tau, lam))
            if covered or width >= WIDEST:
                break
            width = min(4 * width, WIDEST)
        if not len(ids):
            raise NotFound(
                f"{self.path} has no candidate with a {encoder_id!r} feature; ingest a corpus or a model first"
            )
        shares = influence(similarity, tau, lam)
        missing = 0.0
        if not covered:
            last = shares[-1] * (size - len(ids))
            missing = last / (1 + last)
            shares *= 1 - missing
        answer = self._described(ids[:k])
        n = len(answer)
        added = {"similarity": similarity[:n], "influence": shares[:n], "complete": [covered] * n}
        for name, values in {**added, "missing_influence": [missing] * n}.items():
            answer = answer.append_column(name, pa.array(values))
        return answer

    def _described(self, ids: np.ndarray) -> pa.Table:
        """What is known of some images, in the order given, with their rank before it."""
        columns = ["image_id", "role", "model_id", "source", "category", "creator", "license"]
        found = self.images(f"image_id IN ({', '.join(map(literal, ids))})", columns)
        position = {image_id: row for row, image_id in enumerate(found["image_id"].to_pylist())}
        ordered = found.take([position[image_id] for image_id in ids])
        return ordered.add_column(0, "rank", pa.array(range(1, len(ids) + 1), pa.int64()))

    # --- appending ----------------------------------------------------------------------------------------------------

    def check_encoder(self, spec: str, dimension: int, preprocessing: dict, weights_fingerprint: str) -> bool:
        """Whether the encoder is registered.

        raises: InvalidValue if the registered encoder of that id differs in spec, dimension, preprocessing or weights
        """
        row = _encoder_row(spec, dimension, preprocessing, weights_fingerprint)
        stored = self.encoders.get(row["encoder_id"])
        for what in row if stored else ():
            if stored[what] != row[what]:
                raise InvalidValue(
                    f"encoder {row['encoder_id']!r} has {what.replace('_', ' ')} {row[what]!r}, its stored features were "
                    f"made with {stored[what]!r}; use that encoder or open another database"
                )
        return stored is not None

    def add_encoder(self, spec: str, dimension: int, preprocessing: dict, weights_fingerprint: str) -> str:
        """Register an encoder and add its column to images, null so far; the id of the encoder.

        One that is registered already is checked instead: raises as `check_encoder`.
        """
        row = _encoder_row(spec, dimension, preprocessing, weights_fingerprint)
        encoder_id = row["encoder_id"]
        for attempt in range(5):
            self.refresh()
            if self.check_encoder(spec, dimension, preprocessing, weights_fingerprint):
                return encoder_id
            try:
                columns = feature_columns(self._tables["images"].schema)
                if columns.get(encoder_id) != dimension:
                    if encoder_id in columns:  # left by a call that was interrupted before the encoder's row
                        self._tables["images"].drop_columns([encoder_id])
                    self._tables["images"].add_columns(pa.field(encoder_id, feature_type(dimension)))
                self._insert("encoders", [row], on="encoder_id")
                break
            except OSError:  # another writer changed the table in between
                if attempt == 4:
                    raise
        self.refresh()
        return encoder_id

    def stored(self, ids: Iterable[str]) -> dict[str, dict]:
        """Those of the ids that images has, at the version being read, with their uri and sha256."""
        ids = list(ids)
        found: dict[str, dict] = {}
        for start in range(0, len(ids), 512):
            part = ", ".join(map(literal, ids[start : start + 512]))
            for row in self.images(f"image_id IN ({part})", ["image_id", "uri", "sha256"]).to_pylist():
                found[row["image_id"]] = row
        return found

    def append_images(self, rows: pa.Table) -> Appended:
        """Append the images that are not stored yet, in one commit; all of them are visible afterwards, or none.

        raises: InvalidValue, with the row named, for what `schema.conform_images` refuses
        """
        self.refresh()
        images = self._tables["images"]
        table = conform_images(rows, images.schema)
        stored = self.stored(table["image_id"].to_pylist())
        n_appended = 0
        if len(stored) < len(table):
            # merge_insert and not append: what another process stored since the look-up is skipped too.
            result = images.merge_insert("image_id").when_not_matched_insert_all().execute(table)
            n_appended = result["num_inserted_rows"]
        self.refresh()
        return Appended(n_appended, len(table) - n_appended, self.version)

    def append_model(self, rows: pa.Table, model: dict) -> Appended:
        """Append a customized model: its exemplars and samples in one commit, then its row in `models`.

        Both steps skip what is stored, so a call that was interrupted between them is completed by the next.
        raises: InvalidValue for a refused image, or if a row does not belong to the model
        """
        strangers = set(rows["model_id"].to_pylist()) - {model["model_id"]}
        if strangers:
            raise InvalidValue(f"images of model {strangers.pop()!r} among those of model {model['model_id']!r}")
        appended = self.append_images(rows)
        self._insert("models", [model], on="model_id")
        self.refresh()
        return appended

    def replace_exemplar_ranks(self, rows: pa.Table, encoder_id: str, gallery: str) -> None:
        """Store the ranks of one encoder, without a mapper, and gallery in place of those there are."""
        ranks = lance.dataset(str(self.path / "exemplar_ranks.lance"))
        scope = f"encoder_id = {literal(encoder_id)} AND mapper_id = '' AND gallery = {literal(gallery)}"
        key = ["encoder_id", "mapper_id", "gallery", "sample_id", "exemplar_id"]
        table = rows.select(TABLES["exemplar_ranks"].names).cast(ranks.schema)
        (
            ranks.merge_insert(key)
            .when_matched_update_all()
            .when_not_matched_insert_all()
            .when_not_matched_by_source_delete(scope)
            .execute(table)
        )
        self.refresh()

    def _insert(self, table: str, rows: list[dict], on: str) -> None:
        dataset = lance.dataset(str(self.path / f"{table}.lance"))
        batch = pa.Table.from_pylist(rows, schema=dataset.schema)
        dataset.merge_insert(on).when_not_matched_insert_all().execute(batch)

    # --- health -------------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """What the database holds: rows by role, models by kind, encoders and how complete they are, versions, bytes."""
        images = self._tables["images"]
        roles = self.sql("SELECT role, count(*) AS n FROM images GROUP BY role ORDER BY role").to_pylist()
        kinds = self.sql("SELECT kind, count(*) AS n FROM models GROUP BY kind ORDER BY kind").to_pylist()
        n_images = images.count_rows()
        encoded = {name: images.count_rows(f"`{name}` IS NOT NULL") for name in feature_columns(images.schema)}
        return {
            "path": str(self.path),
            "schema_version": SCHEMA_VERSION,
            "versions": {name: dataset.version for name, dataset in self._tables.items()},
            "n_images": n_images,
            "images_by_role": {row["role"]: row["n"] for row in roles},
            "models_by_kind": {row["kind"]: row["n"] for row in kinds},
            "encoders": {
                name: {"spec": row["spec"], "dimension": row["dimension"], "n_encoded": encoded.get(name, 0)}
                for name, row in self.encoders.items()
            },
            "n_exemplar_ranks": self._tables["exemplar_ranks"].count_rows(),
            "bytes": sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file()),
        }
