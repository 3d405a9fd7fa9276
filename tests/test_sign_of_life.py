"""Long commands show from their start on that they work, and give up at once on a hub that cannot be reached."""

import os
import select
import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from click.testing import CliRunner

from attrdb.cli import main
from attrdb.ingest import hub as hub_module
from attrdb.ingest.hub import hub, is_reachable

# A command whose packages take long to import.
SLOW = """
import importlib, sys, time
whole = importlib.import_module
def slow(name, *rest):
    if name.startswith("attrdb."):
        time.sleep(4)
        raise SystemExit(9)
    return whole(name, *rest)
import attrdb.cli.common
attrdb.cli.common.importlib.import_module = slow
sys.argv = ["attrdb", *{words!r}]
from attrdb.cli import main
main()
"""


def long_commands(command=main, path=()):
    """Names of all commands with --quiet."""
    for name, sub in command.commands.items():
        if hasattr(sub, "commands"):
            yield from long_commands(sub, (*path, name))
        elif any(parameter.name == "quiet" for parameter in sub.params):
            yield (*path, name)


def test_long_commands_have_it():
    found = set(long_commands())
    assert {("train",), ("report",), ("encode",), ("ingest", "model"), ("ingest", "models"), ("import",)} <= found


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_shows_that_a_command_starts(toy, tmp_path, quiet):
    words = ["report", str(toy.path), "--out", str(tmp_path / "r.html"), *(["--quiet"] if quiet else [])]
    ours, theirs = os.openpty()
    process = subprocess.Popen([sys.executable, "-c", SLOW.replace("{words!r}", repr(words))], stderr=theirs)
    os.close(theirs)
    seen, ended = b"", time.monotonic() + 60
    while b"starting" not in seen and process.poll() is None and time.monotonic() < ended:
        with suppress(OSError):  # the command has ended
            if select.select([ours], [], [], 0.1)[0]:
                seen += os.read(ours, 4096)
    shown_while_it_worked = b"starting" in seen and process.poll() is None
    assert process.wait(60) == 9
    os.close(ours)
    assert shown_while_it_worked != quiet


def test_nothing_is_shown_where_there_is_no_terminal(toy):
    done = CliRunner().invoke(main, ["evaluate", str(toy.path)])
    assert done.exit_code == 0, done.output
    assert done.stderr == "4 ranks by toy_2, gallery own\n"
    assert done.stdout == ""


@pytest.fixture
def no_proxy(monkeypatch):
    for name in hub_module.PROXIES:
        monkeypatch.delenv(name, raising=False)


def test_a_hub_that_answers_is_asked(no_proxy, monkeypatch):
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert is_reachable()
        with hub():
            assert not constants.HF_HUB_OFFLINE
    assert not is_reachable()  # it has gone


def test_without_a_network_a_hub_name_fails_at_once(toy, no_proxy, monkeypatch, tmp_path):
    from huggingface_hub import constants

    from attrdb.errors import NotFound
    from attrdb.ingest.customize.base_model import base_model_folder

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the port of discard: nobody listens
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    began = time.monotonic()
    with pytest.raises(NotFound, match="no base model 'nobody/nothing': no such folder, and the hub says"):
        base_model_folder("nobody/nothing")
    assert time.monotonic() - began < 10  # the hub's client alone tries for 48 s
    assert not constants.HF_HUB_OFFLINE


def test_a_proxy_is_trusted(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert is_reachable()
