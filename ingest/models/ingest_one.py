"""Ingest a model: customize the base model on exemplars, sample it, encode, and append it all at once.

Rerunning it after a crash resumes the job (see `stages`) and ends in the same rows. `regenerate` generates the samples of a
stored model again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from attrdb.database import Database
from attrdb.errors import NotFound
from attrdb.ingest.customize.base_model import BaseModel, base_model_folder, is_made_from, load_base_model, weights_hash
from attrdb.ingest.customize.customize import Regularization, apply_delta, check_prompts
from attrdb.ingest.customize.regularization import (
    Subject,
    choose_for_each,
    choose_names,
    generate,
    read_corpus,
    read_for_each,
)
from attrdb.ingest.customize.synthesize import SamplePlan, plan_samples, synthesize, use_fast_solver
from attrdb.ingest.devices import resolved_precision
from attrdb.ingest.encode import Encoder
from attrdb.ingest.models.exemplars import Exemplar
from attrdb.ingest.models.settings import captions, check_model, filled_prompt, prompts_of
from attrdb.ingest.models.stages import (
    SampleBatch,
    check_same,
    customize_stage,
    exemplar_prompts,
    leased_job,
    open_job,
    record_tokens,
    sample_stage,
    settings_hash,
)
from attrdb.ingest.models.stored import check_base_model, stored_delta, stored_model, stored_settings
from attrdb.ingest.monitor.files import read_rows
from attrdb.ingest.monitor.monitor import Monitor, Monitored, Names
from attrdb.ingest.options import ModelSettings
from attrdb.ingest.prompts import CAPTION, TOKEN, Prompt, train_prompt
from attrdb.ingest.read.corpus import image_rows, register
from attrdb.progress import Progress, no_progress
from attrdb.store.blocklist import blocklist
from attrdb.store.concepts import concept_id
from attrdb.store.ids import weights_file
from attrdb.store.job_folders import JobFolder, model_job
from attrdb.store.leases import LEASE_MINUTES


@dataclass(frozen=True)
class ModelResult:
    model_id: str
    n_exemplars: int
    n_samples: int
    appended: bool  # false: the model was stored already, with these settings
    version: int


def ingest_model(
    db: Database,
    exemplars: Sequence[Exemplar],
    settings: ModelSettings,
    encoders: Sequence[Encoder],
    model_id: str | None = None,
    report: Progress = no_progress,
    load: Callable[[str], BaseModel] = load_base_model,
    lease_minutes: float = LEASE_MINUTES,
) -> ModelResult:
    """Customize, sample, encode and append one model; nothing is done twice.

    load:          returns a fresh base model by its name, such as `OneBaseModel().load` for many models of one base; the
                   base model is left fresh. Not called for a model that is stored.
    lease_minutes: minutes of silence after which another process counts as stuck, and its model is taken over
    raises:        InvalidValue if the model is stored with other settings, and for exemplars, prompts, encoders,
                   regularization images or a base model that cannot be used, and exemplars that were taken out for good,
                   all before training begins; and for training that diverges; OutOfMemory; Busy if another process
                   is making the model
    """
    model_id = check_model(settings, exemplars, model_id)
    prompts = prompts_of(settings, exemplars)
    record = _record(settings, exemplars, prompts)
    folder = model_job(db.path, model_id)
    if result := _stored_result(db, model_id, record, encoders, folder):
        return result
    for exemplar in exemplars:
        blocklist(db.snapshot).check(exemplar.picture.name, exemplar.picture.sha256, exemplar.fields.get("uri"))
    base = load(settings.base_model)
    register(db, encoders)
    with leased_job(folder, lease_minutes) as lease:
        # The process that held the lease before may have stored it.
        if result := _stored_result(db, model_id, record, encoders, folder):
            return result
        record = open_job(folder, record)

        def beat_and_report(stage: str, done: int, total: int | None, note: str = "") -> None:
            lease.beat(stage, done, total)
            report(stage, done, total, note)

        try:
            return _run_stages(db, base, model_id, exemplars, settings, encoders, prompts, record, beat_and_report)
        finally:
            base.restore()


def _run_stages(
    db: Database,
    base: BaseModel,
    model_id: str,
    exemplars: Sequence[Exemplar],
    settings: ModelSettings,
    encoders: Sequence[Encoder],
    prompts: list[Prompt],
    record: dict,
    report: Progress,
) -> ModelResult:
    """Make and append the model, beginning after the last stage that is in its job's folder."""
    folder, weights = model_job(db.path, model_id), weights_file(db.path, model_id)
    job = folder.path
    base.precision = record.get("computed_in", "float32")
    images = [exemplar.picture.image for exemplar in exemplars]

    def regularization() -> Regularization | None:
        if not settings.customize.prior_images:
            return None
        images = regularization_images(db, base, exemplars, settings, encoders, record, report)
        record["regularization"] = list(images.names)
        folder.write_settings(record)
        return images

    if tokens := record_tokens(record):
        _check_prompts(base, record["prompts"], tokens)

    def monitored() -> Monitored | None:
        return None if settings.monitor == "off" else _monitored(model_id, settings.monitor, record)

    figures = customize_stage(base, job, weights, images, settings.customize, record, regularization, monitored, report)
    use_fast_solver(base)
    batches = plan_samples(model_id, prompts, settings.synthesize)
    samples = sample_stage(base, job, batches, settings.synthesize, encoders, report)
    figures["synthesize_seconds"] = sum(batch.seconds for batch in samples)
    report("encode", 0, 1)
    plans = [plan for batch in batches for plan in batch]
    rows = _image_rows(model_id, settings, exemplars, plans, samples, encoders)
    figures |= {"n_exemplars": len(exemplars), "n_samples": len(plans)}
    model = _model_row(model_id, settings, record, weights, figures)
    appended = db.writer.append_model(rows, model, _concept_rows(model_id, record), read_rows(job))
    folder.remove()
    report("encode", 1, 1)
    return ModelResult(model_id, len(exemplars), len(plans), True, appended.version)


