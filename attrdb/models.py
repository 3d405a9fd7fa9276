"""The customized models of a database: their list, all that is known of one, and their labels."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa

from attrdb.database import Database
from attrdb.errors import InvalidValue, NotFound
from attrdb.store.ids import stored_file
from attrdb.store.predicates import among, literal
from attrdb.text import fixed

LIST = """\
SELECT
    model_id,
    kind,
    category,
    split,
    n_exemplars,
    n_samples,
    method,
    customize_seconds + synthesize_seconds AS seconds
FROM models
ORDER BY model_id
"""
EXAMPLES = {"split": "train, val or test", "category": "vase"}
SHOWN_ELSEWHERE = (
    "exemplars",
    "exemplar_tokens",
    "concepts",
    "prompts",
    "captions",
)  # settings that `describe` has apart


def list_models(db: Database) -> pa.Table:
    """A row per model; seconds: of training and sampling, null where they were not measured."""
    return db.sql(LIST)


def describe(db: Database, model_id: str) -> dict[str, Any]:
    """All that is known of one model, but for pictures and features, as JSON can hold it.

    returns: the columns of `models`, with settings as an object, and
             training   what was noted while it was trained, see `training_record`
             concepts   its rows of `concepts`, in their order in the settings
             exemplars  image_id, source, category, concept_id, prompt (caption), creator, license of each
             samples    image_id, prompt, prompt_scheme, seed of each, by scheme and prompt
    raises:  NotFound, with the nearest ids
    """
    found = db.sql("SELECT * FROM models WHERE model_id = $id", {"id": model_id}).to_pylist()
    if not found:
        raise NotFound(_no_such_model(db, model_id))
    [model] = found
    settings = json.loads(model.pop("settings") or "{}")
    model["created_at"] = model["created_at"] and model["created_at"].isoformat()
    own = {"id": model_id}
    concepts = db.sql("SELECT * FROM concepts WHERE model_id = $id", own).to_pylist()
    tokens = [concept["token"] for concept in settings.get("concepts") or []]
    # A moment before schema 8 has no such column.
    concept_id = "concept_id" if "concept_id" in db.snapshot.tables["images"].schema.names else "NULL AS concept_id"
    exemplars = db.sql(
        f"SELECT image_id, source, category, {concept_id}, prompt, creator, license FROM exemplars WHERE model_id = $id "
        "ORDER BY image_id",
        own,
    )
    samples = db.sql("SELECT image_id, prompt, prompt_scheme, seed FROM samples WHERE model_id = $id", own)
    return {
        **model,
        "settings": settings,
        "training": training_record(db.path, model["weights_path"]),
        "concepts": sorted(concepts, key=lambda row: (_position(row["token"], tokens), row["token"])),
        "exemplars": exemplars.to_pylist(),
        "samples": sorted(samples.to_pylist(), key=lambda row: _place(row, settings.get("prompts") or [])),
    }


def training_record(path: Path, weights_path: str | None) -> dict[str, Any]:
    """What was noted while a model was trained: `losses`, one a step, and figures such as `customize_seconds`.

    It is a JSON object beside the weights, `weights/<model_id>.json`; empty where there is none. One that cannot be read
    is told as `problem`: the model can be used without it.
    """
    if not weights_path:
        return {}
    file = stored_file(path, str(PurePath(weights_path).with_suffix(".json")))
    if not file.exists():
        return {}
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        record["losses"] = [float(loss) for loss in record.get("losses", []) if math.isfinite(loss)]
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        return {"problem": f"{file} is not a training record: {error}"}
    return record


MONITORED = {"probes": "monitor_probes", "changes": "monitor_changes", "steps": "monitor_steps"}  # most first
N_GREATEST = 3


def monitoring_level(db: Database, model_id: str) -> str | None:
    """What was noted while a model was customized: `probes`, `changes` or `steps`; None if it was not monitored."""
    for level, table in MONITORED.items():
        if db.sql(f"SELECT 1 FROM {table} WHERE model_id = $id LIMIT 1", {"id": model_id}).num_rows:
            return level
    return None


def monitoring_in_words(db: Database, model_id: str) -> str | None:
    """The level, and for each concept the exemplars of the greatest progress; None if it was not monitored."""
    level = monitoring_level(db, model_id)
    if level is None:
        return None
    by_concept: dict[str | None, list[str]] = {}
    for row in db.query("attribution_table", model_id=model_id).to_pylist():  # greatest first
        exemplars = by_concept.setdefault(row["concept_id"], [])
        if len(exemplars) < N_GREATEST:
            exemplars.append(f"{row['image_id']} {fixed(100 * row['value'], 0)} %")
    greatest = [
        f"greatest progress{f' of {concept_id}' if len(by_concept) > 1 else ''}: {', '.join(exemplars)}"
        for concept_id, exemplars in by_concept.items()
    ]
    return "; ".join([level, *greatest])


def kind_in_words(model: dict[str, Any]) -> str:
    """What kind of model a described model is."""
    return "model of several concepts" if model["kind"] == "concepts" else f"{model['kind'] or ''} model"


def settings_by_group(model: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of a described model, those of the model itself first; what the description has apart is left out."""
    groups: dict[str, dict[str, Any]] = {"model": {}}
    for name, value in model["settings"].items():
        if isinstance(value, dict):
            groups[name] = value
        elif name not in SHOWN_ELSEWHERE and model.get(name) != value:
            groups["model"][name] = value
    return {group: values for group, values in groups.items() if values}


