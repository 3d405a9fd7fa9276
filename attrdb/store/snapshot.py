"""A snapshot: every table of a database at one pinned version. It never changes, so threads may share it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import lance
import numpy as np
import pyarrow as pa
from lance.commit import CommitConflictError

from attrdb.attribution.influence import DEFAULT_LAM, DEFAULT_TAU
from attrdb.errors import InvalidValue, NotFound, StorageError
from attrdb.search import exact as exact_search
from attrdb.search import ivf
from attrdb.search.mapper import Mapper
from attrdb.store.schema import SCHEMA_VERSION, TABLES, feature_columns, feature_matrix

COUNTS = 100  # predicates whose counts are remembered
STAMP = b"attrdb.schema_version"


def literal(text: str) -> str:
    """The text as an SQL string."""
    return "'" + text.replace("'", "''") + "'"


def among(column: str, values: Iterable[str]) -> str:
    """The SQL predicate that a column holds one of the values."""
    listed = ", ".join(map(literal, values))
    return f"{column} IN ({listed})" if listed else "false"


def by_lance(error: BaseException) -> bool:
    """Whether it may be Lance's word on a disk or a file; a panic inside Lance is no Exception and has no public class."""
    return isinstance(error, (OSError, pa.ArrowException, RuntimeError)) or type(error).__name__ == "PanicException"


def words_of(error: BaseException) -> str:
    """The first line of what Lance says, without the places in its own source."""
    lines = re.sub(r",? /\S+\.rs:\d+(:\d+)?", "", str(error)).splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turns what Lance says about a disk or a file into a StorageError; a commit conflict is passed on."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, (StorageError, CommitConflictError)) or not by_lance(error):
            raise
        text, said = str(error), words_of(error)
        if "No space left" in text or "os error 28" in text:
            raise StorageError(
                f"the disk of {path} is full; what was committed before is kept: free some space, then give the command again"
            ) from error
        if any(words in text for words in ("Read-only file system", "Permission denied", "os error 13", "os error 30")):
            raise StorageError(f"{path} cannot be written: {said}; open it with read_only=True to read it") from error
        raise StorageError(
            f"{path} cannot be read or written: {said}; a damaged file is named by: attrdb check {path}"
        ) from error


def schema_version(dataset: lance.LanceDataset) -> int:
    """The schema version a table is stamped with, 0 for none."""
    return int((dataset.schema.metadata or {}).get(STAMP, b"0"))


def made(table: Path) -> bool:
    """Whether a table is there, whole or damaged; one whose making was killed has neither a version nor data."""
    return any(next(table.glob(files), None) for files in ("_versions/*.manifest", "data/*"))


