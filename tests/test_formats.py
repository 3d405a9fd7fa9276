"""Rows in every format: to standard output, to files, and what cannot be written."""

import csv
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from xml.etree import ElementTree

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_cli import run

from attrdb import formats
from attrdb.errors import InvalidValue, StorageError
from attrdb.formats.xlsx import MAX_CHARACTERS

ODD = """
    SELECT 1 AS n, 0.1234567 AS x, 'a|b' AS text, [1, 2] AS list, {'k': 'é'} AS struct, 'ab'::BLOB AS bytes
    UNION ALL
    SELECT NULL, 'nan'::DOUBLE, 'two' || chr(10) || 'lines, "quoted" 漢', [], NULL, NULL
    ORDER BY n
"""
GOLDEN = {
    "csv": 'n,x,text,list,struct,bytes\n1,0.1234567,a|b,"[1, 2]","{""k"": ""é""}",<2 bytes>\n'
    ',NaN,"two\nlines, ""quoted"" 漢",[],,\n',
    "nl": '{"n": 1, "x": 0.1234567, "text": "a|b", "list": [1, 2], "struct": {"k": "\\u00e9"}, "bytes": "<2 bytes>"}\n'
    '{"n": null, "x": "NaN", "text": "two\\nlines, \\"quoted\\" \\u6f22", "list": [], "struct": null, "bytes": null}\n',
    "markdown": "| n | x | text | list | struct | bytes |\n| ---: | ---: | --- | --- | --- | --- |\n"
    "| 1 | 0.1235 | a\\|b | \\[1, 2\\] | {'k': 'é'} | &lt;2 bytes&gt; |\n"
    '|  | NaN | two<br>lines, "quoted" 漢 | \\[\\] |  |  |\n',
    "table": " n       x  text                list    struct      bytes     \n"
    " ──────────────────────────────────────────────────────────── \n"
    " 1  0.1235  a|b                 [1, 2]  {'k': 'é'}  <2 bytes> \n"
    " -     NaN  two                 []      -           -         \n"
    '            lines, "quoted" 漢                                \n',
}


def result(statement) -> pa.Table:
    return duckdb.connect().sql(statement).to_arrow_table()


def written(table, form, folder) -> bytes:
    formats.write_file(table, form, folder / "rows")
    return (folder / "rows").read_bytes()


@pytest.mark.parametrize("form", GOLDEN)
def test_golden_output_is_the_same_in_a_file_and_on_stdout(form, tmp_path, capsysbinary):
    in_file = written(result(ODD), form, tmp_path)
    formats.write_stdout(result(ODD), form)
    assert capsysbinary.readouterr().out == in_file
    lines = [line for line in in_file.decode().splitlines(keepends=True) if line.strip()]
    assert "".join(lines) == GOLDEN[form]


def test_json_is_a_list_of_the_objects_of_nl(tmp_path):
    text = written(result(ODD), "json", tmp_path).decode()
    assert json.loads(text) == [json.loads(line) for line in GOLDEN["nl"].splitlines()]
    assert text.startswith('[\n  {\n    "n": 1,\n')
    assert written(result("SELECT 1 AS a WHERE false"), "json", tmp_path) == b"[]\n"


def test_csv_is_read_back_as_it_was(tmp_path):
    texts = ["a\rb", "a\r\nb", '"', ",", "\n", " x ", "=1+1"]
    read = csv.reader(io.StringIO(written(pa.table({"a": texts}), "csv", tmp_path).decode(), newline=""))
    assert [row[0] for row in read] == ["a", *texts]


def test_markdown_shows_markup_as_text(tmp_path):
    text = written(
        pa.table({"a_b": ["<img src=x>", r"\|", "*x* `y` [z](u)", "__init__ my_id", "1 & 2"]}), "markdown", tmp_path
    )
    assert text.decode().splitlines() == [
        "| a_b |",
        "| --- |",
        "| &lt;img src=x&gt; |",
        r"| \\\| |",
        r"| \*x\* \`y\` \[z\](u) |",
        r"| \_\_init\_\_ my_id |",
        "| 1 &amp; 2 |",
    ]


def test_a_table_for_reading_sends_no_commands_to_the_terminal(tmp_path):
    assert b"\\x1b[31mred" in written(pa.table({"a": ["\x1b[31mred"]}), "table", tmp_path)


def test_types_that_python_lacks(tmp_path):
    moment = "TIMESTAMP_NS '2026-01-02 03:04:05.123456789'"
    statement = f"SELECT {moment} AS t, INTERVAL 3 DAY AS i, MAP {{'a': 1}} AS m, 7::HUGEINT AS h"
    [row] = json.loads(written(result(statement), "json", tmp_path))
    assert row["t"] == "2026-01-02 03:04:05.123456789"
    assert row["i"] == "3 days"
    assert (row["m"], row["h"]) == ([["a", 1]], "7")


def test_parquet_keeps_types_and_bytes(tmp_path):
    table = result(ODD)
    formats.write_file(table, "parquet", tmp_path / "x.parquet")
    read = pq.read_table(tmp_path / "x.parquet")
    assert read.schema.types == table.schema.types
    assert str(read.to_pylist()) == str(table.to_pylist())


