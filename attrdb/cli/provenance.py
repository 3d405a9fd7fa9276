"""Commands of source-model attribution: choose keys of one's own model, collect answers of others, test a model by them."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import click

import attrdb
from attrdb.cli.common import DB, Id, at_option, ml, quiet_option
from attrdb.cli.ingest import LISTED
from attrdb.cli.rows import Output, output_options
from attrdb.errors import InvalidValue
from attrdb.text import visible

FILE = click.Path(path_type=Path)


@click.group(short_help="Key sets: prompts and pictures to test other models with.")
def keys() -> None:
    """Key sets: prompts, each with a picture of your model, by which others are tested for having learned from it."""


@keys.command("find", short_help="Choose keys from answers of your model.")
@DB
@click.argument("key_set_id", metavar="KEY_SET", type=Id("key set", new=True))
@click.option("--source", required=True, type=Id("source", new=True), help="Name of your model.")
@click.option(
    "--prompts", required=True, type=FILE, help="Text file with a prompt per line; or a CSV of number, prompt."
)
@click.option("--answers", required=True, type=FILE, help="Your model's answers to them, see attrdb answers draw.")
@click.option(
    "--other", "others", multiple=True, type=FILE, help="Answers of another model, such as its base model. Repeatable."
)
@click.option("--images", type=FILE, help="Training images of your model, by the number of their caption.")
@click.option(
    "--strategy",
    type=click.Choice(["generation", "detection", "random"]),
    default="generation",
    show_default=True,
    help="Keys that your model answers alike; training images that it answers with; any.",
)
@click.option("-n", "n_keys", type=click.IntRange(1), default=30, show_default=True, help="Keys to choose.")
@click.option(
    "-m", "n_answers", type=click.IntRange(1), default=4, show_default=True, help="Answers per key to ask models for."
)
@click.option("--descriptor", default="l2", show_default=True, help="What distances are of: l2, or an encoder's spec.")
@click.option("--plain", is_flag=True, help="Rank by your model's answers alone, not by contrast to --other.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of --strategy random.")
@quiet_option
def find_keys(
    db: Path,
    key_set_id: str,
    source: str,
    prompts: Path,
    answers: Path,
    others: tuple[Path, ...],
    images: Path | None,
    quiet: bool,
    **settings: Any,
) -> None:
    """Choose the keys of KEY_SET from answers of your own model to many prompts.

    Generation, which needs no training data, takes prompts that your model answers alike (-m + 1 pictures each) and that the
    models of --other answer otherwise. Detection takes training images (--images) that your model's answers come near to.

    Keep a key set secret: who knows it can answer otherwise.
    """
    finding, files = ml("ingest.answers.keys"), importlib.import_module("attrdb.ingest.answers.files")
    from attrdb.cli.output import progress

    chosen_by = finding.KeySettings(**settings)
    database, asked = attrdb.open(db), files.read_prompts(prompts).texts
    named = _named(answers, others)
    with progress(quiet) as advance:
        read = {
            path: files.read_answers(path, set(asked), advance)
            for path in (answers, *others, *([images] if images else []))
        }
        against = {name: read[path] for name, path in named.items()}
        chosen = finding.choose_keys(
            asked, read[answers], against, chosen_by, read[images] if images else None, advance
        )
    for path, found in read.items():
        _tell_read(path, found)
    if chosen.n_without:
        click.echo(f"{chosen.n_without:,} prompts lack answers of a model of --other, and cannot be keys", err=True)
    if not others and chosen_by.strategy != "random":
        click.echo(
            "no --other: keys are ranked by your model alone; prompts that every model answers alike make poor keys",
            err=True,
        )
    finding.store_keys(database, key_set_id, source, chosen, chosen_by, named)
    click.echo(
        f"key set {key_set_id}: {len(chosen.keys):,} keys of {chosen.n_pool:,} prompts that could be keys; next: "
        f"attrdb keys sheet {db} {key_set_id}",
        err=True,
    )


def _named(answers: Path, others: tuple[Path, ...]) -> dict[str, Path]:
    """The models of --other by the names of their folders or files.

    raises: InvalidValue
    """
    named: dict[str, Path] = {}
    for path in others:
        name = path.resolve().stem
        if path.resolve() == answers.resolve():
            raise InvalidValue(f"--other {path} are the answers of your own model; give those of another one")
        if name in named:
            raise InvalidValue(f"two models of --other would be called {name!r}; name their folders otherwise")
        named[name] = path
    return named


def _tell_read(path: Path, found: Any) -> None:
    others = f", {found.n_others:,} to other prompts" if found.n_others else ""
    click.echo(visible(f"{path}: {len(found):,} pictures{others}"), err=True)
    walk = importlib.import_module("attrdb.ingest.read.walk")
    for line in found.skipped.lines(but=(walk.HIDDEN, walk.OTHER_FILES)):
        click.echo(visible(f"  not read: {line}"), err=True)
    _tell_failures(found.failures)


def _tell_failures(failures: dict[str, str]) -> None:
    for reason in list(failures.values())[:LISTED]:
        click.echo(visible(f"  left out: {reason}"), err=True)
    if len(failures) > LISTED:
        click.echo(f"  and {len(failures) - LISTED:,} more", err=True)


@keys.command("list", short_help="List the key sets.")
@DB
@at_option
@output_options
def list_keys(db: Path, at: str | None, output: Output) -> None:
    """List the key sets: source, strategy, descriptor, keys, answers per key, models with answers and verdicts."""
    statement = """
        SELECT key_set_id, source, strategy, descriptor, n_answers,
            (SELECT count(*) FROM keys WHERE keys.key_set_id = sets.key_set_id) AS n_keys,
            (SELECT count(DISTINCT suspect_id) FROM answers JOIN keys USING (key_id)
                WHERE keys.key_set_id = sets.key_set_id) AS n_models,
            (SELECT count(*) FROM verdicts WHERE verdicts.key_set_id = sets.key_set_id) AS n_verdicts
        FROM key_sets AS sets ORDER BY key_set_id"""
    output.write(attrdb.open(db, read_only=True, at=at).sql(statement))


@keys.command("sheet", short_help="Print the prompts to ask a model.")
@DB
@click.argument("key_set_id", metavar="KEY_SET", type=Id("key set"))
@output_options
def sheet(db: Path, key_set_id: str, output: Output) -> None:
    """Print the prompts of KEY_SET with their numbers, to ask a model by hand or by a program of your own.

    Save its pictures as NUMBER/ANY_NAME.png, or as NUMBER-ANY_NAME.png, then: attrdb answers add.
    """
    from attrdb.provenance.verdict import key_set_of

    database = attrdb.open(db, read_only=True)
    asked = key_set_of(database.snapshot, key_set_id)["n_answers"]
    rows = database.sql(
        "SELECT number, prompt, $asked::INTEGER AS n_answers FROM keys WHERE key_set_id = $id ORDER BY number",
        {"asked": asked, "id": key_set_id},
    )
    output.write(rows)


@click.group(short_help="Answers of models to prompts: draw them, add them.")
def answers() -> None:
    """Answers of models to prompts: draw them as files, add them from files."""


@answers.command("draw", short_help="Draw a model's answers to prompts, as files.")
@click.argument("prompts", type=FILE)
@click.argument("folder", type=FILE)
@click.option("--model", required=True, help="Stable Diffusion 1.x/2.x: a pipeline folder, a hub id, or icon-sd.")
@click.option(
    "-m", "n_answers", type=click.IntRange(1), help="Pictures per prompt. Default: as the sheet says, else 4."
)
@click.option("--solver-steps", type=click.IntRange(1), default=25, show_default=True, help="Sampling steps.")
@click.option("--guidance", type=click.FloatRange(1), default=6.0, show_default=True, help="Classifier-free guidance.")
@click.option("--sample-batch", type=click.IntRange(1), default=16, show_default=True, help="Pictures drawn at a time.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the starting noises, with the model's weights."
)
@quiet_option
def draw(prompts: Path, folder: Path, model: str, n_answers: int | None, quiet: bool, **settings: Any) -> None:
    """Draw answers to PROMPTS, a text file with a prompt per line or a sheet of attrdb keys sheet, into FOLDER.

    The files are FOLDER/NUMBER/SEED.png. Rerunning the command draws those that are missing; a folder takes the answers of
    one model to one list of prompts. Each model begins with noises of its own, as models asked elsewhere do.
    """
    files, drawing = importlib.import_module("attrdb.ingest.answers.files"), ml("ingest.answers.draw")
    from attrdb.cli.output import progress
    from attrdb.ingest.options import SynthesizeSettings

    asked = files.read_prompts(prompts)
    wanted = n_answers or asked.n_answers or 4
    with progress(quiet) as advance:
        drawn = drawing.draw_answers(model, asked.texts, folder, wanted, SynthesizeSettings(**settings), advance)
    click.echo(f"{folder}: {drawn.n_done:,} answers drawn, {drawn.n_stored:,} were there already", err=True)


@answers.command("add", short_help="Store a model's answers to a key set.")
@DB
@click.argument("key_set_id", metavar="KEY_SET", type=Id("key set"))
@click.argument("path", type=FILE)
@click.option("--model", "suspect_id", required=True, type=Id("model", new=True), help="Name of the model.")
@click.option(
    "--innocent",
    "stratum",
    type=Id("stratum", new=True),
    metavar="STRATUM",
    help="It has not learned from the source; unrelated, topic, generator, lineage, or a word of your own.",
)
@click.option("--infringing", is_flag=True, help="It is known to have learned from the source.")
@click.option(
    "--rho", type=click.FloatRange(0, 1, min_open=True), help="With --infringing: share of its training images."
)
@quiet_option
def add(
    db: Path,
    key_set_id: str,
    path: Path,
    suspect_id: str,
    stratum: str | None,
    infringing: bool,
    rho: float | None,
    quiet: bool,
) -> None:
    """Store the answers of a model to KEY_SET from PATH: a folder of NUMBER/ANY_NAME.png or NUMBER-ANY_NAME.png, or a Parquet
    file with columns number and image.

    Innocent models are what a suspicious one is compared with. Rerunning the command adds what has come since.
    """
    if stratum is not None and infringing:
        raise InvalidValue("--innocent and --infringing contradict each other; give one")
    if rho is not None and not infringing:
        raise InvalidValue("--rho is of a model that has learned from the source; give it with --infringing")
    adding = ml("ingest.answers.add")
    from attrdb.cli.output import progress

    label = adding.Label("infringing", None, rho) if infringing else None
    if stratum is not None:
        label = adding.Label("innocent", stratum)
    with progress(quiet) as advance:
        result = adding.add_answers(attrdb.open(db), key_set_id, suspect_id, path, label, advance)
    click.echo(f"{result.n_done:,} answers stored, {result.n_stored:,} were stored already", err=True)
    for line in _notes(result):
        click.echo(line, err=True)
    _tell_failures(result.failures)
    if result.failures:
        raise click.exceptions.Exit(1)


def _notes(result: Any) -> Iterable[str]:
    if result.n_surplus:
        yield f"  {result.n_surplus:,} are more than the key set asks for per key, and are not compared"
    if result.n_others:
        yield f"  {result.n_others:,} have a number that is none of the key set's"
    if result.n_unanswered or result.n_short:
        yield f"  {result.n_unanswered:,} keys have no answer, {result.n_short:,} fewer than the key set asks for"
    if result.n_verdicts:
        yield f"  {result.n_verdicts:,} verdicts rested on another label of the model, and were deleted; test again"
    if result.n_references:
        yield (
            f"  {result.n_references:,} are the source's own pictures of the keys, byte for byte: the model is the source, "
            "or knows the key set"
        )


@click.command("source-test", short_help="Test whether a model learned from pictures of yours.")
@DB
@click.argument("key_set_id", metavar="KEY_SET", type=Id("key set"))
@click.option(
    "--model", "suspect_id", required=True, type=Id("model"), help="Name of the model whose answers are stored."
)
@click.option(
    "--threshold",
    type=click.FloatRange(min=0),
    help="Largest distance at which an answer is near; the paper's is 0.15. Default: the nearest tenth of all models.",
)
@output_options
def source_test(db: Path, key_set_id: str, suspect_id: str, threshold: float | None, output: Output) -> None:
    """Test a model by its stored answers to KEY_SET: was it trained on pictures that the source made?

    conf is the share of keys to which one of its answers comes near. p is the share of innocent models, and the model
    itself, with a conf as high, for the kind of innocent models where that share is largest. It holds only if the model,
    were it innocent, could as well have been any of them, made from the same base model. The verdict is stored, in the place
    of an earlier one. It is an estimate, and no proof.
    """
    from attrdb.provenance import verdict as testing

    database = attrdb.open(db)
    found = testing.verdict(database.snapshot, key_set_id, suspect_id, threshold)
    testing.store(database.writer, found)
    output.write_laid_out(_laid_out(found, testing.words(found)), testing.strata_table(found))


def _laid_out(found: Any, sentence: str) -> str:
    lines = [sentence]
    if found.n_missing:
        lines.append(f"Partial: {found.n_missing:,} keys have no answer of the model, and are left out for all.")
    if found.left_out:
        lines.append(f"Left out, with fewer answers than the model: {', '.join(found.left_out)}.")
    for stratum in found.strata:
        left = f"; {stratum.n_left_out} left out" if stratum.n_left_out else ""
        if stratum.p is None:
            said = f"one innocent model, conf {stratum.conf[0]:.2f}" if stratum.conf else "no innocent model"
            lines.append(f"  {stratum.name}: {said}{left}; no distribution")
            continue
        lines.append(
            f"  {stratum.name}: {len(stratum.conf)} innocent models, conf {stratum.conf[0]:.2f} to {stratum.conf[-1]:.2f}, "
            f"median {median(stratum.conf):.2f}; p = {stratum.p:.3g}{left}"
        )
    if found.p is not None:
        lines.append(
            "p holds only if the model, were it innocent, could as well have been any of these, of the same base model."
        )
    return "\n".join(lines) + "\n"
