"""The prompt of `attrdb shell` on a terminal: history, completion, highlighting, statements of several lines."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import duckdb
from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.lexers import PygmentsLexer
from prompt_toolkit.output import create_output
from pygments.lexers.sql import SqlLexer

import attrdb
from attrdb import formats
from attrdb.errors import AttrdbError
from attrdb.shell.session import NAMES, Quit, Shell, note, one_line
from attrdb.shell.statements import is_blank, split


def run_prompt(shell: Shell) -> None:
    """Read and run what the user types, until he leaves."""
    session: PromptSession[str] = PromptSession(
        history=history(shell.path),
        completer=ShellCompleter(shell),
        complete_while_typing=False,
        lexer=PygmentsLexer(SqlLexer),
        multiline=Condition(lambda: not is_complete(get_app().current_buffer.text)),
        prompt_continuation=lambda width, line, wraps: "...> ".rjust(width),
        output=create_output(always_prefer_tty=True),
    )
    note(f"attrdb {attrdb.__version__}, {shell.path}, version {shell.db.version}, read only")
    note("statements end with ; and .help lists the commands")
    while True:
        try:
            text = session.prompt(f"attrdb@{shell.at}> " if shell.at else "attrdb> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        try:
            run_text(shell, text)
        except Quit:
            return


def run_text(shell: Shell, text: str) -> None:
    """Run what was typed; an error or Ctrl-C ends it, and is told in one line."""
    try:
        if text.lstrip().startswith("."):
            shell.command(text.strip())
            return
        for statement in split(text)[0]:
            shell.statement(statement.text)
    except KeyboardInterrupt:
        note("canceled")
    except (AttrdbError, OSError) as error:
        note(f"Error: {one_line(error)}")


def is_complete(text: str) -> bool:
    """Whether Enter runs the text; otherwise it begins another line."""
    return text.lstrip().startswith(".") or is_blank(text) or is_blank(split(text)[1])


def history(database: Path) -> History:
    """What was typed before, in the user's state folder; in memory only where that folder cannot be used."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    folder = (state if state.is_absolute() else Path.home() / ".local" / "state") / "attrdb"
    if folder.resolve().is_relative_to(database.resolve()):
        note(f"{folder} lies inside the database: the history of this session is not kept")
        return InMemoryHistory()
    file = folder / "shell_history"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        note(f"{file} cannot be written ({error.strerror}): the history of this session is not kept")
        return InMemoryHistory()
    return FileHistory(file)


class ShellCompleter(Completer):
    """Completes dot commands and their words; in SQL relations, macros, columns and keywords."""

    def __init__(self, shell: Shell):
        self.shell = shell
        found = duckdb.execute("SELECT keyword_name FROM duckdb_keywords() ORDER BY keyword_name").fetchall()
        self.keywords = [name for (name,) in found]

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        before = document.text_before_cursor
        command = re.fullmatch(r"\s*(\.\w+\s+)*(\.?\w*)", before) if before.lstrip().startswith(".") else None
        typed = command[2] if command else re.findall(r"\w*$", before)[0]
        names = self._words_of(before.split()[:1], command[1]) if command else self._sql_words(before, typed)
        for name in names:
            if name.lower().startswith(typed.lower()):
                yield Completion(name, start_position=-len(typed))

    def _words_of(self, command: list[str], done: str | None) -> Iterable[str]:
        """Dot commands, or the first word after one."""
        if not done:
            return NAMES
        first = {".schema": self.shell.relations, ".run": self.shell.queries, ".mode": formats.FORMATS}
        return first.get(command[0], ())

    def _sql_words(self, before: str, typed: str) -> list[str]:
        """The columns of a relation after its name and a dot; otherwise relations, columns, then keywords."""
        relations = self.shell.relations
        owner = re.search(r"(\w+)\.\w*$", before)
        if owner and owner[1] in relations:
            return list(relations[owner[1]].columns)
        columns = sorted({column for one in relations.values() for column in one.columns})
        names = [f"{name}(" if one.arguments else name for name, one in relations.items()]
        keywords = map(str.upper, self.keywords) if typed.isupper() else self.keywords
        return list(dict.fromkeys([*names, *columns, *keywords]))
