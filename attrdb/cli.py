"""The command line: each command parses, calls one library function and prints."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import click

import attrdb
from attrdb.errors import AttrdbError, InvalidValue, MissingExtra, NotFound

DB = click.argument("db", type=click.Path(path_type=Path))
ML_PACKAGES = {"torch", "torchvision", "PIL", "diffusers", "transformers", "timm", "safetensors", "jinja2"}


class Commands(click.Group):
    """Turns every AttrdbError into a click error, and shows commands in the order in which they are used."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except AttrdbError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("\ninterrupted; what was finished is kept, and the same command goes on from there", err=True)
            context.exit(130)

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)


def ml(module: str) -> ModuleType:
    """A module of attrdb that needs the `ml` extra, imported only now.

    raises: MissingExtra if one of its packages is not installed
    """
    try:
        return importlib.import_module(f"attrdb.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ML_PACKAGES:
            raise
        raise MissingExtra(
            f"this command needs {error.name}, which is not installed: pip install 'attrdb[ml]'"
        ) from error


def form_options(command: Any) -> Any:
    """--table, --json, --nl or --csv."""
    for form, says in (
        ("csv", "Comma-separated values."),
        ("nl", "One JSON object a line."),
        ("json", "A JSON list of objects."),
        ("table", "A table for reading (the default)."),
    ):
        command = click.option(
            f"--{form}", "form", flag_value=form, type=str, default="table" if form == "table" else None, help=says
        )(command)
    return command


def print_table(table: Any, form: str | None) -> None:
    from attrdb.output import print_table

    print_table(table, form or "table")


def quiet_option(command: Any) -> Any:
    return click.option("--quiet", is_flag=True, help="No progress on stderr.")(command)


def encoder_option(command: Any) -> Any:
    return click.option(
        "--encoder",
        "encoders",
        multiple=True,
        help="Encoder spec, repeatable. Default: those of the database, else efficientnet-lite0 and pixels:8.",
    )(command)


def open_with_encoders(path: Path, specs: tuple[str, ...]) -> tuple[Any, list]:
    """The database at the path, made if there is none, and the encoders; nothing is made when an encoder is unknown."""
    encoders = ml("ingest.encoders")
    db = attrdb.open(path) if path.exists() else None
    stored = tuple(row["spec"] for row in db.encoders.values()) if db else ()
    loaded = [encoders.load_encoder(spec) for spec in specs or stored or encoders.DEFAULT_ENCODERS]
    return db or attrdb.create(path), loaded


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(attrdb.__version__, prog_name="attrdb")
def main() -> None:
    """attrdb says which training images shaped a generated image, and how much.

    Influence scores are estimates, not causal shares.
    """


@main.command()
@DB
def init(db: Path) -> None:
    """Make a new, empty database directory."""
    attrdb.create(db)
    click.echo(f"made {db}", err=True)


# --- ingest ---------------------------------------------------------------------------------------------------------


@main.group(cls=Commands)
def ingest() -> None:
    """Add images: a corpus, or a customized model with its exemplars and samples."""


@ingest.command("corpus")
@DB
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--source", help="Name of the data set; the folder's name when left out.")
@encoder_option
@quiet_option
def ingest_corpus(db: Path, path: Path, source: str | None, encoders: tuple[str, ...], quiet: bool) -> None:
    """Append pretraining images from a folder (captions in .txt files) or a Parquet file (columns name, image)."""
    corpus = ml("ingest.corpus")
    from attrdb.output import progress

    total, done = corpus.check_corpus(path), 0
    database, loaded = open_with_encoders(db, encoders)
    with progress(quiet) as advance:

        def report(n_items: int) -> None:
            nonlocal done
            done += n_items
            advance("ingest corpus", min(done, total), total)

        result = corpus.ingest_corpus(database, path, loaded, source, report)
    click.echo(f"{result.n_appended} images appended, {result.n_stored} were stored already", err=True)
    if result.failures:
        for failure in result.failures[:20]:
            click.echo(f"left out: {failure}", err=True)
        raise InvalidValue(
            f"{len(result.failures)} images could not be read, all others are stored; mend them and give the command again"
        )


@ingest.command("model")
@DB
@click.option("--exemplars", type=click.Path(path_type=Path), required=True, help="Folder of the training images.")
@click.option("--category", required=True, help="What they show, such as cat; for a style, its name.")
@click.option("--kind", type=click.Choice(["object", "style"]), required=True)
@click.option("--base-model", required=True, help="Stable Diffusion 1.x/2.x: a pipeline folder or a hub id.")
@click.option("--model-id", help="Default: the category and a hash of the exemplars.")
@click.option("--split", help="Such as train, val or test.")
@click.option("--prompts", help="A prompt bank (photo, icon) or a text file, one prompt with V* a line.")
@click.option("--prompts-per-scheme", type=click.IntRange(1))
@click.option("--samples-per-prompt", type=click.IntRange(1))
@click.option("--steps", type=click.IntRange(1), help="Training steps.")
@click.option("--batch", type=click.IntRange(1), help="Training batch size.")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), help="Learning rate.")
@click.option("--solver-steps", type=click.IntRange(1), help="Sampling steps.")
@click.option("--guidance", type=click.FloatRange(1), help="Classifier-free guidance.")
@click.option("--seed", type=int)
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
    encoders: tuple[str, ...],
    quiet: bool,
    **given: Any,
) -> None:
    """Customize a base model on exemplars, sample it, encode everything, and append it in one commit.

    Options that are left out come from the base model's customize.json, else from the defaults for Stable Diffusion.
    Given again, the command goes on where it was interrupted, and changes nothing once the model is stored.
    """
    model = ml("ingest.model")
    from attrdb.output import progress

    images = model.read_exemplars(exemplars)
    settings = model.settings_for(base_model, kind, category, given, split)
    model.check_model(settings, images, model_id)
    database, loaded = open_with_encoders(db, encoders)
    with progress(quiet) as advance:
        result = model.ingest_model(database, images, settings, loaded, model_id, advance)
    what = f"model {result.model_id}: {result.n_exemplars} exemplars, {result.n_samples} samples"
    click.echo(f"{what} {'appended' if result.appended else 'stored already, nothing to do'}", err=True)


