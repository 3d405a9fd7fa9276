"""Embeddings that others computed: clip-retrieval's folders, as LAION publishes them.

    img_emb/img_emb_<NNN>.npy          float16 or float32, (rows, dimension)
    metadata/metadata_<NNN>.parquet    one row a vector, aligned only by position

Only what fits into memory at once is read: a part of a shard, which is also what is committed at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

import duckdb
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from attrdb.database import Database
from attrdb.errors import InvalidValue, NotFound
from attrdb.progress import Progress, no_progress
from attrdb.store import jobs
from attrdb.store.blocklist import blocklist
from attrdb.store.ids import lock_file
from attrdb.store.jobs import JobResult
from attrdb.store.locks import exclusive_lock
from attrdb.store.schema import IMAGES, encoder_id_of

PART_ROWS = 131_072
PART_BYTES = 256 * 2**20  # of a part's features as float32
LISTED_FAILURES = 10_000  # a part's; beyond that the data set is not what it seems

# Our columns, and what img2dataset, clip-retrieval and LAION-400M call them. The first that is there is taken.
COLUMNS = {
    "prompt": ("caption", "TEXT"),
    "uri": ("url", "URL"),
    "sha256": ("sha256",),
    "width": ("original_width", "width", "WIDTH"),
    "height": ("original_height", "height", "HEIGHT"),
    "creator": ("creator", "author"),
    "license": ("license", "LICENSE"),
}
ID_COLUMNS = ("key", "image_path")
VECTORS = r"img_emb_(\d+)\.npy"


@dataclass(frozen=True)
class Shard:
    """A pair of files. offset: where the vectors begin in the .npy file, in bytes."""

    number: str
    vectors: str
    metadata: str
    n_rows: int
    dimension: int
    dtype: np.dtype
    offset: int
    columns: tuple[str, ...]  # of the metadata


@dataclass(frozen=True)
class Embeddings:
    """A folder of embeddings whose headers have been checked, and which of its columns become ours."""

    root: str
    files: fsspec.AbstractFileSystem
    shards: tuple[Shard, ...]
    id_column: str | None  # None: shard and position
    columns: dict[str, str]  # ours -> theirs

    @property
    def n_rows(self) -> int:
        return sum(shard.n_rows for shard in self.shards)

    @property
    def dimension(self) -> int:
        return self.shards[0].dimension


def is_embeddings(path: str) -> bool:
    """Whether a path (local, or a URL that fsspec opens) is a folder of embeddings."""
    files, root = _file_system(path)
    return bool(_numbered(files, f"{root}/img_emb", VECTORS))


def open_embeddings(path: str, id_column: str | None = None, columns: Mapping[str, str] | None = None) -> Embeddings:
    """Read the headers of all shards, and nothing else.

    columns: ours -> theirs, before the known names
    raises:  NotFound if there is nothing at the path, InvalidValue for a shard without its other half, another number of
             rows than its other half, a truncated file, another dtype or dimension, or a column that is not there
    """
    files, root = _file_system(path)
    vectors = _numbered(files, f"{root}/img_emb", VECTORS)
    metadata = _numbered(files, f"{root}/metadata", r"metadata_(\d+)\.parquet")
    if not vectors:
        raise NotFound(f"no img_emb/img_emb_<number>.npy in {path}")
    for one, other, what in ((vectors, metadata, "metadata"), (metadata, vectors, "vectors")):
        alone = sorted(one.keys() - other.keys())
        if alone:
            raise InvalidValue(
                f"shard {alone[0]} of {path} has no {what} file; every img_emb file needs its metadata file"
            )
    shards = [_shard(files, number, vectors[number], metadata[number]) for number in sorted(vectors, key=int)]
    for shard in shards[1:]:
        if shard.dimension != shards[0].dimension:
            raise InvalidValue(
                f"{shard.vectors} has dimension {shard.dimension}, {shards[0].vectors} has {shards[0].dimension}; "
                "one folder holds the features of one encoder"
            )
    theirs = shards[0].columns
    chosen = _columns(list(theirs), columns or {}, shards[0].metadata)
    id_column = id_column or next((name for name in ID_COLUMNS if name in theirs), None)
    for shard in shards:
        for name in [*chosen.values(), *([id_column] if id_column else [])]:
            if name not in shard.columns:
                raise InvalidValue(f"{shard.metadata} has no column {name!r}; it has: {', '.join(shard.columns)}")
    return Embeddings(files.unstrip_protocol(root), files, tuple(shards), id_column, chosen)


def _file_system(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        files, root = url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise InvalidValue(f"{path} cannot be opened: {error}") from error
    return files, root.rstrip("/")


def _numbered(files: fsspec.AbstractFileSystem, folder: str, pattern: str) -> dict[str, str]:
    found = {}
    for path in files.ls(folder, detail=False) if files.exists(folder) else ():
        if match := re.fullmatch(pattern, path.rsplit("/", 1)[-1]):
            found[match[1]] = path
    return found


def _shard(files: fsspec.AbstractFileSystem, number: str, vectors: str, metadata: str) -> Shard:
    with files.open(vectors) as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
        except (ValueError, EOFError) as error:
            raise InvalidValue(f"{vectors} is no readable .npy file: {error}") from error
        offset = file.tell()
    if len(shape) != 2 or fortran or dtype not in (np.float16, np.float32):
        raise InvalidValue(
            f"{vectors} holds {dtype} of shape {shape}{', in Fortran order' if fortran else ''}; "
            "float16 or float32 of shape (rows, dimension) is needed"
        )
    needed, found = offset + shape[0] * shape[1] * dtype.itemsize, files.size(vectors)
    if found != needed:
        raise InvalidValue(f"{vectors} has {found:,} bytes, its header says {needed:,}; fetch it again")
    with files.open(metadata) as file:
        try:
            parquet = pq.ParquetFile(file)
            n_rows, columns = parquet.metadata.num_rows, tuple(parquet.schema_arrow.names)
        except (pa.ArrowException, OSError) as error:
            raise InvalidValue(f"{metadata} is not a readable Parquet file: {error}") from error
    if n_rows != shape[0]:
        raise InvalidValue(
            f"shard {number} has {shape[0]:,} vectors and {n_rows:,} rows of metadata; they belong together by position, "
            "so both files are needed as they were written"
        )
    return Shard(number, vectors, metadata, n_rows, shape[1], dtype, offset, columns)


def _columns(theirs: list[str], given: Mapping[str, str], where: str) -> dict[str, str]:
    for ours, name in given.items():
        if ours not in IMAGES.names or ours in ("image_id", "role", "model_id", "image", "metadata", "source"):
            usable = ", ".join([*COLUMNS, "split", "category"])
            raise InvalidValue(f"{ours!r} is no column that embeddings can fill; such are: {usable}")
        if name not in theirs:
            raise InvalidValue(f"{where} has no column {name!r}; it has: {', '.join(theirs)}")
    known = {ours: next((name for name in names if name in theirs), None) for ours, names in COLUMNS.items()}
    return {ours: name for ours, name in {**known, **given}.items() if name is not None}


# --- import ----------------------------------------------------------------------------------------------------------


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
             against the database's
    source:  name of the data set; ids are `<source>/<key>`
    raises:  InvalidValue if the database's encoder of that spec has another dimension, Busy if another process imports the
             same source

    A vector that is zero or not finite, a row without an id, and a row whose id an earlier row has, is left out and
    recorded with its reason. Vectors are brought to unit length. Given again, the import goes on where it was.
    """
    encoder_id = _register(db, encoder, embeddings.dimension)
    settings = {"encoder": encoder, "source": source, "path": embeddings.root, "id_column": embeddings.id_column}
    with (
        exclusive_lock(lock_file(db.path, "corpus", source), f"source {source!r} is being imported"),
        jobs.running(db.writer, "ingest corpus", f"{source} from {embeddings.root}", settings) as job,
    ):
        db.refresh()
        before, n_seen = Database(db.path, at=db.version), 0
        if retry_failed:
            # A row whose id came before was not stored, and would look as if it were.
            job.mended([item for item, reason in job.failures.items() if not reason.endswith(_twice(embeddings))])
        for part in parts(embeddings, source):
            report(f"import {source}", n_seen, embeddings.n_rows)
            n_seen += len(part.metadata)
            _import_part(db, before, part, encoder_id, job)
        report(f"import {source}", n_seen, embeddings.n_rows)
    return job.result()


