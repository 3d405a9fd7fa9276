"""Commands that learn from the models of a database and measure what came of it: train, calibrate, evaluate, report."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import click

import attrdb
from attrdb.cli.common import DB, Id, at_option, device_option, method_option, ml, quiet_option
from attrdb.search.memory import use_the_machine


@click.command()
@DB
@click.option("--encoder", "encoder_id", type=Id("encoder"), help="encoder_id; the database's first when left out.")
@click.option("--kind", type=click.Choice(["object", "style", "both"]), help="Of the models; default both.")
@click.option("--form", type=click.Choice(["affine", "gain", "mlp"]), help="Of the maps; default affine.")
@click.option("--prompt-scheme", type=click.Choice(["gpt", "procedural", "both"]), help="Of the samples; default both.")
@click.option("--split", help="Of the models it learns from; default train.")
@click.option("--val-split", help="Of the models that say when to stop; default val.")
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), help="v of the loss; default 0.1.")
@click.option("--lambda-reg", type=click.FloatRange(0), help="Weight of the regularizer; default 0.05.")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), help="Learning rate; default 1e-4.")
@click.option("--batch", type=click.IntRange(2), help="Pairs of as many models; default 256.")
@click.option("--epochs", type=click.IntRange(1), help="At most; default 100.")
@click.option("--patience", type=click.IntRange(1), help="Epochs without better ranks until it ends; default 10.")
@click.option("--n-candidates", type=click.IntRange(1), help="Pretraining images in validation; default 10000.")
@click.option("--augment", type=click.Choice(["none", "mild", "strong"]), help="Of the training images; default none.")
@click.option("--seed", type=int)
@click.option("--mapper-id", type=Id("mapper", new=True), help="Default: encoder, kind and a hash of the settings.")
@quiet_option
def train(db: Path, encoder_id: str | None, mapper_id: str | None, quiet: bool, **given: Any) -> None:
    """Train a mapper on pairs of exemplars and samples, and keep the epoch that ranks validation exemplars best.

    Interrupted or killed, the command goes on at the epoch it had reached when it is given again.
    """
    training = ml("training.train")
    from attrdb.cli.output import progress

    settings = training.TrainSettings(**{name: value for name, value in given.items() if value is not None})
    with progress(quiet) as advance:
        result = training.train(
            attrdb.open(db),
            encoder_id,
            settings,
            mapper_id,
            lambda done, total, note: advance("train", done, total, note),
        )
    if not result.trained:
        click.echo(f"mapper {result.mapper_id} was trained already, nothing to do", err=True)
    click.echo(
        f"mapper {result.mapper_id}: on validation models the typical rank of an exemplar is "
        f"{math.exp(result.mean_log_rank):,.0f} in epoch {result.best_epoch}, {math.exp(result.mean_log_rank_before):,.0f} "
        f"without it; recall@{training.K} {result.recall:.3f}, {result.recall_before:.3f} without it",
        err=True,
    )
    if not result.best_epoch:
        click.echo("no epoch ranks them better than the encoder alone: this mapper changes nothing", err=True)


@click.command()
@DB
@method_option
@click.option(
    "--encoder", "encoder_id", type=Id("encoder"), help="Similarity of this encoder; the first when left out."
)
@click.option("--mapper", "mapper_id", type=Id("mapper"), help="Similarity with this mapper.")
@click.option("--split", default="val", show_default=True, help="Of the models whose samples it is fitted on.")
@quiet_option
def calibrate(
    db: Path, method: str | None, encoder_id: str | None, mapper_id: str | None, split: str, quiet: bool
) -> None:
    """Fit temperature and cut-off of influence to the exemplars' known shares; `attribute` uses them from then on.

    Give it again when the corpus has grown.
    """
    use_the_machine()
    calibration = ml("training.calibrate")
    import pyarrow as pa

    from attrdb.attribution.methods import resolve_method
    from attrdb.cli.output import print_table, progress

    database = attrdb.open(db)
    method_id = resolve_method(database.snapshot, method, encoder_id, mapper_id)
    with progress(quiet) as advance:
        found = calibration.calibrate(database, method_id, split, lambda done, total: advance("calibrate", done, total))
    print_table(pa.Table.from_pylist(found.reliability), "table")
    click.echo(
        f"tau {found.tau:.4g}, lambda {found.lam:.4g}: divergence {found.kl:.3f} nats, {found.kl_before:.3f} at tau 1 "
        f"without a cut-off; {found.n_samples:,} samples among {found.gallery_size:,} pretraining images",
        err=True,
    )


@click.command()
@DB
@click.option(
    "--method",
    "methods",
    type=Id("method"),
    multiple=True,
    help="A method_id, encoder_id or mapper_id, repeatable. Default: every encoder and every stored method.",
)
@click.option(
    "--encoder", "encoder_ids", type=Id("encoder"), multiple=True, help="Similarity of this encoder, repeatable."
)
@click.option(
    "--mapper", "mapper_ids", type=Id("mapper"), multiple=True, help="Similarity with this mapper, repeatable."
)
@click.option("--gallery", type=click.Choice(["own", "all"]), default="own", show_default=True)
@device_option
@quiet_option
def evaluate(
    db: Path,
    methods: tuple[str, ...],
    encoder_ids: tuple[str, ...],
    mapper_ids: tuple[str, ...],
    gallery: str,
    device: str,
    quiet: bool,
) -> None:
    """Rank every sample's exemplars exactly; the metrics are queries over these ranks."""
    evaluation = importlib.import_module("attrdb.training.evaluate")
    from attrdb.attribution.methods import resolve_method
    from attrdb.cli.output import progress
    from attrdb.search.exact import accelerator

    use_the_machine()
    database, device = attrdb.open(db), accelerator(device)
    wanted = [resolve_method(database.snapshot, method) for method in methods]
    wanted += [resolve_method(database.snapshot, None, encoder_id) for encoder_id in encoder_ids]
    wanted += [resolve_method(database.snapshot, None, None, mapper_id) for mapper_id in mapper_ids]
    if not wanted:
        database.encoder_id()
        wanted = [name for name, row in database.methods.items() if row["mapper_id"] is None]
    with progress(quiet) as advance:
        for method_id in dict.fromkeys(wanted):
            stage = f"evaluate {method_id}"
            n_ranks = evaluation.evaluate(
                database, method_id, gallery, lambda done, total, stage=stage: advance(stage, done, total), device
            )
            click.echo(f"{n_ranks} ranks by {method_id}, gallery {gallery}", err=True)


@click.command()
@DB
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="The page's file.",
)
@click.option("--gallery", type=click.Choice(["own", "all"]), default="own", show_default=True)
@at_option
def report(db: Path, out: Path, gallery: str, at: str | None) -> None:
    """Write a page with all metrics, plots, and queries with their attributed images, in one file.

    It shows what was evaluated: attrdb evaluate DB, with --mapper for mappers.
    """
    module, database = ml("pages.report"), attrdb.open(db, read_only=True, at=at)
    out.write_text(module.render(database, module.figures(database, gallery)), encoding="utf-8")
    click.echo(f"wrote {out}", err=True)