class Snapshot:
    """The tables of a database as they were at one moment.

    A customized model counts once its row in `models` is there: images that were appended before that, by a job that is
    still at it or was killed, are not shown.
    """

    def __init__(self, path: Path, tables: dict[str, lance.LanceDataset]):
        self.path = path
        self.tables = tables
        self.lock = Lock()
        self.catalog: Any = None  # what attrdb.sql.connection has made for it
        self._counts: dict[str, int] = {}

    @property
    def version(self) -> int:
        """The version of the images table."""
        return self.tables["images"].version

    @cached_property
    def encoders(self) -> dict[str, dict]:
        """The rows of `encoders`, by encoder_id, in the order in which they were added."""
        with storage(self.path):
            rows = {row["encoder_id"]: row for row in self.tables["encoders"].to_table().to_pylist()}
        # The columns of images keep that order; rows of a table may move when one is updated.
        return {name: rows[name] for name in feature_columns(self.tables["images"].schema) if name in rows}

    @cached_property
    def hidden_models(self) -> tuple[str, ...]:
        """Models that have images and no row in `models`."""
        with storage(self.path):
            models = self.tables["models"].to_table(columns=["model_id", "n_exemplars", "n_samples"]).to_pylist()
            counted = sum((row["n_exemplars"] or 0) + (row["n_samples"] or 0) for row in models)
            # The usual case, no such model, is told from a count: the ids of all samples need not be read.
            if self.tables["images"].count_rows("role <> 'pretraining'") == counted:
                return ()
            scan = self.tables["images"].to_batches(columns=["model_id"], filter="role <> 'pretraining'")
            found = {model_id for batch in scan for model_id in batch["model_id"].unique().to_pylist()}
        return tuple(sorted(found - {None} - {row["model_id"] for row in models}))

    def visible(self, where: str) -> str:
        """The predicate, with hidden models left out."""
        if not self.hidden_models:
            return where
        return f"({where}) AND (model_id IS NULL OR model_id NOT IN ({', '.join(map(literal, self.hidden_models))}))"

    def check_predicate(self, name: str, predicate: str) -> None:
        """See that a text from outside is a predicate by itself, before it becomes part of a longer one.

        raises: InvalidValue, with the name of the parameter that it was given as
        """
        try:
            if not _closed(predicate):
                raise ValueError("a bracket or quote that is not closed, or a comment")
            self.tables["images"].scanner(columns=["image_id"], filter=f"({predicate})").explain_plan()
        except Exception as error:  # Lance has many words for it
            raise InvalidValue(
                f"{name} is {predicate!r}; it must be an SQL predicate on the columns of images: {words_of(error)}"
            ) from error

    def images(self, where: str, columns: list[str]) -> pa.Table:
        """Columns of the images that a predicate keeps."""
        with storage(self.path):
            return self.tables["images"].to_table(columns=columns, filter=self.visible(where))

    def count(self, where: str) -> int:
        """How many images a predicate keeps; remembered, since every search through an index asks it."""
        n = self._counts.get(where)
        if n is None:
            with storage(self.path):
                n = self.tables["images"].count_rows(self.visible(where))
            if len(self._counts) >= COUNTS:
                self._counts.clear()
            self._counts[where] = n
        return n

    def features(self, encoder_id: str, where: str) -> Iterator[exact_search.Block]:
        """Ids and features of the encoded images that a predicate keeps, streamed in blocks."""
        with storage(self.path):
            yield from exact_search.stream(self.tables["images"], encoder_id, self.visible(where))

    @cached_property
    def indices(self) -> dict[str, ivf.Index]:
        """The indices that attrdb built and that are there, by encoder_id; one that was dropped is not asked."""
        with storage(self.path):
            images = self.tables["images"]
            there = {one.name: one.index_type for one in images.describe_indices()}
            columns = ["encoder_id", "kind", "n_partitions", "n_probes", "oversampling"]
            known = [ivf.Index(**row) for row in self.tables["indices"].to_table(columns=columns).to_pylist()]
            return {
                one.encoder_id: replace(one, **ivf.coverage(images, one.encoder_id))
                for one in known
                if there.get(one.name) == one.kind
            }

    def index(self, encoder_id: str, mapper: Mapper | None) -> ivf.Index | None:
        """The index that searches look into, asked as suits the mapper; None where all candidates are compared."""
        index = self.indices.get(encoder_id)
        return index if index is None or mapper is None else self._mapper_indices.get(mapper.mapper_id)

    @cached_property
    def _mapper_indices(self) -> dict[str, ivf.Index]:
        """The indices of mappers that find enough through them, by mapper_id."""
        with storage(self.path):
            rows = self.tables["mapper_searches"].to_table(filter="used").to_pylist()
        return {
            row["mapper_id"]: replace(
                self.indices[row["encoder_id"]],
                n_probes=row["n_probes"],
                oversampling=row["oversampling"],
                tilt=np.asarray(row["tilt"], np.float32),
            )
            for row in rows
            if row["encoder_id"] in self.indices
        }

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

    def mapper(self, mapper_id: str) -> Mapper:
        """A stored mapper; read once.

        raises: NotFound, with the nearest ids
        """
        if mapper_id not in self._mappers:
            with storage(self.path):
                table = self.tables["mappers"]
                rows = table.to_table(filter=f"mapper_id = {literal(mapper_id)}").to_pylist()
                known = [] if rows else table.to_table(columns=["mapper_id"])["mapper_id"].to_pylist()
            if not rows:
                near = ", ".join(map(repr, difflib.get_close_matches(mapper_id, known, 3, 0)))
                has = f"; nearest: {near}" if near else ", it has none yet: attrdb train makes them"
                raise NotFound(f"no mapper {mapper_id!r} in {self.path}{has}")
            self._mappers[mapper_id] = Mapper.of_row(rows[0])
        return self._mappers[mapper_id]

    def compared(self, encoder_id: str | None, mapper_id: str | None) -> tuple[str, Mapper | None]:
        """The encoder whose features are compared, and the mapper they are mapped with, if one is asked for.

        raises: NotFound for either, InvalidValue if the mapper is of another encoder than the one that is asked for
        """
        if not mapper_id:
            return self.encoder_id(encoder_id), None
        mapper = self.mapper(mapper_id)
        if encoder_id not in (None, mapper.encoder_id):
            raise InvalidValue(f"mapper {mapper_id!r} is of encoder {mapper.encoder_id!r}, not of {encoder_id!r}")
        return self.encoder_id(mapper.encoder_id), mapper

    def calibration(
        self, encoder_id: str, mapper_id: str | None, tau: float | None = None, lam: float | None = None
    ) -> tuple[float, float]:
        """tau and lambda of influence: as given, else as calibrated, else attrdb's defaults."""
        stored = self._calibrations.get((encoder_id, mapper_id or ""), {})
        return (
            tau if tau is not None else stored.get("tau", DEFAULT_TAU),
            lam if lam is not None else stored.get("lam", DEFAULT_LAM),
        )

    @cached_property
    def _mappers(self) -> dict[str, Mapper]:
        return {}

    @cached_property
    def _calibrations(self) -> dict[tuple[str, str], dict]:
        with storage(self.path):
            rows = self.tables["calibrations"].to_table(columns=["encoder_id", "mapper_id", "tau", "lam"]).to_pylist()
        return {(row["encoder_id"], row["mapper_id"]): row for row in rows}

    def feature(self, image_id: str, encoder_id: str) -> np.ndarray:
        """The stored feature of an image, (dimension,) float32.

        raises: NotFound if there is no such image, or it has not been encoded
        """
        found = self.images(f"image_id = {literal(image_id)}", [encoder_id])[encoder_id]
        if not len(found):
            raise NotFound(f"no image {image_id!r} in {self.path}")
        if found.null_count:
            raise NotFound(f"image {image_id!r} has no {encoder_id!r} feature yet")
        return feature_matrix(found)[0]


