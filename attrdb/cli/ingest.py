"""Commands that write images and features: ingest and encode."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import click

import attrdb
from attrdb.cli.common import (
    DB,
    encoder_option,
    encoder_spec,
    ml,
    open_with_encoders,
    quiet_option,
    stored_spec,
)
from attrdb.cli.declared import machine_options, model_options
from attrdb.errors import InvalidValue
from attrdb.ingest.options import MODEL_OPTIONS, QUEUE_OPTIONS, QueueSettings
from attrdb.progress import Progress
from attrdb.text import visible

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
@click.option(
    "--id-column", help="Tables: the column that names a row. Default: key; embeddings: key, else image_path."
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="OURS=THEIRS",
    help="Fill a column from a field of that name; image=NAME chooses among several pictures. Repeatable.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be read, and what not; store nothing.")
@retry_option
@quiet_option
def ingest_corpus(
    db: Path,
    path: str,
    source: str | None,
    encoders: tuple[str, ...],
    id_column: str | None,
    columns: tuple[str, ...],
    dry_run: bool,
    retry_failed: bool,
    quiet: bool,
) -> None:
    """Append pretraining images from PATH.

    PATH is a folder with images in it, as files (captions in .txt files), in Parquet or Arrow files, and in webdataset tars,
    or one such table or tar. Or it is a clip-retrieval folder of embeddings (img_emb, metadata), local or a URL such as
    s3://bucket/laion. Embeddings need --encoder: the one that made them. Rerunning the command resumes it.
    """
    from attrdb.cli.output import progress

    embeddings = importlib.import_module("attrdb.ingest.read.embedding_shards")
    choices = _column_choices(columns)
    job: _PicturesJob | _EmbeddingsJob
    if embeddings.is_embeddings(path):
        opened = embeddings.open_embeddings(path, id_column, choices)
        job = _EmbeddingsJob(opened, source or path.rstrip("/").rsplit("/", 1)[-1], encoders)
    else:
        corpus = ml("ingest.read.discover").open_corpus(Path(path), source, choices, id_column)
        job = _PicturesJob(corpus, encoders)
    if dry_run:
        for line in (*job.plan(), "dry run: nothing was stored"):
            click.echo(visible(line))
        return
    with progress(quiet) as advance:
        result = job.run(db, retry_failed, advance)
    click.echo(f"{result.n_done:,} {job.noun} appended, {result.n_stored:,} were stored already", err=True)
    for line in job.summary(result):
        click.echo(visible(line), err=True)
    _tell_failures(result.failures, job.noun)


def _column_choices(columns: tuple[str, ...]) -> dict[str, str]:
    for column in columns:
        if "=" not in column:
            raise InvalidValue(f"--column {column!r} is not of the form ours=theirs")
    return dict(column.split("=", 1) for column in columns)


@dataclass(frozen=True)
class _PicturesJob:
    """The import of a corpus of pictures."""

    corpus: Any
    encoders: tuple[str, ...]
    noun: ClassVar[str] = "images"

    def plan(self) -> Iterator[str]:
        for source in self.corpus.sources:
            n_files = f" {len(source.files):,}, images:" if source.files else ""
            yield f"read: {source.kind}:{n_files} {'not counted' if source.n_items is None else f'{source.n_items:,}'}"
            yield from (f"  {file}" for file in source.files[:LISTED])
            if len(source.files) > LISTED:
                yield f"  and {len(source.files) - LISTED:,} more"
        yield from self._skipped()

    def run(self, db: Path, retry_failed: bool, report: Progress) -> Any:
        database, loaded = open_with_encoders(db, self.encoders)
        ingest_corpus = ml("ingest.read.corpus").ingest_corpus
        return ingest_corpus(database, self.corpus, loaded, retry_failed=retry_failed, report=report)

    def summary(self, result: Any) -> Iterator[str]:
        """What became of each kind of source, where there are several, and what was not read."""
        if len(result.outcomes) > 1:
            for kind, outcome in result.outcomes.items():
                counts = {
                    "appended": outcome.n_done,
                    "stored already": outcome.n_stored,
                    "left out": outcome.n_failed,
                }
                yield f"{kind}: {', '.join(f'{n:,} {word}' for word, n in counts.items() if n)}"
        yield from self._skipped()

    def _skipped(self) -> Iterator[str]:
        return (f"not read: {line}" for line in self.corpus.skipped.lines())


@dataclass(frozen=True)
class _EmbeddingsJob:
    """The import of features that others computed."""

    embeddings: Any
    source: str
    encoders: tuple[str, ...]
    noun: ClassVar[str] = "embeddings"

    def __post_init__(self) -> None:
        if len(self.encoders) != 1:
            raise InvalidValue(
                f"{self.embeddings.root} holds embeddings: name the one encoder that made them, such as --encoder "
                "open_clip:ViT-B-32/openai"
            )

    def plan(self) -> Iterator[str]:
        shards = self.embeddings.shards
        n_rows, dimension = self.embeddings.n_rows, self.embeddings.dimension
        yield f"read: embeddings of {dimension} numbers: {n_rows:,}, in shards: {len(shards):,}"
        yield from (f"  {shard.vectors}, {shard.metadata}" for shard in shards[:LISTED])
        if len(shards) > LISTED:
            yield f"  and {len(shards) - LISTED:,} more"

    def run(self, db: Path, retry_failed: bool, report: Progress) -> Any:
        from attrdb.database import open_or_create
        from attrdb.ingest.read.embeddings import check_encoder, ingest_embeddings

        encoder = stored_spec(db, self.encoders[0])
        check_encoder(encoder, self.embeddings)
        return ingest_embeddings(
            open_or_create(db), self.embeddings, encoder, self.source, retry_failed=retry_failed, report=report
        )

    def summary(self, result: Any) -> Iterator[str]:
        return iter(())


def _tell_failures(failures: dict[str, str], noun: str) -> None:
    """Print the first reasons, and end with an error: all was not done."""
    if not failures:
        return
    for reason in list(failures.values())[:LISTED]:
        click.echo(visible(f"left out: {reason}"), err=True)
    raise InvalidValue(
        f"{len(failures):,} {noun} were left out, all others are stored; their reasons are in the table failures. Fix them "
        "and rerun the command with --retry-failed"
    )


@ingest.command("model", short_help="Customize a base model on exemplars, sample it, and add it.")
@DB
@model_options(MODEL_OPTIONS)
@encoder_option
@quiet_option
def ingest_model(
    db: Path,
    exemplars: Path | None,
    concepts: Path | None,
    category: str | None,
    kind: str | None,
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
    concepts_module, settings_module = ml("ingest.models.concepts"), ml("ingest.models.settings")
    from attrdb.cli.output import progress

    given = {"exemplars": exemplars, "concepts": concepts, "kind": kind, "category": category}
    concepts_module.check_required(given, lambda name: f"--{name}")
    skipped = ml("ingest.read.walk").Skipped()
    if concepts:
        listed, sources = concepts_module.read_concepts(concepts)
        images = concepts_module.read_exemplars_of(sources, skipped)
    else:
        listed = ()
        images = ml("ingest.models.exemplars").read_exemplars(exemplars, skipped)
    for line in skipped.lines():
        click.echo(visible(f"not read: {line}"), err=True)
    settings = settings_module.settings_for(base_model, kind, category, options, split, profile, listed)
    settings_module.check_model(settings, images, model_id)
    database, loaded = open_with_encoders(db, encoders)
    with progress(quiet) as advance:
        result = ml("ingest.models.ingest_one").ingest_model(database, images, settings, loaded, model_id, advance)
    outcome = "appended" if result.appended else "stored already, nothing to do"
    counts = f"{result.n_exemplars} exemplars, {result.n_samples} samples"
    click.echo(f"model {result.model_id}: {counts} {outcome}", err=True)


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
            click.echo(visible(f"failed: {model_id}: {reason}"), err=True)
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

    opened = abc_release.read_release(release, root)
    database, loaded = open_with_encoders(db, encoders)
    with progress(quiet) as advance:
        result = abc_release.ingest_abc(database, opened, loaded, advance)
    click.echo(f"{result.n_done} models appended, {result.n_stored} were stored already", err=True)
    incomplete = {model.model_id: model.missing for model in opened.models if model.missing}
    missing = [path for model_id in result.failures for path in incomplete.get(model_id, ())]
    for path in missing[:LISTED]:
        click.echo(visible(f"missing: {path}"), err=True)
    unusable = {model_id: reason for model_id, reason in result.failures.items() if model_id not in incomplete}
    for model_id, reason in islice(unusable.items(), LISTED):
        click.echo(visible(f"left out: {model_id}: {reason}"), err=True)
    if result.failures:
        raise InvalidValue(
            f"{len(result.failures) - len(unusable)} models lack {len(missing)} files and {len(unusable)} could not be used, "
            "all others are stored; put the files there and rerun the command"
        )


@click.command(short_help="Add encoders: encode every stored image with them.")
@DB
@click.option(
    "--encoder",
    "specs",
    required=True,
    multiple=True,
    help="Encoder spec, such as timm:NAME, or the id of a stored encoder to complete, repeatable.",
)
@retry_option
@quiet_option
def encode(db: Path, specs: tuple[str, ...], retry_failed: bool, quiet: bool) -> None:
    """Add encoders to a database: encode every stored image that has no feature of them yet.

    Rerunning the command resumes it. Images whose bytes are not stored stay without a feature.
    """
    encoders, job = ml("ingest.encode"), ml("ingest.encode.add_encoder")
    from attrdb.cli.output import progress

    database = attrdb.open(db)
    named = dict.fromkeys(encoder_spec(database, spec) for spec in specs)
    loaded = [encoders.load_encoder(spec) for spec in named]
    failures: dict[str, str] = {}
    for encoder in loaded:
        with progress(quiet) as advance:
            result = job.backfill(database, encoder, retry_failed=retry_failed, report=advance)
        left = f", {result.n_skipped:,} have no image bytes stored" if result.n_skipped else ""
        click.echo(f"{result.n_done:,} images encoded by {encoder.spec}{left}", err=True)
        failures |= result.failures
    _tell_failures(failures, "images")
