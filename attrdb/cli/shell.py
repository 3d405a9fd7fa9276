"""attrdb shell: SQL and dot commands, typed at a prompt or read from standard input."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import click

from attrdb.cli.common import DB, at_option, queries_option, with_option
from attrdb.cli.limits import limit_options
from attrdb.cli.rows import format_options
from attrdb.errors import MissingExtra
from attrdb.search.memory import use_the_machine


@click.command("shell", short_help="Ask in SQL at a prompt, or from standard input.")
@DB
@queries_option
@with_option
@at_option
@limit_options
@format_options
def shell(
    db: Path,
    query_folders: tuple[Path, ...],
    relations: dict[str, Path],
    at: str | None,
    limits: Any,
    form: str | None,
) -> None:
    """Ask in SQL at a prompt with history and completion. The database is only read.

    A statement is one SELECT, ended by a semicolon. `.help` lists the other commands: tables, named queries, formats, files,
    older versions. Ctrl-C cancels a statement, Ctrl-D leaves. Statements can also come from standard input: the first error
    ends them, with exit code 1.
    """
    from attrdb.shell.session import Shell, run_script

    use_the_machine()
    at_prompt = sys.stdin.isatty()
    if at_prompt:
        try:
            from attrdb.shell.prompt import run_prompt
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "prompt_toolkit":
                raise
            raise MissingExtra(
                "the prompt needs prompt_toolkit, which is not installed: pip install 'attrdb[shell]', or give the "
                "statements on standard input"
            ) from error
    on_screen = at_prompt and sys.stdout.isatty()
    session = Shell(
        db,
        at=at,
        query_folders=query_folders,
        user_tables=relations,
        form=form or "table",
        on_screen=on_screen,
        limits=limits,
    )
    if at_prompt:
        run_prompt(session)
    else:
        run_script(session, io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig"))
