"""Importing embeddings that others computed.

Only what fits into memory at once is read: a part of a shard, which is also what is committed at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from attrdb.database import Database
from attrdb.errors import InvalidValue
from attrdb.ingest.dimensions import known_dimension
from attrdb.ingest.read.embedding_shards import Embeddings, Shard
from attrdb.ingest.read.text_columns import clean_column, json_column, valid_text
from attrdb.progress import Progress, no_progress
from attrdb.store import jobs
from attrdb.store.blocklist import blocklist
from attrdb.store.ids import lock_file
from attrdb.store.jobs import JobResult
from attrdb.store.lance_errors import storage
from attrdb.store.locks import exclusive_lock
from attrdb.store.predicates import literal
from attrdb.store.schema import IMAGES, encoder_id_of

PART_ROWS = 131_072
PART_BYTES = 256 * 2**20  # of a part's features as float32
LISTED_FAILURES = 10_000  # a part's; beyond that the data set is not what it seems


def check_encoder(encoder: str, embeddings: Embeddings) -> None:
    """raises: InvalidValue if the encoder of that spec is known to make features of another dimension"""
    dimension = known_dimension(encoder)
    if dimension not in (None, embeddings.dimension):
        raise InvalidValue(
            f"the embeddings have dimension {embeddings.dimension}, and {encoder} makes features of dimension {dimension}; "
            "name the encoder that made them"
        )


def ingest_embeddings(
    db: Database,
    embeddings: Embeddings,
    encoder: str,
    source: str,
    *,
    retry_failed: bool = False,
    report: Progress = no_progress,
) -> JobResult:
    """Append the vectors that are not stored yet as pretraining images with a feature, a commit for every part.

    encoder: the spec of the encoder that made them, in the caller's word: vectors do not say it. Its dimension is checked
             against the database's, and against that of its architecture where it is known
    source:  name of the data set; ids are `<source>/<key>`
    raises:  InvalidValue if the encoder has another dimension, or a row is stored already without a feature of it; Busy if
             another process imports the same source

    A vector that is zero or not finite, a row without an id, and a row whose id an earlier row has, is left out and
    recorded with its reason. Vectors are brought to unit length. Rerun, the import resumes where it was.
    """
    check_encoder(encoder, embeddings)
    _check_stored_dimension(db, encoder, embeddings.dimension)
    settings = {"encoder": encoder, "source": source, "path": embeddings.root, "id_column": embeddings.id_column}
    with (
        exclusive_lock(lock_file(db.path, "corpus", source), f"source {source!r} is being imported"),
        jobs.running(db.writer, "ingest corpus", f"{source} from {embeddings.root}", settings) as job,
    ):
        db.refresh()
        work = _Import(db, Database(db.path, at=db.version), encoder, job)
        n_seen = 0
        if retry_failed:
            # A row whose id came before was not stored, and would look as if it were.
            job.mended([item for item, reason in job.failures.items() if not reason.endswith(_repeated(embeddings))])
        for part in parts(embeddings, source):
            report(f"import {source}", n_seen, embeddings.n_rows)
            n_seen += len(part.metadata)
            work.add(part)
        report(f"import {source}", n_seen, embeddings.n_rows)
    return job.result()


def _repeated(embeddings: Embeddings) -> str:
    """The end of the reason of a row whose id an earlier row has."""
    named = f"column {embeddings.id_column!r}" if embeddings.id_column else "shard and position"
    return f"has the id of an earlier row ({named}); name a column that tells them apart with --id-column"


def _check_stored_dimension(db: Database, encoder: str, dimension: int) -> None:
    encoder_id = encoder_id_of(encoder)
    stored = db.encoders.get(encoder_id)
    if stored and stored["dimension"] != dimension:
        raise InvalidValue(
            f"the embeddings have dimension {dimension}, encoder {encoder_id!r} of {db.path} makes {stored['dimension']}; "
            "name the encoder that made them"
        )


@dataclass(frozen=True)
class Part:
    """Some rows of a shard, from position `first` on. The vectors are read when they are asked for."""

    embeddings: Embeddings
    source: str
    shard: Shard
    first: int
    metadata: pa.Table

    @cached_property
    def positions(self) -> pa.Array:
        """`<source>/<shard>/<position>`"""
        numbers = pa.array(np.arange(self.first, self.first + len(self.metadata))).cast(pa.string())
        return pc.binary_join_element_wise(pa.scalar(self.source), pa.scalar(self.shard.number), numbers, "/")

    @cached_property
    def ids(self) -> pa.Array:
        """image_id of every row, null where the id column is."""
        if self.embeddings.id_column is None:
            return self.positions
        names = self.metadata[self.embeddings.id_column].combine_chunks().cast(pa.string())
        return pc.binary_join_element_wise(pa.scalar(self.source), names, "/")

    def images(self, encoder_id: str) -> tuple[pa.Table, np.ndarray]:
        """The rows as `images` has them, and which of them have a feature that can be used (n,) bool."""
        with self.embeddings.files.open(self.shard.vectors) as file:
            features = _unit_features(file, self.shard, self.first, len(self.metadata))
        once = pa.array(np.zeros(len(self.metadata), np.int8))
        columns = {
            "image_id": self.ids,
            "role": pa.array(["pretraining"]).take(once),
            "source": pa.array([self.source]).take(once),
        }
        for ours, theirs in self.embeddings.columns.items():
            try:
                columns[ours] = clean_column(self.metadata[theirs].cast(IMAGES.field(ours).type))
            except pa.ArrowException as error:
                raise InvalidValue(f"column {theirs!r} of the metadata cannot become {ours!r}: {error}") from error
        taken = {*self.embeddings.columns.values(), self.embeddings.id_column}
        rest = [name for name in self.metadata.column_names if name not in taken]
        if rest:
            columns["metadata"] = json_column(self.metadata.select(rest))
        columns[encoder_id] = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), self.shard.dimension)
        return pa.table(columns), ~np.isnan(features[:, 0])


def parts(embeddings: Embeddings, source: str) -> Iterator[Part]:
    """All rows, as many at a time as are committed at once."""
    size = max(1, min(PART_ROWS, PART_BYTES // (4 * embeddings.dimension)))
    for shard in embeddings.shards:
        first, waiting, n_waiting = 0, [], 0
        with embeddings.files.open(shard.metadata) as file:
            for batch in _batches(file, size, shard.metadata):
                waiting.append(batch)
                n_waiting += len(batch)
                if n_waiting >= size:
                    yield Part(embeddings, source, shard, first, valid_text(pa.Table.from_batches(waiting)))
                    first, waiting, n_waiting = first + n_waiting, [], 0
            if waiting:
                yield Part(embeddings, source, shard, first, valid_text(pa.Table.from_batches(waiting)))


def _batches(file: BinaryIO, size: int, where: str) -> Iterator[pa.RecordBatch]:
    try:
        yield from pq.ParquetFile(file).iter_batches(size)
    except (pa.ArrowException, OSError) as error:
        raise InvalidValue(f"{where} cannot be read: {str(error).splitlines()[0]}; fetch it again") from error


@dataclass(frozen=True)
class _Rows:
    """Which rows of a part are what, (n,) bool each. repeated: an earlier row has the id; wanted: to be appended."""

    without_id: np.ndarray
    repeated: np.ndarray
    stored: np.ndarray
    wanted: np.ndarray


class _Import:
    """An import under way. before: the database as it was when the import began."""

    def __init__(self, db: Database, before: Database, encoder: str, job: jobs.Job):
        self.db = db
        self.before = before
        self.encoder = encoder
        self.encoder_id = encoder_id_of(encoder)
        self.job = job

    def add(self, part: Part) -> None:
        """Append what is not stored of a part, and record what cannot be."""
        rows = self._sorted(part)
        self._check_features(part, rows.stored)
        self.job.n_stored += int(rows.stored.sum())
        reasons = self._row_reasons(part, rows)
        if rows.wanted.any():
            reasons |= self._append(part, rows.wanted)
        if len(reasons) > LISTED_FAILURES:
            raise InvalidValue(
                f"{len(reasons):,} of {len(part.metadata):,} rows of shard {part.shard.number} cannot be used, the first: "
                f"{next(iter(reasons.values()))}; is this the right folder?"
            )
        self.job.failed({item: reason for item, reason in reasons.items() if item not in self.job.failures})

    def _sorted(self, part: Part) -> _Rows:
        has_id, first = pc.is_valid(part.ids).to_numpy(zero_copy_only=False), _first_of_each(part.ids)
        absent = _absent(self.db, part.ids)
        failed = pc.is_in(part.ids, pa.array(list(self.job.failures), pa.string())).to_numpy(zero_copy_only=False)
        repeated, stored = has_id & ~first, has_id & first & ~absent
        if stored.any():
            # Unless it was there when this import began, an earlier row of it has the id.
            new = stored & _absent(self.before, part.ids)
            repeated, stored = repeated | new, stored & ~new
        return _Rows(~has_id, repeated, stored, has_id & first & absent & ~failed)

    def _check_features(self, part: Part, stored: np.ndarray) -> None:
        """raises: InvalidValue if a row is stored without a feature of the encoder: it came from another one"""
        if not stored.any():
            return
        ids = part.ids.filter(pa.array(stored))
        if self.encoder_id in self.before.encoders:
            if len(self.before.encoders) == 1:
                return
            ids = self._without_feature(ids)
        if len(ids):
            others = ", ".join(row["spec"] for row in self.before.encoders.values() if row["spec"] != self.encoder)
            raise InvalidValue(
                f"image {ids[0].as_py()!r} is stored already, without a feature of {self.encoder}, as are {len(ids) - 1:,} "
                f"more of shard {part.shard.number}; {self.db.path} has features of {others}. Name the encoder that made "
                "these embeddings, or import them with another --source"
            )

    def _without_feature(self, ids: pa.Array) -> pa.Array:
        ends = pc.min_max(ids)
        where = (
            f"image_id >= {literal(ends['min'].as_py())} AND image_id <= {literal(ends['max'].as_py())} "
            f"AND `{self.encoder_id}` IS NULL"
        )
        with storage(self.before.path):
            lacking = self.before.snapshot.tables["images"].to_table(columns=["image_id"], filter=where)["image_id"]
        return ids.filter(pc.is_in(ids, lacking))

    def _row_reasons(self, part: Part, rows: _Rows) -> dict[str, str]:
        """Why rows cannot be used whose vectors need not be read for that, by their position."""
        reasons = dict.fromkeys(np.flatnonzero(rows.without_id), f"has no {part.embeddings.id_column}")
        reasons |= dict.fromkeys(np.flatnonzero(rows.repeated), _repeated(part.embeddings))
        return {
            part.positions[row].as_py(): f"{part.shard.metadata} row {part.first + row} {reason}"
            for row, reason in reasons.items()
        }

    def _append(self, part: Part, wanted: np.ndarray) -> dict[str, str]:
        """Append rows in one commit; why some of them cannot be, by id."""
        table, sound = part.images(self.encoder_id)
        reasons = {
            part.ids[row].as_py(): f"{part.shard.vectors} row {part.first + row} is zero or not finite"
            for row in np.flatnonzero(~sound & wanted)
        }
        wanted = wanted & sound
        for row, reason in blocklist(self.db.snapshot).refusals(table).items():
            if wanted[row]:
                reasons[part.ids[row].as_py()] = reason
                wanted[row] = False
        if not wanted.all():
            table = table.filter(pa.array(wanted))
        if len(table):
            if self.encoder_id not in self.db.encoders:  # not before there is something of it
                self.db.writer.add_encoder(self.encoder, part.shard.dimension, {}, "")
            self.job.n_done += self.db.writer.append_bulk(table).n_appended
        return reasons


def _absent(db: Database, ids: pa.Array) -> np.ndarray:
    """(n,) bool: which ids the database does not have; False where there is no id."""
    return pc.fill_null(db.writer.absent(ids), False).to_numpy(zero_copy_only=False)


def _first_of_each(ids: pa.Array) -> np.ndarray:
    """(n,) bool: where an id stands for the first time."""
    numbers = pa.table({"id": ids, "row": pa.array(np.arange(len(ids)))})
    firsts = numbers.group_by("id").aggregate([("row", "min")])["row_min"].to_numpy()
    mask = np.zeros(len(ids), bool)
    mask[firsts] = True
    return mask


def _unit_features(file: BinaryIO, shard: Shard, first: int, n_rows: int) -> np.ndarray:
    """(n_rows, dimension) float32 of unit length; a row that cannot be is NaN.

    raises: InvalidValue if the file ends early
    """
    row_bytes = shard.dimension * shard.dtype.itemsize
    file.seek(shard.offset + first * row_bytes)
    encoded = file.read(n_rows * row_bytes)
    if len(encoded) != n_rows * row_bytes:
        raise InvalidValue(f"{shard.vectors} ends within row {first + len(encoded) // row_bytes}; fetch it again")
    features = np.frombuffer(encoded, shard.dtype).reshape(n_rows, shard.dimension).astype(np.float32)
    with np.errstate(all="ignore"):
        norms = np.sqrt(np.einsum("nd,nd->n", features, features))
        norms[~np.isfinite(norms) | (norms == 0)] = np.nan
        features /= norms[:, None]
    return features
