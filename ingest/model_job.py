"""The stages of a model's job, each kept in the job's folder as it ends, so that a rerun goes on from there.

<database>/jobs/<model_id>/   settings.json, figures.json once the weights are trained, batch-NNNN.parquet
<database>/weights/<model_id>.safetensors
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from attrdb.errors import InvalidValue
from attrdb.ingest.base_model import BaseModel
from attrdb.ingest.customize import CustomizeSettings, apply_delta, customize, load_delta, save_delta
from attrdb.ingest.pictures import webp
from attrdb.ingest.prompts import TOKEN
from attrdb.ingest.synthesize import SamplePlan, SynthesizeSettings, synthesize
from attrdb.locks import alone

Report = Callable[[str, int, int], None]  # stage, units done, units in all

NOT_COMPARED = {"base_model"}  # the folder's name may change; what it holds is compared by its hash


def check_same(model_id: str, found: dict, wanted: dict, where: str) -> None:
    """raises: InvalidValue, naming both values, if two records of settings differ"""
    for name in sorted((found.keys() | wanted.keys()) - NOT_COMPARED):
        if found.get(name) != wanted.get(name):
            raise InvalidValue(
                f"model {model_id!r} is {where} with {name} = {found.get(name)!r}, now it is {wanted.get(name)!r}; "
                "use the old settings or another --model-id"
            )


def locked(job: Path) -> AbstractContextManager[None]:
    """Hold the job's folder; raises Busy if another process is at it."""
    job.mkdir(parents=True, exist_ok=True)
    return alone(job.parent / f".{job.name}.lock", f"model {job.name!r} is being made")


def open_job(job: Path, record: dict) -> None:
    """Note the settings in the job's folder.

    raises: InvalidValue if it holds weights that were trained with others
    """
    path = job / "settings.json"
    if path.exists() and (job / "figures.json").exists():
        where = f"half done in {job} (delete that folder to begin anew)"
        check_same(job.name, json.loads(path.read_text()), record, where)
        return
    write_whole(path, lambda part: part.write_text(json.dumps(record, indent=2)))


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
    report: Report,
) -> dict:
    """Turn the base model into the customized one, by training unless the weights are there; the training's figures."""
    figures_file = job / "figures.json"
    if figures_file.exists():
        apply_delta(base, load_delta(weights), TOKEN, category)
        return json.loads(figures_file.read_text())
    delta, figures = customize(
        base,
        images,
        record["train_prompt"],
        TOKEN,
        category,
        settings,
        lambda done, total: report("customize", done, total),
    )
    weights.parent.mkdir(exist_ok=True)
    write_whole(weights, lambda part: save_delta(delta, part, TOKEN, record["base_model_hash"]))
    write_whole(figures_file, lambda part: part.write_text(json.dumps(figures)))
    return figures


def sampled(
    base: BaseModel, job: Path, batches: list[list[SamplePlan]], settings: SynthesizeSettings, report: Report
) -> tuple[dict[str, bytes], float]:
    """The encoded samples by id, and the seconds they took; a batch that the job's folder holds is not made again."""
    encoded: dict[str, bytes] = {}
    seconds = 0.0
    total = len(batches) * settings.solver_steps
    for number, batch in enumerate(batches):
        before = number * settings.solver_steps
        file = job / f"batch-{number:04d}.parquet"
        if not file.exists():
            started = time.monotonic()
            images = synthesize(base, batch, settings, partial(_report_step, report, before, total))
            took = time.monotonic() - started
            made = {
                "image_id": [plan.image_id for plan in batch],
                "image": [webp(image) for image in images],
                "seconds": [took / len(batch)] * len(batch),
            }
            write_whole(file, lambda part, made=made: pq.write_table(pa.table(made), part))
        table = pq.read_table(file)
        encoded.update(zip(table["image_id"].to_pylist(), table["image"].to_pylist(), strict=True))
        seconds += sum(table["seconds"].to_pylist())
        report("sample", before + settings.solver_steps, total)
    return encoded, seconds


def _report_step(report: Report, before: int, total: int, step: int, _steps: int) -> None:
    report("sample", before + step, total)
