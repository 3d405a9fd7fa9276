"""attrdb inside an application: threads, pinned versions, read-only, a typed API, and the page that says so."""

import inspect
import re
import threading
import time
import tomllib
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import TOY, rows
from test_sql import ranks

import attrdb
from attrdb import sql
from attrdb.database import Database
from attrdb.errors import InvalidValue, NotFound
from attrdb.store.methods import similarity_row
from attrdb.store.schema import TABLES
from attrdb.store.writer import Writer

PAGE = (Path(__file__).parent.parent / "docs" / "embedding.md").read_text(encoding="utf-8")
BY_ROLE = "SELECT role, count(*) AS n FROM images WHERE source IS DISTINCT FROM 'later' GROUP BY role ORDER BY role"
N_THREADS = 8


# --- threads -------------------------------------------------------------------------------------------------------


def answers(db):
    """What does not change while pictures are appended that resemble nothing."""
    return {
        "sql": db.sql(BY_ROLE).to_pylist(),
        "macro": db.sql("SELECT image_id, influence FROM attribute('m/0/2', k := 2)").to_pylist(),
        "query": db.query("influence", image_id="m/0/1").to_pylist(),
        "attribute": db.attribute("m/0/1", k=3).to_pylist(),
        "feature": db.feature("m/0/2").tolist(),
    }


def test_threads_share_a_database_while_others_append(toy):
    shared, expected, stop = attrdb.open(toy.path, read_only=True), answers(toy), threading.Event()
    wrong, rounds, versions = [], [0] * N_THREADS, set()

    def ask(number):
        try:
            while not stop.is_set() or rounds[number] < 2:
                found = answers(shared)
                if found != expected:
                    wrong.append(found)
                result = shared.sql("SELECT count(*) AS n FROM images")
                versions.add((int(result.schema.metadata[b"attrdb.images_version"]), result["n"][0].as_py()))
                rounds[number] += 1
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(N_THREADS)]
    for thread in threads:
        thread.start()
    for number in range(8):
        far = rows([(f"later/{number}", "pretraining", None, 180)], source=["later"])
        toy.writer.append_images(far)
        shared.refresh()
    stop.set()
    for thread in threads:
        thread.join(120)
    assert not wrong, wrong[0]
    assert min(rounds) >= 2
    assert shared.version == toy.version
    # a result has the rows of the version that it names: a picture a version
    assert {n - version for version, n in versions} == {7 + 8 - toy.version}


# --- read-only -----------------------------------------------------------------------------------------------------


WRITES = {
    "add_encoder": lambda db: db.writer.add_encoder("other:3", 3, {}, "none"),
    "append_images": lambda db: db.writer.append_images(rows([("x", "pretraining", None, 1)])),
    "append_bulk": lambda db: db.writer.append_bulk(rows([("x", "pretraining", None, 1)])),
    "append_model": lambda db: db.writer.append_model(rows([("n/0/1", "sample", "n", 1)]), {"model_id": "n"}),
    "replace_exemplar_ranks": lambda db: db.writer.replace_exemplar_ranks(
        ranks([("m/0/1", "m/e0", 1)]), "toy_2", "own"
    ),
    "replace_calibrations": lambda db: db.writer.replace_calibrations(
        [{"calibration_id": "toy_2", "method_id": "toy_2", "tau": 0.1, "lam": 0.1}], "toy_2"
    ),
    "append_rows": lambda db: db.writer.append_rows(
        "attributions", TABLES["attributions"].empty_table(), db.snapshot, "true"
    ),
    "add_method": lambda db: db.writer.add_method(similarity_row("toy_2")),
    "add_mapper": lambda db: db.writer.add_mapper({"mapper_id": "n", "encoder_id": "toy_2", "form": "gain"}),
    "upsert": lambda db: db.writer.upsert("models", [{"model_id": "n"}]),
    "update": lambda db: db.writer.update("models", "true", {"split": "val"}),
    "delete": lambda db: db.writer.delete("models", "true"),
    "delete_matching": lambda db: db.writer.delete_matching("models", pa.table({"model_id": ["m"]})),
    "exclusive": lambda db: db.writer.exclusive().__enter__(),
    "remove": lambda db: db.remove(where="true"),
    "writing": lambda db: db.writer.writing().__enter__(),
    "commit": lambda db: db.writer.commit(lambda: None),
}
READS = {
    "absent", "attribute", "bound_query", "check_encoder", "encoder_id", "feature", "features", "images", "mapper", "query",
    "refresh", "sql", "status", "stream_query",
}  # fmt: skip