def _closed(predicate: str) -> bool:
    """Whether brackets and quotes of an SQL text are closed in it: Lance ignores what comes after a bracket too many."""
    depth, quote = 0, ""
    for at, character in enumerate(predicate):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"`":
            quote = character
        elif predicate[at : at + 2] in ("--", "/*"):
            return False
        depth += 0 if quote else {"(": 1, ")": -1}.get(character, 0)
        if depth < 0:
            return False
    return depth == 0 and not quote


def open_snapshot(path: Path, at: int | str | datetime | None = None) -> Snapshot:
    """The newest versions of all tables, or those of an older moment.

    at:     a version of images, with the other tables as they were until the next one; or a time, as datetime or ISO 8601
            text (UTC where it names no zone)
    raises: NotFound if there is no database, or no such version, InvalidValue for a schema version that is not read here
            or a time that is not understood
    """
    if not (path / "images.lance").is_dir():
        what = "is not an attrdb database (no images.lance in it)" if path.exists() else "does not exist"
        raise NotFound(f"{path} {what}; make one with: attrdb init {path}")
    check_schema_version(path, schema_version(open_table(path, "images")))
    # models before images: a model that is seen has its images, as they are committed first.
    names = sorted(TABLES, key=lambda name: name == "images")
    tables = {name: open_table(path, name) for name in names}
    if at is not None:
        tables = _older(path, tables, at)
    return Snapshot(path, tables)


def check_schema_version(path: Path, found: int) -> None:
    if found > SCHEMA_VERSION:
        raise InvalidValue(
            f"{path} has schema version {found}, this attrdb reads {SCHEMA_VERSION}; install a newer attrdb"
        )
    if found == 0:
        raise NotFound(f"{path} has an images table that attrdb did not make; make a database with: attrdb init PATH")
    if found < SCHEMA_VERSION:
        raise InvalidValue(
            f"{path} has schema version {found}, this attrdb reads {SCHEMA_VERSION}; bring it up with: attrdb upgrade {path}"
        )


def open_table(path: Path, name: str, **options: Any) -> lance.LanceDataset:
    try:
        return lance.dataset(str(path / f"{name}.lance"), **options)
    except BaseException as error:
        if not (isinstance(error, ValueError) or by_lance(error)):
            raise
        # Lance counts the names of its manifests down.
        newest = min((path / f"{name}.lance" / "_versions").glob("*.manifest"), default=None)
        cure = f"; restore {newest} from a copy of the directory" if newest else ""
        raise NotFound(
            f"{path} is not a whole attrdb database: its table {name} cannot be opened ({words_of(error)}){cure}"
        ) from error


def _older(
    path: Path, tables: dict[str, lance.LanceDataset], at: int | str | datetime
) -> dict[str, lance.LanceDataset]:
    history = {
        name: [(one["version"], _utc(one["timestamp"])) for one in table.versions()] for name, table in tables.items()
    }
    images = history["images"]
    if isinstance(at, str) and at.isdecimal():
        at = int(at)
    if isinstance(at, int) and not isinstance(at, bool):
        kept = [version for version, _ in images]
        if at not in kept:
            raise NotFound(f"{path} has no version {at}; it keeps {len(kept)} versions, {kept[0]} to {kept[-1]}")
        later = [moment for version, moment in images if version > at]
        until = min(later) if later else datetime.max.replace(tzinfo=UTC)
        chosen = {name: [version for version, moment in found if moment < until] for name, found in history.items()}
        chosen["images"] = [at]
    else:
        moment = _moment(at)
        chosen = {name: [version for version, made in found if made <= moment] for name, found in history.items()}
        if not chosen["images"]:
            raise NotFound(
                f"{path} has no version as old as {moment.isoformat()}; its oldest is of {images[0][1].isoformat()}"
            )
    for name, found in history.items():
        if not chosen[name] and found[0][0] > 1:
            raise NotFound(
                f"{path} has dropped what {name} held then; its oldest version is of {found[0][1].isoformat()}"
            )
    # A table that is younger than the moment was empty then, as its first version is.
    versions = {name: max(chosen[name], default=1) for name in tables}
    return {name: open_table(path, name, version=version) for name, version in versions.items()}


def _moment(at: str | datetime) -> datetime:
    try:
        moment = datetime.fromisoformat(at) if isinstance(at, str) else at
    except ValueError:
        moment = None
    if not isinstance(moment, datetime):
        raise InvalidValue(f"{at!r} is neither a version nor a time such as 2026-11-23T12:00:00")
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _utc(timestamp: datetime) -> datetime:
    # Lance gives local time without a zone.
    return timestamp.astimezone(UTC)
