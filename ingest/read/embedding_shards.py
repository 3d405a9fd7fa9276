"""The files of embeddings that others computed: clip-retrieval's folders, as LAION publishes them; only headers are read.

img_emb/img_emb_<NNN>.npy          float16 or float32, (rows, dimension)
metadata/metadata_<NNN>.parquet    one row a vector, aligned only by position
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from attrdb.errors import InvalidValue, NotFound
from attrdb.store.schema import IMAGES

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
    """Whether a path (local, or a URL that fsspec opens) is a folder of embeddings.

    raises: InvalidValue for a part of such a folder that cannot be imported alone: `img_emb` itself, or text embeddings
    """
    files, root = _file_system(path)
    if _numbered(files, f"{root}/img_emb", VECTORS):
        return True
    if _numbered(files, root, VECTORS):
        parent = path.rstrip("/").rpartition("/")[0] or "the folder above it"
        raise InvalidValue(f"{path} holds vectors alone; name the folder that has img_emb and metadata in it: {parent}")
    if _numbered(files, f"{root}/text_emb", r"text_emb_(\d+)\.npy") and not _has_others(files, root):
        raise InvalidValue(
            f"{path} has embeddings of texts alone (text_emb); embeddings of images (img_emb) are needed, which "
            "clip-retrieval inference writes with --enable_image"
        )
    return False


def _has_others(files: fsspec.AbstractFileSystem, root: str) -> bool:
    names = {entry.rstrip("/").rsplit("/", 1)[-1] for entry in files.ls(root, detail=False)}
    return bool(names - {"text_emb", "metadata"})


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
    for numbers, other_half, noun in ((vectors, metadata, "metadata"), (metadata, vectors, "vectors")):
        if unpaired := sorted(numbers.keys() - other_half.keys()):
            raise InvalidValue(
                f"shard {unpaired[0]} of {path} has no {noun} file; every img_emb file needs its metadata file"
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
    """The files in a folder whose names match a pattern, by the number in it."""
    paths = {}
    for path in files.ls(folder, detail=False) if files.isdir(folder) else ():
        if match := re.fullmatch(pattern, path.rsplit("/", 1)[-1]):
            paths[match[1]] = path
    return paths


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
    needed, size = offset + shape[0] * shape[1] * dtype.itemsize, files.size(vectors)
    if size != needed:
        raise InvalidValue(f"{vectors} has {size:,} bytes, its header says {needed:,}; fetch it again")
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


def _columns(theirs: list[str], chosen: Mapping[str, str], where: str) -> dict[str, str]:
    for ours, name in chosen.items():
        if ours not in IMAGES.names or ours in ("image_id", "role", "model_id", "image", "metadata", "source"):
            usable = ", ".join([*COLUMNS, "split", "category"])
            raise InvalidValue(f"{ours!r} is no column that embeddings can fill; such are: {usable}")
        if name not in theirs:
            raise InvalidValue(f"{where} has no column {name!r}; it has: {', '.join(theirs)}")
    known = {ours: next((name for name in names if name in theirs), None) for ours, names in COLUMNS.items()}
    return {ours: name for ours, name in {**known, **chosen}.items() if name is not None}
