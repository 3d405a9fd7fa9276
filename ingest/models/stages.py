"""The stages of a model's job. Each writes its result to the job's folder, so that a rerun resumes after it.

<database>/jobs/<model_id>/   settings.json, figures.json once the weights are trained, batch-NNNN.parquet
                              monitored-<table>.parquet if the training was monitored
<database>/weights/<model_id>.safetensors
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import CLIPTokenizer

from attrdb.errors import InvalidValue
from attrdb.ingest.customize.base_model import BaseModel
from attrdb.ingest.customize.customize import (
    Delta,
    Diverged,
    Regularization,
    apply_delta,
    customize,
    load_delta,
    save_delta,
)
from attrdb.ingest.customize.synthesize import SamplePlan, synthesize
from attrdb.ingest.devices import is_cpu
from attrdb.ingest.encode import Encoder, encode
from attrdb.ingest.encode.stream import ahead
from attrdb.ingest.monitor import files as monitor_files
from attrdb.ingest.monitor.monitor import Monitored
from attrdb.ingest.options import MODEL_OPTIONS, CustomizeSettings, SynthesizeSettings
from attrdb.ingest.prompts import CAPTION, TOKEN, with_caption
from attrdb.ingest.read.pictures import Picture, read_picture, webp
from attrdb.progress import Progress
from attrdb.store.files import write_whole
from attrdb.store.job_folders import JobFolder, check_same_settings
from attrdb.store.leases import LEASE_MINUTES, Lease, leased

# Follow from the settings, the machine and the corpus at the time, and stay as the first run recorded them.
RECORDED_ONLY = ("computed_in", "regularization")
# The base model is compared by the hash of its weights, since its folder may move.
NOT_COMPARED = {"base_model", *RECORDED_ONLY, *(option.name for option in MODEL_OPTIONS if option.of_machine)}
# Settings that early records lack, with the values that those models were made with.
DEFAULTS_BEFORE_0_1: dict[str, Any] = {
    "precision": "auto",
    "customize": {"augment": "none", "prior": "caption", "prior_images": 0, "prior_weight": 1.0, "token_from": ""},
}


def comparable_settings(record: dict) -> dict:
    """The part of a record that decides whether two models are the same.

    Settings at their DEFAULTS_BEFORE_0_1 are left out, so that a model keeps its settings and their hash across versions.
    """
    kept = {
        name: value
        for name, value in record.items()
        if name not in NOT_COMPARED and DEFAULTS_BEFORE_0_1.get(name, ...) != value
    }
    if "customize" in kept:
        before = DEFAULTS_BEFORE_0_1["customize"]
        kept["customize"] = {k: v for k, v in kept["customize"].items() if k not in before or before[k] != v}
    return kept


def settings_hash(record: dict) -> str:
    return hashlib.sha256(json.dumps(comparable_settings(record), sort_keys=True).encode()).hexdigest()


def check_same(model_id: str, stored: dict, wanted: dict, where: str) -> None:
    """raises: InvalidValue, naming both values, if two records of settings differ"""
    check_same_settings("model", model_id, comparable_settings(stored), comparable_settings(wanted), where)


def leased_job(job: JobFolder, minutes: float = LEASE_MINUTES) -> AbstractContextManager[Lease]:
    """Hold the job's folder; raises Busy if another process holds it."""
    job.make()
    return leased(job.lock, f"model {job.path.name!r} is being made", minutes)


def open_job(job: JobFolder, record: dict) -> dict:
    """Write the settings to the job's folder. Returns them with what an interrupted run has recorded.

    raises: InvalidValue if the folder holds weights that were trained with other settings
    """
    recorded = job.read_settings()
    if recorded is not None:
        if (job.path / "figures.json").exists():
            where = f"half done in {job.path} (delete that folder to start again)"
            check_same(job.path.name, recorded, record, where)
        if comparable_settings(recorded) == comparable_settings(record):
            record |= {name: recorded[name] for name in RECORDED_ONLY if name in recorded}
    job.write_settings(record)
    return record


