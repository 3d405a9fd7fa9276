"""Errors of Lance about a disk or a file, turned into attrdb's errors in one place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from lance.commit import CommitConflictError

from attrdb.errors import AttrdbError, InvalidValue, OutOfMemory, StorageError

# The last two: no thread could be made.
NO_MEMORY = ("Cannot allocate memory", "os error 12", "os error 11", "Task was aborted")
SHOWN = 200  # characters of the beginning and of the end of a long error


def by_lance(error: BaseException) -> bool:
    """Whether it may be Lance's error about a disk or a file. A panic of Lance is no Exception and has no public class."""
    return isinstance(error, (OSError, pa.ArrowException, RuntimeError)) or type(error).__name__ == "PanicException"


def words_of(error: BaseException) -> str:
    """The first line of an error's text, without lines of Lance's source; the middle of a long one is left out."""
    lines = re.sub(r",? /\S+\.rs:\d+(:\d+)?", "", str(error)).splitlines()
    words = lines[0] if lines else type(error).__name__
    return words if len(words) <= 2 * SHOWN else f"{words[:SHOWN]} ... {words[-SHOWN:]}"


def cause_of(path: Path, error: BaseException) -> BaseException | None:
    """The error of attrdb that an error of Lance stands for, if its words say what happened; None if they do not."""
    text, words = str(error), words_of(error)
    if "KeyboardInterrupt" in text:  # Lance asks for Ctrl-C while it computes, and wraps it
        return KeyboardInterrupt()
    if "Error applying filter expression" in text:
        return InvalidValue(f"a predicate cannot be computed for every image: {words.rpartition('Arrow error: ')[2]}")
    if "No space left" in text or "os error 28" in text:
        return StorageError(
            f"the disk of {path} is full; what was committed before is kept: free some space, then rerun the command"
        )
    if "Too many open files" in text or "os error 24" in text:
        return StorageError(
            f"{path} cannot be read or written: too many files are open; allow more (ulimit -n), or close other databases "
            "of this process"
        )
    if any(sign in text for sign in NO_MEMORY):
        return OutOfMemory(
            f"{path} cannot be read or written: no memory, or no thread, is left; end other programs and rerun the command"
        )
    if any(sign in text for sign in ("Read-only file system", "Permission denied", "os error 13", "os error 30")):
        return StorageError(f"{path} cannot be written: {words}; open it with read_only=True to read it")
    return None


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn errors of Lance about a disk or a file into errors of attrdb, mostly StorageError; pass commit conflicts on."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, (AttrdbError, CommitConflictError)) or not by_lance(error):
            raise
        if cause := cause_of(path, error):
            raise cause from error
        if re.search(r"Not found: \S*/(data|_versions|_indices|_deletions)/", str(error)):
            raise StorageError(
                f"{path} cannot be read: a file of the version that is being read is gone ({words_of(error)}). If old "
                "versions were deleted meanwhile (optimize --drop-older-than, remove --purge), rerun the command; a "
                f"file that is lost is named by: attrdb check {path}"
            ) from error
        raise StorageError(
            f"{path} cannot be read or written: {words_of(error)}; a damaged file is named by: attrdb check {path}"
        ) from error
