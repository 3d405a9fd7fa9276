"""Commands that write images and features: ingest and encode."""

from __future__ import annotations

import importlib
from itertools import islice
from pathlib import Path
from typing import Any

import click

import attrdb
from attrdb.cli.common import DB, encoder_option, encoder_spec, ml, open_with_encoders, quiet_option
from attrdb.cli.declared import machine_options, model_options
from attrdb.errors import InvalidValue
from attrdb.ingest.options import MODEL_OPTIONS, QUEUE_OPTIONS, QueueSettings

LISTED = 20  # failures that are printed; all of them are in the table `failures`

retry_option = click.option("--retry-failed", is_flag=True, help="Try items again that failed before.")


@click.group(short_help="Add images: a corpus, or customized models.")
def ingest() -> None:
    """Add images: a corpus, or customized models with their exemplars and samples."""


@ingest.command("corpus", short_help="Add pretraining images, or embeddings of them.")
@DB
@click.argument("path")
@click.option("--source", help="Name of the data set; the folder's name when left out.")
@encoder_option
@click.option("--id-column", help="Embeddings: the metadata column that names a row. Default: key, else image_path.")
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="OURS=THEIRS",
    help="Embeddings: take a column from another; repeatable.",
)
@retry_option
@quiet_option
def ingest_corpus(
    db: Path,
    path: str,
    source: str | None,
    encoders: tuple[str, ...],
    id_column: str | None,
    columns: tuple[str, ...],
    retry_failed: bool,
    quiet: bool,
) -> None:
    """Append pretraining images from PATH.

    PATH is a folder of images (captions in .txt files), a Parquet file or a folder of them (columns name and image), a
    webdataset tar or a folder of them, or a clip-retrieval folder of embeddings (img_emb, metadata), local or a URL such as
    s3://bucket/laion. Embeddings need --encoder: the one that made them. Given again, the command goes on where it was.
    """
    embeddings = importlib.import_module("attrdb.ingest.read.embeddings")
    if embeddings.is_embeddings(path):
        _ingest_embeddings(db, path, source, encoders, id_column, columns, retry_failed, quiet)
        return
    if id_column or columns:
        raise InvalidValue(f"--id-column and --column are for embeddings, and {path} is no folder of embeddings")
    corpus = ml("ingest.read.corpus")
    from attrdb.cli.output import progress

    opened = corpus.open_corpus(Path(path), source)
    database, loaded = open_with_encoders(db, encoders)
    with progress(quiet) as advance:
        result = corpus.ingest_corpus(database, opened, loaded, retry_failed=retry_failed, report=advance)
    click.echo(f"{result.n_done:,} images appended, {result.n_stored:,} were stored already", err=True)
    _tell_failures(result.failures, "images")


def _ingest_embeddings(
    db: Path,
    path: str,
    source: str | None,
    encoders: tuple[str, ...],
    id_column: str | None,
    columns: tuple[str, ...],
    retry_failed: bool,
    quiet: bool,
) -> None:
    from attrdb.cli.output import progress
    from attrdb.database import open_or_create
    from attrdb.ingest.read.embeddings import ingest_embeddings, open_embeddings

    if len(encoders) != 1:
        raise InvalidValue(
            f"{path} holds embeddings: name the one encoder that made them, such as --encoder open_clip:ViT-B-32/openai"
        )
    for column in columns:
        if "=" not in column:
            raise InvalidValue(f"--column {column!r} is not of the form ours=theirs")
    opened = open_embeddings(path, id_column, dict(column.split("=", 1) for column in columns))
    database = open_or_create(db)
    name = source or path.rstrip("/").rsplit("/", 1)[-1]
    with progress(quiet) as advance:
        result = ingest_embeddings(
            database, opened, encoder_spec(database, encoders[0]), name, retry_failed=retry_failed, report=advance
        )
    click.echo(f"{result.n_done:,} embeddings appended, {result.n_stored:,} were stored already", err=True)
    _tell_failures(result.failures, "embeddings")


def _tell_failures(failures: dict[str, str], what: str) -> None:
    """Print the first reasons, and end with an error: all was not done."""
    if not failures:
        return
    for reason in list(failures.values())[:LISTED]:
        click.echo(f"left out: {reason}", err=True)
    raise InvalidValue(
        f"{len(failures):,} {what} were left out, all others are stored; their reasons are in the table failures. Mend them "
        "and give the command again with --retry-failed"
    )