def _place(sample: dict[str, Any], prompts: list[str]) -> tuple[str, int, str, str]:
    """Samples come by scheme, then in the order in which the model's prompts were drawn, then by id."""
    prompt = sample["prompt"] or ""
    return (sample["prompt_scheme"] or "", _position(prompt, prompts), prompt, sample["image_id"])


def _position(value: str, values: list[str]) -> int:
    """Where a value is in a list; after all of them if it is not."""
    return values.index(value) if value in values else len(values)


@dataclass(frozen=True)
class Relabelled:
    """What `set_models` changed. fitted: mappers that were trained or stopped on a split which a model has left or joined."""

    n_models: int
    n_images: int
    fitted: list[str]


def set_models(
    db: Database, model_ids: Sequence[str], *, split: str | None = None, category: str | None = None
) -> Relabelled:
    """Give models another split or category, with their exemplars and samples.

    The exemplars of a model of several concepts keep the categories of their concepts.
    Models that have it already are left alone, so a rerun completes what was interrupted.
    raises: NotFound for an id that is not there, InvalidValue for an empty value or none at all; nothing is changed then
    """
    values = {name: value for name, value in (("split", split), ("category", category)) if value is not None}
    if not values:
        raise InvalidValue("nothing to set: give --split or --category")
    for name, value in values.items():
        if not value.strip():
            raise InvalidValue(f"an empty {name}; give a name, such as {EXAMPLES[name]}")
    known = {row["model_id"]: row for row in db.sql("SELECT model_id, kind, split, category FROM models").to_pylist()}
    for model_id in model_ids:
        if model_id not in known:
            raise NotFound(_no_such_model(db, model_id))
    differing = {name: f"({name} IS NULL OR {name} <> {literal(value)})" for name, value in values.items()}
    in_images = differing | ({"category": f"(concept_id IS NULL AND {differing['category']})"} if category else {})
    of_models = among("model_id", dict.fromkeys(model_ids))
    n_images = db.snapshot.count(f"{of_models} AND ({' OR '.join(in_images.values())})")
    changed = [id_ for id_ in dict.fromkeys(model_ids) if any(known[id_][name] != values[name] for name in values)]
    moved = {split, *(known[model_id]["split"] for model_id in changed)} if split else set()
    fitted = [
        row["mapper_id"]
        for row in db.sql("SELECT mapper_id, settings FROM mappers ORDER BY mapper_id").to_pylist()
        if changed and moved & {json.loads(row["settings"] or "{}").get(name) for name in ("split", "val_split")}
    ]
    if n_images:
        for name, condition in in_images.items():
            db.writer.update("images", f"{of_models} AND {condition}", {name: values[name]})
    if changed:  # after their images, so that a model whose row has the new values is done
        if category:
            of_one_concept = among("model_id", [id_ for id_ in changed if known[id_]["kind"] != "concepts"])
            db.writer.update("concepts", of_one_concept, {"category": category})
        db.writer.update("models", f"{of_models} AND ({' OR '.join(differing.values())})", values)
    return Relabelled(len(changed), n_images, fitted)


def _no_such_model(db: Database, model_id: str) -> str:
    known = db.sql("SELECT model_id FROM models ORDER BY model_id")["model_id"].to_pylist()
    if not known:
        return f"no customized model {model_id!r}: {db.path} has none yet; make one with: attrdb ingest model {db.path}"
    near = sorted(difflib.get_close_matches(model_id, known, 3, 0)) if len(known) > 3 else known
    which = ", ".join(map(repr, near))
    is_or_are = "is" if len(near) == 1 else "are"
    return (
        f"no customized model {model_id!r}; nearest {is_or_are} {which} (list them with: attrdb models list {db.path})"
    )
