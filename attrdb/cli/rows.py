"""The options --format and --output of commands that print rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click

from attrdb import formats

SHORTHANDS = {
    "json": "a JSON list of objects",
    "nl": "one JSON object per line",
    "csv": "comma-separated values",
    "table": "a table for reading",
}


@dataclass(frozen=True)
class Output:
    """Where the rows of a command go, and in which format; by default a table for reading, to standard output."""

    form: str = "table"
    file: Path | None = None

    @classmethod
    def chosen(cls, form: str | None, file: Path | None, database: Path | None = None) -> Output:
        """What the options ask for.

        raises: AttrdbError if it cannot be written, so that no command works in vain
        """
        if file is None:
            formats.check_stdout(form or "table")
            return cls(form or "table")
        chosen = cls(form or formats.format_of(file), file)
        formats.check_file(file, chosen.form, database)
        return chosen

    def write(self, table: Any) -> None:
        """Write an Arrow table; a note on stderr says where it went, if not to standard output."""
        from attrdb.cli.output import end_sign_of_life

        end_sign_of_life()
        if self.file is None:
            formats.write_stdout(table, self.form)
            return
        formats.write_file(table, self.form, self.file)
        click.echo(formats.written(self.file, table), err=True)

    def write_laid_out(self, text: str, table: Any) -> None:
        """Write a table, for reading as the command has laid it out itself."""
        from attrdb.cli.output import end_sign_of_life

        end_sign_of_life()
        if self.form != "table":
            self.write(table)
        elif self.file is None:
            click.echo(text, nl=False)
        else:
            with formats.replacing(self.file) as stream:
                stream.write(text.encode())
            click.echo(formats.written(self.file, table), err=True)


def format_options(command: Any) -> Any:
    """--format and its shorthands, as the parameter `form`."""
    for form, meaning in reversed(SHORTHANDS.items()):
        command = click.option(
            f"--{form}", "form", flag_value=form, type=str, default=None, help=f"Same as --format {form}: {meaning}."
        )(command)
    return click.option(
        "--format",
        "form",
        type=click.Choice(formats.FORMATS),
        metavar="FORMAT",
        help=f"{', '.join(formats.FORMATS[:-1])} or {formats.FORMATS[-1]}. Default: as the suffix of the output file "
        "says, else table.",
    )(command)


def output_options(command: Any) -> Any:
    """--format with its shorthands and --output; the command gets them as one `output`."""

    @wraps(command)
    def with_output(*args: Any, form: str | None, file: Path | None, **values: Any) -> Any:
        return command(*args, output=Output.chosen(form, file, values.get("db")), **values)

    with_output = click.option(
        "-o",
        "--output",
        "file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Write to FILE instead of standard output. An error leaves no half file.",
    )(with_output)
    return format_options(with_output)
