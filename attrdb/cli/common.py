"""What commands share: options, late imports, and the place where errors become messages."""

from __future__ import annotations

import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import click

import attrdb
from attrdb.cli import machine
from attrdb.cli.faults import fault_text
from attrdb.errors import AttrdbError, InvalidValue, MissingExtra
from attrdb.store.ids import check_id
from attrdb.text import check_text, visible


class DatabasePath(click.Path):
    """The path of a database, see `tables.database_path`."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Path:
        from attrdb.store.tables import database_path

        return database_path(str(super().convert(value, param, context)))


DB = click.argument("db", type=DatabasePath())


class Id(click.ParamType):  # type: ignore[type-arg]  # generic, but not in the oldest click that attrdb takes
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


# What `pip install 'attrdb[EXTRA]'` brings that the core has not; an extra further down holds those above it.
EXTRAS = {
    "images": {"PIL"},
    "report": {"jinja2", "matplotlib"},
    "ml": {
        "torch",
        "torchvision",
        "diffusers",
        "transformers",
        "timm",
        "open_clip",
        "safetensors",
        "peft",
        "accelerate",
    },
}
# Where a command needs more than the package that is missed first: beginning of a module's name -> extra.
LEAST_EXTRA = {"pages": "report", "training": "ml", "demo": "ml", "ingest.customize": "ml", "ingest.models": "ml"}


def settle_streams() -> None:
    """Give a closed stdout or stderr a place to write to, and let neither fail at a character that it cannot hold."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (it is closed with the process)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _record_checksums() -> None:
    """Record the files that the command wrote."""
    checksums = sys.modules.get("attrdb.store.checksums")
    try:
        if checksums:
            checksums.record_changed()
    except (AttrdbError, OSError) as error:
        click.echo(
            visible(f"checksums of new files were not recorded: {error}; later: attrdb check --record"), err=True
        )


class Commands(click.Group):
    """Turns every AttrdbError into a click error, and shows commands in sections, in the order in which they are used."""

    def __init__(self, *args: Any, **attributes: Any):
        super().__init__(*args, **attributes)
        self.sections: dict[str, list[str]] = {}

    def add_section(self, title: str, *commands: click.Command) -> None:
        """Add commands under a title of --help."""
        self.sections[title] = [command.name for command in commands if command.name]
        for command in commands:
            self.add_command(command)

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        for number, text in enumerate(args, 1):
            try:
                check_text(f"argument {number}", text)
            except InvalidValue as error:
                raise click.UsageError(str(error), context) from error
        return super().parse_args(context, args)

    def invoke(self, context: click.Context) -> Any:
        settle_streams()
        # Of metadata that Pillow cannot read: the picture is read, or left out with a reason.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        if checksums := sys.modules.get("attrdb.store.checksums"):
            checksums.CHANGED.clear()
        try:
            machine.prepare()
            result = super().invoke(context)
            _record_checksums()
            return result
        except BrokenPipeError:
            raise  # the reader of a pipe has gone: click ends quietly
        except ModuleNotFoundError as error:  # of an import at its first use
            missing = missing_extra(error)
            if missing is error:
                raise
            raise click.ClickException(str(missing)) from error
        except (AttrdbError, OSError) as error:  # OSError: a full disk, a file that went away
            raise click.ClickException(visible(str(error))) from error
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            raise click.ClickException(fault_text(error)) from error
        except KeyboardInterrupt:
            click.echo("\ninterrupted; what was finished is kept, and the same command goes on from there", err=True)
            context.exit(130)

    def main(self, *args: Any, **values: Any) -> Any:
        try:
            return super().main(*args, **values)
        except SystemExit as end:
            if limits := sys.modules.get("attrdb.sql.limits"):  # a statement that was ended may compute still
                limits.leave(end.code if isinstance(end.code, int) else 1)
            raise

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        limit = formatter.width - 6 - max(map(len, self.commands), default=0)
        grouped = {name for names in self.sections.values() for name in names}
        others = [name for name in self.commands if name not in grouped]
        for title, names in (*self.sections.items(), ("Other commands", others)):
            if not names:
                continue
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(limit)) for name in names])


def ml(module: str) -> ModuleType:
    """A module of attrdb that needs an extra, imported only now.

    raises: MissingExtra if one of its packages is not installed
    """
    try:
        return importlib.import_module(f"attrdb.{module}")
    except ModuleNotFoundError as error:
        least = next((extra for start, extra in LEAST_EXTRA.items() if module.startswith(start)), None)
        raise missing_extra(error, least) from error


def missing_extra(error: ModuleNotFoundError, least: str | None = None) -> Exception:
    """The error itself, or a MissingExtra if the package that is missing comes with an extra.

    least: an extra that the command needs in any case
    """
    package = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            names = list(EXTRAS)
            extra = max(extra, least or extra, key=names.index)
            return MissingExtra(f"this command needs {package}, which is not installed: pip install 'attrdb[{extra}]'")
    return error


