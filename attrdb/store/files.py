"""Files of a job, which a killed process leaves either whole or absent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from attrdb.errors import StorageError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it is either whole or absent.

    write:  called with a path beside the file, which it writes to
    raises: StorageError if it cannot be written; the old file stays
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
