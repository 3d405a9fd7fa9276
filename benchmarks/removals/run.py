"""What models owe to their exemplars, and which method foretells it: python benchmarks/removals/run.py STAGE WORK

    make     the models of plan.py, monitored, with their samples -> WORK/removals.attrdb
    truth    models of split `test` trained again without each concept, and without random halves
    score    every method: gradients, controls
    figures  the queries' answers -> FILE

Each stage resumes where it was interrupted; `truth` is the long one, some 10 minutes per model on one core. `score` may run
beside it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pyarrow.parquet as pq
from controls import CONTROLS, Control
from plan import write_plan

import attrdb
from attrdb.demo import bundled_icons
from attrdb.ingest.score import BUILT_IN, score

ENCODERS = ("efficientnet-lite0", "pixels:8", "vgg-gram")
N_CORPUS = 500  # `attrdb evaluate` ranks exemplars among pretraining images; the scores do not depend on them
NOT_BLENDED = "prompt_scheme <> 'blend'"


def command(*words: object) -> None:
    """Run attrdb's command line; what it prints goes through. Its failure ends this script."""
    done = subprocess.run([sys.executable, "-m", "attrdb", *map(str, words)], check=False)
    if done.returncode:
        raise click.ClickException(f"attrdb {' '.join(map(str, words))} ended with {done.returncode}")


def database(work: Path) -> Path:
    return work / "removals.attrdb"


@click.group()
def main() -> None:
    """Measure what models owe to their exemplars, and which method foretells it."""


@main.command()
@click.argument("work", type=click.Path(file_okay=False, path_type=Path))
@click.option("--workers", default=1, show_default=True)
def make(work: Path, workers: int) -> None:
    """Make the models."""
    work.mkdir(parents=True, exist_ok=True)
    specs = work / "models.jsonl"
    if not specs.exists():
        write_plan(work)
    corpus = work / "corpus.parquet"
    pretraining = pq.read_table(bundled_icons(), filters=[("role", "=", "pretraining")])
    pq.write_table(pretraining.slice(0, N_CORPUS), corpus)
    encoders = [word for spec in ENCODERS for word in ("--encoder", spec)]
    command("ingest", "corpus", database(work), corpus, *encoders)
    command("ingest", "models", database(work), specs, "--base-model", "icon-sd", "--workers", workers, *encoders)


@main.command()
@click.argument("work", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--workers", default=1, show_default=True)
@click.option("--halves", default=32, show_default=True)
@click.option("--images", is_flag=True, help="Also leave out each image.")
def truth(work: Path, workers: int, halves: int, images: bool) -> None:
    """Train the models of split `test` again."""
    shared = ("truth", database(work), "--models", "split = 'test'", "--workers", workers)
    command(*shared, "--leave", "concept")
    command(*shared, "--leave", "half", "--halves", halves, "--samples", NOT_BLENDED)
    if images:
        command(*shared, "--leave", "image", "--samples", NOT_BLENDED)


@main.command("score")
@click.argument("work", type=click.Path(exists=True, file_okay=False, path_type=Path))
def score_all(work: Path) -> None:
    """Score all samples by every method, and evaluate it."""
    db = attrdb.open(database(work))
    for name in CONTROLS:
        score(db, name, Control(name))
    for name in BUILT_IN:
        command("score", db.path, name)
    db.refresh()
    for method_id in db.sql("SELECT method_id FROM methods ORDER BY method_id")["method_id"].to_pylist():
        command("evaluate", db.path, "--method", method_id, "--gallery", "own")


if __name__ == "__main__":
    main()
