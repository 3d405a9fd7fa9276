"""Arguments and moments that no command may answer with a traceback, and errors that are not a damaged file."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from functools import partial

import lance
import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

import attrdb
from attrdb.cli import machine, main
from attrdb.errors import AttrdbError, InvalidValue, QueryRefused, StorageError
from attrdb.search import index_build
from attrdb.store.lance_errors import storage
from attrdb.text import size_text
from attrdb.upkeep.optimize import optimize

NOT_UTF_8 = b"caf\xe9"
COMMANDS = sorted(set(main.commands) - {"ingest", "models", "queries"})


def command_line(*words, **settings):
    return subprocess.run(
        [sys.executable, "-m", "attrdb", *words], capture_output=True, check=False, timeout=120, **settings
    )


@pytest.mark.parametrize("command", [*COMMANDS, "ingest corpus", "ingest model", "models show", "queries show"])
def test_an_argument_that_is_not_utf_8_is_refused_by_number(toy, command):
    text = os.fsdecode(NOT_UTF_8)
    for words in ([*command.split(), text], [*command.split(), str(toy.path), text, "--rows", "1"]):
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 2, result.output
        assert f"argument {words.index(text) + 1} is not UTF-8 text: 'caf\\udce9'" in result.output


def test_an_argument_that_is_not_utf_8_in_a_process(toy):
    result = command_line(b"sql", os.fsencode(toy.path), b"SELECT '" + NOT_UTF_8 + b"'")
    assert result.returncode == 2
    assert b"argument 3 is not UTF-8 text" in result.stderr
    assert b"Traceback" not in result.stderr


@pytest.mark.parametrize("text", ["caf\udce9", "\ud800", "a\udfff\ud800"])
def test_half_characters_in_python_are_errors_of_attrdb(toy, text):
    calls = [
        lambda: toy.sql(f"SELECT '{text}'"),
        lambda: toy.sql("SELECT $x AS x", {"x": text}),
        lambda: toy.query("influence", image_id=text),
        lambda: toy.attribute(text),
        lambda: toy.feature(text),
        lambda: toy.attribute("m/0/1", candidates=f"role = '{text}'"),
        lambda: attrdb.open(toy.path.with_name(text)),
        lambda: attrdb.create(toy.path.with_name(text)),
        lambda: toy.remove(ids=[text]),
    ]
    for number, call in enumerate(calls):
        with pytest.raises(AttrdbError) as error:
            call()
        str(error.value).encode("utf-8", "backslashreplace")
        assert "Traceback" not in str(error.value), number


@pytest.mark.parametrize("days", ["36501", "999999999", "99999999999999999999999"])
def test_an_age_of_versions_that_is_no_age(toy, days):
    result = CliRunner().invoke(main, ["optimize", str(toy.path), "--drop-older-than", days])
    assert (result.exit_code, type(result.exception)) == (2, SystemExit)
    with pytest.raises(InvalidValue, match="it must be 0 to 36,500"):
        optimize(toy.writer, timedelta(days=min(int(days), 999_999_999)))


def test_the_oldest_age_of_versions_is_one_of_lance(toy):
    optimize(toy.writer, timedelta(days=36_500))


# --- paths ------------------------------------------------------------------------------------------------------------


def test_a_path_may_have_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("a:b.attrdb", "file:c.attrdb", "x:/y.attrdb"):
        assert CliRunner().invoke(main, ["init", path]).exit_code == 0
        result = CliRunner().invoke(main, ["sql", path, "SELECT count(*) AS n FROM images", "--nl"])
        assert result.output == '{"n": 0}\n'
        assert (tmp_path / path / "images.lance").is_dir()


@pytest.mark.parametrize("address", ["s3://bucket/some.attrdb", "gs://b/x", "file:///tmp/x", "az+http://x/y"])
def test_an_address_is_no_path(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["init", address], ["status", address], ["upgrade", address]):
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 1
        assert f"{address} is an address; a database is a directory on this machine" in result.output
    with pytest.raises(InvalidValue, match="is an address"):
        attrdb.create(address)
    assert list(tmp_path.iterdir()) == []


def test_a_deleted_database_does_not_come_back_as_a_stub(toy):
    shutil.rmtree(toy.path)
    for write in (
        lambda: index_build.build(toy.writer),
        lambda: optimize(toy.writer),
        lambda: toy.remove(where="true"),
        lambda: toy.writer.append_images(pa.table({"image_id": ["a"], "role": ["pretraining"]})),
    ):
        with pytest.raises(AttrdbError):
            write()
        assert not toy.path.exists()
    for command in ("index", "optimize", "check", "upgrade", "status", "encode", "calibrate"):
        assert CliRunner().invoke(main, [command, str(toy.path)]).exit_code in (1, 2)
        assert not toy.path.exists(), command


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 bytes"), (1023, "1,023 bytes"), (1024, "1.00 KiB"), (5_000_000, "4.77 MiB"), (3 * 2**29, "1.50 GiB")],
)
def test_a_size_is_never_shown_as_nothing(n_bytes, text):
    assert size_text(n_bytes) == text


# --- what is no damage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predicate", ["CAST(role AS int) = 1", "1 / 0 = 1", "regexp_like(role, '(a{1000}){1000}')"])
def test_a_predicate_that_fails_for_an_image_is_not_called_damage(toy, predicate):
    with pytest.raises(InvalidValue, match="a predicate cannot be computed for every image: ") as refused:
        toy.attribute("m/0/1", candidates=predicate)
    assert "damaged" not in str(refused.value)
    with pytest.raises(InvalidValue, match="cannot be computed"):
        toy.remove(where=predicate)


def test_ctrl_c_inside_lance_is_ctrl_c(tmp_path):
    table = pa.table({"t": [f"{number}-abcdefghij" * 5 for number in range(200_000)]})
    dataset = lance.write_dataset(table, str(tmp_path / "t.lance"))
    slow = " OR ".join(f"levenshtein(t, 'abc{number}') = 1" for number in range(60))
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    began = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt), storage(tmp_path):
        dataset.to_table(filter=slow)
    assert time.monotonic() - began < 20
    timer.join()


def test_a_count_heeds_ctrl_c(toy):
    where = " OR ".join(f"levenshtein(t, 'abc{number}') = 1" for number in range(60))
    table = pa.table({"t": [f"{number}-abcdefghij" * 5 for number in range(200_000)]})
    toy.snapshot.tables["images"] = lance.write_dataset(table, str(toy.path / "other.lance"))
    toy.snapshot.hidden_models = ()
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    began = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        toy.snapshot.count(where)
    assert time.monotonic() - began < 10
    timer.join()


def test_too_many_open_files_are_called_that(toy):
    program = "import resource, sys, attrdb; db = attrdb.open(sys.argv[1]); db.snapshot.hidden_models\n"
    program += "files = []\nresource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
    program += "try:\n    while True: files.append(open('/dev/null'))\nexcept OSError: pass\n"
    program += "try: db.snapshot.images(\"role = 'sample'\", ['image_id'])\nexcept attrdb.StorageError as e: print(e)\n"
    program += "try: attrdb.open(sys.argv[1])\nexcept attrdb.AttrdbError as e: print(e)\n"
    result = subprocess.run(
        [sys.executable, "-c", program, str(toy.path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("too many files are open; allow more (ulimit -n)") == 2, result.stdout
    assert "damaged" not in result.stdout
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] != 0


@pytest.mark.parametrize(
    ("n_files", "code", "said"), [(8, 1, "may open 8 files at once; needed are 12"), (12, 0, "made ")]
)
def test_too_few_open_files_are_refused_before_the_work(tmp_path, n_files, code, said):
    """With 8, Lance would panic and print where."""
    limited = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (n_files, n_files))
    done = command_line("init", str(tmp_path / "new.attrdb"), preexec_fn=limited)
    assert done.returncode == code
    assert said in done.stderr.decode()
    assert b"panicked" not in done.stderr


def test_a_folder_for_temporary_files_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    monkeypatch.setattr("tempfile.tempdir", None)
    machine.prepare()
    assert os.access(os.environ["TMPDIR"], os.W_OK)


def test_a_version_that_was_deleted_meanwhile_is_not_called_damage(toy):
    reader = attrdb.open(toy.path, read_only=True)
    toy.writer.append_images(pa.table({"image_id": ["late"], "role": ["pretraining"]}))
    optimize(attrdb.open(toy.path).writer, timedelta(0))
    for ask in (
        lambda: reader.images("true", ["image_id"]),
        lambda: reader.sql("SELECT image_id FROM images"),
        lambda: reader.attribute("m/0/1"),
    ):
        with pytest.raises(StorageError, match=r"old versions were deleted meanwhile \(optimize --drop-older-than"):
            ask()
    reader.refresh()
    assert len(reader.sql("SELECT image_id FROM images")) == 8


def test_a_wrong_statement_is_not_called_damage(toy):
    with pytest.raises(QueryRefused) as refused:
        toy.sql("SELECT CAST(role AS INTEGER) FROM images")
    assert "damaged" not in str(refused.value)


# --- Ctrl-C at any moment ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["sql", "SELECT count(*) FROM images"], ["upgrade"], ["status"]])
def test_ctrl_c_at_any_moment_ends_quietly(toy, words):
    name, *rest = words
    for moment in np.linspace(0.15, 1.5, 8):
        process = subprocess.Popen(
            [sys.executable, "-m", "attrdb", name, str(toy.path), *rest], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        time.sleep(moment)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert b"Traceback" not in errors, errors.decode()
        assert process.returncode in (0, 130, -signal.SIGINT)


def test_ctrl_c_while_a_native_module_is_imported_ends_quietly(tmp_path):
    (tmp_path / "native.py").write_text(
        "import os, signal\n"
        "try: os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt: print('Critical error: Traceback', flush=True)\n"
    )
    program = "import sys, attrdb.cli, attrdb.__main__ as line\n"
    program += "attrdb.cli.main = lambda prog_name: __import__('native')\nline.main()\n"
    process = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True
    )
    assert process.returncode == -signal.SIGINT
    assert process.stdout + process.stderr == b""
