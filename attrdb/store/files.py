"""Files of a job, which a killed process leaves whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from attrdb.errors import StorageError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that appears whole or not at all.

    write:  writes to the path that it is given, beside the file
    raises: StorageError if it cannot be written; what was there stays
    """
    part = path.with_suffix(".part")
    try:
        write(part)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise StorageError(
            f"{path} cannot be written: {reason}; free some space there, then rerun the command"
        ) from error