def public_methods():
    return {
        name
        for kind in (Database, Writer)
        for name, value in vars(kind).items()
        if not name.startswith("_") and inspect.isfunction(value)
    }


def test_every_method_is_known_to_read_or_to_write():
    assert public_methods() == READS | set(WRITES)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_read_only_database_refuses_to_write(toy, write):
    for db in (attrdb.open(toy.path, read_only=True), attrdb.open(toy.path, at=toy.version)):
        before = {name: table.version for name, table in attrdb.open(toy.path).snapshot.tables.items()}
        with pytest.raises(InvalidValue, match="was opened read-only"):
            write(db)
        assert {name: table.version for name, table in attrdb.open(toy.path).snapshot.tables.items()} == before


def test_a_registered_encoder_may_be_checked_read_only(toy):
    assert attrdb.open(toy.path, read_only=True).writer.check_encoder(**TOY)


# --- older moments -------------------------------------------------------------------------------------------------


def n_images(db):
    return db.sql("SELECT count(*) AS n FROM images")["n"][0].as_py()


@pytest.fixture
def grown(toy):
    """The toy database, the moment between its first model and one more picture, and the versions at both."""
    first = toy.version
    time.sleep(0.01)
    moment = datetime.now(UTC)
    time.sleep(0.01)
    toy.writer.append_images(pa.table({"image_id": ["later"], "role": ["pretraining"]}))
    return toy, first, moment


def test_a_version_by_number_and_as_text(grown):
    toy, first, _ = grown
    for at in (first, str(first)):
        then = attrdb.open(toy.path, at=at)
        assert (then.version, n_images(then)) == (first, 7)
        assert then.status()["version"] == first
        then.refresh()
        assert then.version == first
        for answer in (then.query("model_coverage"), then.attribute("m/0/1")):
            assert answer.schema.metadata[b"attrdb.images_version"] == str(first).encode()
    assert n_images(attrdb.open(toy.path, at=toy.version)) == 8


def test_a_time_in_every_form(grown):
    toy, first, moment = grown
    elsewhere = moment.astimezone(datetime.now().astimezone().tzinfo)
    naive = moment.replace(tzinfo=None)
    for at in (moment, elsewhere, naive, moment.isoformat(), naive.isoformat(sep=" "), f"{naive.isoformat()}Z"):
        then = attrdb.open(toy.path, at=at)
        assert (then.version, n_images(then)) == (first, 7), at
    assert n_images(attrdb.open(toy.path, at=datetime.now(UTC) + timedelta(days=1))) == 8


def test_a_moment_that_is_not_kept(grown):
    toy, _, _ = grown
    for at in (99, "99", 0):
        with pytest.raises(NotFound, match=rf"no version {at}; it keeps \d+ versions, 1 to {toy.version}"):
            attrdb.open(toy.path, at=at)
    for at in ("2001-01-01", datetime(2001, 1, 1), "2001-01-01T00:00:00+02:00"):
        with pytest.raises(NotFound, match=r"no version as old as .*; its oldest is of"):
            attrdb.open(toy.path, at=at)
    with pytest.raises(InvalidValue, match="'yesterday' is neither a version nor a time such as"):
        attrdb.open(toy.path, at="yesterday")


def test_an_older_moment_shows_what_was_whole_then(toy):
    before = toy.version
    toy.writer.append_images(rows([("n/0/1", "sample", "n", 5)]))
    assert n_images(attrdb.open(toy.path)) == 7
    toy.writer.upsert("models", [{"model_id": "n", "kind": "style", "n_exemplars": 0, "n_samples": 1}])
    assert n_images(attrdb.open(toy.path)) == 8
    assert n_images(attrdb.open(toy.path, at=before)) == 7