def warn_renamed(old: str, new: str) -> None:
    click.echo(f"warning: {old} is now called {new}; the old name goes with the next release", err=True)


def renamed(old: str, new: str, parameter: str) -> Callable[[Any], Any]:
    """An old name of an option: it works for one release, with a warning, and --help does not show it.

    new, parameter: the option's name now, and the name of its parameter
    """

    def pass_on(context: click.Context, option: click.Parameter, value: str | None) -> None:
        if value is not None:
            warn_renamed(old, new)
            context.default_map = {**(context.default_map or {}), parameter: value}

    return click.option(
        old,
        f"old_{parameter}",  # not the name of the option's own parameter
        expose_value=False,
        is_eager=True,
        hidden=True,
        callback=pass_on,
        help=f"The old name of {new}.",
    )


class RenamedChoice(click.Choice):  # type: ignore[type-arg]  # as `Id`
    """A choice of which some values had other names, which work for one release, with a warning."""

    def __init__(self, choices: list[str], old: dict[str, str]):
        super().__init__(choices)
        self.old = old

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in self.old:
            option = param.opts[0] if param else ""
            warn_renamed(f"{option} {value}", f"{option} {self.old[value]}")
            value = self.old[value]
        return super().convert(value, param, ctx)


def quiet_option(command: Any) -> Any:
    """--quiet of a long command, which shows from its start on that it works."""

    @wraps(command)
    def with_sign_of_life(*args: Any, quiet: bool, **values: Any) -> Any:
        from attrdb.cli.output import sign_of_life

        with sign_of_life(quiet):
            return command(*args, quiet=quiet, **values)

    return click.option("--quiet", is_flag=True, help="No progress on stderr.")(with_sign_of_life)


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


def _as_relations(context: click.Context, option: click.Parameter, words: tuple[str, ...]) -> dict[str, Path]:
    relations: dict[str, Path] = {}
    for word in words:
        name, equals, file = word.partition("=")
        if not (name and equals and file):
            raise click.BadParameter(f"{word!r} is not of the form NAME=FILE")
        if name in relations:
            raise click.BadParameter(f"{name!r} names two files")
        relations[name] = Path(file)
    return relations


def with_option(command: Any) -> Any:
    """--with, as the parameter `relations`: name -> file."""
    return click.option(
        "--with",
        "relations",
        multiple=True,
        metavar="NAME=FILE",
        callback=_as_relations,
        help="A table of your own for SQL to read as NAME: CSV, Parquet, Arrow or JSON; repeatable.",
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


def methods_option(default: str) -> Callable[[Any], Any]:
    """--method of a command that takes several; default: what it takes without one."""
    return click.option(
        "--method",
        "methods",
        type=Id("method"),
        multiple=True,
        help=f"A method_id, encoder_id or mapper_id, repeatable. Default: {default}.",
    )


def encoder_option(command: Any) -> Any:
    return click.option(
        "--encoder",
        "encoders",
        multiple=True,
        help="Encoder spec, or the id of a stored encoder; repeatable. Default: all encoders of the database, else "
        "efficientnet-lite0 and pixels:8.",
    )(command)


def asked_encoder_option(command: Any) -> Any:
    """--encoder of a command that asks about one stored encoder."""
    return click.option(
        "--encoder",
        "encoder_id",
        type=Id("encoder"),
        help="Id of a stored encoder, or its spec. Default: the database's first.",
    )(command)


def stored_encoder_id(database: Any, encoder: str | None) -> str | None:
    """The id of an encoder that --encoder names by its id or its spec; None where the option was left out."""
    from attrdb.store.schema import encoder_id_of

    return encoder if encoder is None or encoder in database.encoders else encoder_id_of(encoder)


def encoder_spec(database: Any, encoder: str) -> str:
    """The spec of an encoder that --encoder names by its spec, or by its id if the database has it."""
    stored = database.encoders.get(encoder)
    return stored["spec"] if stored else encoder


def stored_spec(path: Path, encoder: str) -> str:
    """`encoder_spec` of a database that there may not be yet."""
    from attrdb.store.tables import table_exists

    return encoder_spec(attrdb.open(path), encoder) if table_exists(path / "images.lance") else encoder


def open_with_encoders(path: Path, encoders: tuple[str, ...]) -> tuple[Any, list[Any]]:
    """The database at the path, made if there is none, and the encoders; nothing is made when an encoder is unknown."""
    from attrdb.database import open_or_create
    from attrdb.store.tables import table_exists

    module = ml("ingest.encode")
    db = attrdb.open(path) if table_exists(path / "images.lance") else None
    stored = tuple(row["spec"] for row in db.encoders.values()) if db else ()
    named = tuple(encoder_spec(db, encoder) for encoder in encoders) if db else encoders
    loaded = [module.load_encoder(spec) for spec in dict.fromkeys(named or stored or module.DEFAULT_ENCODERS)]
    distinct = {encoder.spec: encoder for encoder in loaded}  # one may be named by two specs
    return db or open_or_create(path), list(distinct.values())
