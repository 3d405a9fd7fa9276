"""Commands that learn from the models of a database and measure what came of it: train, calibrate, evaluate, report."""

from __future__ import annotations

import importlib
import math
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import click

import attrdb
from attrdb.cli.common import (
    DB,
    Id,
    RenamedChoice,
    asked_encoder_option,
    at_option,
    device_option,
    method_option,
    methods_option,
    ml,
    quiet_option,
    renamed,
    stored_encoder_id,
)
from attrdb.cli.declared import machine_options
from attrdb.cli.ingest import LISTED
from attrdb.cli.rows import Output, output_options
from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.options import LEAVES, QUEUE_OPTIONS, TRUTH_OPTIONS, QueueSettings, TruthSettings
from attrdb.search.memory import use_the_machine
from attrdb.text import visible

KINDS = {
    "object": "object",
    "style": "style",
    "object+style": "both",
}  # word of the command line -> word of the settings

gallery_option = click.option(
    "--gallery",
    type=click.Choice(["own", "all"]),
    default="own",
    show_default=True,
    help="Ranked beside the pretraining images: the exemplars of the sample's own model, or those of all models.",
)


@click.command(short_help="Train a mapper on exemplars and their samples.")
@DB
@asked_encoder_option
@click.option(
    "--on",
    type=click.Choice(["pairs", "attribution-table"]),
    default="pairs",
    show_default=True,
    help="What to learn from: pairs of an exemplar and a sample, or the scores of a method.",
)
@click.option(
    "--kind",
    type=RenamedChoice(list(KINDS), {"both": "object+style"}),
    help="Kinds of models to learn from. Default: object+style.",
)
@click.option(
    "--form",
    type=click.Choice(["affine", "gain", "mlp", "released-gain", "released-mlp"]),
    help="Form of the maps. Default: affine.",
)
@click.option(
    "--prompt-scheme", type=click.Choice(["gpt", "procedural", "both"]), help="Prompts of the samples. Default: both."
)
@click.option("--split", help="Split of the models to learn from. Default: train.")
@click.option("--val-split", help="Split of the models that decide when to stop. Default: val.")
@click.option(
    "--contrastive-temperature",
    "temperature",
    type=click.FloatRange(min=0, min_open=True),
    help="Temperature of the contrastive loss. Default: 0.1.",
)
@renamed("--temperature", "--contrastive-temperature", "temperature")
@click.option("--lambda-reg", type=click.FloatRange(0), help="Weight of the regularizer. Default: 0.05.")
@click.option(
    "--lr", type=click.FloatRange(min=0, min_open=True), help="Learning rate. Default: 1e-4; on a table 1e-3."
)
@click.option(
    "--batch",
    type=click.IntRange(2),
    help="Pairs per batch, each of another model. Default: 256; on a table 64 samples.",
)
@click.option("--epochs", type=click.IntRange(1), help="Most epochs to train. Default: 100.")
@click.option(
    "--patience",
    type=click.IntRange(1),
    help="Stop after this many epochs without better ranks. Default: 10; on a table 100 steps.",
)
@click.option("--n-candidates", type=click.IntRange(1), help="Pretraining images to validate among. Default: 10000.")
@click.option(
    "--augment",
    type=click.Choice(["none", "mild", "strong"]),
    help="Augmentation of the training images. Default: none.",
)
@click.option("--target", metavar="METHOD", help="On a table: the method whose scores are learned. Default: in_run.")
@click.option(
    "--loss",
    type=click.Choice(["soft", "one-hot", "regression", "rank", "rank-bce", "soft+regression"]),
    help="On a table: see docs/training.md. Default: soft.",
)
@click.option("--steps", type=click.IntRange(1), help="On a table: most steps to train. Default: 300.")
@click.option("--seed", type=int, help="Seed of the draws. Default: 0.")
@click.option(
    "--mapper-id",
    type=Id("mapper", new=True),
    help="Id of the mapper. Default: encoder, kind and a hash of the settings.",
)
@quiet_option
def train(db: Path, encoder_id: str | None, on: str, mapper_id: str | None, quiet: bool, **given: Any) -> None:
    """Train a mapper, and keep what does best on validation models.

    It learns from pairs of exemplars and samples. With --on attribution-table it learns the scores that a method, such as
    in_run, gave the exemplars of each sample's model (attrdb score); it then scores any image by its picture alone.

    Rerunning an interrupted command resumes at the epoch that it had reached; on a table, which takes a minute, it starts
    again.
    """
    given = {name: value for name, value in given.items() if value is not None}
    given |= {"kind": KINDS[given["kind"]]} if "kind" in given else {}
    on_pairs = on == "pairs"
    training = ml("training.train" if on_pairs else "training.attribution_model")
    make = training.TrainSettings if on_pairs else training.TableSettings
    known = {member.name for member in fields(make)}
    for name in given.keys() - known:
        raise InvalidValue(
            f"--{name.replace('_', '-')} is not an option of training on {on.replace('-', ' ')}; leave it out"
        )
    from attrdb.cli.output import progress

    database = attrdb.open(db)
    run = training.train if on_pairs else training.train_on_table
    with progress(quiet) as advance:
        result = run(database, stored_encoder_id(database, encoder_id), make(**given), mapper_id, advance)
    if not result.trained:
        click.echo(f"mapper {result.mapper_id} was trained already, nothing to do", err=True)
    if on_pairs:
        _tell_ranks(result, training.K)
    else:
        click.echo(
            f"mapper {result.mapper_id}: on validation models its rank correlation with the scores is "
            f"{result.correlation:.3f} at step {result.best_step}, {result.correlation_before:.3f} without it",
            err=True,
        )
    if not (result.best_epoch if on_pairs else result.best_step):
        click.echo("nothing that was learned is better than the encoder alone: this mapper changes nothing", err=True)


