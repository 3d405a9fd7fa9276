"""attrdb shell: from standard input, and at a prompt in a real pseudo-terminal."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import rows
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from attrdb.cli import main
from attrdb.shell.prompt import ShellCompleter, history, is_complete
from attrdb.shell.session import ROWS_ON_SCREEN, Shell
from attrdb.shell.statements import is_blank, split

SECONDS = 30  # a shared machine may be slow


def shell(db, text, *words, code=0):
    result = CliRunner().invoke(main, ["shell", str(db.path), *words], input=text)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.mark.parametrize(
    ("text", "statements", "rest"),
    [
        ("SELECT 1; SELECT\n2;", ["SELECT 1", "SELECT\n2"], ""),
        ("SELECT 'a;b', \"c;d\", $$e;f$$, E'g\\';h';", ["SELECT 'a;b', \"c;d\", $$e;f$$, E'g\\';h'"], ""),
        ("SELECT 'é;ü';x", ["SELECT 'é;ü'"], "x"),
        ("-- a;\nSELECT 1 /* b; /* c; */ */;", ["-- a;\nSELECT 1 /* b; /* c; */ */"], ""),
        (";; ;SELECT 1", [], "SELECT 1"),
        ("SELECT 'a;", [], "SELECT 'a;"),
        ("", [], ""),
    ],
)
def test_split(text, statements, rest):
    found, left = split(text)
    assert ([one.text for one in found], left) == (statements, rest)


def test_split_counts_the_lines_before_a_statement():
    assert [one.lines_before for one in split("SELECT 1;\n\n-- note\nSELECT\n2;SELECT 3;")[0]] == [0, 3, 4]


def test_is_blank():
    assert is_blank(" \n-- note; \n/* more; */ ")
    assert not any(map(is_blank, ["SELECT", "/* open", ";"]))


def test_statements_from_standard_input(toy):
    done = shell(toy, "SELECT 1 AS a;\nSELECT 2\nAS b; SELECT 3 AS c", "--csv")
    assert done.stdout == "a\n1\nb\n2\nc\n3\n"


def test_the_first_error_ends_it_and_is_named(toy):
    done = shell(toy, "SELECT 1 AS a;\n\nSELECT *\nFROM nobody;\nSELECT 3;", "--csv", code=1)
    assert done.stdout == "a\n1\n"
    assert done.stderr.startswith("Error: statement 2 (line 3): Catalog Error: Table with name nobody does not exist!")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("SELECT * FROM read_csv('/etc/passwd');", "not files or the network"),
        ("SET memory_limit = '1GB';", "one SELECT is needed, found: SET"),
        ("DELETE FROM images;", "one SELECT is needed, found: DELETE"),
        ("SELECT 'open", "unterminated string literal"),
        ("SELECT 1; /* open", "unterminated /* comment"),
        (".tabels", "no command .tabels; nearest is .tables; .help lists all"),
        (".schema imags", "no table, view or macro 'imags'; nearest: images"),
        (".schema", ".schema NAME was given 0 words after its name; it takes 1"),
        (".schema 'a", "No closing quotation"),
        (".mode yaml", "no format 'yaml'; one of: table, json"),
        (".run", ".run needs the name of a query"),
        (".run recall_at_k k", "parameter 'k' is not of the form name=value"),
        (".run recall_at_k k=x", "parameter k is 'x'; it must be INTEGER"),
        (".run nothing", "no query 'nothing'"),
        (".at 999", "999"),
        (".output /nowhere/x.csv", "no folder /nowhere to write x.csv into"),
        (".mode xlsx\nSELECT 1;", "xlsx is written to a file only; give .output FILE first"),
    ],
)
def test_errors_are_one_line(toy, text, says):
    done = shell(toy, text, code=1)
    assert says in done.stderr
    assert re.match(r"Error: statement [12] \(line [12]\): ", done.stderr)
    assert done.stderr.count("\n") == 1


def test_input_that_is_no_text(toy):
    assert "the input is not UTF-8 text" in shell(toy, b"SELECT 1;\n\xff\n", code=1).stderr


def test_tables_schema_queries_and_help(toy):
    said = shell(toy, ".tables\n.schema images\n.schema nearest\n.queries\n.help\n").stdout
    assert "pretraining_images  One row per pretraining image" in said
    assert "toy_2          FLOAT[2]" in said
    assert "nearest(feature, k := 10" in said
    assert "recall_at_k" in said
    assert ".schema NAME" in said
    assert max(map(len, said.splitlines())) <= 80


def test_run_mode_output_and_quit(toy, tmp_path):
    file = tmp_path / "images.parquet"
    text = f".mode nl\n.run model_counts\nSELECT 1 AS a;\n.output '{file}'\nSELECT * FROM images;\nSELECT 2 AS b;\n.quit\nX"
    done = shell(toy, text)
    assert done.stdout == '{"a": 1}\n{"b": 2}\n'
    assert done.stderr == f"wrote {file}: 7 rows\n"
    assert len(pq.read_table(file)) == 7


def test_output_without_a_file_goes_to_the_screen_again(toy, tmp_path):
    assert shell(toy, f".output {tmp_path}/x.csv\n.output\nSELECT 1 AS a;", "--csv").stdout == "a\n1\n"
    assert not (tmp_path / "x.csv").exists()


def test_output_cannot_go_into_the_database(toy):
    assert "lies inside the database" in shell(toy, f".output {toy.path}/x.csv", code=1).stderr


def test_at_and_refresh(toy):
    count, before = "SELECT count(*) AS n FROM images", toy.version
    asked = Shell(toy.path, form="csv")
    toy.writer.append_images(rows([("p1", "pretraining", None, 1)]))

    def counted():
        return asked.db.sql(count)["n"][0].as_py()

    assert counted() == 7
    asked.command(".refresh")
    assert counted() == 8
    asked.command(f".at {before}")
    assert (counted(), asked.at) == (7, str(before))
    asked.command(".refresh")
    assert counted() == 7
    asked.command(".at")
    assert (counted(), asked.at) == (8, None)


def completions(completer, text):
    return [one.text for one in completer.get_completions(Document(text), CompleteEvent())]


def test_completion(toy):
    completer = ShellCompleter(Shell(toy.path))
    assert completions(completer, "SELECT * FROM sampl") == ["samples", "sample_scores(", "sample_id", "sample"]
    assert completions(completer, "SELECT images.toy") == ["toy_2"]
    assert completions(completer, "SELE") == ["SELECT"]
    assert completions(completer, "sele") == ["select"]
    assert completions(completer, ".ta") == [".tables"]
    assert completions(completer, ".schema nea") == ["nearest"]
    assert completions(completer, ".run recall_at") == ["recall_at_k"]
    assert completions(completer, ".mode mark") == ["markdown"]
    assert completions(completer, ".at ") == []


def test_when_enter_runs():
    assert all(map(is_complete, ["", "SELECT 1;", "SELECT 1; -- note", ".tables", "SELECT 1; SELECT 2;"]))
    assert not any(map(is_complete, ["SELECT 1", "SELECT ';", "SELECT 1; SELECT 2", "/* ; "]))


def test_history_is_never_inside_the_database(toy, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(toy.path / "state"))
    assert type(history(toy.path)).__name__ == "InMemoryHistory"
    assert "lies inside the database" in capsys.readouterr().err
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert type(history(toy.path)).__name__ == "InMemoryHistory"
    assert "cannot be written" in capsys.readouterr().err


class Terminal:
    """attrdb shell in a pseudo-terminal of 80 columns."""

    def __init__(self, db, state):
        environment = {**os.environ, "XDG_STATE_HOME": str(state), "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
        ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "attrdb", "shell", str(db.path)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)
        self.terminal, self.said = ours, ""

    def expect(self, text, seconds=SECONDS):
        """Read until the text has been said; what was said before it is forgotten."""
        end = time.monotonic() + seconds
        while text not in self.said:
            ready, _, _ = select.select([self.terminal], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} was not said: {self.said!r}"
            try:
                data = os.read(self.terminal, 65536).decode(errors="replace")
            except OSError:  # it has ended
                data = ""
            assert data, f"{text!r} was not said before the end: {self.said!r}"
            if "\x1b[6n" in data:  # where is the cursor?
                os.write(self.terminal, b"\x1b[1;1R")
            self.said += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data)
        self.said = self.said.partition(text)[2]

    def type(self, text):
        os.write(self.terminal, text.encode())

    def end(self):
        code = self.process.wait(SECONDS)
        os.close(self.terminal)
        return code


@pytest.fixture
def terminal(toy, tmp_path):
    terminal = Terminal(toy, tmp_path / "state")
    terminal.expect(".help lists the commands")
    terminal.expect("attrdb>")
    yield terminal
    if terminal.process.poll() is None:
        terminal.process.kill()
        terminal.end()


def test_a_session_at_a_prompt(terminal, tmp_path):
    terminal.type("SELECT image_id\r")
    terminal.expect("...>")
    terminal.type("FROM pretraining_images ORDER BY 1;\r")
    terminal.expect("p10")
    terminal.expect("p90")
    terminal.type("SELECT nothing;\r")
    terminal.expect('Error: Binder Error: Referenced column "nothing" was not found')
    terminal.type("SELECT count(*) FROM pretr\t")
    terminal.expect("aining_images")
    terminal.type(" WHERE true;\r")
    terminal.expect("count_star()")
    terminal.type("half a statement")
    terminal.type("\x03")  # Ctrl-C forgets it
    terminal.expect("attrdb>")
    terminal.type(f"SELECT i AS many FROM range({ROWS_ON_SCREEN + 1}) AS t(i);\r")
    terminal.expect(f"the first {ROWS_ON_SCREEN} rows")
    terminal.expect("attrdb>")
    terminal.type("\x04")
    assert terminal.end() == 0
    kept = tmp_path / "state" / "attrdb" / "shell_history"
    assert "FROM pretraining_images" in kept.read_text()
    assert kept.stat().st_mode & 0o777 == 0o600


def test_ctrl_c_cancels_a_statement_at_once(terminal):
    terminal.type("SELECT count(*) FROM range(1000000000000) AS t(i) WHERE i * i % 7 = 3;\r")
    terminal.expect("7 = 3;")
    for attempt in range(6):  # one that comes before the statement runs clears the prompt alone
        time.sleep(1 + attempt)
        os.killpg(terminal.process.pid, signal.SIGINT)
        with suppress(AssertionError):
            terminal.expect("canceled", 5)
            break
    else:
        pytest.fail("no Ctrl-C cancelled the statement")
    terminal.type("SELECT 40 + 2 AS answer;\r")
    terminal.expect("42")
    terminal.type(".quit\r")
    assert terminal.end() == 0