def _twice(embeddings: Embeddings) -> str:
    """The end of the reason of a row whose id an earlier row has."""
    named = f"column {embeddings.id_column!r}" if embeddings.id_column else "shard and position"
    return f"has the id of an earlier row ({named}); name a column that tells them apart with --id-column"


def _register(db: Database, encoder: str, dimension: int) -> str:
    encoder_id = encoder_id_of(encoder)
    stored = db.encoders.get(encoder_id)
    if stored is None:
        return db.writer.add_encoder(encoder, dimension, {}, "")
    if stored["dimension"] != dimension:
        raise InvalidValue(
            f"the embeddings have dimension {dimension}, encoder {encoder_id!r} of {db.path} makes {stored['dimension']}; "
            "name the encoder that made them"
        )
    return encoder_id


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
                columns[ours] = self.metadata[theirs].cast(IMAGES.field(ours).type)
            except pa.ArrowException as error:
                raise InvalidValue(f"column {theirs!r} of the metadata cannot become {ours!r}: {error}") from error
        taken = {*self.embeddings.columns.values(), self.embeddings.id_column}
        rest = [name for name in self.metadata.column_names if name not in taken]
        if rest:
            columns["metadata"] = _as_json(self.metadata.select(rest))
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
                    yield Part(embeddings, source, shard, first, pa.Table.from_batches(waiting))
                    first, waiting, n_waiting = first + n_waiting, [], 0
            if waiting:
                yield Part(embeddings, source, shard, first, pa.Table.from_batches(waiting))


