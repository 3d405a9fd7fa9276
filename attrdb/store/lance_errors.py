"""Errors of Lance about a disk or a file, turned into attrdb's errors in one place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from lance.commit import CommitConflictError

from attrdb.errors import StorageError

SHOWN = 200  # characters of the beginning and of the end of a long error


def by_lance(error: BaseException) -> bool:
    """Whether it may be Lance's error about a disk or a file. A panic of Lance is no Exception and has no public class."""
    return isinstance(error, (OSError, pa.ArrowException, RuntimeError)) or type(error).__name__ == "PanicException"


def words_of(error: BaseException) -> str:
    """The first line of an error's text, without lines of Lance's source; the middle of a long one is left out."""
    lines = re.sub(r",? /\S+\.rs:\d+(:\d+)?", "", str(error)).splitlines()
    words = lines[0] if lines else type(error).__name__
    return words if len(words) <= 2 * SHOWN else f"{words[:SHOWN]} ... {words[-SHOWN:]}"


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn errors of Lance about a disk or a file into a StorageError; commit conflicts are passed on."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, (StorageError, CommitConflictError)) or not by_lance(error):
            raise
        text, words = str(error), words_of(error)
        if "No space left" in text or "os error 28" in text:
            raise StorageError(
                f"the disk of {path} is full; what was committed before is kept: free some space, then rerun the command"
            ) from error
        if any(sign in text for sign in ("Read-only file system", "Permission denied", "os error 13", "os error 30")):
            raise StorageError(f"{path} cannot be written: {words}; open it with read_only=True to read it") from error
        raise StorageError(
            f"{path} cannot be read or written: {words}; a damaged file is named by: attrdb check {path}"
        ) from error
