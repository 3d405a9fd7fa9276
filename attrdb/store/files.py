"""Files of a job, which a killed process leaves whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that appears whole or not at all.

    write: writes to the path that it is given, beside the file
    """
    part = path.with_suffix(".part")
    write(part)
    part.replace(path)
