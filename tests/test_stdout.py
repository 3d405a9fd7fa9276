"""Where output goes: closed, in another encoding, or a terminal that obeys what it is sent."""

import os
import pty
import subprocess
import sys

import pytest
from conftest import TOY, rows

ESCAPE = "\x1b]0;title\x07\x1b[31mred\x9b2J"


@pytest.fixture
def captioned(empty):
    """A database with a caption that an older attrdb has let pass."""
    empty.writer.add_encoder(**TOY)
    empty.writer.append_images(rows([("a", "pretraining", None, 10)], prompt=[f"{ESCAPE} 猫 café"]))
    return str(empty.path)


def attrdb(*words, shell_end="", **environment):
    command = " ".join(f"'{word}'" for word in (sys.executable, "-m", "attrdb", *words))
    return subprocess.run(["sh", "-c", command + shell_end], capture_output=True, env={**os.environ, **environment})


PROMPT = ("sql", "{db}", "SELECT image_id, prompt FROM images")


def filled(words, db):
    return [word.replace("{db}", db) for word in words]


@pytest.mark.parametrize(
    "words", [PROMPT, (*PROMPT, "--csv"), ("status", "{db}"), ("--help",), ("query", "{db}", "nothing")]
)
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_end_quietly(captioned, words, closed):
    done = attrdb(*filled(words, captioned), shell_end=f" {closed}")
    assert done.returncode == (1 if words[0] == "query" else 0)
    assert b"Traceback" not in done.stderr
    assert (done.stderr == b"") == ("2>&-" in closed or words[0] != "query")


def test_a_reader_that_goes_away_ends_quietly(captioned):
    done = attrdb("sql", captioned, "SELECT * FROM range(300000)", "--csv", shell_end=" | head -n 1")
    assert (done.stdout.strip(), done.stderr) == (b"range", b"")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
@pytest.mark.parametrize("form", ["--csv", "--table", "--json"])
def test_characters_that_the_output_cannot_hold_are_spelled(captioned, encoding, form):
    done = attrdb(*filled(PROMPT, captioned), form, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u732b" in done.stdout or "猫".encode() in done.stdout


@pytest.mark.parametrize("form", ["csv", "nl", "json", "markdown", "table"])
def test_a_terminal_is_shown_control_characters_and_not_sent_them(captioned, form):
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "attrdb", *filled(PROMPT, captioned), "--format", form]
    done = subprocess.run(words, stdout=theirs, stderr=subprocess.PIPE, env={**os.environ, "TERM": "dumb"})
    os.close(theirs)
    sent = os.read(ours, 100_000).decode()
    os.close(ours)
    assert done.returncode == 0
    assert "\x1b]" not in sent
    assert "\x1b[31m" not in sent
    assert not {"\x07", "\x9b"} & set(sent)
    assert "red" in sent


def test_a_pipe_gets_data_as_it_is(captioned):
    done = attrdb(*filled(PROMPT, captioned), "--csv")
    assert done.stdout.decode() == f"image_id,prompt\na,{ESCAPE} 猫 café\n"


def test_errors_show_control_characters(captioned, tmp_path):
    done = attrdb("ingest", "corpus", captioned, str(tmp_path / "no\x1b[31m"))
    assert done.stderr.decode() == f"Error: no folder or file {tmp_path}/no\\x1b[31m\n"