def _batches(file: BinaryIO, size: int, where: str) -> Iterator[pa.RecordBatch]:
    try:
        yield from pq.ParquetFile(file).iter_batches(size)
    except (pa.ArrowException, OSError) as error:
        raise InvalidValue(f"{where} cannot be read: {str(error).splitlines()[0]}; fetch it again") from error


def _import_part(db: Database, before: Database, part: Part, encoder_id: str, job: jobs.Job) -> None:
    """Append what is not stored of a part. before: the database as it was when the import began."""
    has_id, first = pc.is_valid(part.ids).to_numpy(zero_copy_only=False), _first_of_each(part.ids)
    absent = pc.fill_null(db.writer.absent(part.ids), False).to_numpy(zero_copy_only=False)
    failed = pc.is_in(part.ids, pa.array(list(job.failures), pa.string())).to_numpy(zero_copy_only=False)
    wanted = has_id & first & absent & ~failed
    twice = has_id & ~first
    known = has_id & first & ~absent
    if known.any():
        # Unless it was there when this import began, an earlier row of it has the id.
        twice |= known & before.writer.absent(part.ids).to_numpy(zero_copy_only=False)
    failures = dict.fromkeys(np.flatnonzero(~has_id), f"has no {part.embeddings.id_column}")
    failures |= {row: _twice(part.embeddings) for row in np.flatnonzero(twice)}
    reasons = {
        part.positions[row].as_py(): f"{part.shard.metadata} row {part.first + row} {why}"
        for row, why in failures.items()
    }
    job.n_stored += int((known & ~twice).sum())
    if wanted.any():
        table, sound = part.images(encoder_id)
        for row in np.flatnonzero(~sound & wanted):
            reasons[part.ids[row].as_py()] = f"{part.shard.vectors} row {part.first + row} is zero or not finite"
        for number, refusal in blocklist(db.snapshot).refusals(table).items():
            if wanted[number]:
                reasons[part.ids[number].as_py()] = refusal
                sound[number] = False
        wanted &= sound
        if not wanted.all():
            table = table.filter(pa.array(wanted))
        if len(table):
            job.n_done += db.writer.append_bulk(table).n_appended
    if len(reasons) > LISTED_FAILURES:
        raise InvalidValue(
            f"{len(reasons):,} of {len(part.metadata):,} rows of shard {part.shard.number} cannot be used, the first: "
            f"{next(iter(reasons.values()))}; is this the right folder?"
        )
    job.failed({item: reason for item, reason in reasons.items() if item not in job.failures})


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
    found = file.read(n_rows * row_bytes)
    if len(found) != n_rows * row_bytes:
        raise InvalidValue(f"{shard.vectors} ends within row {first + len(found) // row_bytes}; fetch it again")
    features = np.frombuffer(found, shard.dtype).reshape(n_rows, shard.dimension).astype(np.float32)
    with np.errstate(all="ignore"):
        norms = np.sqrt(np.einsum("nd,nd->n", features, features))
        norms[~np.isfinite(norms) | (norms == 0)] = np.nan
        features /= norms[:, None]
    return features


def _as_json(table: pa.Table) -> pa.ChunkedArray:
    """Every row as JSON text."""
    rows = pa.table({"row": table.to_struct_array()})
    with duckdb.connect() as connection:
        connection.register("metadata", rows)
        return connection.sql('SELECT to_json("row")::VARCHAR AS line FROM metadata').to_arrow_table()["line"]