def test_parquet_refuses_a_type_that_it_lacks(tmp_path):
    with pytest.raises(InvalidValue, match=r"Parquet cannot hold this result: .*; cast the column to another type"):
        formats.write_file(result("SELECT INTERVAL 3 DAY AS i"), "parquet", tmp_path / "x.parquet")
    assert not os.listdir(tmp_path)


MAIN = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"


def cells(data: bytes) -> dict[str, tuple[str | None, str]]:
    """Type and text of every cell of the only sheet."""
    with zipfile.ZipFile(io.BytesIO(data)) as book:
        sheet = ElementTree.fromstring(book.read("xl/worksheets/sheet1.xml"))
    assert not list(sheet.iter(f"{MAIN}f")), "a formula"
    assert not list(sheet.iter(f"{MAIN}hyperlink"))
    return {cell.get("r"): (cell.get("t"), "".join(cell.itertext())) for cell in sheet.iter(f"{MAIN}c")}


def test_xlsx(tmp_path):
    found = cells(written(result(ODD), "xlsx", tmp_path))
    assert [found[f"{column}1"] for column in "ABCDEF"] == [
        ("inlineStr", name) for name in ("n", "x", "text", "list", "struct", "bytes")
    ]
    assert (found["A2"], found["B2"]) == ((None, "1"), (None, "0.1234567"))
    assert [found[f"{column}2"][1] for column in "CDEF"] == ["a|b", "[1, 2]", '{"k": "é"}', "<2 bytes>"]
    assert found["C3"] == ("inlineStr", 'two\nlines, "quoted" 漢')
    assert found["B3"] == ("inlineStr", "NaN")


def test_text_in_xlsx_is_never_a_formula_a_link_or_a_number(tmp_path):
    texts = ["=1+1", "{=1+1}", "+1", "-1", "@SUM(A1)", "http://example.com", "007", "\t=1"]
    data = written(pa.table({"=a": texts}), "xlsx", tmp_path)
    found = cells(data)
    assert [found[f"A{row}"] for row in range(1, 8)] == [("inlineStr", text) for text in ["=a", *texts[:6]]]
    assert found["A8"] == ("inlineStr", "007")
    assert {kind for kind, _ in found.values()} == {"inlineStr"}


def test_numbers_that_xlsx_would_round_are_text(tmp_path):
    table = result(
        "SELECT 123456789012345 AS a, 1234567890123456 AS b, 1.50::DECIMAL(5,2) AS c, sum(2) AS d, true AS e"
    )
    found = cells(written(table, "xlsx", tmp_path))
    assert [found[f"{column}2"] for column in "ABCDE"] == [
        (None, "123456789012345"),
        ("inlineStr", "1234567890123456"),
        (None, "1.5"),
        (None, "2"),
        ("b", "1"),
    ]


def test_xlsx_refuses_what_excel_cannot_hold(tmp_path):
    with pytest.raises(InvalidValue, match="row 2, column 'a' has 32,768 characters; a cell of xlsx holds 32,767"):
        formats.write_file(pa.table({"a": ["", "x" * (MAX_CHARACTERS + 1)]}), "xlsx", tmp_path / "x.xlsx")
    with pytest.raises(InvalidValue, match="xlsx holds 1,048,575 and 16,384: write csv or parquet"):
        formats.write_file(pa.table({"a": pa.nulls(1_048_576)}), "xlsx", tmp_path / "x.xlsx")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("form", formats.FORMATS)
def test_no_rows(form, tmp_path):
    assert bool(written(result("SELECT 1 AS a, 'x' AS b WHERE false"), form, tmp_path)) == (form != "nl")


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("before")
    file.chmod(0o640)
    with pytest.raises(InvalidValue, match="xlsx holds"):  # once the new file is begun
        formats.write_file(pa.table({"a": pa.nulls(1_048_576)}), "xlsx", file)
    assert (file.read_text(), os.listdir(tmp_path)) == ("before", ["x.csv"])
    formats.write_file(pa.table({"a": [1]}), "csv", file)
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("a\n1\n", 0o640)


def test_what_a_link_points_to_is_replaced(tmp_path):
    (tmp_path / "target.csv").write_text("before")
    (tmp_path / "link.csv").symlink_to("target.csv")
    formats.write_file(pa.table({"a": [1]}), "csv", tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "target.csv").read_text() == "a\n1\n"


def test_a_file_that_cannot_be_written():
    with pytest.raises(StorageError, match=r"/proc/x\.csv could not be written, and is as it was before"):
        formats.write_file(pa.table({"a": [1]}), "csv", formats.Path("/proc/x.csv"))


SELECT = "SELECT 1 AS a, '=x' AS b"


