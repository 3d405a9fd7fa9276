"""What commands share: options, late imports, and the place where errors become messages."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import click

import attrdb
from attrdb.errors import AttrdbError, InvalidValue, MissingExtra
from attrdb.store.ids import check_id

DB = click.argument("db", type=click.Path(path_type=Path))


class Id(click.ParamType):
    """An id that a command stores or looks up; an empty one would mean none, which is said by leaving the option out.

    new: it is to be stored, and must be one that can be part of a path
    """

    name = "text"

    def __init__(self, noun: str, new: bool = False):
        self.noun, self.new = noun, new

    def convert(self, value: str, param: click.Parameter | None, context: click.Context | None) -> str:
        if not value.strip():
            self.fail(f"an empty {self.noun} id; give one, or leave it out", param, context)
        if self.new:
            try:
                check_id(self.noun, value)
            except InvalidValue as error:
                self.fail(str(error), param, context)
        return value


ML_PACKAGES = {
    "torch", "torchvision", "PIL", "diffusers", "transformers", "timm", "open_clip", "safetensors", "jinja2", "matplotlib"
}  # fmt: skip


class Commands(click.Group):
    """Turns every AttrdbError into a click error, and shows commands in the order in which they are used."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except BrokenPipeError:
            raise  # the reader of a pipe has gone: click ends quietly
        except (AttrdbError, OSError) as error:  # OSError: a full disk, a file that went away
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
    from attrdb.cli.output import print_table

    print_table(table, form or "table")


def quiet_option(command: Any) -> Any:
    return click.option("--quiet", is_flag=True, help="No progress on stderr.")(command)


def device_option(command: Any) -> Any:
    return click.option(
        "--device",
        type=click.Choice(["auto", "cuda", "cpu"]),
        default="auto",
        show_default=True,
        help="Where matrices are multiplied; auto: a GPU where there is one.",
    )(command)


def at_option(command: Any) -> Any:
    return click.option(
        "--at", metavar="VERSION|TIME", help="Read an older moment: a version of images, or a time (ISO 8601, UTC)."
    )(command)


def queries_option(command: Any) -> Any:
    return click.option(
        "--queries",
        "query_folders",
        multiple=True,
        envvar="ATTRDB_QUERIES",
        type=click.Path(path_type=Path),
        help="A folder of your own query files, repeatable.",
    )(command)


def method_option(command: Any) -> Any:
    return click.option(
        "--method",
        type=Id("method"),
        help="A method_id, encoder_id or mapper_id (attrdb methods). Default: similarity of the first encoder.",
    )(command)


def encoder_option(command: Any) -> Any:
    return click.option(
        "--encoder",
        "encoders",
        multiple=True,
        help="Encoder spec, repeatable. Default: those of the database, else efficientnet-lite0 and pixels:8.",
    )(command)


def open_with_encoders(path: Path, specs: tuple[str, ...]) -> tuple[Any, list]:
    """The database at the path, made if there is none, and the encoders; nothing is made when an encoder is unknown."""
    from attrdb.database import open_or_create
    from attrdb.store.tables import table_exists

    encoders = ml("ingest.encode")
    db = attrdb.open(path) if table_exists(path / "images.lance") else None
    stored = tuple(row["spec"] for row in db.encoders.values()) if db else ()
    loaded = [encoders.load_encoder(spec) for spec in specs or stored or encoders.DEFAULT_ENCODERS]
    return db or open_or_create(path), loaded
