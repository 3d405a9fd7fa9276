"""What models owe to their exemplars, and which method foretells it: python benchmarks/removals/run.py STAGE WORK

    make     the models of plan.py, monitored, with their samples -> WORK/removals.attrdb
    truth    models of split `test` trained again without each concept, and without random halves
    score    every method: gradients, controls; attribution models, chosen on models of split `val`
    figures  the queries' answers -> FILE
    keep     what `truth` has found -> truth.parquet; `restore` takes it from there, for models that are the same

Each stage resumes where it was interrupted; `truth` is the long one, some 10 minutes per model on one core. `score` may run
beside it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import click
from controls import CONTROLS, Control, latents_encoder
from kept import FILE, keep, restore
from plan import write_plan

import attrdb
from attrdb.bundled import write_corpus
from attrdb.database import Database
from attrdb.ingest.score import BUILT_IN, method_id_of, score
from attrdb.store.schema import encoder_id_of
from attrdb.training.attribution_model import TableSettings, train_on_table
from attrdb.training.table_losses import LOSSES, WITH_TEMPERATURE

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import describe, icon_sd
from truth import short

ENCODERS = ("efficientnet-lite0", "pixels:8", "vgg-gram")
N_CORPUS = 500  # `attrdb evaluate` ranks exemplars among pretraining images; the scores do not depend on them
NOT_BLENDED = "prompt_scheme <> 'blend'"
TEMPERATURES = (0.03, 0.1, 0.3)
NOT_LEARNED_ON = ("pixels:8",)  # an attribution model is tried on the features of every other encoder
TEACHERS = ("in-run", "d-trak-layers")  # whose scores they learn; the others score the models that are measured
SLOW = ("trac-in",)  # trains the models again, and differentiates at five checkpoints
COMPARED = ("d_trak_layers", "in_run")  # and attribution models, each with all methods
AS_PAIRS = "one-hot"  # the loss of mappers: what pairs alone teach


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
    corpus = write_corpus(work / "corpus.parquet", N_CORPUS)
    specs_of_encoders = (*ENCODERS, latents_encoder(work / "latents.pt"))
    encoders = [word for spec in specs_of_encoders for word in ("--encoder", spec)]
    command("ingest", "corpus", database(work), corpus, *encoders)
    command("ingest", "models", database(work), specs, "--base-model", "icon-sd", "--workers", workers, *encoders)


@main.command()
@click.argument("work", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--workers", default=1, show_default=True)
@click.option("--halves", default=8, show_default=True)
@click.option("--images", default=4, show_default=True, help="Of so many models, leave out each image.")
def truth(work: Path, workers: int, halves: int, images: int) -> None:
    """Train the models of split `test` again."""
    shared = ("truth", database(work), "--workers", workers, "--models")
    command(*shared, "split = 'test'", "--leave", "concept")
    command(*shared, "split = 'test'", "--leave", "half", "--halves", halves, "--samples", NOT_BLENDED)
    if images:
        some = f"split = 'test' AND model_id < 'test-{images:02d}'"
        command(*shared, some, "--leave", "image", "--samples", NOT_BLENDED)


@main.command("keep")
@click.argument("work", type=click.Path(exists=True, file_okay=False, path_type=Path))
def keep_truth(work: Path) -> None:
    """Keep what `truth` has found, in truth.parquet."""
    click.echo(f"{keep(attrdb.open(database(work)))} retrainings kept in {FILE}")


@main.command("restore")
@click.argument("work", type=click.Path(exists=True, file_okay=False, path_type=Path))
def restore_truth(work: Path) -> None:
    """Take what was kept in truth.parquet, in place of training again."""
    n_same, n_other = restore(attrdb.open(database(work)))
    click.echo(f"{n_same} retrainings restored; {n_other} are of models or samples that came out otherwise here")


@main.command("score")
@click.argument("work", type=click.Path(exists=True, file_okay=False, path_type=Path))
def score_all(work: Path) -> None:
    """Score all samples by every method, train attribution models, and evaluate all of them."""
    db = attrdb.open(database(work))
    for name in CONTROLS:
        score(db, name, Control(name))
    measured = [name for name in BUILT_IN if name not in SLOW]
    command("score", db.path, *measured, "--samples", "split = 'test'")
    command("score", db.path, *TEACHERS, "--samples", "split <> 'test'")
    command("score", db.path, *SLOW, "--samples", f"split = 'test' AND {NOT_BLENDED}")
    chosen = {row["mapper_id"] for row in learned(db) if row["chosen"]}
    db.refresh()
    for method_id, method in db.methods.items():
        if method["mapper_id"] is None or method["mapper_id"] in chosen:
            command("evaluate", db.path, "--method", method_id, "--gallery", "own")


def learned(db: Database) -> list[dict]:
    """The attribution models that were tried. The best on validation models are chosen, see `groups`."""
    tried = []
    features = [each for each in db.snapshot.encoders if each not in map(encoder_id_of, NOT_LEARNED_ON)]
    for teacher, encoder_id, name in product(TEACHERS, features, LOSSES):
        target = method_id_of(teacher)
        for temperature in TEMPERATURES if name in WITH_TEMPERATURE else TEMPERATURES[:1]:
            if name == AS_PAIRS and teacher != TEACHERS[0]:
                continue  # its pairs are the same
            settings = TableSettings(target=target, loss=name, temperature=temperature)
            mapper_id = f"{target}-{name.replace('+', '-')}-v{temperature:g}-{short(encoder_id)}"
            result = train_on_table(db, encoder_id, settings, mapper_id)
            asked = {"teacher": target, "features": encoder_id, "loss": name, "temperature": temperature}
            tried.append(asked | vars(result) | {"chosen": False})
    for group in groups(tried):
        max(group, key=lambda row: row["correlation"])["chosen"] = True
    return tried


def groups(tried: list[dict]) -> list[list[dict]]:
    """By encoder and teacher, those of pairs' loss in a group of their own."""
    kept: dict[tuple[str, str], list[dict]] = {}
    for row in tried:
        taught_by = AS_PAIRS if row["loss"] == AS_PAIRS else row["teacher"]
        kept.setdefault((row["features"], taught_by), []).append(row)
    return list(kept.values())


@main.command()
@click.argument("work", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "out", type=click.Path(path_type=Path), required=True)
def figures(work: Path, out: Path) -> None:
    """Ask the queries, and write their answers."""
    db = attrdb.open(database(work))
    tried = learned(db)
    best = [
        max((row for row in tried if row["teacher"] == method_id_of(teacher)), key=lambda row: row["correlation"])
        for teacher in TEACHERS
    ]
    answers = {
        name: db.query(name).to_pylist()
        for name in ("removal_intervals", "between_concepts", "within_concept", "learned_concepts")
    }
    answers["between_learned_concepts"] = db.query("between_concepts", learned=True).to_pylist()
    answers["gains"] = {
        method: db.query("compare_removals", method=method).to_pylist()
        for method in (*COMPARED, *(f"{row['features']}/{row['mapper_id']}" for row in best))
        if method in db.methods
    }
    retrainings = db.sql(
        """
        SELECT leave, draws, count(DISTINCT model_id) AS n_models, count(*) AS n, median(seconds) AS seconds
        FROM retrainings GROUP BY ALL ORDER BY ALL
        """
    )
    found = {
        "machine": describe("torch", "diffusers", "duckdb"),
        "base_model": icon_sd(),
        "retrainings": retrainings.to_pylist(),
        "tried": tried,
    }
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in (found | answers).items())
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
