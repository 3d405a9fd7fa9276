"""The AbC release (Wang et al. 2023): models that others have customized, with their exemplars and samples as files.

A release file is a JSON list with one entry per model:
    {"exemplar": [path], "synth": {"gpt": [path], "object" or "media": [path]}, "class_id": text, "category": text or null}
Its name gives the data set and the split, such as test_bamfg.json. Paths are relative to the release's root, the folder
that has `dataset` in it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from attrdb.database import Database
from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.customize.customizers import DEFAULT_METHOD
from attrdb.ingest.encode import Encoder
from attrdb.ingest.prompts import TOKEN, train_prompt
from attrdb.ingest.read.corpus import image_rows, register
from attrdb.ingest.read.pictures import Picture, read_picture_file
from attrdb.progress import Progress, no_progress
from attrdb.store import jobs
from attrdb.store.jobs import JobResult
from attrdb.text import decode

BASE_MODEL = "CompVis/stable-diffusion-v1-4"
KEYS = {"exemplar", "synth", "class_id", "category"}
SCHEMES = {"gpt": "gpt", "object": "procedural", "media": "procedural"}  # the release's word: ours
KIND_OF = {"artchive": "style", "bamfg": "style", "imagenet": "object"}
FILE_NAME = re.compile(rf"(train|val|test)_(?:(observed|unobserved)_)?({'|'.join(KIND_OF)})\.json")


@dataclass(frozen=True)
class ReleasedModel:
    """An entry of a release. Paths are relative to its root, as the release spells them."""

    model_id: str
    class_id: str
    kind: str
    category: str | None
    source: str
    split: str
    exemplars: tuple[str, ...]
    samples: dict[str, tuple[str, ...]]  # by the release's word for the prompt scheme
    missing: tuple[str, ...]  # those of all paths at which there is no file

    @property
    def settings_hash(self) -> str:
        """Of everything that the release holds about the model."""
        entry = [self.class_id, self.category, self.split, self.exemplars, self.samples]
        return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Release:
    name: str
    root: Path
    models: list[ReleasedModel]

    @property
    def missing(self) -> list[str]:
        """Paths at which there is no file, of all models."""
        return [path for model in self.models for path in model.missing]


# --- reading ----------------------------------------------------------------------------------------------------------


def read_release(json_path: Path, root: Path) -> Release:
    """Every entry of a release file, checked; no picture is opened.

    raises: NotFound for the file or the root, InvalidValue, with the entry's number (from 0), for an entry that is not as
            above or has a path that leads out of the root
    """
    name = FILE_NAME.fullmatch(json_path.name)
    if not name:
        raise InvalidValue(
            f"release file {json_path} has a name without split and data set; it must be a name such as "
            "test_artchive.json, val_bamfg.json, test_observed_imagenet.json or test_unobserved_imagenet.json"
        )
    if not json_path.is_file():
        raise NotFound(f"no release file {json_path}")
    if not root.is_dir():
        raise NotFound(f"no release root folder {root}")
    split = f"{name[1]}_unseen" if name[2] == "unobserved" else name[1]
    try:
        entries = json.loads(decode(json_path.read_bytes(), str(json_path)))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidValue(f"release file {json_path} is not JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise InvalidValue(f"release file {json_path} must be a JSON list with an entry for every model")
    exists = _finder(root)
    models: list[ReleasedModel] = []
    numbers: dict[str, int] = {}
    for number, entry in enumerate(entries):
        try:
            model = _released_model(entry, name[3], split, exists)
        except InvalidValue as error:
            raise InvalidValue(f"{json_path} entry {number}: {error}") from error
        if numbers.setdefault(model.model_id, number) != number:
            raise InvalidValue(f"{json_path} entry {number}: entry {numbers[model.model_id]} has the same exemplars")
        models.append(model)
    return Release(json_path.name, root, models)


def _released_model(entry: object, source: str, split: str, exists: Callable[[str], bool]) -> ReleasedModel:
    if not isinstance(entry, dict) or entry.keys() != KEYS:
        keys = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise InvalidValue(f"the keys must be {', '.join(sorted(KEYS))}; found {keys}")
    class_id, category, synth = entry["class_id"], entry["category"], entry["synth"]
    if not isinstance(class_id, str) or not class_id.strip():
        raise InvalidValue(f"class_id must be text, found {class_id!r}")
    if category is not None and not isinstance(category, str):
        raise InvalidValue(f"category must be text or null, found {category!r}")
    if not isinstance(synth, dict) or not synth or synth.keys() - SCHEMES.keys():
        keys = sorted(synth) if isinstance(synth, dict) else type(synth).__name__
        raise InvalidValue(f"synth must have lists under {', '.join(SCHEMES)}; found {keys}")
    exemplars = _paths("exemplar", entry["exemplar"], "exemplar", source)
    samples = {word: _paths(f"synth {word}", paths, "synth", source) for word, paths in sorted(synth.items())}
    all_paths = [*exemplars, *(path for paths in samples.values() for path in paths)]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", class_id)
    return ReleasedModel(
        f"{source}-{name}-{hashlib.sha256(json.dumps(exemplars).encode()).hexdigest()[:8]}",
        class_id,
        KIND_OF[source],
        category,
        source,
        split,
        exemplars,
        samples,
        tuple(path for path in all_paths if not exists(path)),
    )


def _paths(key: str, paths: object, folder: str, source: str) -> tuple[str, ...]:
    """The paths of a list under a key, checked: none twice, none of another data set."""
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) and path for path in paths):
        raise InvalidValue(f"{key} must be a list of paths with at least one in it, found {str(paths)[:100]}")
    if len(set(paths)) < len(paths):
        repeated = next(path for number, path in enumerate(paths) if path in paths[:number])
        raise InvalidValue(f"{key} has {repeated!r} twice")
    for path in paths:
        parts = PurePosixPath(path).parts
        at = parts.index(folder) + 1 if folder in parts else len(parts)
        if at < len(parts) - 1 and parts[at] in KIND_OF and parts[at] != source:
            raise InvalidValue(f"{key} path {path!r} belongs to {parts[at]}, and the file's name to {source}")
    return tuple(paths)


def _finder(root: Path) -> Callable[[str], bool]:
    """A function that tells whether there is a file at a path; it raises InvalidValue if the path leads out of the root."""
    real_root = root.resolve()

    @lru_cache(maxsize=1024)  # dozens of samples lie in one folder
    def resolved(folder: Path) -> Path:
        return folder.resolve()

    def exists(path: str) -> bool:
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or "\0" in path:
            raise InvalidValue(f"path {path!r} leads out of the release's root; it must be relative, without '..'")
        full = resolved((real_root / pure).parent) / pure.name
        if full.is_symlink():
            full = full.resolve()
        if not full.is_relative_to(real_root):
            raise InvalidValue(f"path {path!r} is a link to {full}, outside the release's root {root}")
        return full.is_file()

    return exists


# --- importing --------------------------------------------------------------------------------------------------------


def ingest_abc(
    db: Database,
    release: Release,
    encoders: Sequence[Encoder],
    report: Progress = no_progress,
) -> JobResult:
    """Append the models of a release that are not stored yet, each in one commit.

    Models with missing or unusable files are left out and listed; a rerun appends those whose files are there by then.
    Exemplars with the same content are stored once, because their id is the hash of their content.
    raises: InvalidValue for an encoder as `register`
    """
    register(db, encoders)
    db.refresh()
    stored = {
        row["model_id"]: row["settings_hash"]
        for row in db.sql("SELECT model_id, settings_hash FROM models").to_pylist()
    }
    with jobs.running(db.writer, "ingest abc", f"{release.name} in {release.root.resolve()}", {}) as job:
        for done, model in enumerate(release.models):
            report(f"ingest {release.name}", done, len(release.models))
            if reason := _append_unless_stored(db, release, model, encoders, stored, job):
                job.failed({model.model_id: reason})
            else:
                job.mended([model.model_id])
    report(f"ingest {release.name}", len(release.models), len(release.models))
    return job.result({model.model_id for model in release.models})


def _append_unless_stored(
    db: Database,
    release: Release,
    model: ReleasedModel,
    encoders: Sequence[Encoder],
    stored: dict[str, str],
    job: jobs.Job,
) -> str | None:
    """Append a model unless it is stored. Returns the reason if it could not be appended."""
    if model.model_id in stored:
        if stored[model.model_id] == model.settings_hash:
            job.n_stored += 1
            return None
        difference = "stored already, with other samples, another category or another split"
        return f"{difference}; import {release.name} into another database"
    if model.missing:
        return f"{len(model.missing)} files are missing, the first is {model.missing[0]}"
    try:
        _append(db, release, model, encoders)
    except InvalidValue as error:
        return str(error)
    job.n_done += 1
    return None


def _append(db: Database, release: Release, model: ReleasedModel, encoders: Sequence[Encoder]) -> None:
    shared = {"model_id": model.model_id, "split": model.split, "category": model.category}
    rows: dict[str, dict[str, Any]] = {}
    pictures: list[Picture] = []

    def add(path: str, row: dict) -> None:
        picture = read_picture_file(release.root / path)
        image_id = row.get("image_id", f"{model.model_id}/{picture.sha256[:16]}")
        if row["role"] == "exemplar" and image_id in rows:
            return
        if image_id in rows:
            raise InvalidValue(f"samples {rows[image_id]['uri']} and {path} would have the same id, {image_id!r}")
        rows[image_id] = shared | row | {"image_id": image_id, "uri": (release.root / path).resolve().as_uri()}
        pictures.append(picture)

    for path in model.exemplars:
        add(path, {"role": "exemplar", "source": model.source})
    n_exemplars = len(rows)
    for word, paths in model.samples.items():
        scheme, metadata = SCHEMES[word], json.dumps({"release_scheme": word})
        for path in paths:
            image_id = f"{model.model_id}/{scheme}/{PurePosixPath(path).stem}"
            row = {"image_id": image_id, "role": "sample", "source": "synthesized", "prompt_scheme": scheme}
            add(path, row | {"metadata": metadata})
    n_samples = len(rows) - n_exemplars
    table = image_rows(list(rows.values()), pictures, encoders)
    db.writer.append_model(table, _model_row(release, model, n_exemplars, n_samples))


def _model_row(release: Release, model: ReleasedModel, n_exemplars: int, n_samples: int) -> dict:
    settings = {
        "release": release.name,
        "class_id": model.class_id,
        "exemplars": list(model.exemplars),
        "synth": {word: len(paths) for word, paths in model.samples.items()},
    }
    has_prompt = model.kind == "style" or model.category
    return {
        "model_id": model.model_id,
        "base_model": BASE_MODEL,
        "method": DEFAULT_METHOD,
        "kind": model.kind,
        "category": model.category,
        "split": model.split,
        "train_prompt": train_prompt(model.kind, model.category or "") if has_prompt else None,
        "token": TOKEN,
        "settings": json.dumps(settings, sort_keys=True),
        "settings_hash": model.settings_hash,
        "n_exemplars": n_exemplars,
        "n_samples": n_samples,
        "created_at": datetime.now(UTC),
    }