def _check_prompts(base: BaseModel, prompts: Sequence[str], tokens: Mapping[str, str]) -> None:
    """Check the prompts of samples with a fresh base model, which is left fresh. raises: as `check_prompts`"""
    try:
        for token, words in tokens.items():
            base.add_token(token, words)
        check_prompts(base.pipeline, prompts, tokens)
    finally:
        base.restore()


def _monitored(model_id: str, level: str, record: dict) -> Monitored:
    """What observes the training of a model, and what its rows are about."""
    of_concepts = [[concept["train_prompt"]] for concept in record.get("concepts", ())]
    concepts: list[str | None] = [concept_id(model_id, token) for token in record_tokens(record)]
    ids = [f"{model_id}/{sha256[:16]}" for sha256 in record["exemplars"]]
    return Monitor(level, of_concepts or None), Names(
        model_id, ids, record.get("regularization", ()), concepts or [None]
    )


def regularization_images(
    db: Database,
    base: BaseModel,
    exemplars: Sequence[Exemplar],
    settings: ModelSettings,
    encoders: Sequence[Encoder],
    record: dict,
    report: Progress,
) -> Regularization:
    """The regularization images; those of an interrupted run if it has recorded any. Several concepts share their number."""
    plain = _plain_prompts(record, base)
    if settings.customize.prior == "generated":
        return generate(base, plain, settings.customize, settings.synthesize, report)
    names = record.get("regularization")
    if settings.concepts:
        subjects = [
            Subject(concept.category, [each.picture for each in exemplars if each.token == concept.token], prompt)
            for concept, prompt in zip(settings.concepts, plain, strict=True)
        ]
        names = choose_for_each(db, subjects, settings.customize, encoders) if names is None else names
        return read_for_each(db, subjects, names)
    if names is None:
        pictures = [exemplar.picture for exemplar in exemplars]
        names = choose_names(db, pictures, settings.category, settings.customize, encoders)
    return read_corpus(db, names, plain[0])


def _plain_prompts(record: dict, base: BaseModel) -> list[str]:
    """The training prompts without modifier tokens: that of the model, of each concept or of each exemplar."""
    prompts = [concept["train_prompt"] for concept in record.get("concepts", ())]
    if not prompts:
        of_exemplars = exemplar_prompts(record, base.pipeline.tokenizer)
        prompts = [of_exemplars] if isinstance(of_exemplars, str) else of_exemplars
    tokens = list(record_tokens(record)) or [TOKEN]
    for token in tokens:
        prompts = [prompt.replace(token, "") for prompt in prompts]
    return [" ".join(prompt.split()) for prompt in prompts]


def regenerate(
    db: Database,
    model_id: str,
    image_ids: Sequence[str] | None = None,
    load: Callable[[str], BaseModel] = load_base_model,
    base_model: str | None = None,
) -> Iterator[tuple[str, Image.Image]]:
    """Generate samples of a stored model again from its stored weights: (image_id, picture), in their original order.

    image_ids:  samples to yield, by default all; a batch with one of them is generated as a whole, as before
    load:       as in `ingest_model`
    base_model: where the base model is now, if not where the model's row says
    raises:     NotFound for an unknown model, sample or base model, InvalidValue if weights are missing or have changed
    """
    row = stored_model(db, model_id, "its samples cannot be generated again")
    record, name = json.loads(row["settings"]), base_model or row["base_model"]
    try:
        check_base_model(row, base_model, "give the folder of that one with --base-model")
    except NotFound as error:
        if base_model:
            raise
        raise NotFound(
            f"{error}. Model {model_id!r} was made from it; say where it is now with --base-model"
        ) from error
    delta = stored_delta(db, row)
    settings = stored_settings(record).synthesize
    prompts = [Prompt(n, "", text) for n, text in enumerate(record["prompts"])]
    batches = plan_samples(model_id, prompts, settings)
    known = {plan.image_id for batch in batches for plan in batch}
    wanted = known if image_ids is None else set(image_ids)
    if strange := wanted - known:
        raise NotFound(f"model {model_id!r} has no sample {min(strange)!r}")
    base = load(name)
    encoded: dict[str, Any] = {}
    base.precision = record.get("computed_in", "float32")
    try:
        apply_delta(base, delta, record_tokens(record), row["method"])
        use_fast_solver(base)
        for batch in batches:
            if wanted.isdisjoint(plan.image_id for plan in batch):
                continue
            for plan, image in zip(batch, synthesize(base, batch, settings, encoded=encoded), strict=True):
                if plan.image_id in wanted:
                    yield plan.image_id, image
    finally:
        base.restore()


