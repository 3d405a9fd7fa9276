"""The bytes of a tar shard, compressed or not: a compressed one is unpacked into a file without a name.

Such a file is gone when the last picture in it has been read, however the process ends.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import pyarrow as pa

from attrdb.errors import InvalidValue

SHARD_SUFFIXES = (
    ".tar",
    *(".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4"),
)
BLOCK = 2**17  # bytes
# Pictures hardly shrink, so a shard that grows by more than this is made to fill the disk.
MAX_GROWTH, MIN_LIMIT = 200, 64 * 2**20
# What decompressors raise for a file that is damaged or cut off.
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)

Opener = Callable[[str], Any]
OPENERS: tuple[tuple[bytes, Opener], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\x00", lzma.open),
    (b"\x28\xb5\x2f\xfd", lambda path: pa.input_stream(path, compression="zstd")),
    (b"\x04\x22\x4d\x18", lambda path: pa.input_stream(path, compression="lz4")),
)


def shard_stem(name: str) -> str:
    """The name of a shard's file without its ending."""
    lowered = name.lower()
    suffix = max((end for end in SHARD_SUFFIXES if lowered.endswith(end)), key=len, default="")
    return name[: len(name) - len(suffix)]


def is_shard(name: str) -> bool:
    return name.lower().endswith(SHARD_SUFFIXES)


class Content(Protocol):
    """Where the members of a shard are read from, in several threads at once."""

    def read(self, start: int, size: int) -> bytes:
        """raises: OSError"""


@dataclass(frozen=True)
class Plain:
    """A shard that is not compressed."""

    path: Path

    def read(self, start: int, size: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(size)


@dataclass(frozen=True)
class Unpacked:
    """What a compressed shard holds, in a file without a name."""

    file: IO[bytes]

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self.file.fileno(), size, start)


@contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes], Content, Exception | None]]:
    """A shard's bytes to walk through, where its members are read from, and what is wrong with its compression.

    raises: OSError, and InvalidValue if it cannot be unpacked
    """
    with path.open("rb") as file:
        start = file.read(8)
        opener = next((opener for mark, opener in OPENERS if start.startswith(mark)), None)
        if opener is None:
            file.seek(0)
            yield file, Plain(path), None
            return
    unpacked, damage = _unpack(path, opener)
    yield unpacked, Unpacked(unpacked), damage


def _unpack(path: Path, opener: Opener) -> tuple[IO[bytes], Exception | None]:
    """What a compressed file holds, as far as it can be read, and the damage that ends it."""
    limit, size = max(MIN_LIMIT, MAX_GROWTH * path.stat().st_size), 0
    target = tempfile.TemporaryFile(prefix="attrdb-")  # noqa: SIM115 (its readers close it)
    damage: Exception | None = None
    with opener(str(path)) as stream:
        # read1 gives what there is before a file is cut off, where read gives nothing.
        read = getattr(stream, "read1", stream.read)
        while True:
            try:
                block = read(BLOCK)
            except DAMAGE as error:
                damage = error
                break
            if not block:
                break
            size += len(block)
            if size > limit:
                raise InvalidValue(f"{path} unpacks to more than {limit:,} bytes; unpack it yourself, if you trust it")
            try:
                target.write(block)
            except OSError as error:
                raise InvalidValue(
                    f"{path} cannot be unpacked in {tempfile.gettempdir()}: {error.strerror}; set TMPDIR to a folder with "
                    "more space"
                ) from error
    target.flush()
    target.seek(0)
    return target, damage
