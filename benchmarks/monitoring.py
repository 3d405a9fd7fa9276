"""What monitoring costs, and how fast its tables answer: python benchmarks/monitoring.py --json FILE

Cost: the same customization of the bundled base model at each level of --monitor. They take their steps in turn, so that what
else the machine does falls on all alike. Answers: the attribution table of one model among many, and a sum over all rows.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import click
import numpy as np
import pyarrow as pa
import torch
from machine import describe, icon_sd, spread
from PIL import Image

import attrdb
from attrdb.ingest.customize.base_model import BUNDLED, BaseModel, load_base_model
from attrdb.ingest.customize.customize import CustomizeSettings, customize
from attrdb.ingest.customize.customizers import BUILT_IN
from attrdb.ingest.monitor.monitor import Monitor
from attrdb.ingest.options import MONITOR_LEVELS
from attrdb.store.schema import TABLES

ROWS_AT_ONCE = 500_000
CHANGES_OF = 1.6  # times as many models have changes as have attribution tables: a million rows at 10,000 models


class Turns:
    """Lets several customizations take their steps in turn, one at a time, and notes how long each step took."""

    def __init__(self, names: Sequence[str]):
        self.names, self.seconds = list(names), {name: [] for name in names}
        self.changed, self.turn, self.started = threading.Condition(), 0, time.perf_counter()

    def take(self, name: str) -> None:
        """Wait for one's turn."""
        with self.changed:
            self.changed.wait_for(lambda: self.names[self.turn] == name)
            self.started = time.perf_counter()

    def end(self, name: str) -> None:
        with self.changed:
            self.seconds[name].append(time.perf_counter() - self.started)
            self.turn = (self.turn + 1) % len(self.names)
            self.changed.notify_all()


def customized(base: BaseModel, turns: Turns, method: str, n_images: int, level: str, steps: int) -> None:
    """One customization whose steps are taken in turn with those at the other levels."""
    images = [Image.linear_gradient("L").rotate(5 * n).resize((base.resolution,) * 2) for n in range(n_images)]
    settings = CustomizeSettings(steps=steps, batch=8, lr=1e-3, seed=0)
    turns.take(level)

    def report(stage: str, done: int, _total: int | None, _note: str = "") -> None:
        if stage == "customize" and done:
            turns.end(level)
            if done < steps:
                turns.take(level)

    images = [image.convert("RGB") for image in images]
    observer = None if level == "off" else Monitor(level)
    customize(base, images, "V* vase", "V*", "vase", settings, report, method=method, observer=observer)
    base.restore()


def cost(steps: int) -> list[dict]:
    bases = {level: load_base_model(BUNDLED) for level in MONITOR_LEVELS}
    found = []
    for method, n_images in [(method, 4) for method in BUILT_IN] + [("custom-diffusion", 16)]:
        turns = Turns(MONITOR_LEVELS)
        with ThreadPoolExecutor(len(MONITOR_LEVELS)) as threads:
            made = [
                threads.submit(customized, base, turns, method, n_images, level, steps) for level, base in bases.items()
            ]
            for one in made:
                one.result()
        # The first step has what is made once. A part has one probe.
        parts = [slice(start, start + steps // 10) for start in range(1, steps - steps // 10 + 1, steps // 10)]
        ratios = {
            level: spread([sum(turns.seconds[level][part]) / sum(turns.seconds["off"][part]) for part in parts])
            for level in MONITOR_LEVELS[1:]
        }
        milliseconds = 1000 * median(turns.seconds["off"])
        found.append({"method": method, "n_images": n_images, "milliseconds": milliseconds, "ratios": ratios})
        click.echo(f"{method}, {n_images} images: " + ", ".join(f"{k} {v['median']:.3f}" for k, v in ratios.items()))
    return found


def fill(path: Path, n_models: int, n_images: int) -> attrdb.Database:
    """Rows of monitoring of many models, appended in few commits."""
    db, chance = attrdb.create(path), np.random.default_rng(0)
    for table, keys in (("attribution_tables", ["progress"]), ("monitor_changes", [1, 2, 3, 4])):
        per_model = len(keys) * n_images
        n_of_table = n_models if table == "attribution_tables" else int(CHANGES_OF * n_models)
        for start in range(0, n_of_table, ROWS_AT_ONCE // per_model):
            models = np.arange(start, min(start + ROWS_AT_ONCE // per_model, n_of_table)).repeat(per_model)
            n = len(models)
            names = [f"model-{model:06d}" for model in models]
            columns = {
                "model_id": names,
                "concept_id": [f"{name}/V*" for name in names],
                "image_id": [f"{name}/{number % n_images:016x}" for number, name in enumerate(names)],
                "n_visits": np.full(n, 75),
                "measure": ["progress"] * n,
                "value": chance.random(n),
                "share": chance.random(n),
                "quarter": np.tile(np.repeat(np.arange(1, 5), n_images), n // per_model) if len(keys) > 1 else [1] * n,
                "cause": ["weights"] * n,
                "change_norm": chance.random(n),
                "progress": chance.random(n),
            }
            schema = TABLES[table]
            rows = pa.table({name: columns[name] for name in schema.names}).cast(schema)
            db.writer.append_rows(table, rows, db.snapshot)
    db.refresh()
    return db


def answers(n_models: int, n_images: int, n_questions: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        db = fill(Path(folder) / "many.attrdb", n_models, n_images)
        n_rows = db.sql("SELECT count(*) AS n FROM monitor_changes").to_pylist()[0]["n"]
        seconds: dict[str, list[float]] = {"one model": [], "all rows": []}
        for number in range(n_questions):
            model_id = f"model-{number * 7919 % n_models:06d}"
            started = time.perf_counter()
            rows = db.query("attribution_table", model_id=model_id).num_rows
            seconds["one model"].append(time.perf_counter() - started)
            if rows != n_images:
                raise RuntimeError(f"{rows} rows of {model_id}, not {n_images}")
        for _ in range(n_questions):
            started = time.perf_counter()
            db.sql("SELECT model_id, concept_id, sum(progress) AS whole FROM monitor_changes GROUP BY ALL")
            seconds["all rows"].append(time.perf_counter() - started)
    return {"n_models": n_models, "n_rows": n_rows} | {name: spread(values) for name, values in seconds.items()}


@click.command()
@click.option("--steps", default=150, show_default=True)
@click.option("--questions", default=20, show_default=True)
@click.option("--models", default=10_000, show_default=True, help="That have an attribution table of 16 images.")
@click.option("--json", "file", type=click.Path(path_type=Path))
def main(steps: int, questions: int, models: int, file: Path | None) -> None:
    """Measure what monitoring costs, and how fast its tables answer."""
    torch.set_num_threads(1)
    results = {
        "machine": describe("torch", "diffusers", "pylance", "duckdb"),
        "base_model": icon_sd(),
        "steps": steps,
        "cost": cost(steps),
        "answers": answers(models, 16, questions),
    }
    for name in ("one model", "all rows"):
        click.echo(f"{name}: {1000 * results['answers'][name]['median']:.1f} ms")
    if file:
        file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