# --- the API -------------------------------------------------------------------------------------------------------


def test_the_package_is_typed():
    assert files("attrdb").joinpath("py.typed").is_file()
    pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '"py.typed"' in pyproject


def test_a_checkout_holds_the_whole_package_where_type_checkers_look():
    root = Path(__file__).parent.parent
    packages = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert [name for name in packages if not root.joinpath(*name.split("."), "__init__.py").is_file()] == []
    trees = [root / "attrdb", *(root / tree for tree in ("ingest", "queries", "training"))]
    rooms = {folder.parent for tree in trees for folder in tree.rglob("__init__.py")}
    names = {".".join(("attrdb", *room.parts[len(root.parts) :])).replace("attrdb.attrdb", "attrdb") for room in rooms}
    assert names - set(packages) == {
        "attrdb.training.icon_sd"
    }  # which makes the base model, and stays out of the wheel


@pytest.mark.parametrize("name", sorted(public_methods() | {"__init__"}))
def test_a_method_is_annotated(name):
    signature = inspect.signature(vars(Database).get(name) or vars(Writer)[name])
    assert name == "__init__" or signature.return_annotation is not inspect.Signature.empty
    untyped = [one.name for one in signature.parameters.values() if one.annotation is inspect.Parameter.empty]
    assert untyped == ["self"]


@pytest.mark.parametrize("function", [attrdb.open, attrdb.create])
def test_a_function_is_annotated(function):
    signature = inspect.signature(function)
    assert signature.return_annotation == "Database"
    assert all(one.annotation is not inspect.Parameter.empty for one in signature.parameters.values())


@pytest.mark.parametrize("name", [n for n, v in vars(Database).items() if isinstance(v, property)])
def test_a_property_is_annotated(name):
    assert inspect.signature(vars(Database)[name].fget).return_annotation is not inspect.Signature.empty


def test_the_page_names_the_calls_as_they_are():
    for call, parameters in re.findall(r"^\| `(?:attrdb|db)\.(\w+)\((.*?)\)` \|", PAGE, re.MULTILINE):
        signature = inspect.signature(attrdb.open if call == "open" else getattr(Database, call))
        said = [parameter.partition("=") for parameter in parameters.split(", ") if parameter]
        known = [one for one in signature.parameters.values() if one.name != "self"]
        assert [name.strip("*") for name, _, _ in said] == [one.name for one in known], call
        for (name, _, default), one in zip(said, known, strict=True):
            known_default = getattr(one.default, "__name__", str(one.default))  # of a function, its name
            assert default == ("" if one.default is one.empty else known_default), (call, name)


def test_the_page_runs(toy, monkeypatch, capsys):
    toy.path.rename(toy.path.with_name("my.attrdb"))
    monkeypatch.chdir(toy.path.parent)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "embedding.md", "exec"), names)
    said = capsys.readouterr().out
    assert "1 m/e0 None" in said
    assert "{'m/0/1': 'm/e0', 'm/0/2': 'm/e40'}" in said
    assert "no image 'nobody'" in said


def test_a_connection_is_used_again_and_forgets_what_it_was_given(toy):
    """To make one takes 20 ms; two statements one after the other share one, threads have their own."""
    with sql.connect(toy.snapshot) as first:
        pass
    with sql.connect(toy.snapshot) as second, sql.connect(toy.snapshot) as third:
        assert second is first
        assert third is not first
    toy.sql("FROM contracts", relations={"contracts": pa.table({"a": [1]})})
    with pytest.raises(attrdb.QueryRefused, match="contracts does not exist"):
        toy.sql("FROM contracts")
    with pytest.raises(attrdb.QueryRefused):
        toy.sql("SELECT nothing")
    assert toy.sql("SELECT count(*) AS n FROM images")["n"][0].as_py() == 7
