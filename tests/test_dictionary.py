"""The data dictionary: complete, and what the program would write today."""

import importlib.util
import re
from pathlib import Path

import lance
import pytest

from attrdb import queries, sql
from attrdb.sql.relations import MACROS, STORED, VALUE_MACROS
from attrdb.store.dictionary import DICTIONARY

DOCS = Path(__file__).parent.parent / "docs"
TEXT = (DOCS / "dictionary.md").read_text(encoding="utf-8")


def section(name):
    [found] = re.findall(rf"^### {name}\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL)
    return found


def first_cells(text):
    return re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)


def test_the_page_is_what_the_program_writes():
    spec = importlib.util.spec_from_file_location("dictionary_page", DOCS / "dictionary.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "stale: run make docs"


def test_every_table_on_disk_is_there_column_by_column(empty):
    tables = sorted(path.stem for path in empty.path.glob("*.lance"))
    assert tables == sorted(DICTIONARY)
    for name in tables:
        schema = lance.dataset(str(empty.path / f"{name}.lance")).schema
        assert first_cells(section(name)) == schema.names
        for field in schema:
            [line] = re.findall(rf"^\| `{field.name}` \|.*", section(name), re.MULTILINE)
            _, _, arrow, _, null, meaning, _ = (cell.strip() for cell in re.split(r"(?<!\\)\|", line))
            assert arrow == str(field.type)
            assert (null == "yes") == field.nullable
            assert len(meaning) > 3


def test_every_view_and_macro_that_duckdb_shows_is_there(empty):
    with sql.connect(empty.snapshot) as connection:
        views = {row[0] for row in connection.sql("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()}
        macros = connection.sql(
            "SELECT function_name, parameters FROM duckdb_functions() WHERE function_type LIKE '%macro' AND NOT internal"
        ).fetchall()
        assert {"samples", "features", "unfinished_models"} <= views
        of_images = [row[0] for row in connection.sql("DESCRIBE images").fetchall()]
        for view in views:
            columns = [row[0] for row in connection.sql(f"DESCRIBE {view}").fetchall()]
            title = f"{view} in SQL" if view in STORED else view.removeprefix("_")  # _x is the table behind the view x
            assert first_cells(section(title)) == (columns if columns != of_images or view == "images" else [])
    assert {name for name, _ in macros} == {*VALUE_MACROS, *MACROS}
    for name, parameters in macros:
        [call] = re.findall(rf"^    {name}\((.*)\)$", section(name), re.MULTILINE)
        assert [argument.split(" ")[0] for argument in call.split(", ")] == list(parameters)


@pytest.mark.parametrize("name", sorted(queries.own_queries()))
def test_every_named_query_is_there(name):
    query = queries.load(name)
    [line] = [line for line in section(query.group).splitlines() if line.startswith(f"| `{name}` |")]
    assert query.summary.replace("|", "\\|") in line
    for parameter in query.parameters:
        assert f"`{parameter.name}` {parameter.type}" in line