@pytest.mark.parametrize("suffix", formats.SUFFIXES)
def test_the_suffix_says_the_format(toy, tmp_path, suffix):
    done = run("sql", toy.path, SELECT, "--output", tmp_path / f"x{suffix.upper()}")
    assert (done.stdout, done.stderr) == ("", f"wrote {tmp_path}/x{suffix.upper()}: 1 row\n")
    start = (tmp_path / f"x{suffix.upper()}").read_bytes().lstrip()[:4]
    form = formats.SUFFIXES[suffix]
    starts = {
        "csv": b"a,b\n",
        "json": b"[\n  ",
        "nl": b'{"a"',
        "markdown": b"| a ",
        "parquet": b"PAR1",
        "xlsx": b"PK\x03\x04",
    }
    assert start == starts.get(form, b"a  b")


def test_a_format_that_is_named_goes_before_the_suffix(toy, tmp_path):
    run("sql", toy.path, SELECT, "-o", tmp_path / "x.csv", "--format", "nl")
    assert json.loads((tmp_path / "x.csv").read_text()) == {"a": 1, "b": "=x"}
    run("sql", toy.path, SELECT, "-o", tmp_path / "rows", "--csv")
    assert (tmp_path / "rows").read_text() == "a,b\n1,=x\n"


@pytest.mark.parametrize("form", ["json", "nl", "csv", "table"])
def test_shorthands(toy, form):
    assert run("sql", toy.path, SELECT, f"--{form}").stdout == run("sql", toy.path, SELECT, "--format", form).stdout


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--format", "yaml"], 2, "'yaml' is not one of 'table', 'json', 'nl', 'csv', 'markdown', 'parquet', 'xlsx'"),
        (["-o", "x.yaml"], 1, "x.yaml has the suffix '.yaml', which names no format; use one of .csv, "),
        (["-o", "x"], 1, "x has the suffix '', which names no format"),
        (["-o", "none/x.csv"], 1, "no folder none to write x.csv into; make it first"),
        (["-o", "folder.csv"], 1, "folder.csv is a folder; name a file"),
        (["-o", "/dev/null", "--csv"], 1, "/dev/null is no regular file; name a file"),
        (["-o", "/proc/x.csv"], 1, "/proc/x.csv could not be written"),
        (["-o", "toy.attrdb/x.csv"], 1, "toy.attrdb/x.csv lies inside the database"),
        (["--format", "xlsx"], 1, "xlsx is written to a file only; name a file with --output"),
    ],
)
def test_output_that_cannot_be(toy, tmp_path, monkeypatch, words, code, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    done = run("sql", "toy.attrdb", SELECT, *words, code=code)
    assert says in done.stderr
    assert done.stdout == ""
    assert sorted(os.listdir(tmp_path)) == ["folder.csv", "toy.attrdb"]


def test_a_failed_statement_leaves_the_earlier_file(toy, tmp_path):
    (tmp_path / "x.csv").write_text("before")
    run("sql", toy.path, "SELECT nothing", "-o", tmp_path / "x.csv", code=1)
    assert (tmp_path / "x.csv").read_text() == "before"


def test_parquet_goes_through_a_pipe_and_not_to_a_terminal(toy):
    words = [sys.executable, "-m", "attrdb", "sql", str(toy.path), SELECT, "--format", "parquet"]
    piped = subprocess.run(words, capture_output=True, check=True).stdout
    assert pq.read_table(io.BytesIO(piped)).to_pylist() == [{"a": 1, "b": "=x"}]
    ours, theirs = os.openpty()
    done = subprocess.run(words, stdout=theirs, stderr=subprocess.PIPE, text=True, check=False)
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 1
    assert "parquet is binary and standard output is a terminal" in done.stderr


def test_every_command_that_prints_rows_writes_files(toy, tmp_path):
    for words in (["attribute", toy.path, "m/0/1"], ["query", toy.path, "model_counts"], ["models", "list", toy.path]):
        run(*words, "-o", tmp_path / "x.csv")
        assert (tmp_path / "x.csv").read_text()
    run("queries", "list", "-o", tmp_path / "x.txt")
    assert "recall_at_k" in (tmp_path / "x.txt").read_text()
    done = run("attribute", toy.path, "--samples", "true", "--csv", code=2)
    assert "--samples stores its rows and prints none; leave --format and --output out" in done.stderr


def test_xlsx_without_its_library(toy, tmp_path):
    code = f"""
import sys
sys.modules['xlsxwriter'] = None
import click.testing, attrdb.cli as c
words = ['sql', {str(toy.path)!r}, 'SELECT 1', '--output', {str(tmp_path / "x.xlsx")!r}]
print(click.testing.CliRunner().invoke(c.main, words).output)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Error: xlsx needs XlsxWriter, which is not installed: pip install 'attrdb[xlsx]'"


def test_queries_list_is_grouped_and_narrow():
    lines = run("queries", "list").stdout.splitlines()
    groups = [line for line in lines if re.fullmatch(r"\w+:", line)]
    assert groups == [
        "attribution:",
        "checks:",
        "health:",
        "metrics:",
        "monitoring:",
        "provenance:",
        "training:",
        "truth:",
    ]
    assert max(map(len, lines)) <= 80
    [row] = [row for row in json.loads(run("queries", "list", "--json").stdout) if row["name"] == "recall_at_k"]
    assert row.keys() == {"name", "group", "parameters", "summary"}
    assert row["summary"].endswith("Without ranks there is no row.")
