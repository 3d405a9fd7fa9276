"""Ids that become part of a path: one rule for all of them. Only this module and `job_folders` make paths of them.

An id has 1 to 120 letters (A to Z, a to z), digits, '.', '_' and '-', and begins with a letter or a digit. So it cannot name
a folder above, a hidden file, or another file of the database. No path that holds an id is deleted unless it was made there.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path, PurePath
from typing import TypeVar

from attrdb.errors import InvalidValue

AnyPath = TypeVar("AnyPath", bound=PurePath)
LONGEST = 120  # characters: with what stands before and after it, a file's name keeps within 255 bytes
RULE = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST - 1}}}")


def check_id(noun: str, value: str) -> str:
    """The id, if it may be part of a path.

    noun:   what it is the id of, such as 'mapper'
    raises: InvalidValue
    """
    if not RULE.fullmatch(value):
        shown = value if len(value) <= LONGEST else value[:40] + "..."
        raise InvalidValue(
            f"{noun} id {shown!r} ({len(value)} characters) cannot be used; an id has 1 to {LONGEST} letters (A to Z, "
            "a to z), digits, '.', '_' and '-', and begins with a letter or a digit"
        )
    return value


def weights_file(database: Path, model_id: str) -> Path:
    return database / "weights" / f"{check_id('model', model_id)}.safetensors"


def files_beside(weights: AnyPath) -> tuple[AnyPath, AnyPath]:
    """What is kept beside a model's weights: the record of its training, and sums of gradients if it was monitored."""
    return weights.with_suffix(".json"), weights.with_suffix(".gradients")


def lock_file(database: Path, command: str, *subjects: str) -> Path:
    """The lock of a command on subjects that may be any text, such as a source, or an id that an older attrdb let pass."""
    return database / "jobs" / f".{command}-{text_digest(*subjects)}.lock"


def text_digest(*texts: str) -> str:
    """What stands for any text in the name of a file: 16 digits."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def stored_file(database: Path, relative: str) -> Path:
    """The file that a row of the database names.

    raises: InvalidValue for one outside the database, also by way of a link: rows may come from strangers
    """
    root = database.resolve()
    try:
        inside = (root / relative).resolve().is_relative_to(root)
    except (OSError, ValueError):  # a NUL in it, links in a circle
        inside = False
    if not inside:
        raise InvalidValue(f"{database} names the file {relative!r}, which lies outside of it; it is not read")
    return database / relative
