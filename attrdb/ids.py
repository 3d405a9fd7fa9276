"""Ids that become part of a path: one rule for all of them, and the only places where they do.

An id may be a file's name on every disk: 1 to 120 letters, digits, '.', '_' and '-', beginning with a letter or a digit. So
it cannot name a folder above, a hidden file, or another file of the database. Nothing is deleted with its content unless its
path was made here.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from attrdb.errors import InvalidValue

LONGEST = 120  # characters: file names may have 255 bytes, and a lock is named after an encoder and a mapper
RULE = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST - 1}}}")


def check_id(noun: str, value: str) -> str:
    """The id, if it may be part of a path.

    noun:   what it is the id of, such as 'mapper'
    raises: InvalidValue
    """
    if not RULE.fullmatch(value):
        shown = value if len(value) <= LONGEST else value[:40] + "..."
        raise InvalidValue(
            f"{noun} id {shown!r} ({len(value)} characters) cannot be used; an id has 1 to {LONGEST} letters (a to z), "
            "digits, '.', '_' and '-', and begins with a letter or a digit"
        )
    return value


@dataclass(frozen=True)
class JobFolder:
    """The folder of an unfinished job in a database's `jobs`; made by the functions below, whose ids are checked."""

    path: Path

    @property
    def lock(self) -> Path:
        """The file that the process at this job holds."""
        return self.path.with_name(f".{self.path.name}.lock")

    def make(self) -> Path:
        self.path.mkdir(parents=True, exist_ok=True)
        return self.path

    def remove(self) -> None:
        """Delete the folder and what is in it; a link in its place is left alone, with what it points to."""
        shutil.rmtree(self.path, ignore_errors=True)


def model_job(database: Path, model_id: str) -> JobFolder:
    return JobFolder(database / "jobs" / check_id("model", model_id))


def train_job(database: Path, mapper_id: str) -> JobFolder:
    """Begins with a dot, which no model's does: a model may be called 'train-...'."""
    return JobFolder(database / "jobs" / f".train-{check_id('mapper', mapper_id)}")


def encode_job(database: Path, encoder_id: str) -> JobFolder:
    return JobFolder(database / "jobs" / f".encode-{check_id('encoder', encoder_id)}")


def weights_file(database: Path, model_id: str) -> Path:
    return database / "weights" / f"{check_id('model', model_id)}.safetensors"


def lock_file(database: Path, command: str, *subjects: str) -> Path:
    """The lock of a command on subjects that may be any text, such as a source, or an id that an older attrdb let pass."""
    digest = hashlib.sha256("\0".join(subjects).encode()).hexdigest()[:16]
    return database / "jobs" / f".{command}-{digest}.lock"


def stored_file(database: Path, relative: str) -> Path:
    """The file that a row of the database names.

    raises: InvalidValue for one outside the database: rows may come from strangers
    """
    root = database.resolve()
    path = (root / relative).resolve()
    if not path.is_relative_to(root):
        raise InvalidValue(f"{database} names the file {relative!r}, which lies outside of it; it is not read")
    return database / relative
