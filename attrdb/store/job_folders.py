"""Folders of unfinished jobs, `<database>/jobs/...`: where they are, and the settings that a job has begun with.

A folder is deleted by its `JobFolder` alone, which is made of an id that `ids.check_id` let pass, or of a name that the
database's `jobs` lists. An id in a row, which may come from a stranger, never becomes a path by itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attrdb.errors import InvalidValue
from attrdb.store.files import write_whole
from attrdb.store.ids import RULE, check_id, text_digest


@dataclass(frozen=True)
class JobFolder:
    """The folder of an unfinished job in a database's `jobs`; made by the functions below."""

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
    return JobFolder(_jobs(database) / check_id("model", model_id))


def train_job(database: Path, mapper_id: str) -> JobFolder:
    """Begins with a dot, which no model's does: a model may be called 'train-...'."""
    return JobFolder(_jobs(database) / f".train-{check_id('mapper', mapper_id)}")


def encode_job(database: Path, encoder_id: str) -> JobFolder:
    """Of an encoder in the database: its id is a column's name already, and may be longer than an id is today."""
    name = encoder_id if RULE.fullmatch(encoder_id) else text_digest(encoder_id)
    return JobFolder(_jobs(database) / f".encode-{name}")


def model_jobs(database: Path) -> dict[str, JobFolder]:
    """The half-done models, by model_id."""
    return {job.path.name: job for job in _listed(database, "[!.]*")}


def train_jobs(database: Path) -> dict[str, JobFolder]:
    """The half-trained mappers, by mapper_id."""
    return {job.path.name.removeprefix(".train-"): job for job in _listed(database, ".train-*")}


def encode_jobs(database: Path) -> list[JobFolder]:
    return _listed(database, ".encode-*")


def _listed(database: Path, names: str) -> list[JobFolder]:
    """Links are left out: what they point to is not the database's."""
    return [
        JobFolder(folder)
        for folder in sorted(_jobs(database).glob(names))
        if folder.is_dir() and not folder.is_symlink()
    ]


def _jobs(database: Path) -> Path:
    """raises: InvalidValue if `jobs` is a link that leaves the database"""
    folder = database / "jobs"
    if not folder.resolve().is_relative_to(database.resolve()):
        raise InvalidValue(f"{folder} is a link that leaves the database; make it a folder")
    return folder


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