def _stored_result(
    db: Database, model_id: str, record: dict, encoders: Sequence[Encoder], job: JobFolder
) -> ModelResult | None:
    """The result if the model is stored already.

    raises: InvalidValue if it was made with other settings
    """
    db.refresh()
    stored = db.sql("SELECT * FROM models WHERE model_id = $id", {"id": model_id}).to_pylist()
    if not stored:
        return None
    settings = json.loads(stored[0]["settings"])
    if is_made_from(base_model_folder(record["base_model"]), settings["base_model_hash"]):
        record |= {"base_model_hash": settings["base_model_hash"]}
    check_same(model_id, settings, record, f"in {db.path}")
    register(db, encoders)
    job.remove()
    return ModelResult(model_id, stored[0]["n_exemplars"], stored[0]["n_samples"], False, db.version)


# --- the rows of a model -------------------------------------------------------------------------------------------------


def _record(settings: ModelSettings, exemplars: Sequence[Exemplar], prompts: list[Prompt]) -> dict:
    """The settings as they are stored and compared: plain JSON, with hashes of files.

    computed_in is the precision that 'auto' means on this machine. `regularization` is added once images are chosen.
    """
    record = json.loads(json.dumps(asdict(settings)))
    record |= {
        "base_model_hash": weights_hash(base_model_folder(settings.base_model)),
        "exemplars": [exemplar.picture.sha256 for exemplar in exemplars],
        "train_prompt": None,
        "prompts": [prompt.text for prompt in prompts],
        "computed_in": resolved_precision(settings.precision),
    }
    if settings.concepts:
        for concept in record["concepts"]:
            concept["train_prompt"] = train_prompt(concept["kind"], concept["category"], concept["token"])
        return record | {"exemplar_tokens": [exemplar.token for exemplar in exemplars]}
    del record["concepts"]
    if settings.kind == "mixed":
        return record | {"captions": captions(exemplars, settings)}
    record["train_prompt"] = train_prompt(settings.kind, settings.category, template=filled_prompt(settings, exemplars))
    return record | ({"captions": captions(exemplars, settings)} if CAPTION in record["train_prompt"] else {})


def _image_rows(
    model_id: str,
    settings: ModelSettings,
    exemplars: Sequence[Exemplar],
    plans: list[SamplePlan],
    samples: list[SampleBatch],
    encoders: Sequence[Encoder],
) -> pa.Table:
    shared = {"model_id": model_id, "split": settings.split, "category": settings.category}
    concepts = {
        concept.token: {"category": concept.category, "concept_id": concept_id(model_id, concept.token)}
        for concept in settings.concepts
    }
    exemplar_fields = [
        {
            **shared,
            "image_id": f"{model_id}/{exemplar.picture.sha256[:16]}",
            "role": "exemplar",
            **(concepts[exemplar.token] if exemplar.token else {}),
            **exemplar.fields,
        }
        for exemplar in exemplars
    ]
    sample_fields = [
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
    pictures = [picture for batch in samples for picture in batch.pictures]
    features = [np.concatenate(parts) for parts in zip(*(batch.features for batch in samples), strict=True)]
    return pa.concat_tables(
        [
            image_rows(exemplar_fields, [exemplar.picture for exemplar in exemplars], encoders),
            image_rows(sample_fields, pictures, encoders, features),
        ]
    )


def _concept_rows(model_id: str, record: dict) -> list[dict]:
    """The rows in `concepts` of a model of several; of any other there is no list of them."""
    return [
        {"concept_id": concept_id(model_id, concept["token"]), "model_id": model_id, **concept}
        for concept in record.get("concepts", ())
    ]


def _model_row(model_id: str, settings: ModelSettings, record: dict, weights: Path, figures: dict) -> dict:
    return {
        "model_id": model_id,
        "base_model": settings.base_model,
        "base_model_hash": record["base_model_hash"],
        "method": settings.method,
        "kind": settings.kind,
        "category": settings.category,
        "split": settings.split,
        "train_prompt": record["train_prompt"],
        "token": None if settings.concepts else next(iter(record_tokens(record)), None),
        "settings": json.dumps(record, sort_keys=True),
        "settings_hash": settings_hash(record),
        "weights_path": f"weights/{weights.name}",
        "weights_hash": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "n_exemplars": figures["n_exemplars"],
        "n_samples": figures["n_samples"],
        "customize_seconds": figures["customize_seconds"],
        "synthesize_seconds": figures["synthesize_seconds"],
        "created_at": datetime.now(UTC),
    }
