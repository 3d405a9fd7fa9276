"""A table for reading on a terminal: numbers stay whole, names break where a reader would break them."""

import os
import re
import subprocess
import sys

import pyarrow as pa
import pytest

from attrdb.formats.grid import broken, column_widths, grid_parts
from attrdb.formats.text import cells, markdown_parts

NAMES = ["efficientnet_lite0/halved-both-a1b2c3d4", "pixels_8"]
GAINS = pa.table(
    {
        "method_id": NAMES,
        "gallery": ["own", "all"],
        "n_models": [1234567, 12],
        "recall_gain": [0.0312, -3.429e-18],
        "recall_low": [-3.429e-18, -0.01234],
        "image_id": ["corpus/some/long/path/with/many/parts/00001.png", "p1"],
    }
)


def printed(table, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    return "".join(grid_parts(table, terminal=True))


@pytest.mark.parametrize("columns", [160, 100, 80, 70, 40, 20])
def test_no_number_is_folded(columns, monkeypatch):
    text = printed(GAINS, columns, monkeypatch)
    for number in ("1234567", "12", "0.0312", "-0.01234"):
        assert re.search(rf"(?<![\d.-]){re.escape(number)}(?![\d.])", text), text
    if columns > 20:
        assert max(map(len, text.splitlines())) <= columns


@pytest.mark.parametrize("columns", [100, 80, 40])
def test_names_break_after_punctuation(columns, monkeypatch):
    text = printed(GAINS, columns, monkeypatch)
    pieces = re.findall(r"[^/_-]+[/_-]?", NAMES[0])
    for piece in pieces:
        assert piece in text


def test_a_terminal_that_is_too_narrow_gets_rows_one_below_the_other(monkeypatch):
    text = printed(GAINS, 40, monkeypatch)
    assert text.splitlines()[:4] == [
        "row 1",
        "  method_id    efficientnet_lite0/",
        "               halved-both-a1b2c3d4",
        "  gallery      own",
    ]
    assert "row 2\n  method_id    pixels_8\n" in text


def test_the_least_widths_decide():
    columns = [["n", "123456"], ["text", "a/b/c/d/e/f/g/h"]]
    assert column_widths(columns, [True, False], 30) == [6, 15]
    assert column_widths(columns, [True, False], 14) == [6, 6]
    assert column_widths(columns, [True, False], 9) is None


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("efficientnet_lite0/mapper-a", 16, ["efficientnet_", "lite0/mapper-a"]),
        ("a photo of a vase", 8, ["a photo", "of a", "vase"]),
        ("one\ntwo", 10, ["one", "two"]),
        ("abcdefghij", 4, ["abcd", "efgh", "ij"]),  # where there is no other place
        ("漢字漢字", 4, ["漢字", "漢字"]),
        ("", 4, [""]),
        ("a/" * 4, 4, ["a/a/", "a/a/"]),
    ],
)
def test_where_text_breaks(text, width, lines):
    assert broken(text, width).split("\n") == lines


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.5, -3.429e-18, 2.2e-16], ["0.5", "0", "0"]),
        ([3e-18, 2e-18], ["3e-18", "2e-18"]),  # nothing greater says that this is noise
        ([1e-13, 5000.0], ["1e-13", "5000"]),  # such as a learning rate beside seconds
        ([123456.7, 2e20, -98765.4], ["123457", "2e+20", "-98765"]),
        ([float("nan"), float("inf"), 1e-20], ["NaN", "Infinity", "1e-20"]),
        ([None, -0.0], ["-", "0"]),
    ],
)
def test_what_rounding_leaves_is_0(values, text):
    assert [row[0] for row in cells(pa.table({"x": pa.array(values, pa.float64())}))] == text


def test_noise_is_seen_beside_other_columns_and_in_markdown():
    table = pa.table({"gain": [0.25], "low": [-3.429e-18], "single": pa.array([0.5], pa.float32())})
    assert list(cells(table)) == [["0.25", "0", "0.5"]]
    assert "".join(markdown_parts(table)).splitlines()[-1] == "| 0.25 | 0 | 0.5 |"


def test_a_real_terminal_of_80_columns(toy):
    """By the command itself, on a pseudo-terminal."""
    statement = (
        "SELECT 'efficientnet_lite0/halved-both-a1b2c3d4' AS method_id, 'corpus/a/long/path/with/parts/1.png' AS image_id, "
        "-3.429e-18 AS low, 0.03125 AS gain, 1234567 AS n_candidates"
    )
    ours, theirs = os.openpty()
    words = [sys.executable, "-m", "attrdb", "sql", str(toy.path), statement]
    subprocess.run(words, stdout=theirs, check=True, env={**os.environ, "COLUMNS": "80", "TERM": "dumb"})
    os.close(theirs)
    text = os.read(ours, 65536).decode()
    os.close(ours)
    assert "0.03125" in text
    assert "1234567" in text
    assert "e-1" not in text
    assert max(map(len, text.splitlines())) <= 80
