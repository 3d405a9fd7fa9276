"""Appending models to a large database: seconds until SQL sees a model, and how they and queries grow over many appends.

    python benchmarks/appending.py --rows 1000000 --models 200 --json appending.json

A model is 1 exemplar and 80 samples. Two copies of the database take the same appends in turn; one of them is optimized every
--optimize-every appends, the other never. Each figure is of an open database, after `refresh`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
from importing import ENCODER_ID, SPEC, write_shards
from machine import describe, spread

import attrdb
from attrdb.database import Database
from attrdb.ingest.read.embedding_shards import open_embeddings
from attrdb.ingest.read.embeddings import ingest_embeddings
from attrdb.store.schema import feature_array
from attrdb.upkeep import optimize

N_SAMPLES = 80
QUERIES = {
    "visible": "SELECT count(*) AS n FROM samples WHERE model_id = $id",
    "one image": "SELECT prompt FROM images WHERE image_id = $id || '/0/7'",
    "counts by role": "SELECT role, count(*) AS n FROM images GROUP BY role",
}


def model_rows(model_id: str, dimension: int, rng: np.random.Generator) -> pa.Table:
    ids = [f"{model_id}/exemplar", *(f"{model_id}/0/{seed}" for seed in range(N_SAMPLES))]
    features = rng.standard_normal((len(ids), dimension), dtype=np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return pa.table(
        {
            "image_id": ids,
            "role": ["exemplar"] + ["sample"] * N_SAMPLES,
            "model_id": [model_id] * len(ids),
            "prompt": [None] + [f"a picture of V* thing {seed}" for seed in range(N_SAMPLES)],
            ENCODER_ID: feature_array(features),
        }
    )


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def append_and_ask(db: Database, number: int, dimension: int, rng: np.random.Generator) -> dict[str, float]:
    """Seconds of the append and of every query; the new model must be seen at once."""
    model_id = f"model-{number:04d}"
    rows = model_rows(model_id, dimension, rng)
    seconds = {"append": timed(lambda: db.writer.append_model(rows, {"model_id": model_id, "kind": "object"}))}
    seen = db.sql(QUERIES["visible"], {"id": model_id})["n"].to_pylist()
    assert seen == [N_SAMPLES], seen
    for name, statement in QUERIES.items():
        parameters = {"id": model_id} if "$id" in statement else {}
        seconds[name] = timed(lambda statement=statement, parameters=parameters: db.sql(statement, parameters))
    return seconds


@click.command()
@click.option("--rows", type=click.IntRange(1), default=1_000_000, show_default=True)
@click.option("--dimension", type=click.IntRange(1), default=512, show_default=True)
@click.option("--models", type=click.IntRange(1), default=200, show_default=True)
@click.option("--optimize-every", type=click.IntRange(1), default=50, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there too.")
def main(rows: int, dimension: int, models: int, optimize_every: int, seed: int, out: Path | None) -> None:
    figures: dict[str, list[dict]] = {"left alone": [], "optimized": []}
    rounds: list[dict] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder / "laion", rows, dimension, 1, seed)
        ingest_embeddings(attrdb.create(folder / "0.attrdb"), open_embeddings(str(folder / "laion")), SPEC, "laion")
        shutil.rmtree(folder / "laion")
        shutil.copytree(folder / "0.attrdb", folder / "1.attrdb")
        databases = dict(
            zip(figures, (attrdb.open(folder / "0.attrdb"), attrdb.open(folder / "1.attrdb")), strict=True)
        )
        # Build the indices of ids and roles once; appends do not rebuild them.
        for db in databases.values():
            rounds.append(optimized(db, 0))
        for number in range(models):
            for copy, db in databases.items():
                rng = np.random.default_rng((seed, number))
                figures[copy].append(append_and_ask(db, number, dimension, rng))
            if (number + 1) % optimize_every == 0:
                rounds.append(optimized(databases["optimized"], number + 1))
                click.echo(f"{number + 1} appends: " + json.dumps({w: round_all(f[-1]) for w, f in figures.items()}))
        tables = {copy: db.status()["tables"]["images"] for copy, db in databases.items()}
    tenth = max(1, models // 10)
    result = {
        "machine": describe("pylance", "duckdb", "pyarrow"),
        "sizes": {"rows": rows, "dimension": dimension, "models": models, "images_a_model": N_SAMPLES + 1},
        "optimize_every": optimize_every,
        "seed": seed,
        "first_tenth": {copy: summed(runs[:tenth]) for copy, runs in figures.items()},
        "last_tenth": {copy: summed(runs[-tenth:]) for copy, runs in figures.items()},
        "optimize_rounds": rounds[1:],
        "tables": tables,
    }
    click.echo(json.dumps(result, indent=1))
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


def optimized(db: Database, after: int) -> dict:
    start = time.perf_counter()
    result = optimize.optimize(db.writer)
    states = (result.before, result.after)
    return {
        "after_appends": after,
        "seconds": time.perf_counter() - start,
        "fragments": [state["tables"]["images"]["fragments"] for state in states],
        "bytes": [state["tables"]["images"]["bytes"] for state in states],
        "n_unindexed": [max((index["n_unindexed"] for index in state["indices"]), default=None) for state in states],
    }


def summed(runs: list[dict[str, float]]) -> dict[str, dict]:
    return {name: spread([run[name] for run in runs]) for name in runs[0]}


def round_all(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


if __name__ == "__main__":
    main()
