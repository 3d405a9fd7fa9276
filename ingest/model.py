"""Ingest a model: customize the base model on exemplars, sample it, encode, and append it all at once.

Given again after a crash, the job goes on where it was (`model_job`) and ends in the same rows.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from attrdb.database import Database
from attrdb.errors import InvalidValue
from attrdb.ingest.base_model import base_model_folder, load_base_model, read_profile, weights_hash
from attrdb.ingest.corpus import image_rows, register
from attrdb.ingest.customize import METHOD, CustomizeSettings, check_prompts
from attrdb.ingest.encoders import Encoder
from attrdb.ingest.model_job import NOT_COMPARED, Report, check_same, customized, locked, open_job, sampled
from attrdb.ingest.pictures import Picture, image_files, read_picture, read_picture_file
from attrdb.ingest.prompts import TOKEN, Prompt, choose_prompts, train_prompt
from attrdb.ingest.synthesize import SamplePlan, SynthesizeSettings, plan_samples, use_fast_solver
from attrdb.schema import KINDS


@dataclass(frozen=True)
class Exemplar:
    picture: Picture
    fields: dict = field(default_factory=dict)  # source, creator, license, uri, prompt ... where known


@dataclass(frozen=True)
class ModelSettings:
    """All that decides a customized model and its samples."""

    kind: str
    category: str
    base_model: str
    split: str | None = None
    prompts: str = "photo"
    prompts_per_scheme: int = 4
    customize: CustomizeSettings = field(default_factory=CustomizeSettings)
    synthesize: SynthesizeSettings = field(default_factory=SynthesizeSettings)


@dataclass(frozen=True)
class ModelResult:
    model_id: str
    n_exemplars: int
    n_samples: int
    appended: bool  # false: the model was there already, with these settings
    version: int


def read_exemplars(folder: Path) -> list[Exemplar]:
    """The images of a folder, in the order of their names.

    raises: NotFound if there is no such folder, InvalidValue if it has no image, or one that cannot be used
    """
    files = list(image_files(folder))
    if not files:
        raise InvalidValue(f"exemplar folder {folder} has no image; put PNG, JPEG, WebP, BMP or GIF files into it")
    return [
        Exemplar(read_picture_file(path), {"source": folder.name, "uri": path.resolve().as_uri()}) for path in files
    ]


def settings_for(
    base_model: str, kind: str, category: str, given: dict | None = None, split: str | None = None
) -> ModelSettings:
    """The base model's own profile over the defaults, and what is given over both (None: not given).

    raises: InvalidValue for an unknown kind or setting, NotFound or InvalidValue for the base model or the prompts
    """
    if kind not in KINDS:
        raise InvalidValue(f"kind is {kind!r}; it must be {' or '.join(KINDS)}")
    if not category.strip() or TOKEN in category:
        raise InvalidValue(f"category is {category!r}; it must say what is shown, without the modifier token {TOKEN}")
    wanted = dict(read_profile(base_model_folder(base_model)))
    wanted |= {name: value for name, value in (given or {}).items() if value is not None}
    customize_names, synthesize_names = (
        {one.name for one in fields(part)} for part in (CustomizeSettings, SynthesizeSettings)
    )
    own_names = {"prompts", "prompts_per_scheme"}
    unknown = wanted.keys() - customize_names - synthesize_names - own_names
    if unknown:
        raise InvalidValue(f"unknown settings for base model {base_model}: {', '.join(sorted(unknown))}")

    def only(names: set[str]) -> dict:
        return {name: value for name, value in wanted.items() if name in names}

    settings = ModelSettings(
        kind,
        category,
        base_model,
        split,
        customize=CustomizeSettings(**only(customize_names)),
        synthesize=SynthesizeSettings(**only(synthesize_names)),
        **only(own_names),
    )
    prompts_of(settings)
    return settings


def prompts_of(settings: ModelSettings) -> list[Prompt]:
    """The prompts that a model with these settings is sampled with; raises as `choose_prompts`."""
    return choose_prompts(
        settings.kind, settings.category, settings.prompts, settings.prompts_per_scheme, settings.synthesize.seed
    )


def default_model_id(settings: ModelSettings, exemplars: Sequence[Exemplar]) -> str:
    """`<category>-<hash of the exemplars>`: the same exemplars make the same model."""
    digest = hashlib.sha256("".join(sorted(exemplar.picture.sha256 for exemplar in exemplars)).encode())
    name = re.sub(r"[^a-z0-9]+", "-", settings.category.lower()).strip("-") or settings.kind
    return f"{name}-{digest.hexdigest()[:8]}"


def ingest_model(
    db: Database,
    exemplars: Sequence[Exemplar],
    settings: ModelSettings,
    encoders: Sequence[Encoder],
    model_id: str | None = None,
    report: Report = lambda stage, done, total: None,
) -> ModelResult:
    """Customize, sample, encode and append one model; nothing is done twice.

    raises: InvalidValue if the model is there with other settings, and for exemplars, prompts, encoders or a base model
            that cannot be used: all of it before training begins
    """
    model_id = check_model(settings, exemplars, model_id)
    prompts = prompts_of(settings)
    record = _record(settings, exemplars, prompts)
    job = db.path / "jobs" / model_id
    if done := _stored(db, model_id, record, encoders, job):
        return done
    base = load_base_model(settings.base_model)
    register(db, encoders)
    with locked(job):
        if done := _stored(db, model_id, record, encoders, job):  # by the process that held the lock just now
            return done
        open_job(job, record)
        images = [exemplar.picture.image for exemplar in exemplars]
        weights = db.path / "weights" / f"{model_id}.safetensors"
        figures = customized(base, job, weights, images, settings.category, settings.customize, record, report)
        check_prompts(base.pipeline, record["prompts"], TOKEN)
        use_fast_solver(base)
        batches = plan_samples(model_id, prompts, settings.synthesize)
        encoded, figures["synthesize_seconds"] = sampled(base, job, batches, settings.synthesize, report)
        report("encode", 0, 1)
        plans = [plan for batch in batches for plan in batch]
        rows = _image_rows(model_id, settings, exemplars, plans, encoded, encoders)
        figures |= {"n_exemplars": len(exemplars), "n_samples": len(plans)}
        appended = db.append_model(rows, _model_row(model_id, settings, record, weights, figures))
        shutil.rmtree(job, ignore_errors=True)
        report("encode", 1, 1)
    return ModelResult(model_id, len(exemplars), len(plans), True, appended.version)


def _stored(db: Database, model_id: str, record: dict, encoders: Sequence[Encoder], job: Path) -> ModelResult | None:
    """What is there of the model already, if it is.

    raises: InvalidValue if it was made with other settings
    """
    db.refresh()
    stored = db.sql("SELECT * FROM models WHERE model_id = $id", {"id": model_id}).to_pylist()
    if not stored:
        return None
    check_same(model_id, json.loads(stored[0]["settings"]), record, f"in {db.path}")
    register(db, encoders)
    shutil.rmtree(job, ignore_errors=True)
    return ModelResult(model_id, stored[0]["n_exemplars"], stored[0]["n_samples"], False, db.version)


def check_model(settings: ModelSettings, exemplars: Sequence[Exemplar], model_id: str | None) -> str:
    """The model's id, the given one or one made from category and exemplars.

    raises: InvalidValue for an unusable id, no exemplar, or the same exemplar twice
    """
    if not exemplars:
        raise InvalidValue("a model needs at least one exemplar")
    model_id = model_id or default_model_id(settings, exemplars)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", model_id, re.ASCII):
        raise InvalidValue(f"model id {model_id!r} is not usable; letters, digits, '.', '_' and '-' are")
    first_of: dict[str, str] = {}
    for picture in (exemplar.picture for exemplar in exemplars):
        if first_of.setdefault(picture.sha256, picture.name) != picture.name:
            raise InvalidValue(f"exemplars {first_of[picture.sha256]} and {picture.name} are the same file; keep one")
    return model_id


# --- what a model is -------------------------------------------------------------------------------------------------


def _record(settings: ModelSettings, exemplars: Sequence[Exemplar], prompts: list[Prompt]) -> dict:
    """The settings as they are stored and compared: plain JSON, with hashes for files."""
    record = json.loads(json.dumps(asdict(settings)))
    return record | {
        "method": METHOD,
        "base_model_hash": weights_hash(base_model_folder(settings.base_model)),
        "exemplars": [exemplar.picture.sha256 for exemplar in exemplars],
        "train_prompt": train_prompt(settings.kind, settings.category),
        "prompts": [prompt.text for prompt in prompts],
    }


def _image_rows(
    model_id: str,
    settings: ModelSettings,
    exemplars: Sequence[Exemplar],
    plans: list[SamplePlan],
    encoded: dict[str, bytes],
    encoders: Sequence[Encoder],
) -> pa.Table:
    shared = {"model_id": model_id, "split": settings.split, "category": settings.category}
    rows = [
        {**shared, "image_id": f"{model_id}/{one.picture.sha256[:16]}", "role": "exemplar", **one.fields}
        for one in exemplars
    ]
    rows += [
        {
            **shared,
            "image_id": plan.image_id,
            "role": "sample",
            "source": "synthesized",
            "prompt": plan.prompt.text,
            "prompt_scheme": plan.prompt.scheme,
            "seed": plan.seed,
        }
        for plan in plans
    ]
    samples = [read_picture(plan.image_id, encoded[plan.image_id]) for plan in plans]
    return image_rows(rows, [one.picture for one in exemplars] + samples, encoders)


def _model_row(model_id: str, settings: ModelSettings, record: dict, weights: Path, figures: dict) -> dict:
    compared = {name: value for name, value in record.items() if name not in NOT_COMPARED}
    return {
        "model_id": model_id,
        "base_model": settings.base_model,
        "base_model_hash": record["base_model_hash"],
        "method": METHOD,
        "kind": settings.kind,
        "category": settings.category,
        "split": settings.split,
        "train_prompt": record["train_prompt"],
        "token": TOKEN,
        "settings": json.dumps(record, sort_keys=True),
        "settings_hash": hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest(),
        "weights_path": f"weights/{weights.name}",
        "weights_hash": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "n_exemplars": figures["n_exemplars"],
        "n_samples": figures["n_samples"],
        "customize_seconds": figures["customize_seconds"],
        "synthesize_seconds": figures["synthesize_seconds"],
        "created_at": datetime.now(UTC),
    }
