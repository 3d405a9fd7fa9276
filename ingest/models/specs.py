"""Specs of customized models: reading and checking a models.jsonl file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from attrdb.errors import AttrdbError, InvalidValue, NotFound
from attrdb.ingest.models.concepts import (
    ConceptSources,
    check_keys,
    check_required,
    parse_concepts,
    read_exemplars_of,
    source_in,
)
from attrdb.ingest.models.exemplars import Exemplar, ExemplarSource, read_source
from attrdb.ingest.models.settings import check_model, settings_for
from attrdb.ingest.options import MODEL_OPTIONS, Concept, ModelSettings
from attrdb.ingest.prompts import BANKS

SHOWN_LINES = 20  # bad lines that an error lists

KEYS = {option.name: option for option in MODEL_OPTIONS}
# Arguments of `settings_for` and `check_model`, or paths; the other keys are settings that have defaults.
NOT_SETTINGS = {"exemplars", "concepts", "category", "kind", "base_model", "model_id", "split", "profile"}

Hashes = list[tuple[str | None, str]]  # concept and sha256 of each exemplar


@dataclass(frozen=True)
class ModelSpec:
    """A model to be made: a line of the file, checked, with its settings complete."""

    model_id: str
    exemplars: ExemplarSource | ConceptSources
    settings: ModelSettings

    def read_exemplars(self) -> list[Exemplar]:
        """raises: NotFound or InvalidValue for a folder or a file that is gone or cannot be used"""
        return read_exemplars_of(self.exemplars) if isinstance(self.exemplars, dict) else read_source(self.exemplars)


def read_specs(path: Path, base_model: str | None = None) -> list[ModelSpec]:
    """The models of a JSON Lines file, one per line, in its order. A line that repeats another counts once.

    Every line is checked, exemplars included, before any is returned. Paths are relative to the file's folder.
    base_model: for lines that name none
    raises:     NotFound if there is no file, InvalidValue with number and problem of every bad line, up to SHOWN_LINES
    """
    if not path.is_file():
        raise NotFound(f"no file {path}; write one JSON object per line, one line per model")
    specs = _Specs()
    problems = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                specs.add(number, *_read_line(line, path.parent, base_model))
            except AttrdbError as error:
                problems.append(f"line {number}: {error}")
    if problems:
        raise InvalidValue(
            f"{path} has {len(problems)} lines that cannot be used; nothing was begun" + _listed(problems)
        )
    if not specs.by_id:
        raise InvalidValue(f"{path} has no model in it; write one JSON object per line, one line per model")
    return list(specs.by_id.values())


class _Specs:
    """Specs by model id, with the line and the exemplars' hashes of each."""

    def __init__(self) -> None:
        self.by_id: dict[str, ModelSpec] = {}
        self._lines: dict[str, tuple[int, Hashes]] = {}

    def add(self, line: int, spec: ModelSpec, hashes: Hashes) -> None:
        """raises: InvalidValue if an earlier line makes another model with the same id"""
        first = self.by_id.setdefault(spec.model_id, spec)
        first_line, first_hashes = self._lines.setdefault(spec.model_id, (line, hashes))
        differing = _differing_settings(first.settings, spec.settings) + ["exemplars"] * (hashes != first_hashes)
        if differing:
            raise InvalidValue(
                f"it makes model {spec.model_id!r} as line {first_line} does, with other {', '.join(differing)}; "
                "give each model its own model_id"
            )


def _differing_settings(first: ModelSettings, second: ModelSettings) -> list[str]:
    names = [declared.name for declared in fields(ModelSettings)]
    return [name for name in names if getattr(first, name) != getattr(second, name)]


def _listed(problems: Sequence[str]) -> str:
    n_more = len(problems) - SHOWN_LINES
    lines = [*problems[:SHOWN_LINES], *([f"and {n_more} more"] if n_more > 0 else [])]
    return "".join(f"\n  {line}" for line in lines)


def _read_line(line: bytes, folder: Path, base_model: str | None) -> tuple[ModelSpec, Hashes]:
    """A line's spec and the hashes of its exemplars."""
    values = _parse(line)
    concepts: tuple[Concept, ...] = ()
    exemplars: ExemplarSource | ConceptSources
    if "concepts" in values:
        concepts, exemplars = parse_concepts(values["concepts"], folder)
    else:
        exemplars = source_in(values["exemplars"], folder)
    options = {name: value for name, value in values.items() if name not in NOT_SETTINGS}
    if options.get("prompts", BANKS[0]) not in BANKS:
        options["prompts"] = str(folder / options["prompts"])
    settings = settings_for(
        _base_model_of(values, folder, base_model),
        values.get("kind"),
        values.get("category"),
        options,
        values.get("split"),
        values.get("profile"),
        concepts,
    )
    images = ModelSpec("", exemplars, settings).read_exemplars()
    model_id = check_model(settings, images, values.get("model_id"))
    return ModelSpec(model_id, exemplars, settings), [(exemplar.token, exemplar.picture.sha256) for exemplar in images]


def _base_model_of(values: dict[str, Any], folder: Path, base_model: str | None) -> str:
    name = values.get("base_model", base_model)
    if name is None:
        raise InvalidValue("no base_model; name one in the line, or one for all lines with --base-model")
    in_folder = "base_model" in values and (folder / name).exists()
    return str(folder / name) if in_folder else name


def _parse(line: bytes) -> dict[str, Any]:
    """A line's object, with every key and value checked."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidValue(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InvalidValue(f"must be a JSON object, found {type(values).__name__}")
    check_keys(values, KEYS, given_elsewhere=["base_model"])  # the command may name one for all lines
    check_required(values, lambda name: f"key {name!r}")
    return values
