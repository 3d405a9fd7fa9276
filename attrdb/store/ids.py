"""Ids that become part of a path: one rule for all of them, and the only places where they do.

An id has 1 to 120 letters (A to Z, a to z), digits, '.', '_' and '-', and begins with a letter or a digit. So it cannot name
a folder above, a hidden file, or another file of the database. No path that holds an id is deleted unless it was made here.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attrdb.errors import InvalidValue
from attrdb.store.files import write_whole

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


def check_same_settings(noun: str, name: str, stored: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """raises: InvalidValue, naming both values, if the settings of a mapper or model differ from those it is stored with

    where: it is stored, such as "in my.attrdb"
    """
    for key in sorted(stored.keys() | wanted.keys()):
        if stored.get(key) != wanted.get(key):
            raise InvalidValue(
                f"{noun} {name!r} is {where} with {key} = {stored.get(key)!r}, now it is {wanted.get(key)!r}; "
                f"use the old settings or another --{noun}-id"
            )


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

    @property
    def settings_file(self) -> Path:
        return self.path / "settings.json"

    def read_settings(self) -> dict[str, Any] | None:
        """The settings of the job that has begun here, or None.

        raises: InvalidValue if the file is damaged
        """
        try:
            record = json.loads(self.settings_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise InvalidValue(f"{self.settings_file} is damaged; delete {self.path} to start again")
        return record

    def write_settings(self, record: Mapping[str, Any]) -> None:
        text = json.dumps(record, indent=2)
        write_whole(self.settings_file, lambda part: part.write_text(text, encoding="utf-8"))

    def remove(self) -> None:
        """Delete the folder and what is in it; a link in its place is left alone, with what it points to."""
        shutil.rmtree(self.path, ignore_errors=True)


def model_job(database: Path, model_id: str) -> JobFolder:
    return JobFolder(database / "jobs" / check_id("model", model_id))


def train_job(database: Path, mapper_id: str) -> JobFolder:
    """Begins with a dot, which no model's does: a model may be called 'train-...'."""
    return JobFolder(database / "jobs" / f".train-{check_id('mapper', mapper_id)}")


def encode_job(database: Path, encoder_id: str) -> JobFolder:
    """Of an encoder in the database: its id is a column's name already, and may be longer than an id is today."""
    name = encoder_id if RULE.fullmatch(encoder_id) else _digest(encoder_id)
    return JobFolder(database / "jobs" / f".encode-{name}")


def weights_file(database: Path, model_id: str) -> Path:
    return database / "weights" / f"{check_id('model', model_id)}.safetensors"


def lock_file(database: Path, command: str, *subjects: str) -> Path:
    """The lock of a command on subjects that may be any text, such as a source, or an id that an older attrdb let pass."""
    return database / "jobs" / f".{command}-{_digest(*subjects)}.lock"


def _digest(*texts: str) -> str:
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
