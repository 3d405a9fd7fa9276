"""Ingest a model: customize the base model on exemplars, sample it, encode, and append it all at once.

What has been done is kept under `<database>/jobs/<model_id>` until the model is appended: weights after training, a file
a sampled batch. Given again after a crash, the job goes on from there and ends in the same rows.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from attrdb.database import Database
from attrdb.errors import InvalidValue
from attrdb.ingest.base_model import BaseModel, base_model_folder, load_base_model, read_profile, weights_hash
from attrdb.ingest.corpus import image_rows, register
from attrdb.ingest.customize import METHOD, CustomizeSettings, apply_delta, customize, load_delta, save_delta
from attrdb.ingest.encoders import Encoder
from attrdb.ingest.pictures import Picture, image_files, read_picture, read_picture_file, webp
from attrdb.ingest.prompts import TOKEN, Prompt, choose_prompts, train_prompt
from attrdb.ingest.synthesize import SynthesizeSettings, plan_samples, synthesize, use_fast_solver
from attrdb.schema import KINDS

Report = Callable[[str, int, int], None]  # stage, units done, units in all

NOT_COMPARED = {"base_model"}  # the folder's name may change; what it holds is compared by its hash


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
    name = re.sub(r"[^a-z0-9]+", "-", settings.category.lower()).strip("-")
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
    model_id = model_id or default_model_id(settings, exemplars)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", model_id):
        raise InvalidValue(f"model id {model_id!r} is not usable; letters, digits, '.', '_' and '-' are")
    if not exemplars:
        raise InvalidValue(f"model {model_id!r} has no exemplar; at least one image is needed")
    first_of: dict[str, str] = {}
    for picture in (exemplar.picture for exemplar in exemplars):
        if first_of.setdefault(picture.sha256, picture.name) != picture.name:
            raise InvalidValue(f"exemplars {first_of[picture.sha256]} and {picture.name} are the same file; keep one")
    prompts = prompts_of(settings)
    record = _record(settings, exemplars, prompts)

    db.refresh()
    stored = db.sql("SELECT * FROM models WHERE model_id = $id", {"id": model_id}).to_pylist()
    if stored:
        _check_same(model_id, json.loads(stored[0]["settings"]), record, f"in {db.path}")
        return ModelResult(model_id, stored[0]["n_exemplars"], stored[0]["n_samples"], False, db.version)
    register(db, encoders)

    job = db.path / "jobs" / model_id
    _open_job(job, model_id, record)
    weights_file = f"weights/{model_id}.safetensors"
    figures = _customized_weights(db, job, weights_file, exemplars, settings, record, report)
    batches = plan_samples(model_id, prompts, settings.synthesize)
    started = time.monotonic()
    encoded = _sampled(db, job, weights_file, batches, settings, report)
    figures["synthesize_seconds"] = time.monotonic() - started

    report("encode", 0, 1)
    rows, pictures = [], []
    for exemplar in exemplars:
        image_id = f"{model_id}/{exemplar.picture.sha256[:16]}"
        rows.append({"image_id": image_id, "role": "exemplar", "category": settings.category, **exemplar.fields})
        pictures.append(exemplar.picture)
    for plan in (plan for batch in batches for plan in batch):
        rows.append(
            {
                "image_id": plan.image_id,
                "role": "sample",
                "source": "synthesized",
                "category": settings.category,
                "prompt": plan.prompt.text,
                "prompt_scheme": plan.prompt.scheme,
                "seed": plan.seed,
            }
        )
        pictures.append(read_picture(plan.image_id, encoded[plan.image_id]))
    shared = {"model_id": model_id, "split": settings.split}
    table = image_rows([{**row, **shared} for row in rows], pictures, encoders)
    n_samples = len(rows) - len(exemplars)
    model = {
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
        "settings_hash": _settings_hash(record),
        "weights_path": weights_file,
        "weights_hash": hashlib.sha256((db.path / weights_file).read_bytes()).hexdigest(),
        "n_exemplars": len(exemplars),
        "n_samples": n_samples,
        "customize_seconds": figures.get("customize_seconds"),
        "synthesize_seconds": figures["synthesize_seconds"],
        "created_at": datetime.now(UTC),
    }
    appended = db.append_model(table, model)
    shutil.rmtree(job)
    report("encode", 1, 1)
    return ModelResult(model_id, len(exemplars), n_samples, True, appended.version)


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


def _settings_hash(record: dict) -> str:
    compared = {name: value for name, value in record.items() if name not in NOT_COMPARED}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()


def _check_same(model_id: str, found: dict, wanted: dict, where: str) -> None:
    for name in sorted((found.keys() | wanted.keys()) - NOT_COMPARED):
        if found.get(name) != wanted.get(name):
            raise InvalidValue(
                f"model {model_id!r} is {where} with {name} = {found.get(name)!r}, now it is {wanted.get(name)!r}; "
                "use the old settings or another --model-id"
            )


# --- stages of a job ---------------------------------------------------------------------------------------------------


def _open_job(job: Path, model_id: str, record: dict) -> None:
    path = job / "settings.json"
    if path.exists():
        _check_same(model_id, json.loads(path.read_text()), record, f"half done in {job}")
        return
    job.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=2))
    part.replace(path)


def _customized_weights(
    db: Database,
    job: Path,
    weights_file: str,
    exemplars: Sequence[Exemplar],
    settings: ModelSettings,
    record: dict,
    report: Report,
) -> dict:
    """Train unless the weights are there; the training's figures."""
    figures_file = job / "figures.json"
    if figures_file.exists() and (db.path / weights_file).exists():
        return json.loads(figures_file.read_text())
    base = load_base_model(settings.base_model)
    delta, figures = customize(
        base,
        [exemplar.picture.image for exemplar in exemplars],
        record["train_prompt"],
        TOKEN,
        settings.category,
        settings.customize,
        lambda done, total: report("customize", done, total),
    )
    save_delta(delta, db.path / weights_file, TOKEN, record["base_model_hash"])
    part = figures_file.with_suffix(".part")
    part.write_text(json.dumps(figures))
    part.replace(figures_file)
    return figures


def _sampled(
    db: Database, job: Path, weights_file: str, batches: list, settings: ModelSettings, report: Report
) -> dict[str, bytes]:
    """The encoded samples by id; a batch that a file in the job's folder holds is not made again."""
    encoded: dict[str, bytes] = {}
    base: BaseModel | None = None
    total = len(batches) * settings.synthesize.solver_steps
    for number, batch in enumerate(batches):
        file = job / f"batch-{number:04d}.parquet"
        if not file.exists():
            if base is None:
                base = load_base_model(settings.base_model)
                apply_delta(base, load_delta(db.path / weights_file), TOKEN, settings.category)
                use_fast_solver(base)
            before = number * settings.synthesize.solver_steps
            images = synthesize(
                base, batch, settings.synthesize, lambda step, _, before=before: report("sample", before + step, total)
            )
            made = {"image_id": [plan.image_id for plan in batch], "image": [webp(image) for image in images]}
            pq.write_table(pa.table(made), file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
        table = pq.read_table(file)
        encoded.update(zip(table["image_id"].to_pylist(), table["image"].to_pylist(), strict=True))
        report("sample", (number + 1) * settings.synthesize.solver_steps, total)
    return encoded
