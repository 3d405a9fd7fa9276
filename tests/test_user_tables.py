"""Tables of the caller's own beside those of the database: --with NAME=FILE, and relations= in Python."""

import gzip
import json

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from attrdb.cli import main
from attrdb.errors import InvalidValue, NotFound, QueryRefused

CONTRACTS = pa.table({"model_id": ["m", "n"], "rate": [0.5, 0.25]})
JOIN = (
    "SELECT samples.image_id, contracts.rate FROM samples JOIN contracts ON contracts.model_id = samples.model_id "
    "ORDER BY image_id"
)
JOINED = [{"image_id": "m/0/1", "rate": 0.5}, {"image_id": "m/0/2", "rate": 0.5}]


def run(*words, code=0, **settings):
    result = CliRunner().invoke(main, [str(word) for word in words], **settings)
    assert result.exit_code == code, result.output
    return result


def write_arrow_stream(table, file):
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_lines(table, file):
    file.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))


def write_csv(separator=",", encoding="utf-8", opening=open):
    def write(table, file):
        lines = [separator.join(table.column_names)]
        lines += [separator.join(map(str, row.values())) for row in table.to_pylist()]
        with opening(file, "wt", encoding=encoding) as stream:
            stream.write("\n".join(lines) + "\n")

    return write


WRITERS = {
    "x.csv": write_csv(),
    "SEMICOLON.CSV": write_csv(";"),
    "x.tsv": write_csv("\t"),
    "bom.csv": write_csv(encoding="utf-8-sig"),
    "utf16.csv": write_csv(encoding="utf-16"),
    "x.csv.gz": write_csv(opening=gzip.open),
    "[x]*? .csv": write_csv(),  # no pattern: this very file
    "x.parquet": pq.write_table,
    "role=exemplar.parquet": pq.write_table,
    "x.arrow": write_arrow_stream,
    "file.arrow": pyarrow.feather.write_feather,
    "x.feather": pyarrow.feather.write_feather,
    "x.jsonl": write_lines,
    "x.ndjson": write_lines,
    "x.json": lambda table, file: file.write_text(json.dumps(table.to_pylist())),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_joined(toy, tmp_path, name):
    WRITERS[name](CONTRACTS, tmp_path / name)
    done = run("sql", toy.path, JOIN, "--with", f"contracts={tmp_path / name}", "--nl")
    assert [json.loads(line) for line in done.stdout.splitlines()] == JOINED
    assert toy.sql(JOIN, relations={"contracts": str(tmp_path / name)}).to_pylist() == JOINED


def test_several_files_of_one_statement(toy, tmp_path):
    (tmp_path / "a.csv").write_text("x\n1\n")
    (tmp_path / "b.csv").write_text("y\n2\n")
    words = ["--with", f"a={tmp_path / 'a.csv'}", "--with", f"b={tmp_path / 'b.csv'}", "--csv"]
    assert run("sql", toy.path, "SELECT x, y FROM a, b", *words).stdout == "x,y\n1,2\n"


class Frame:
    """A data frame of another library: it shows its rows by the Arrow protocol."""

    def __init__(self, table):
        self.table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)


@pytest.mark.parametrize(
    "kind",
    [lambda table: table, Frame, lambda table: table.to_pydict(), lambda table: table.to_reader()],
    ids=["table", "frame", "dictionary", "reader"],
)
def test_what_arrow_can_read_is_a_relation(toy, kind):
    assert toy.sql(JOIN, relations={"contracts": kind(CONTRACTS)}).to_pylist() == JOINED


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_data_frame_is_a_relation(toy, library):
    frame = pytest.importorskip(library).DataFrame(CONTRACTS.to_pydict())
    assert toy.sql(JOIN, relations={"contracts": frame}).to_pylist() == JOINED


def test_relations_are_of_one_call_only(toy):
    toy.sql(JOIN, relations={"contracts": CONTRACTS})
    with pytest.raises(QueryRefused, match="Table with name contracts does not exist"):
        toy.sql(JOIN)


def test_a_query_file_reads_them(toy, tmp_path):
    (tmp_path / "rates.sql").write_text(
        "-- Rates.\n-- source our own\n-- grain one row per sample\n-- param $least DOUBLE = 0 least rate\n"
        "-- reads samples, contracts\n-- column image_id VARCHAR\n"
        "SELECT image_id FROM samples JOIN contracts USING (model_id) WHERE rate >= $least ORDER BY image_id"
    )
    (tmp_path / "c.csv").write_text("model_id,rate\nm,0.5\n")
    words = ["query", toy.path, "rates", "--queries", tmp_path, "--with", f"contracts={tmp_path / 'c.csv'}", "--csv"]
    assert run(*words).stdout == "image_id\nm/0/1\nm/0/2\n"
    assert run(*words, "-p", "least=0.6").stdout == "image_id\n"


