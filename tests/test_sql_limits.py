"""SQL within limits of time, memory and rows, and Ctrl-C, which ends any statement at once."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from click.testing import CliRunner

from attrdb.cli import main
from attrdb.errors import InvalidValue, OutOfMemory, QueryRefused
from attrdb.search.memory import free_memory
from attrdb.sql.limits import Limits, parse_size

SLACK = 20  # seconds: a shared machine may be slow
RECURSIVE = "WITH RECURSIVE t AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM t) SELECT count(*) FROM t"
CROSS_JOIN = "SELECT * FROM range(100000) AS a, range(100000) AS b ORDER BY random()"
ONE_CALL = "SELECT length(repeat('x', 2000000000))"  # DuckDB looks for interrupts between calls only
ENDLESS = [RECURSIVE, CROSS_JOIN, "SELECT count(*) FROM range(1000000000000) AS t(i) WHERE i * i % 7 = 3"]


@pytest.mark.parametrize("statement", ENDLESS)
def test_a_statement_is_ended_after_its_time(toy, statement):
    began = time.monotonic()
    with pytest.raises(QueryRefused, match=r"ended after 0\.3 s; .* more time \(--timeout"):
        toy.sql(statement, timeout=0.3, memory="1GB")
    assert time.monotonic() - began < SLACK
    assert toy.sql("SELECT count(*) AS n FROM images", timeout=SLACK).to_pylist() == [{"n": 7}]


def test_the_time_of_one_thread_does_not_end_the_statement_of_another(toy):
    with ThreadPoolExecutor(2) as pool:
        ended = pool.submit(toy.sql, RECURSIVE, timeout=0.3)
        counted = pool.submit(toy.sql, "SELECT count(*) AS n FROM range(200000000) AS t(i) WHERE i % 7 = 3")
        with pytest.raises(QueryRefused, match="ended after"):
            ended.result()
        assert counted.result().to_pylist() == [{"n": 28571429}]


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT count(DISTINCT i) FROM range(100000000) AS t(i)",
        "SELECT list(i) FROM range(100000000) AS t(i)",
        "SELECT i FROM range(100000000) AS t(i) ORDER BY hash(i)",
    ],
)
@pytest.mark.parametrize("in_main_thread", [True, False])
def test_too_little_memory_says_what_to_do(toy, statement, in_main_thread):
    with ThreadPoolExecutor(1) as pool:
        run = toy.sql if in_main_thread else lambda *words, **values: pool.submit(toy.sql, *words, **values).result()
        with pytest.raises(OutOfMemory) as refused:
            run(statement, memory="64MiB")
    assert re.search(r"needs more than the 64\.0 MiB of memory .* allow more \(--memory", str(refused.value))
    assert "SET " not in str(refused.value)
    assert len(toy.sql("SELECT image_id FROM images", memory="64MiB")) == 7


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT i, hash(i) AS h FROM range(2000000000) AS t(i)",  # the result is not DuckDB's memory
        "SELECT sum(length(repeat(i::VARCHAR, 10000000))) FROM range(100000) AS t(i)",  # nor are texts that functions make
    ],
)
def test_memory_that_duckdb_does_not_count_is_limited_too(toy, statement):
    """In a process of its own, which ends although the statement may still compute."""
    result = attrdb_run("sql", toy.path, statement, "--memory", "100MB")
    assert "needs more than the 95.37 MiB of memory" in result.stderr
    assert result.returncode == 1


def test_rows_are_the_first(toy):
    assert toy.sql("SELECT image_id FROM images ORDER BY image_id", rows=2)["image_id"].to_pylist() == [
        "m/0/1",
        "m/0/2",
    ]
    assert toy.sql("SELECT 1 AS one", rows=0).to_pylist() == []


def test_rows_that_are_left_out_are_counted_on_stderr(toy):
    statement = "SELECT image_id FROM images"
    result = CliRunner().invoke(main, ["sql", str(toy.path), statement, "--rows", "3", "--csv"])
    assert len(result.stdout.splitlines()) == 4
    assert "the first 3 rows; --rows N writes more" in result.stderr
    assert CliRunner().invoke(main, ["sql", str(toy.path), statement, "--rows", "7"]).stderr == ""


def test_a_named_query_has_limits_too(toy):
    arguments = ["query", str(toy.path), "encoder_coverage", "--rows", "0", "--csv"]
    result = CliRunner().invoke(main, [*arguments, "--timeout", "20", "--memory", "200MB"])
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 1), result.output


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"timeout": 0}, "timeout is 0"),
        ({"timeout": -1}, "timeout is -1"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"timeout": float("inf")}, "timeout is inf"),
        ({"memory": 1000}, r"at least 16\.00 MiB"),
        ({"memory": "much"}, "'much' is no size"),
        ({"rows": -1}, "rows is -1"),
    ],
)
def test_limits_are_checked(toy, limits, says):
    with pytest.raises(InvalidValue, match=says):
        toy.sql("SELECT 1", **limits)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("4GB", 4 * 10**9), ("512 MiB", 512 * 2**20), ("1.5g", 15 * 10**8), ("100", 100), ("2Ti", 2 * 2**40)],
)
def test_sizes(text, n_bytes):
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "4 G B", "٤GB", "9" * 400 + "GB"])
def test_texts_that_are_no_size(text):
    with pytest.raises(InvalidValue, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize(
    "option", [["--timeout", "soon"], ["--memory", "much"], ["--rows", "-1"], ["--timeout", "nan"]]
)
def test_limits_of_commands_are_checked(toy, option):
    result = CliRunner().invoke(main, ["sql", str(toy.path), "SELECT 1", *option])
    assert result.exit_code in (1, 2)
    assert "Traceback" not in result.output


def test_timeout_0_is_no_limit(toy):
    assert CliRunner().invoke(main, ["sql", str(toy.path), "SELECT 1 AS one", "--timeout", "0", "--nl"]).output == (
        '{"one": 1}\n'
    )


def test_a_statement_of_the_prompt_is_ended_too(toy):
    text = f"SELECT 1 AS one;\n{RECURSIVE};\n"
    result = CliRunner().invoke(main, ["shell", str(toy.path), "--timeout", "0.5", "--nl"], input=text)
    assert '{"one": 1}' in result.stdout
    assert "statement 2 (line 2): the statement was ended after 0.5 s" in result.stderr


def test_free_memory_is_within_the_limit_of_a_container(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 4000 kB\nMemAvailable:    3000 kB\n")
    assert free_memory(tmp_path) == 3000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("500\n")
    (group / "memory.stat").write_text("anon 300\ninactive_file 100\n")
    assert free_memory(tmp_path) == 3000 * 1024
    (group / "memory.max").write_text("2000\n")
    assert free_memory(tmp_path) == 1600


def test_the_defaults_are_no_limit_of_time_and_half_of_the_free_memory(toy):
    assert Limits() == Limits(seconds=None, memory=None, rows=None)


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def attrdb_run(*words, **settings):
    command = [sys.executable, "-m", "attrdb", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **settings)


@pytest.mark.parametrize("statement", [RECURSIVE, CROSS_JOIN, ONE_CALL])
@pytest.mark.parametrize("after", [1.5, 3])
def test_ctrl_c_ends_a_statement_at_once(toy, statement, after):
    command = [sys.executable, "-m", "attrdb", "sql", str(toy.path), statement]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(after)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    output, errors = process.communicate(timeout=SLACK)
    assert time.monotonic() - began < SLACK / 2
    assert output == ""
    if process.returncode == -signal.SIGINT:  # a slow machine was importing modules still
        assert errors == ""
        return
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert "nanobind" not in errors


def test_ctrl_c_while_a_table_of_ones_own_is_loaded(toy, tmp_path):
    """As everywhere it is Ctrl-C, and no error of the file."""
    with (tmp_path / "large.csv").open("w") as file:
        file.write("a,b,c\n")
        line = "".join(f"{number},{number * 7},some text {number}\n" for number in range(100_000))
        for _ in range(30):
            file.write(line)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        toy.sql("SELECT count(*) FROM large", relations={"large": tmp_path / "large.csv"})
    timer.join()


@pytest.mark.parametrize("statement", ["EXPLAIN ANALYZE " + RECURSIVE, f"PIVOT ({CROSS_JOIN}) ON 1 USING count(*)"])
def test_statements_of_other_kinds_have_limits_too(toy, statement):
    began = time.monotonic()
    with pytest.raises((QueryRefused, OutOfMemory)):
        toy.sql(statement, timeout=0.5)
    assert time.monotonic() - began < SLACK