def _tell_ranks(result: Any, k: int) -> None:
    click.echo(
        f"mapper {result.mapper_id}: on validation models the typical rank of an exemplar is "
        f"{math.exp(result.mean_log_rank):,.0f} in epoch {result.best_epoch}, {math.exp(result.mean_log_rank_before):,.0f} "
        f"without it; recall@{k} {result.recall:.3f}, {result.recall_before:.3f} without it",
        err=True,
    )


@click.command(short_help="Fit influence to known shares.")
@DB
@method_option
@asked_encoder_option
@click.option("--mapper", "mapper_id", type=Id("mapper"), help="Similarity with this mapper, in the place of a method.")
@click.option("--split", default="val", show_default=True, help="Split of the models whose samples are used.")
@output_options
@quiet_option
def calibrate(
    db: Path,
    method: str | None,
    encoder_id: str | None,
    mapper_id: str | None,
    split: str,
    output: Output,
    quiet: bool,
) -> None:
    """Fit influence to the exemplars' known shares: its temperature, its cut-off, and the share that cannot be attributed.

    There is one fit for all samples, and one for each kind of models where there are several. `attribute` uses them from then
    on; rerun it when the corpus has grown. It prints influence beside the true share of exemplars, one row per bin: on each
    half of the models with what was fitted on the other half (held out), of a single model on itself (fitted).
    """
    use_the_machine()
    calibration = ml("training.calibrate")
    import pyarrow as pa

    from attrdb.attribution.methods import resolve_method
    from attrdb.cli.output import progress

    database = attrdb.open(db)
    method_id = resolve_method(database.snapshot, method, stored_encoder_id(database, encoder_id), mapper_id)
    with progress(quiet) as advance:
        found = calibration.calibrate(database, method_id, split, advance)
    rows = [
        {"kind": one.kind, "measured_on": "held out" if one.held_out else "fitted"} | row
        for one in found
        for row in one.held_out or one.reliability
    ]
    types = {"kind": pa.string(), "measured_on": pa.string(), "n": pa.int64()}
    names = ("kind", "measured_on", "least", "most", "n", "influence", "share")
    output.write(
        pa.table({name: pa.array([row[name] for row in rows], types.get(name, pa.float64())) for name in names})
    )
    for one in found:
        of = f"{one.kind} models: " if one.kind else ""
        before = "not finite" if one.kl_before is None else f"{one.kl_before:.3f}"
        click.echo(
            f"{of}tau {one.tau:.4g}, lambda {one.lam:.4g}, {one.unattributed:.3f} of influence cannot be attributed: "
            f"divergence {one.kl:.3f} nats, {before} at tau {one.tau_before:.4g} without a cut-off and with nothing "
            f"unattributed; {one.n_samples:,} samples among {one.gallery_size:,} pretraining images",
            err=True,
        )


