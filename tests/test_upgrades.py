"""Upgrades, from the oldest shape: tests/fixtures/schema-1.attrdb was written by the first attrdb (see `toy` in conftest)."""

import shutil
from pathlib import Path

import lance
import pyarrow as pa
import pytest
from click.testing import CliRunner
from conftest import rows

import attrdb
from attrdb.cli import main
from attrdb.errors import InvalidValue, NotFound
from attrdb.store import upgrades
from attrdb.store.schema import SCHEMA_VERSION, TABLES
from attrdb.upkeep.health import check

OLDEST = Path(__file__).parent / "fixtures" / "schema-1.attrdb"


@pytest.fixture
def oldest(tmp_path):
    return Path(shutil.copytree(OLDEST, tmp_path / "old.attrdb"))


def shapes(path):
    return {name: lance.dataset(str(path / f"{name}.lance")).schema.remove_metadata() for name in TABLES}


def test_there_is_a_step_to_every_version():
    assert list(upgrades.STEPS) == list(range(2, SCHEMA_VERSION + 1))


def test_an_old_database_is_not_read_as_if_it_were_new(oldest):
    with pytest.raises(
        InvalidValue, match=rf"has schema version 1, this attrdb reads {SCHEMA_VERSION}; bring it up with"
    ):
        attrdb.open(oldest)


def test_upgraded_it_is_a_new_database_with_the_old_rows(oldest, toy):
    assert upgrades.upgrade(oldest) == (1, SCHEMA_VERSION)
    db = attrdb.open(oldest)
    for table in ("images", "models", "encoders"):
        statement = f"SELECT * FROM {table} ORDER BY 1"
        assert db.sql(statement).to_pylist() == toy.sql(statement).to_pylist()
    assert [row["recall_at_k"] for row in db.query("recall_at_k", k=1).to_pylist()] == [0.5]
    assert db.attribute("m/0/1", k=1)["image_id"].to_pylist() == ["m/e0"]
    assert shapes(oldest) == shapes(toy.path)
    assert check(db.snapshot) == []
    assert db.append_images(rows([("new", "pretraining", None, 3)])).n_appended == 1


def test_older_moments_can_still_be_read(oldest):
    upgrades.upgrade(oldest)
    then = attrdb.open(oldest, at=3)
    assert then.sql("SELECT count(*) AS n FROM images")["n"].to_pylist() == [3]
    assert then.sql("SELECT count(*) AS n FROM jobs")["n"].to_pylist() == [0]


def test_given_again_there_is_nothing_to_do(oldest):
    upgrades.upgrade(oldest)
    version = attrdb.open(oldest).version
    assert upgrades.upgrade(oldest) == (SCHEMA_VERSION, SCHEMA_VERSION)
    assert attrdb.open(oldest).version == version


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 7, 8, 9, 12])
def test_interrupted_it_is_completed(oldest, monkeypatch, after):
    """Ended after any number of the tables were made or stamped."""
    steps = [lance.LanceDataset.update_schema_metadata, upgrades.create_table]
    calls = []

    def ending(step):
        def run(*args, **kwargs):
            if len(calls) == after:
                raise KeyboardInterrupt
            calls.append(step)
            return step(*args, **kwargs)

        return run

    with monkeypatch.context() as patched:
        patched.setattr(lance.LanceDataset, "update_schema_metadata", ending(steps[0]))
        patched.setattr(upgrades, "create_table", ending(steps[1]))
        with pytest.raises(KeyboardInterrupt):
            upgrades.upgrade(oldest)
    found, now = upgrades.upgrade(oldest)
    assert 1 <= found < now == SCHEMA_VERSION
    assert len(attrdb.open(oldest).sql("SELECT image_id FROM images")) == 7


def test_a_newer_database_is_left_alone(oldest):
    lance.dataset(str(oldest / "images.lance")).update_schema_metadata({"attrdb.schema_version": "99"})
    with pytest.raises(InvalidValue, match=r"has schema version 99, .* install a newer attrdb"):
        upgrades.upgrade(oldest)
    with pytest.raises(NotFound, match="is not an attrdb database"):
        upgrades.upgrade(oldest / "nowhere")


def test_a_folder_of_another_lance_program(tmp_path):
    lance.write_dataset(pa.table({"a": [1]}), str(tmp_path / "images.lance"))
    for opens in (attrdb.open, upgrades.upgrade):
        with pytest.raises(NotFound, match="has an images table that attrdb did not make"):
            opens(tmp_path)


def test_a_table_that_is_gone(oldest):
    shutil.rmtree(oldest / "models.lance")
    with pytest.raises(NotFound, match="its table models cannot be opened"):
        upgrades.upgrade(oldest)


def test_the_command(oldest):
    done = CliRunner().invoke(main, ["upgrade", str(oldest)])
    assert (done.exit_code, done.stderr) == (0, f"{oldest}: schema version 1, now {SCHEMA_VERSION}\n")
    assert "nothing to do" in CliRunner().invoke(main, ["upgrade", str(oldest)]).stderr
