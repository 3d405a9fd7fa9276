"""What Lance says about a disk or a file, turned into attrdb's errors in one place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from lance.commit import CommitConflictError

from attrdb.errors import StorageError


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
