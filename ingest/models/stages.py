"""The stages of a model's job, each kept in the job's folder as it ends, so that a rerun goes on from there.

<database>/jobs/<model_id>/   settings.json, figures.json once the weights are trained, batch-NNNN.parquet
<database>/weights/<model_id>.safetensors
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from attrdb.errors import InvalidValue
from attrdb.ingest.base_model import BaseModel
from attrdb.ingest.customize import (
    CustomizeSettings,
    Delta,
    Diverged,
    Regularization,
    apply_delta,
    customize,
    load_delta,
    save_delta,
)
from attrdb.ingest.devices import is_cpu
from attrdb.ingest.encode import Encoder, encode
from attrdb.ingest.encode.stream import ahead
from attrdb.ingest.prompts import TOKEN
from attrdb.ingest.read.pictures import Picture, read_picture, webp
from attrdb.ingest.synthesize import SamplePlan, SynthesizeSettings, synthesize
from attrdb.store.ids import JobFolder
from attrdb.store.leases import LEASE_MINUTES, Lease, leased

Report = Callable[[str, int, int], None]  # stage, units done, units in all

# The base model's folder may change, what it holds is compared by its hash. What the model was computed in and which
# regularization images it had follow from the settings, the machine and the corpus of that day, and are kept as they were.
# Gradient checkpointing changes no number.
NOTED = ("computed_in", "regularization")
NOT_COMPARED = {"base_model", "gradient_checkpointing", *NOTED}
# Settings that records of attrdb 0.1 lack, and what they were then.
SINCE = {
    "precision": "auto",
    "customize": {
        name: value
        for name, value in asdict(CustomizeSettings()).items()
        if name in ("augment", "prior", "prior_images", "prior_weight", "token_from")
    },
}


def essence(record: dict) -> dict:
    """A record without what is not compared, and without settings that are what they were before there was a choice.

    So a model that was stored by an earlier attrdb has the same essence, and the same hash of it, today.
    """
    kept = {name: value for name, value in record.items() if name not in NOT_COMPARED and SINCE.get(name, ...) != value}
    if "customize" in kept:
        before = SINCE["customize"]
        kept["customize"] = {k: v for k, v in kept["customize"].items() if k not in before or before[k] != v}
    return kept


def check_same(model_id: str, found: dict, wanted: dict, where: str) -> None:
    """raises: InvalidValue, naming both values, if two records of settings differ"""
    found, wanted = essence(found), essence(wanted)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise InvalidValue(
                f"model {model_id!r} is {where} with {name} = {found.get(name)!r}, now it is {wanted.get(name)!r}; "
                "use the old settings or another --model-id"
            )


def leased_job(job: JobFolder, minutes: float = LEASE_MINUTES) -> AbstractContextManager[Lease]:
    """Hold the job's folder; raises Busy if another process is at it."""
    job.make()
    return leased(job.lock, f"model {job.path.name!r} is being made", minutes)


def open_job(job: Path, record: dict) -> dict:
    """Note the settings in the job's folder; the record that holds, which an interrupted run may have noted.

    raises: InvalidValue if it holds weights that were trained with others
    """
    path = job / "settings.json"
    if path.exists():
        found = json.loads(path.read_text())
        if (job / "figures.json").exists():
            where = f"half done in {job} (delete that folder to begin anew)"
            check_same(job.name, found, record, where)
        if essence(found) == essence(record):
            record |= {name: found[name] for name in NOTED if name in found}
    note(job, record)
    return record