def test_the_shell_reads_them(toy, tmp_path):
    (tmp_path / "c.csv").write_text("model_id,rate\nm,0.5\n")
    words = ["shell", toy.path, "--with", f"contracts={tmp_path / 'c.csv'}", "--csv"]
    done = run(*words, input="SELECT rate FROM contracts;\n.tables\n.schema contracts\n")
    assert done.stdout.startswith("rate\n0.5\n")
    assert "your tables:\n  contracts " in done.stdout
    assert "rate      DOUBLE" in done.stdout
    done = run(*words[:3], f"images={tmp_path / 'c.csv'}", input="SELECT 1;", code=1)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("images", "'images' is a view of the database already; use another name"),
        ("Samples", "'Samples' is a view of the database already"),
        ("features", "a view of"),
        ("methods", "a view of"),
        ("unfinished_models", "a view of"),
        ("attribute", "'attribute' is a macro of the database already"),
        ("bootstrap_draws", "a macro of"),
        ("_images", "'_images' cannot name a table; use letters, digits and underscores, with a letter first"),
        ("a b", "cannot name a table"),
        ("a.b", "cannot name a table"),
        ('x"; DROP', "cannot name a table"),
        ("1a", "cannot name a table"),
        ("", "cannot name a table"),
        ("order", "'order' cannot name a table, because it is a word of SQL"),
        ("SELECT", "because it is a word of SQL"),
    ],
)
def test_names_that_are_refused(toy, name, says):
    with pytest.raises(InvalidValue, match=says):
        toy.sql("SELECT 1", relations={name: CONTRACTS})


def test_names_are_the_same_in_upper_and_lower_case(toy):
    with pytest.raises(InvalidValue, match="'A' names two tables"):
        toy.sql("SELECT 1", relations={"a": CONTRACTS, "A": CONTRACTS})
    assert toy.sql("SELECT count(*) AS n FROM verträge", relations={"verträge": CONTRACTS})["n"].to_pylist() == [2]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.csv", None, "no file .*none.csv"),
        ("x.xlsx", b"PK", r"has the suffix '.xlsx'; a table of your own is a file with one of .csv, .tsv, .json"),
        ("x", b"a\n1\n", "has the suffix ''"),
        ("x.gz", b"a\n1\n", "has the suffix '.gz'"),
        ("x.csv", b"", "is empty; it needs at least the names of its columns"),
        ("x.csv", b"a,b\n1,2\n3\n", "cannot be read as CSV: line 3 has 1 fields, the first line has 2 names"),
        ("x.tsv", b"a\tb\n1\t2\n3\t4\t5\n", "line 3 has 3 fields, the first line has 2 names"),
        ("x.csv", bytes(range(256)) * 4, "is not UTF-8 text; save it as UTF-8"),
        ("x.parquet", b"hello", "cannot be read as PARQUET: "),
        ("x.arrow", b"hello", "cannot be read as ARROW: "),
        ("x.feather", b"", "is empty"),
        ("x.jsonl", b'{"a": 1}\n{"a": ', "cannot be read as JSONL: Malformed JSON in file .*x.jsonl"),
        ("x.json", b"3", "cannot be read as JSON: "),
    ],
)
def test_files_that_are_refused(toy, tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((InvalidValue, NotFound), match=says) as raised:
        toy.sql("SELECT 1", relations={"t": tmp_path / name})
    assert "attrdb-" not in str(raised.value)  # no name of a file that attrdb made


def test_a_folder_is_no_table(toy, tmp_path):
    (tmp_path / "x.csv").mkdir()
    done = run("sql", toy.path, "SELECT 1", "--with", f"t={tmp_path / 'x.csv'}", code=1)
    assert "x.csv is a folder; name a file" in done.stderr


@pytest.mark.parametrize("value", [3, None, object(), [[1, 2], [3]]])
def test_what_is_no_table_is_refused(toy, value):
    with pytest.raises(InvalidValue, match=r"relation 't' is a \w+, which is no table: .*; give an Arrow table"):
        toy.sql("SELECT 1", relations={"t": value})


@pytest.mark.parametrize("word", ["contracts", "=x.csv", "contracts=", ""])
def test_the_form_of_the_option(toy, word):
    done = run("sql", toy.path, "SELECT 1", "--with", word, code=2)
    assert f"{word!r} is not of the form NAME=FILE" in done.stderr


def test_a_name_for_two_files(toy, tmp_path):
    done = run("sql", toy.path, "SELECT 1", "--with", "a=x.csv", "--with", "a=y.csv", code=2)
    assert "'a' names two files" in done.stderr


def test_the_statement_itself_opens_no_file(toy, tmp_path):
    (tmp_path / "c.csv").write_text("a\n1\n")
    for source in (f"read_csv('{tmp_path}/c.csv')", f"'{tmp_path}/c.csv'", f"glob('{tmp_path}/*')"):
        done = run("sql", toy.path, f"SELECT * FROM {source}", "--with", f"c={tmp_path / 'c.csv'}", code=1)
        assert "not files or the network" in done.stderr
        assert "a file of yours is read if the command names it: --with NAME=FILE" in done.stderr


def test_types_are_guessed_from_all_rows(toy, tmp_path):
    (tmp_path / "c.csv").write_text("a\n" + "1\n" * 30_000 + "x\n")
    assert toy.sql("SELECT max(a) AS a FROM c", relations={"c": tmp_path / "c.csv"})["a"].to_pylist() == ["x"]