@click.command(short_help="Score candidates by gradients, or by a package's method.")
@DB
@click.argument("scorers", metavar="SCORER...", nargs=-1, required=True)
@click.option(
    "--samples", metavar="PREDICATE", default="true", help="Score the samples that fulfil PREDICATE. Default: all."
)
@click.option(
    "--method-id", type=Id("method", new=True), help="Id of the method, of a single SCORER. Default: it, in lower case."
)
@quiet_option
def score(db: Path, scorers: tuple[str, ...], samples: str, method_id: str | None, quiet: bool) -> None:
    """Score candidates of samples by each SCORER (NAME or NAME:ARGUMENT), and store the scores.

    SCORER is in-run, gradient-dot, trac-in, gradient-cosine, influence-function, d-trak, d-trak-layers or data-inf, which
    score the exemplars of a sample's own model by gradients of its training loss, over 24 draws of noise (NAME:N for N of
    them), or one that an installed package adds. in-run needs models that were made with --monitor changes; trac-in
    trains each model again. Give several at once: they share the gradients, which take most of the time.

    The methods then work with --method in attribute, evaluate, calibrate and report. Rerunning the command resumes it, and
    scores samples that are new.
    """
    scoring = importlib.import_module("attrdb.ingest.score")
    from attrdb.cli.output import progress

    specs = list(dict.fromkeys(scorers))
    if method_id is not None and len(specs) > 1:
        raise InvalidValue(f"--method-id names one method, and {len(specs)} are given; score them one by one")
    spec_of: dict[str, str] = {}
    for spec in specs:
        scored_by = scoring.method_id_of(spec, method_id)
        if scored_by in spec_of:
            raise InvalidValue(
                f"{spec_of[scored_by]} and {spec} would both be method {scored_by!r}; score them one by one, with --method-id"
            )
        spec_of[scored_by] = spec
    if any(scoring.name_of(spec) in scoring.BUILT_IN for spec in specs):
        ml("ingest.gradients.scorers")
    scorers_of = scoring.load_scorers(specs)
    methods = {scored_by: (spec, scorers_of[spec]) for scored_by, spec in spec_of.items()}
    with progress(quiet) as advance:
        results = scoring.score_all(attrdb.open(db), methods, samples, advance)
    for scored_by, result in results.items():
        failed = f", {len(result.failures):,} got no score (see failures)" if result.failures else ""
        click.echo(
            f"{result.n_done:,} samples scored by {scored_by}, {result.n_stored:,} were already{failed}", err=True
        )
    if any(result.failures for result in results.values()):
        raise click.exceptions.Exit(1)