def note(job: Path, record: dict) -> None:
    write_whole(job / "settings.json", lambda part: part.write_text(json.dumps(record, indent=2)))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it appears whole or not at all."""
    part = path.with_suffix(".part")
    write(part)
    part.replace(path)


def customized(
    base: BaseModel,
    job: Path,
    weights: Path,
    images: Sequence[Image.Image],
    category: str,
    settings: CustomizeSettings,
    record: dict,
    regularization: Callable[[], Regularization | None],
    report: Report,
) -> dict:
    """Turn the base model into the customized one, by training unless the weights are there; the training's figures.

    regularization: asked for only if there is something to train
    """
    figures_file, method, token = job / "figures.json", record["method"], record_token(record)
    if figures_file.exists():
        apply_delta(base, load_delta(weights, method), token, settings.like(category), method)
        return json.loads(figures_file.read_text())

    def save(delta: Delta, path: Path) -> None:
        write_whole(path, lambda part: save_delta(delta, part, token, record["base_model_hash"], method))

    try:
        delta, figures = customize(
            base,
            images,
            record["train_prompt"] or record["captions"],
            token,
            category,
            settings,
            lambda done, total: report("customize", done, total),
            method=method,
            regularization=regularization(),
            gradient_checkpointing=record["gradient_checkpointing"],
        )
    except Diverged as error:
        last = job / "diverged.safetensors"
        save(error.delta, last)
        raise InvalidValue(f"{error}; what it was after {error.n_steps} steps is kept in {last}") from error
    weights.parent.mkdir(exist_ok=True)
    save(delta, weights)
    for file in (weights.with_suffix(".json"), figures_file):  # one to keep beside the weights, one to go on from
        write_whole(file, lambda part: part.write_text(json.dumps(figures)))
    return figures


def record_token(record: dict) -> str | None:
    """The modifier token of a model; one of kind `mixed` has none."""
    return None if record["kind"] == "mixed" else TOKEN


@dataclass(frozen=True)
class Made:
    """A batch of samples: their pictures, and their features, (n, dimension) of every encoder."""

    pictures: list[Picture]
    features: list[np.ndarray]
    seconds: float  # of sampling


def sampled(
    base: BaseModel,
    job: Path,
    batches: list[list[SamplePlan]],
    settings: SynthesizeSettings,
    encoders: Sequence[Encoder],
    report: Report,
) -> list[Made]:
    """The batches of samples; one whose pictures the job's folder holds is not sampled again.

    With an accelerator a batch is written and its features are taken while the next is sampled. On a CPU both want the
    same cores, so that one waits for the other.
    """
    work = partial(_finish, job=job, encoders=encoders)
    drawn = _drawn(base, job, batches, settings, report)
    if is_cpu(base.device):
        return [work(one) for one in drawn]
    with closing(ahead(drawn, work, 1, 2)) as finished:
        return list(finished)


Drawn = tuple[int, list[SamplePlan], list[Image.Image] | None, float]  # number, plans, pictures unless stored, seconds


def _drawn(
    base: BaseModel, job: Path, batches: list[list[SamplePlan]], settings: SynthesizeSettings, report: Report
) -> Iterator[Drawn]:
    total = len(batches) * settings.solver_steps
    encoded: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(batches):
        before = number * settings.solver_steps
        if _file(job, number).exists():
            report("sample", before + settings.solver_steps, total)
            yield number, batch, None, 0.0
            continue
        started = time.monotonic()
        images = synthesize(base, batch, settings, partial(_report_step, report, before, total), encoded)
        yield number, batch, images, time.monotonic() - started


def _finish(drawn: Drawn, job: Path, encoders: Sequence[Encoder]) -> Made:
    number, batch, images, seconds = drawn
    file = _file(job, number)
    if images is not None:
        made = {
            "image_id": [plan.image_id for plan in batch],
            "image": [webp(image) for image in images],
            "seconds": [seconds / len(batch)] * len(batch),
        }
        write_whole(file, lambda part: pq.write_table(pa.table(made), part))
    table = pq.read_table(file)
    pictures = [
        read_picture(*row) for row in zip(*(table[name].to_pylist() for name in ("image_id", "image")), strict=True)
    ]
    # Batch by batch even where all are there: features depend, in their last digits, on what is computed together.
    features = [encode(encoder, [picture.image for picture in pictures]) for encoder in encoders]
    return Made(pictures, features, sum(table["seconds"].to_pylist()))


def _file(job: Path, number: int) -> Path:
    return job / f"batch-{number:04d}.parquet"


def _report_step(report: Report, before: int, total: int, step: int, _steps: int) -> None:
    report("sample", before + step, total)