@ingest.command("model", short_help="Customize a base model on exemplars, sample it, and add it.")
@DB
@model_options(MODEL_OPTIONS)
@encoder_option
@quiet_option
def ingest_model(
    db: Path,
    exemplars: Path,
    category: str,
    kind: str,
    base_model: str,
    model_id: str | None,
    split: str | None,
    profile: str | None,
    encoders: tuple[str, ...],
    quiet: bool,
    **options: Any,
) -> None:
    """Customize a base model on exemplars, sample it, encode everything, and append it in one commit.

    An object or a style is named by a new token, V*. Of kind mixed the exemplars have nothing in common: each is trained on
    its own caption, a .txt file beside it, and sampled with it unless --prompts names a file.

    Options that are left out come from the base model's customize.json, else from the defaults for Stable Diffusion.
    Rerunning the command resumes it after an interruption, and changes nothing once the model is stored.
    """
    settings_module, module = ml("ingest.models.settings"), ml("ingest.models.ingest_one")
    from attrdb.cli.output import progress

    images = settings_module.read_exemplars(exemplars)
    settings = settings_module.settings_for(base_model, kind, category, options, split, profile)
    settings_module.check_model(settings, images, model_id)
    database, loaded = open_with_encoders(db, encoders)
    with progress(quiet) as advance:
        result = module.ingest_model(database, images, settings, loaded, model_id, advance)
    what = f"model {result.model_id}: {result.n_exemplars} exemplars, {result.n_samples} samples"
    click.echo(f"{what} {'appended' if result.appended else 'stored already, nothing to do'}", err=True)


@ingest.command("models", short_help="Customize many models, listed in a file.")
@DB
@click.argument("specs", type=click.Path(path_type=Path))
@click.option("--base-model", help="Base model of lines that name none.")
@machine_options(QUEUE_OPTIONS)
@encoder_option
@quiet_option
def ingest_models(
    db: Path, specs: Path, base_model: str | None, encoders: tuple[str, ...], quiet: bool, **options: Any
) -> None:
    """Customize many models: SPECS has one JSON object per line, with the option names of `ingest model`.

    Every line is checked first. Each worker takes a GPU, in turn. Several commands may work on one file and database at once.
    Rerunning the command resumes it, and attempts failed models again.
    """
    specs_module, queue = ml("ingest.models.specs"), ml("ingest.models.queue")
    from attrdb.cli.output import progress

    models = specs_module.read_specs(specs, base_model)
    _, loaded = open_with_encoders(db, encoders)
    encoder_specs = [encoder.spec for encoder in loaded]
    with progress(quiet) as advance:
        result = queue.ingest_models(db, models, encoder_specs, QueueSettings(**options), advance, str(specs.resolve()))
    click.echo(f"{result.n_done} models appended, {result.n_stored} were stored already", err=True)
    if result.failures:
        for model_id, reason in islice(result.failures.items(), LISTED):
            click.echo(f"failed: {model_id}: {reason}", err=True)
        raise InvalidValue(
            f"{len(result.failures)} of {len(models)} models failed, all others are stored; fix them and rerun the command"
        )


@ingest.command("abc", short_help="Add the models of an AbC release file.")
@DB
@click.argument("release", type=click.Path(path_type=Path))
@click.option("--root", type=click.Path(path_type=Path), required=True, help="The folder that has `dataset` in it.")
@encoder_option
@quiet_option
def ingest_abc(db: Path, release: Path, root: Path, encoders: tuple[str, ...], quiet: bool) -> None:
    """Append the models of an AbC release file, such as test_artchive.json, with their exemplars and samples."""
    abc_release = ml("ingest.read.abc")
    from attrdb.cli.output import progress

    read = abc_release.read_release(release, root)
    database, loaded = open_with_encoders(db, encoders)
    with progress(quiet) as advance:
        result = abc_release.ingest_abc(database, read, loaded, advance)
    click.echo(f"{result.n_done} models appended, {result.n_stored} were stored already", err=True)
    incomplete = {model.model_id: model.missing for model in read.models if model.missing}
    missing = [path for model_id in result.failures for path in incomplete.get(model_id, ())]
    for path in missing[:LISTED]:
        click.echo(f"missing: {path}", err=True)
    unusable = {model_id: reason for model_id, reason in result.failures.items() if model_id not in incomplete}
    for model_id, reason in islice(unusable.items(), LISTED):
        click.echo(f"left out: {model_id}: {reason}", err=True)
    if result.failures:
        raise InvalidValue(
            f"{len(result.failures) - len(unusable)} models lack {len(missing)} files and {len(unusable)} could not be used, "
            "all others are stored; put the files there and rerun the command"
        )


@click.command(short_help="Add an encoder: encode every stored image with it.")
@DB
@click.option(
    "--encoder",
    "spec",
    required=True,
    help="Encoder spec, such as timm:NAME, or the id of a stored encoder to complete.",
)
@retry_option
@quiet_option
def encode(db: Path, spec: str, retry_failed: bool, quiet: bool) -> None:
    """Add an encoder to a database: encode every stored image that has no feature of it yet.

    Killed and given again, it goes on where it was. Images whose bytes are not stored stay without a feature.
    """
    encoders, job = ml("ingest.encode"), ml("ingest.encode.add_encoder")
    from attrdb.cli.output import progress

    database = attrdb.open(db)
    encoder = encoders.load_encoder(encoder_spec(database, spec))
    with progress(quiet) as advance:
        result = job.backfill(database, encoder, retry_failed=retry_failed, report=advance)
    left = f", {result.n_skipped:,} have no image bytes stored" if result.n_skipped else ""
    click.echo(f"{result.n_done:,} images encoded{left}", err=True)
    _tell_failures(result.failures, "images")
