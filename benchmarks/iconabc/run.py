"""The experiments on IconAbC, from its frozen files: python benchmarks/iconabc/run.py WORK --json FILE

    gallery, exemplars and samples -> WORK/iconabc-DIGEST.attrdb    (render.py, frozen.py; the digest is of the frozen files)
    for every encoder: its features
        mappers: temperature and learning rate chosen on validation models; objects, styles, both; ablations
        calibration on validation models, ranks of all models
    figures -> FILE, the page -> WORK/report.html

A step is skipped if its result is stored, so rerunning the command resumes it. All choices are made before test models are
used.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from pathlib import Path

import click
from frozen import HERE, load
from render import rendered
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import describe

from attrdb.database import Database, open_or_create
from attrdb.ingest.encode import load_encoder
from attrdb.ingest.encode.add_encoder import backfill
from attrdb.pages.report import figures, render
from attrdb.store.schema import encoder_id_of
from attrdb.training.calibrate import calibrate
from attrdb.training.evaluate import evaluate
from attrdb.training.train import TrainSettings, train

ENCODERS = ("efficientnet-lite0", "pixels:8", "vgg-gram")
TEMPERATURES = (1.0, 0.3, 0.1, 0.03)
RATES = (1e-4, 1e-3)
ABLATED = "efficientnet-lite0"
# Differences from the chosen mapper on both kinds.
ABLATIONS = {
    "no-regularizer": {"lambda_reg": 0.0},
    "gain": {"form": "gain"},
    "mlp": {"form": "mlp"},
    "mild": {"augment": "mild"},
    "strong": {"augment": "strong"},
}
console = Console(stderr=True)


def digest() -> str:
    """The digest of the frozen files, so that results on other files are not taken for theirs."""
    files = [HERE / f"{name}.parquet" for name in ("models", "images", "candidates")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def on_both(encoder_id: str, temperature: float, lr: float) -> str:
    """The id of the affine mapper on both kinds of models."""
    return f"{encoder_id}-both-v{temperature:g}-lr{lr:g}"


def chosen_settings(db: Database, encoder_id: str) -> tuple[dict, list[dict]]:
    """Temperature and learning rate with the lowest mean log rank in validation, and the results of all that were tried."""
    tried = []
    for temperature, lr in itertools.product(TEMPERATURES, RATES):
        settings = {"temperature": temperature, "lr": lr}
        result = trained(db, on_both(encoder_id, **settings), encoder_id, **settings)
        tried.append({"encoder_id": encoder_id, **settings, "recall": result.recall, "before": result.recall_before})
        tried[-1] |= {"mean_log_rank": result.mean_log_rank}
    best = min(tried, key=lambda row: row["mean_log_rank"])
    return {name: best[name] for name in ("temperature", "lr")}, tried


def trained(db: Database, mapper_id: str, encoder_id: str, **settings):
    with console.status(f"train {mapper_id}") as status:

        def report(stage: str, done: int, total: int | None, note: str = "") -> None:
            status.update(f"train {mapper_id}: epoch {done} of {total} at most, {note}")

        result = train(db, encoder_id, TrainSettings(**settings), mapper_id, report)
    recalls = f"{result.recall_before:.3f} -> {result.recall:.3f}"
    console.log(f"{mapper_id}: validation recall@10 {recalls}, epoch {result.best_epoch}")
    return result


def measured(db: Database, encoder_id: str, mapper_id: str | None) -> None:
    """Calibrate and rank, unless that is done."""
    known = {"encoder_id": encoder_id, "mapper_id": mapper_id or ""}
    where = "encoder_id = $encoder_id AND mapper_id = $mapper_id"
    if not db.sql(f"SELECT count(*) AS n FROM calibrations WHERE {where}", known)["n"][0].as_py():
        with console.status(f"calibrate {mapper_id or encoder_id}"):
            calibrate(db, mapper_id or encoder_id)
    if not db.sql(f"SELECT count(*) AS n FROM exemplar_ranks WHERE {where}", known)["n"][0].as_py():
        with console.status(f"evaluate {mapper_id or encoder_id}"):
            evaluate(db, mapper_id or encoder_id, "own")
    db.refresh()


@click.command()
@click.argument("work", type=click.Path(file_okay=False, path_type=Path))
@click.option("--encoder", "specs", multiple=True, default=ENCODERS, show_default=True, help="Repeatable.")
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(work: Path, specs: tuple[str, ...], out: Path | None) -> None:
    """Run the experiments; stored results are kept."""
    started = time.monotonic()
    icons = rendered(work)
    db = open_or_create(work / f"iconabc-{digest()}.attrdb")
    counts = load(db, icons)
    tried = []
    for spec in specs:
        with console.status(f"encode {spec}"):
            backfill(db, load_encoder(spec))
        encoder_id = encoder_id_of(spec)
        best, of_encoder = chosen_settings(db, encoder_id)
        tried += of_encoder
        paper = min((row for row in of_encoder if row["temperature"] == 1), key=lambda row: row["mean_log_rank"])
        mappers = dict.fromkeys([on_both(encoder_id, **best), on_both(encoder_id, 1.0, paper["lr"])])
        for kind in ("object", "style"):
            trained(db, f"{encoder_id}-{kind}", encoder_id, kind=kind, **best)
            mappers[f"{encoder_id}-{kind}"] = None
        for name, settings in ABLATIONS.items() if spec == ABLATED else ():
            trained(db, f"{encoder_id}-both-{name}", encoder_id, **best | settings)
            mappers[f"{encoder_id}-both-{name}"] = None
        for mapper_id in (None, *mappers):
            measured(db, encoder_id, mapper_id)
        console.log(f"{spec}: done after {(time.monotonic() - started) / 60:.0f} minutes")
    results = figures(db)
    stored = {"machine": describe("torch", "lancedb", "duckdb"), "counts": counts, "tried": tried, **results}
    stored["seconds"] = time.monotonic() - started
    if out:
        lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in stored.items())
        out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    (work / "report.html").write_text(render(db, results), encoding="utf-8")
    console.log(f"wrote {work / 'report.html'}")


if __name__ == "__main__":
    main()