@click.command(short_help="Train models again without some of their exemplars.")
@DB
@click.option(
    "--models",
    metavar="PREDICATE",
    default="true",
    help="Models that fulfil PREDICATE, on the columns of models. Default: all.",
)
@click.option(
    "--leave",
    type=click.Choice(LEAVES),
    multiple=True,
    required=True,
    help="What to leave out: each image, concept or creator, or random halves. Repeatable.",
)
@click.option(
    "--samples", metavar="PREDICATE", default="true", help="Measure the samples that fulfil PREDICATE. Default: all."
)
@machine_options(TRUTH_OPTIONS)
@machine_options(QUEUE_OPTIONS)
@quiet_option
def truth(db: Path, models: str, leave: tuple[str, ...], samples: str, quiet: bool, **options: Any) -> None:
    """Find out what models owe to their exemplars: train them again without some, and measure their samples.

    A model is trained once more with all exemplars, and then without each image, concept or creator, or without random halves
    (--leave). With fixed draws, the default, all else of the training stays as it was. Each retraining costs as much as the
    model did; it is stored in retrainings, with the loss of every sample in counterfactuals.

    The queries removal_scores, removal_intervals and compare_removals then compare every method that was evaluated (attrdb
    evaluate --gallery own) with this truth. Rerunning the command resumes it, also with more to leave out.
    """
    queue = ml("ingest.truth.queue")
    from attrdb.cli.output import progress

    settings = TruthSettings(**{member.name: options.pop(member.name) for member in fields(TruthSettings)})
    with progress(quiet) as advance:
        result = queue.find_truth(db, models, leave, samples, settings, QueueSettings(**options), advance)
    click.echo(f"{result.n_done} models trained again, {result.n_stored} were already", err=True)
    for model_id, reason in islice(result.failures.items(), LISTED):
        click.echo(visible(f"failed: {model_id}: {reason}"), err=True)
    if result.failures:
        raise InvalidValue(
            f"{len(result.failures)} models failed, all others are stored; fix them and rerun the command"
        )


@click.command(short_help="Rank the exemplars of samples; metrics are queries on it.")
@DB
@methods_option("every encoder and every stored method")
@click.option(
    "--encoder",
    "encoder_ids",
    type=Id("encoder"),
    multiple=True,
    help="Similarity of this encoder (id or spec), repeatable.",
)
@click.option(
    "--mapper", "mapper_ids", type=Id("mapper"), multiple=True, help="Similarity with this mapper, repeatable."
)
@gallery_option
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
    wanted += [
        resolve_method(database.snapshot, None, stored_encoder_id(database, encoder_id)) for encoder_id in encoder_ids
    ]
    wanted += [resolve_method(database.snapshot, None, None, mapper_id) for mapper_id in mapper_ids]
    if not wanted:
        database.encoder_id()
        wanted = [name for name, row in database.methods.items() if row["mapper_id"] is None]
    n_ranks, problems = {}, []
    with progress(quiet) as advance:
        for method_id in dict.fromkeys(wanted):
            try:
                n_ranks[method_id] = evaluation.evaluate(database, method_id, gallery, advance, device)
            except NotFound as error:
                problems.append(f"{method_id} was not evaluated: {error}")
    for method_id, n in n_ranks.items():  # not within the bar
        click.echo(f"{n} ranks by {method_id}, gallery {gallery}", err=True)
    if problems:
        raise NotFound("\n".join(problems))


@click.command(short_help="Write a page with metrics, plots and attributed samples.")
@DB
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="File of the page.",
)
@methods_option("all that were evaluated")
@gallery_option
@at_option
@quiet_option
def report(db: Path, out: Path, methods: tuple[str, ...], gallery: str, at: str | None, quiet: bool) -> None:
    """Write a page with all metrics, plots, and queries with their attributed images, in one file.

    It shows what was evaluated: attrdb evaluate DB, with --method for mappers.
    """
    from attrdb.attribution.methods import resolve_method

    module, database = ml("pages.report"), attrdb.open(db, read_only=True, at=at)
    method_ids = [resolve_method(database.snapshot, method) for method in methods]
    out.write_text(module.render(database, module.figures(database, gallery, method_ids)), encoding="utf-8")
    click.echo(f"wrote {out}", err=True)
