"""Does reading pairs keep up with training? python benchmarks/training.py --json FILE

On a database of pairs of random features, it measures in turn, in pairs per second over whole epochs: the loader alone (the
query of an epoch's pairs, and gathering their features), the step alone (on one preloaded batch), and both together.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from itertools import islice
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import torch
from machine import describe, peak_gib, spread

import attrdb
from attrdb.database import Database
from attrdb.store.schema import feature_array
from attrdb.training.objective import Maps, contrastive_loss, regularizer
from attrdb.training.pairs import Choice, Pairs
from attrdb.training.train import TrainSettings

ROWS_AT_ONCE = 100_000


def build(path: Path, n_models: int, n_samples: int, dimension: int, seed: int) -> Database:
    """n_models models of one exemplar and n_samples samples."""
    rng = np.random.default_rng(seed)
    db = attrdb.create(path)
    encoder_id = db.writer.add_encoder(f"random:{dimension}", dimension, {}, "none")
    models = [f"m{number:06d}" for number in range(n_models)]

    def append(ids: list[str], role: str, of: list[str]) -> None:
        x = rng.standard_normal((len(ids), dimension), np.float32)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        scheme = pa.array([None if role == "exemplar" else "gpt"] * len(ids), pa.string())
        columns = {"image_id": ids, "role": [role] * len(ids), "model_id": of, "prompt_scheme": scheme}
        db.writer.append_bulk(pa.table(columns | {encoder_id: feature_array(x)}))

    append([f"{model}/e" for model in models], "exemplar", models)
    step = max(1, ROWS_AT_ONCE // n_samples)
    for start in range(0, n_models, step):
        of = [model for model in models[start : start + step] for _ in range(n_samples)]
        append([f"{model}/{number % n_samples}/0" for number, model in enumerate(of)], "sample", of)
    db.writer.upsert("models", [{"model_id": model, "kind": "object", "split": "train"} for model in models])
    db.refresh()
    return db


class Step:
    """A training step of the default mapper."""

    def __init__(self, dimension: int):
        self.settings = TrainSettings()
        self.maps = Maps(self.settings.form, dimension)
        self.optimizer = torch.optim.Adam(self.maps.parameters(), lr=self.settings.lr)

    def __call__(self, exemplars: np.ndarray, samples: np.ndarray) -> None:
        t, s = self.maps["exemplar"](torch.from_numpy(exemplars)), self.maps["sample"](torch.from_numpy(samples))
        loss = contrastive_loss(t, s, self.settings.temperature) + self.settings.lambda_reg * regularizer(self.maps)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()


@click.command()
@click.option("--models", "n_models", type=click.IntRange(2), default=10_000, show_default=True)
@click.option("--samples", "n_samples", type=click.IntRange(1), default=100, show_default=True, help="Per model.")
@click.option("--dimension", type=click.IntRange(2), default=512, show_default=True)
@click.option("--batch", type=click.IntRange(2), default=1024, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(n_models: int, n_samples: int, dimension: int, batch: int, rounds: int, out: Path | None) -> None:
    """Measure pairs per second."""
    folder = Path(tempfile.mkdtemp(prefix="attrdb-"))
    try:
        db = build(folder / "pairs.attrdb", n_models, n_samples, dimension, 0)
        started = time.perf_counter()
        pairs = Pairs(db, db.encoder_id(), Choice(), folder / "features.f32")
        prepare = time.perf_counter() - started
        started = time.perf_counter()
        db.query("pairs", **Choice().of_pairs(1))
        query = time.perf_counter() - started
        step = Step(dimension)
        rates: dict[str, list[float]] = {"loader": [], "step": [], "together": []}
        for epoch in range(rounds):
            started, n = time.perf_counter(), 0
            for exemplars, _ in pairs.batches(epoch, batch):
                n += len(exemplars)
            rates["loader"].append(n / (time.perf_counter() - started))
            [first] = islice(pairs.batches(epoch, batch), 1)
            n_steps = 1 + pairs.n_pairs // batch // 10
            started = time.perf_counter()
            for _ in range(n_steps):
                step(*first)
            rates["step"].append(n_steps * len(first[0]) / (time.perf_counter() - started))
            started, n = time.perf_counter(), 0
            for exemplars, samples in pairs.batches(epoch, batch):
                step(exemplars, samples)
                n += len(exemplars)
            rates["together"].append(n / (time.perf_counter() - started))
            click.echo(json.dumps({way: round(values[-1]) for way, values in rates.items()}))
        ratios = [c / min(a, b) for a, b, c in zip(*rates.values(), strict=True)]
        result = {
            "machine": describe("torch", "duckdb", "pylance"),
            "sizes": {"pairs": pairs.n_pairs, "dimension": dimension, "batch": batch, "models": n_models},
            "seconds": {"prepare": prepare, "query": query},
            "rates": {way: spread(values) for way, values in rates.items()},
            "ratio": spread(ratios),
            "peak_gib": peak_gib(),
        }
    finally:
        shutil.rmtree(folder)
    click.echo(json.dumps(result["ratio"]))
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
