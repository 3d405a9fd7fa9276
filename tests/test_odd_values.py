"""Values that Python, JSON or Arrow have no type for, in every output format."""

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import attrdb
from attrdb import formats
from attrdb.cli import main
from attrdb.errors import InvalidValue
from attrdb.formats.text import rows

# SQL, and what is shown. A time is DuckDB's own text of it, so that both say the same.
ODD = {
    "'infinity'::TIMESTAMP": "infinity",
    "'-infinity'::DATE": "-infinity",
    "'infinity'::TIMESTAMPTZ": "infinity",
    "'infinity'::TIMESTAMP_S": "infinity",
    "'-infinity'::TIMESTAMP_NS": "-infinity",
    "TIMESTAMP '0001-01-01 (BC)'": "0001-01-01 (BC) 00:00:00",
    "TIMESTAMP_S '0044-03-15 (BC) 12:00:00'": "0044-03-15 (BC) 12:00:00",
    "DATE '4714-11-24 (BC)'": "4714-11-24 (BC)",
    "DATE '20000-01-31'": "20000-01-31",
    "TIMESTAMP_MS '290000-01-01 00:00:00.25'": "290000-01-01 00:00:00.25",
    "TIMESTAMPTZ '10000-01-01 01:00:00+00'": "10000-01-01 01:00:00+00:00",
    "TIMESTAMP_NS '2020-01-01 00:00:00.123456789'": "2020-01-01 00:00:00.123456789",
    "TIMESTAMP '2020-01-01 01:02:03'": "2020-01-01 01:02:03",
    "TIME '24:00:00'": "24:00:00",
    "TIMETZ '01:02:03+05'": "01:02:03+05",
    "INTERVAL '14 months 3 days 4.5 seconds'": "1 year 2 months 3 days 00:00:04.5",
    "INTERVAL '-1 month'": "-1 month",
    "INTERVAL '-90 minutes'": "-01:30:00",
    "INTERVAL '0 s'": "00:00:00",
    "340282366920938463463374607431768211455::UHUGEINT": "340282366920938463463374607431768211455",
    "'101'::BIT": "101",
    "'nan'::DOUBLE": "NaN",
    "'-inf'::FLOAT": "-Infinity",
    "'inf'::DOUBLE": "Infinity",
    "[TIMESTAMP '0044-03-15 (BC)', NULL]": ["0044-03-15 (BC) 00:00:00", None],
    "[TIMESTAMP 'infinity']::TIMESTAMP[1]": ["infinity"],
    "{'a b': DATE 'infinity', 'UHUGEINT': 1}": {"a b": "infinity", "UHUGEINT": 1},
    "{'a': [TIMESTAMP_NS '2020-01-01 00:00:00']}": {"a": ["2020-01-01 00:00:00"]},
    "[340282366920938463463374607431768211455::UHUGEINT]": ["340282366920938463463374607431768211455"],
    "{'x \"y\"': 1::UHUGEINT}": {'x "y"': "1"},
    "MAP {'k': 1}": [["k", 1]],
    "MAP {TIMESTAMP 'infinity': 'nan'::DOUBLE}": [["infinity", "NaN"]],
    "MAP {1::UHUGEINT: '1'::BIT}": [["1", "1"]],
    "union_value(k := DATE '20000-01-01')": "20000-01-01",
    "NULL::TIMESTAMP": None,
    "NULL::INTERVAL": None,
}
NOT_IN_PARQUET = {
    one
    for one in ODD
    if "INTERVAL" in one or "union" in one or one == "'infinity'::TIMESTAMP_S"  # not in milliseconds
}


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    return attrdb.create(tmp_path_factory.mktemp("odd") / "some.attrdb")


@pytest.mark.parametrize("expression", ODD)
def test_an_odd_value_is_shown(db, expression):
    assert list(rows(db.sql(f"SELECT {expression} AS v"))) == [{"v": ODD[expression]}]


@pytest.mark.parametrize("form", formats.FORMATS)
@pytest.mark.parametrize("expression", ODD)
def test_every_format_holds_an_odd_value(db, form, expression, tmp_path):
    table = db.sql(f"SELECT {expression} AS v, 1 AS n")
    if form == "parquet" and expression in NOT_IN_PARQUET:
        with pytest.raises(InvalidValue, match="cast the column"):
            formats.write_file(table, form, tmp_path / "rows")
        return
    formats.write_file(table, form, tmp_path / "rows")
    content = (tmp_path / "rows").read_bytes()
    if form == "parquet":
        assert pq.read_table(io.BytesIO(content)).num_rows == 1
    elif form in ("nl", "json"):
        [row] = [json.loads(content)] if form == "nl" else json.loads(content)
        assert row == {"v": ODD[expression], "n": 1}
    elif form == "csv" and isinstance(ODD[expression], str):
        assert list(csv.reader(io.StringIO(content.decode())))[1] == [ODD[expression], "1"]


def test_odd_values_on_the_command_line(db):
    columns = ", ".join(f"{expression} AS c{number}" for number, expression in enumerate(ODD))
    for form in ("table", "json", "nl", "csv", "markdown"):
        result = CliRunner().invoke(main, ["sql", str(db.path), f"SELECT {columns}", "--format", form])
        assert result.exit_code == 0, result.output


def test_a_name_of_a_column_may_be_anything(db):
    table = db.sql('SELECT 1::UHUGEINT AS "a ""b"", c", 2 AS "#1"')
    assert table.to_pylist() == [{'a "b", c': "1", "#1": 2}]


def test_the_order_of_rows_stays_where_a_column_becomes_text(db):
    found = db.sql("SELECT i::UHUGEINT AS i FROM range(5000) AS t(i) ORDER BY hash(i)")["i"].to_pylist()
    assert found == [str(i) for i in db.sql("SELECT i FROM range(5000) AS t(i) ORDER BY hash(i)")["i"].to_pylist()]


def test_ordinary_times_are_as_before():
    table = pa.table({"t": pa.array([0, 1_500_000], pa.timestamp("us", tz="UTC")), "d": pa.array([0, 1], pa.date32())})
    assert list(rows(table)) == [
        {"t": "1970-01-01 00:00:00+00:00", "d": "1970-01-01"},
        {"t": "1970-01-01 00:00:01.500000+00:00", "d": "1970-01-02"},
    ]