def customize_stage(
    base: BaseModel,
    job: Path,
    weights: Path,
    images: Sequence[Image.Image],
    settings: CustomizeSettings,
    record: dict,
    regularization: Callable[[], Regularization | None],
    monitored: Callable[[], Monitored | None],
    report: Progress,
) -> dict:
    """Turn the base model into the customized one, by training or from stored weights. Returns the training's figures.

    regularization: called only before training
    monitored:      called after it; the monitor that observes the training, if any, and what its rows are about
    """
    figures_file, method, tokens = job / "figures.json", record["method"], record_tokens(record)
    if figures_file.exists():
        apply_delta(base, load_delta(weights, method), tokens, method)
        return json.loads(figures_file.read_text())

    def save(delta: Delta, path: Path) -> None:
        write_whole(path, lambda part: save_delta(delta, part, tokens, record["base_model_hash"], method))

    monitor_files.clear(job, weights)
    chosen = regularization()
    monitor, names = monitored() or (None, None)
    try:
        delta, figures = customize(
            base,
            images,
            exemplar_prompts(record, base.pipeline.tokenizer),
            list(tokens),
            list(tokens.values()),
            settings,
            report,
            method=method,
            regularization=chosen,
            gradient_checkpointing=record["gradient_checkpointing"],
            observer=monitor,
        )
    except Diverged as error:
        last = job / "diverged.safetensors"
        save(error.delta, last)
        raise InvalidValue(f"{error}; what it was after {error.n_steps} steps is kept in {last}") from error
    weights.parent.mkdir(exist_ok=True)
    save(delta, weights)
    if monitor is not None and names is not None:
        monitor_files.write(monitor, names, job, weights)
    # One file stays beside the weights, the other marks the stage as done.
    for file in (weights.with_suffix(".json"), figures_file):
        write_whole(file, lambda part: part.write_text(json.dumps(figures)))
    return figures


def record_tokens(record: dict) -> dict[str, str]:
    """The modifier tokens of a model, with the words that each starts from; models of kind `mixed` have none."""
    if record["kind"] == "mixed":
        return {}
    categories = {concept["token"]: concept["category"] for concept in record.get("concepts", ())}
    words = record["customize"].get("token_from")
    return {token: words or category for token, category in (categories or {TOKEN: record["category"]}).items()}


def exemplar_prompts(record: dict, tokenizer: CLIPTokenizer) -> str | list[str]:
    """The prompt that all exemplars of a model are learned with, or that of each; as much of a caption as can be read."""
    if "concepts" in record:
        prompts = {concept["token"]: concept["train_prompt"] for concept in record["concepts"]}
        return [prompts[token] for token in record["exemplar_tokens"]]
    template = record["train_prompt"] or CAPTION
    if CAPTION not in template:
        return template
    return [with_caption(template, caption, tokenizer) for caption in record["captions"]]


@dataclass(frozen=True)
class SampleBatch:
    """A batch of samples: their pictures, and their features, (n, dimension) per encoder."""

    pictures: list[Picture]
    features: list[np.ndarray]
    seconds: float  # of sampling


def sample_stage(
    base: BaseModel,
    job: Path,
    batches: list[list[SamplePlan]],
    settings: SynthesizeSettings,
    encoders: Sequence[Encoder],
    report: Progress,
) -> list[SampleBatch]:
    """The batches of samples. Batches whose pictures are in the job's folder are not generated again.

    On an accelerator one batch is written and encoded while the next is generated. On a CPU both would compete for the same
    cores, so they take turns.
    """
    finish = partial(_write_and_encode, job=job, encoders=encoders)
    generated = _generate(base, job, batches, settings, report)
    if is_cpu(base.device):
        return [finish(batch) for batch in generated]
    with closing(ahead(generated, finish, 1, 2)) as finished:
        return list(finished)


@dataclass(frozen=True)
class Generated:
    """A batch of samples as the base model has generated it. images: None if the job's folder has them."""

    number: int
    plans: list[SamplePlan]
    images: list[Image.Image] | None
    seconds: float


def _generate(
    base: BaseModel, job: Path, batches: list[list[SamplePlan]], settings: SynthesizeSettings, report: Progress
) -> Iterator[Generated]:
    total = len(batches) * settings.solver_steps
    encoded: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(batches):
        before = number * settings.solver_steps
        if _batch_file(job, number).exists():
            report("sample", before + settings.solver_steps, total)
            yield Generated(number, batch, None, 0.0)
            continue
        started = time.monotonic()
        images = synthesize(base, batch, settings, partial(_report_step, report, before, total), encoded)
        yield Generated(number, batch, images, time.monotonic() - started)


def _write_and_encode(batch: Generated, job: Path, encoders: Sequence[Encoder]) -> SampleBatch:
    file = _batch_file(job, batch.number)
    if batch.images is not None:
        columns = {
            "image_id": [plan.image_id for plan in batch.plans],
            "image": [webp(image) for image in batch.images],
            "seconds": [batch.seconds / len(batch.plans)] * len(batch.plans),
        }
        write_whole(file, lambda part: pq.write_table(pa.table(columns), part))
    table = pq.read_table(file)
    pictures = [
        read_picture(*row) for row in zip(*(table[name].to_pylist() for name in ("image_id", "image")), strict=True)
    ]
    # Batch by batch even if all are stored: the last digits of features depend on what is computed together.
    features = [encode(encoder, [picture.image for picture in pictures]) for encoder in encoders]
    return SampleBatch(pictures, features, sum(table["seconds"].to_pylist()))


def _batch_file(job: Path, number: int) -> Path:
    return job / f"batch-{number:04d}.parquet"


def _report_step(report: Progress, before: int, total: int, stage: str, step: int, _n_steps: int | None) -> None:
    report(stage, before + step, total)
