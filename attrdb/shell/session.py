"""A conversation with one database, read only: SQL statements and dot commands, each answered in a format."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import click

import attrdb
from attrdb import formats, sql
from attrdb.errors import AttrdbError, InvalidValue, NotFound
from attrdb.formats.listing import first_sentence, listing, page_width, query_listing
from attrdb.queries import all_queries, parameters_of
from attrdb.shell.catalog import Described, meanings, relations
from attrdb.shell.statements import is_blank, split
from attrdb.sql.limits import UNLIMITED, Limits
from attrdb.store.lance_errors import storage
from attrdb.store.snapshot import Snapshot

ROWS_ON_SCREEN = 100

COMMANDS = {
    ".tables": "List tables, views and macros.",
    ".schema NAME": "Show the columns of a table, view or macro.",
    ".queries": "List the named queries.",
    ".run NAME p=v ...": "Run a named query with parameters.",
    ".mode FORMAT": f"Set the format of results: {', '.join(formats.FORMATS)}.",
    ".output FILE": "Write the next result to FILE, in the format of its suffix; without FILE, to the screen after all.",
    ".at VERSION": "Read an older version, or a time (ISO 8601, UTC); without VERSION, the newest again.",
    ".refresh": "Read what was written since the shell was started.",
    ".help": "Show this list.",
    ".quit": "Leave; Ctrl-D does so too.",
}
NAMES = [usage.split()[0] for usage in COMMANDS]


class Quit(Exception):
    """The user leaves."""


class Shell:
    """What the user has set: the database and its version, the format, and the file of the next result.

    user_tables: the user's own tables, loaded here, see `sql.load_tables`
    limits:      of every statement
    on_screen:   results for reading are cut off after ROWS_ON_SCREEN rows, with a note
    raises:      as `attrdb.open`, `sql.load_tables` and `sql.connect`
    """

    def __init__(
        self,
        path: Path,
        *,
        at: str | None = None,
        query_folders: Sequence[Path] = (),
        user_tables: Mapping[str, Any] | None = None,
        form: str = "table",
        on_screen: bool = False,
        limits: Limits = UNLIMITED,
    ):
        self.path, self.at, self.query_folders = path, at, query_folders
        self.form, self.on_screen, self.limits = form, on_screen, limits
        self.file: Path | None = None  # of the next result
        self.db = attrdb.open(path, read_only=True, at=at, query_folders=query_folders)
        self.user_tables = sql.load_tables(user_tables)
        with sql.connect(self.db.snapshot, tables=self.user_tables):
            pass  # a name that is taken is refused
        self._relations: tuple[Snapshot, dict[str, Described]] | None = None

    @property
    def relations(self) -> dict[str, Described]:
        """Everything that can stand in FROM, at the version that is being read."""
        if self._relations is None or self._relations[0] is not self.db.snapshot:
            self._relations = (self.db.snapshot, relations(self.db.snapshot, self.user_tables))
        return self._relations[1]

    @cached_property
    def queries(self) -> dict[str, Any]:
        return all_queries(self.query_folders)

    def command(self, line: str) -> None:
        """Carry out a dot command.

        raises: AttrdbError, Quit
        """
        try:
            name, *words = shlex.split(line)
        except ValueError as error:
            raise InvalidValue(f"{line}: {error}") from error
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, 1)
            raise NotFound(f"no command {name}{f'; nearest is {near[0]}' if near else ''}; .help lists all")
        getattr(self, f"_{name[1:]}")(words)

    def statement(self, text: str, parameters: dict[str, Any] | None = None) -> None:
        """Run one SELECT and write its rows.

        raises: AttrdbError; KeyboardInterrupt if the user cancels it
        """
        form, cut = self.form, False
        if self.file is not None:
            form = formats.SUFFIXES.get(self.file.suffix.lower(), self.form)
            formats.check_file(self.file, form, self.path)
        else:
            formats.check_stdout(form, "give .output FILE first")
            cut = self.on_screen and form == "table"
        limits = replace(self.limits, rows=ROWS_ON_SCREEN + 1 if cut else None)
        with storage(self.path):
            table = sql.select(self.db.snapshot, text, parameters, limits, self.user_tables)
        if self.file is not None:
            formats.write_file(table, form, self.file)
            note(formats.written(self.file, table))
            self.file = None
            return
        formats.write_stdout(table.slice(0, ROWS_ON_SCREEN) if cut else table, form)
        if cut and len(table) > ROWS_ON_SCREEN:
            note(f"the first {ROWS_ON_SCREEN} rows; .output FILE before the statement writes all of them")

    def _tables(self, words: list[str]) -> None:
        _expect(words, 0, ".tables")
        sections: dict[str, list[tuple[str, str]]] = {}
        for one in self.relations.values():
            sections.setdefault(one.kind, []).append((one.name, first_sentence(one.grain)))
        click.echo(listing(sections), nl=False)

    def _schema(self, words: list[str]) -> None:
        [name] = _expect(words, 1, ".schema NAME")
        if name not in self.relations:
            near = difflib.get_close_matches(name, self.relations, 3)
            nearest = f"; nearest: {', '.join(near)}" if near else ""
            raise NotFound(f"no table, view or macro {name!r}{nearest}; .tables lists all")
        one, known = self.relations[name], meanings(name)
        lines = [
            (column, f"{type_}: {known[column]}" if column in known else type_) for column, type_ in one.columns.items()
        ]
        click.echo(click.wrap_text(f"{one.call}: {one.grain}.", page_width()))
        click.echo(listing({"columns": lines}), nl=False)

    def _queries(self, words: list[str]) -> None:
        _expect(words, 0, ".queries")
        click.echo(query_listing(self.queries.values()), nl=False)

    def _run(self, words: list[str]) -> None:
        if not words:
            raise InvalidValue(".run needs the name of a query; .queries lists them")
        name, *given = words
        self.statement(*self.db.bound_query(name, **parameters_of(given)))

    def _mode(self, words: list[str]) -> None:
        [form] = _expect(words, 1, ".mode FORMAT")
        if form not in formats.FORMATS:
            raise InvalidValue(f"no format {form!r}; one of: {', '.join(formats.FORMATS)}")
        self.form = form

    def _output(self, words: list[str]) -> None:
        if not words:
            self.file = None
            return
        [name] = _expect(words, 1, ".output FILE")
        file = Path(name).expanduser()
        formats.check_file(file, formats.SUFFIXES.get(file.suffix.lower(), self.form), self.path)
        self.file = file

    def _at(self, words: list[str]) -> None:
        at = " ".join(words) or None
        self.db = attrdb.open(self.path, read_only=True, at=at, query_folders=self.query_folders)
        self.at = at
        note(f"version {self.db.version} of images")

    def _refresh(self, words: list[str]) -> None:
        _expect(words, 0, ".refresh")
        self.db.refresh()
        note(f"version {self.db.version} of images" + ("" if self.at is None else "; .at returns to the newest"))

    def _help(self, words: list[str]) -> None:
        _expect(words, 0, ".help")
        text = [("SELECT ...;", "Run one SELECT, on one line or several, ended by a semicolon.")]
        click.echo(listing({"commands": text + list(COMMANDS.items())}), nl=False)

    def _quit(self, words: list[str]) -> None:
        _expect(words, 0, ".quit")
        raise Quit


def run_script(shell: Shell, lines: Iterable[str]) -> None:
    """Run statements and dot commands line by line; a last statement needs no semicolon.

    raises: InvalidValue at the first that fails, with its number and line
    """
    text, first_line, count = "", 1, 0

    def carry_out(act: Callable[[str], None], what: str, line: int) -> None:
        nonlocal count
        count += 1
        try:
            act(what)
        except (AttrdbError, OSError) as error:
            raise InvalidValue(f"statement {count} (line {line}): {one_line(error)}") from error

    try:
        for number, line in enumerate(lines, 1):
            if line.lstrip().startswith(".") and is_blank(text):
                carry_out(shell.command, line.strip(), number)
                text, first_line = "", number + 1
                continue
            statements, rest = split(text + line)
            for statement in statements:
                carry_out(shell.statement, statement.text, first_line + statement.lines_before)
            first_line += (text + line).count("\n") - rest.count("\n")
            text = rest
        if not is_blank(text):
            blank = text[: len(text) - len(text.lstrip())]
            carry_out(shell.statement, text.strip(), first_line + blank.count("\n"))
    except Quit:
        return
    except UnicodeDecodeError as error:
        raise InvalidValue(f"the input is not UTF-8 text: {error.reason}; nothing of it was run after that") from error


def one_line(error: BaseException) -> str:
    """An error as one line: DuckDB quotes the statement below an empty line, which the user has before his eyes."""
    said = str(error).partition("\n\nLINE ")[0]
    return " ".join(said.split()) or type(error).__name__


def note(text: str) -> None:
    click.echo(text, err=True)


def _expect(words: list[str], count: int, usage: str) -> list[str]:
    if len(words) != count:
        raise InvalidValue(f"{usage} was given {len(words)} words after its name; it takes {count or 'none'}")
    return words