# --- asking ---------------------------------------------------------------------------------------------------------


@main.command()
@DB
@click.argument("image")
@click.option("--top", "k", type=click.IntRange(1), default=10, show_default=True, help="How many candidates.")
@click.option("--encoder", "encoder_id", help="encoder_id; the database's first when left out.")
@click.option("--tau", type=float, help="Temperature of influence.")
@click.option("--lambda", "lam", type=float, help="Cut-off of influence.")
@form_options
def attribute(
    db: Path, image: str, k: int, encoder_id: str | None, tau: float | None, lam: float | None, form: str | None
) -> None:
    """The candidates that most resemble IMAGE (a stored image_id or an image file), with their influence."""
    database = attrdb.open(db)
    query: Any = image
    if not database.stored([image]):
        if not Path(image).is_file():
            raise NotFound(f"{image!r} is neither an image_id of {db} nor an image file")
        query = ml("ingest.encoders").encode_file(database, Path(image), encoder_id)
    calibration = {name: value for name, value in (("tau", tau), ("lam", lam)) if value is not None}
    print_table(database.attribute(query, k=k, encoder_id=encoder_id, **calibration), form)


@main.command()
@DB
@click.option("--encoder", "encoder_ids", multiple=True, help="encoder_id, repeatable; all when left out.")
@click.option("--gallery", type=click.Choice(["own", "all"]), default="own", show_default=True)
@quiet_option
def evaluate(db: Path, encoder_ids: tuple[str, ...], gallery: str, quiet: bool) -> None:
    """Rank every sample's exemplars exactly; the metrics are queries over these ranks."""
    evaluation = importlib.import_module("attrdb.training.evaluation")
    from attrdb.output import progress

    database = attrdb.open(db)
    with progress(quiet) as advance:
        for encoder_id in encoder_ids or [database.encoder_id(), *list(database.encoders)[1:]]:
            n_ranks = evaluation.evaluate(
                database,
                encoder_id,
                gallery,
                lambda done, total, stage=encoder_id: advance(f"evaluate {stage}", done, total),
            )
            click.echo(f"{n_ranks} ranks of {encoder_id}, gallery {gallery}", err=True)


@main.command("sql")
@DB
@click.argument("statement")
@form_options
def run_sql(db: Path, statement: str, form: str | None) -> None:
    """Run one SELECT over the database's tables and views."""
    print_table(attrdb.open(db).sql(statement), form)


@main.command("query")
@DB
@click.argument("name")
@click.option("-p", "--param", "params", multiple=True, metavar="NAME=VALUE", help="A parameter, repeatable.")
@form_options
def run_query(db: Path, name: str, params: tuple[str, ...], form: str | None) -> None:
    """Run a named query."""
    for param in params:
        if "=" not in param:
            raise InvalidValue(f"parameter {param!r} is not of the form name=value")
    given = dict(param.split("=", 1) for param in params)
    print_table(attrdb.open(db).query(name, **given), form)


@main.group(cls=Commands)
def queries() -> None:
    """The named queries."""


@queries.command("list")
@form_options
def list_queries(form: str | None) -> None:
    """Every named query, with its group and what its rows say."""
    import pyarrow as pa

    from attrdb.queries import all_queries

    rows = [
        {
            "name": query.name,
            "group": query.group,
            "parameters": " ".join(f"{one.name}={one.default or '?'}" for one in query.parameters),
            "summary": query.summary,
        }
        for query in all_queries().values()
    ]
    print_table(pa.Table.from_pylist(rows), form)


@queries.command("show")
@click.argument("name")
def show_query(name: str) -> None:
    """The SQL of a named query, with its header."""
    from attrdb.queries import load

    click.echo(load(name).sql, nl=False)


@main.command()
@DB
@click.option("--json", "as_json", is_flag=True, help="JSON instead of lines for reading.")
def status(db: Path, as_json: bool) -> None:
    """What the database holds."""
    found = attrdb.open(db).status()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(f"{found['path']}: {found['n_images']} images, version {found['versions']['images']}, ", nl=False)
    click.echo(f"{found['bytes'] / 2**20:.1f} MiB")
    for what in ("images_by_role", "models_by_kind"):
        counts = ", ".join(f"{n} {name}" for name, n in found[what].items()) or "none"
        click.echo(f"  {what.replace('_', ' ')}: {counts}")
    for name, encoder in found["encoders"].items():
        click.echo(f"  encoder {name}: {encoder['dimension']}-d, {encoder['n_encoded']} of {found['n_images']} encoded")
    click.echo(f"  exemplar ranks: {found['n_exemplar_ranks']}")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("demo"))
@quiet_option
def demo(folder: Path, quiet: bool) -> None:
    """Build a database from the bundled icons, customize four models live, attribute their samples, write a page."""
    module = ml("demo")
    from attrdb.output import progress

    with progress(quiet) as advance:
        page = module.build(folder, advance)
    module.tell(folder, page)


if __name__ == "__main__":
    sys.exit(main())
