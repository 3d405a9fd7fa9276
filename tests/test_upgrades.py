"""Upgrades: tests/fixtures/schema-1.attrdb was written by the first attrdb (see `toy` in conftest), schema-5.zip by the last
whose results belonged to an encoder and a mapper: `toy` with a mapper, ranks, attributions and a calibration; schema-6.zip
by the last that could take nothing out: `toy` with ranks."""

import shutil
import subprocess
import sys
import time
import zipfile
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
from attrdb.store.checksums import unrecorded
from attrdb.store.locks import WRITERS_LOCK, waiting_lock
from attrdb.store.schema import SCHEMA_VERSION, TABLES
from attrdb.training.evaluate import evaluate
from attrdb.upkeep.health import check

OLDEST = Path(__file__).parent / "fixtures" / "schema-1.attrdb"


@pytest.fixture
def oldest(tmp_path):
    return Path(shutil.copytree(OLDEST, tmp_path / "old.attrdb"))


@pytest.fixture
def before_methods(tmp_path):
    with zipfile.ZipFile(OLDEST.with_name("schema-5.zip")) as archive:
        archive.extractall(tmp_path / "five.attrdb")
    return tmp_path / "five.attrdb"


@pytest.fixture
def before_removals(tmp_path):
    with zipfile.ZipFile(OLDEST.with_name("schema-6.zip")) as archive:
        archive.extractall(tmp_path / "six.attrdb")
    return tmp_path / "six.attrdb"


def shapes(path):
    """The columns of each table, by name: an upgrade adds columns after those of encoders."""
    schemas = {name: lance.dataset(str(path / f"{name}.lance")).schema for name in TABLES}
    return {name: {field.name: field for field in schema} for name, schema in schemas.items()}


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
    assert db.writer.append_images(rows([("new", "pretraining", None, 3)])).n_appended == 1


def test_older_moments_can_still_be_read(oldest):
    upgrades.upgrade(oldest)
    then = attrdb.open(oldest, at=3)
    assert then.sql("SELECT count(*) AS n FROM images")["n"].to_pylist() == [3]
    assert then.sql("SELECT count(*) AS n FROM jobs")["n"].to_pylist() == [0]
    assert then.query("between_concepts").num_rows == then.query("within_concept").num_rows == 0
    assert then.sql("SELECT concept_id FROM exemplars LIMIT 0").num_rows == 0


def test_results_belong_to_methods_from_6_on(before_methods):
    assert upgrades.upgrade(before_methods) == (5, SCHEMA_VERSION)
    db = attrdb.open(before_methods)
    assert [(row["method_id"], row["kind"], row["mapper_id"]) for row in db.sql("FROM methods").to_pylist()] == [
        ("toy_2", "similarity", None),
        ("toy_2/flat", "similarity", "flat"),
    ]
    shown = "method_id, encoder_id, mapper_id"
    for table, n in (("exemplar_ranks", 4), ("attributions", 6)):
        assert db.sql(f"SELECT {shown}, count(*) AS n FROM {table} GROUP BY ALL ORDER BY ALL").to_pylist() == [
            {"method_id": "toy_2", "encoder_id": "toy_2", "mapper_id": "", "n": n},
            {"method_id": "toy_2/flat", "encoder_id": "toy_2", "mapper_id": "flat", "n": n},
        ]
    fitted = {"method_id": "toy_2/flat", "encoder_id": "toy_2", "mapper_id": "flat", "tau": 0.1, "lam": 0.01}
    assert db.sql(f"SELECT {shown}, tau, lam FROM calibrations").to_pylist() == [fitted]
    stored = db.sql("FROM attributions WHERE sample_id = 'm/0/1' AND mapper_id = '' ORDER BY rank")
    assert stored["similarity"].to_pylist() == stored["score"].to_pylist()
    now = db.attribute("m/0/1", k=3)
    assert stored["candidate_id"].to_pylist() == now["image_id"].to_pylist()
    assert stored["influence"].to_pylist() == pytest.approx(now["influence"].to_pylist())
    # Ranked again, there are scores, and the same ranks.
    ranks = "SELECT sample_id, exemplar_id, rank FROM exemplar_ranks WHERE method_id = 'toy_2' ORDER BY ALL"
    before = db.sql(ranks)
    assert db.sql("SELECT count(score) AS n FROM exemplar_ranks")["n"].to_pylist() == [0]
    evaluate(db)
    assert db.sql(ranks).equals(before)
    assert shapes(before_methods) == shapes(attrdb.create(before_methods.with_name("new.attrdb")).path) | {
        "images": {field.name: field for field in db.snapshot.tables["images"].schema}
    }
    assert check(db.snapshot) == []


def test_a_moment_before_methods_is_read_as_they_are_today(before_methods):
    before = lance.dataset(str(before_methods / "exemplar_ranks.lance")).to_table().num_rows
    moment = max(lance.dataset(str(one)).versions()[-1]["timestamp"] for one in before_methods.glob("*.lance"))
    upgrades.upgrade(before_methods)
    then = attrdb.open(before_methods, at=moment.astimezone())
    assert then.sql("SELECT count(*) AS n FROM exemplar_ranks WHERE encoder_id = 'toy_2'")["n"].to_pylist() == [before]
    assert {row["method_id"] for row in then.query("recall_at_k", k=1).to_pylist()} == {"toy_2", "toy_2/flat"}
    assert then.sql("SELECT method_id, tau FROM calibrations").to_pylist() == [{"method_id": "toy_2/flat", "tau": 0.1}]
    flat = then.attribute("m/0/1", k=3, mapper_id="flat")
    stored = then.sql("FROM attributions WHERE sample_id = 'm/0/1' AND mapper_id = 'flat' ORDER BY rank")
    assert flat["influence"].to_pylist() == pytest.approx(stored["influence"].to_pylist())


def test_calibrations_are_by_kind_from_10_on(before_removals, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(upgrades, "SCHEMA_VERSION", 9)
        upgrades.upgrade(before_removals)
    table = lance.dataset(str(before_removals / "calibrations.lance"))
    fitted = dict.fromkeys(table.schema.names) | {"method_id": "toy_2", "tau": 0.1, "lam": 0.01}
    lance.write_dataset(pa.Table.from_pylist([fitted], table.schema), table.uri, mode="append")
    moment = max(lance.dataset(str(one)).versions()[-1]["timestamp"] for one in before_removals.glob("*.lance"))
    assert upgrades.upgrade(before_removals) == (9, SCHEMA_VERSION)
    for db in (attrdb.open(before_removals), attrdb.open(before_removals, at=moment.astimezone())):
        shown = "calibration_id, method_id, kind, tau, lam, unattributed"
        assert db.sql(f"SELECT {shown} FROM calibrations").to_pylist() == [
            {"calibration_id": "toy_2", "kind": None, "unattributed": None}
            | {n: fitted[n] for n in ("method_id", "tau", "lam")}
        ]
        answer = db.attribute("m/0/1", k=3)
        assert answer["influence"].to_pylist() == db.attribute("m/0/1", k=3, tau=0.1, lam=0.01)["influence"].to_pylist()
        assert db.sql("SELECT count(unattributed) AS n FROM attributions")["n"].to_pylist() == [0]
    assert shapes(before_removals)["calibrations"].keys() == set(TABLES["calibrations"].names)


def test_removals_are_kept_from_7_on(before_removals, toy):
    assert upgrades.upgrade(before_removals) == (6, SCHEMA_VERSION)
    db = attrdb.open(before_removals)
    assert shapes(before_removals) == shapes(toy.path)
    for table in ("removals", "marked_models", "blocked_digests"):
        assert db.sql(f"SELECT count(*) AS n FROM {table}")["n"].to_pylist() == [0]
    assert [row["recall_at_k"] for row in db.query("recall_at_k", k=1).to_pylist()] == [0.5]
    assert check(db.snapshot) == []


def test_models_have_concepts_from_8_on(oldest):
    models = lance.dataset(str(oldest / "models.lance"))
    models.update({"token": "'V*'", "train_prompt": "'V* art'"})
    [model] = models.to_table().to_pylist()
    upgrades.upgrade(oldest)
    db = attrdb.open(oldest)
    names = ["model_id", "token", "kind", "category", "train_prompt", "n_exemplars"]
    assert db.sql("FROM concepts").to_pylist() == [{"concept_id": "m/V*"} | {name: model[name] for name in names}]
    assert db.sql("SELECT DISTINCT concept_id FROM images").to_pylist() == [{"concept_id": None}]
    for table in ("monitor_steps", "monitor_changes", "monitor_probes", "attribution_tables"):
        assert db.sql(f"SELECT count(*) AS n FROM {table}")["n"].to_pylist() == [0]


def test_given_again_there_is_nothing_to_do(oldest):
    upgrades.upgrade(oldest)
    version = attrdb.open(oldest).version
    assert upgrades.upgrade(oldest) == (SCHEMA_VERSION, SCHEMA_VERSION)
    assert attrdb.open(oldest).version == version


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 7, 8, 9, 12])
def test_interrupted_it_is_completed(oldest, monkeypatch, after):
    """Ended after any number of the tables were made or stamped."""
    steps = [lance.LanceDataset.update_schema_metadata, upgrades._create]
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
        patched.setattr(upgrades, "_create", ending(steps[1]))
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


def test_several_upgrades_at_once_wait_for_each_other(oldest):
    command = [sys.executable, "-m", "attrdb", "upgrade", str(oldest)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    assert sum("schema version 1, now" in output for output in outputs) == 1
    assert sum("nothing to do" in output for output in outputs) == 3
    assert check(attrdb.open(oldest).snapshot) == []


def test_an_upgrade_waits_for_a_writer(oldest):
    with waiting_lock(oldest / WRITERS_LOCK, exclusive=False):
        process = subprocess.Popen([sys.executable, "-m", "attrdb", "upgrade", str(oldest)])
        time.sleep(3)
        assert process.poll() is None
    assert process.wait(60) == 0
    assert attrdb.open(oldest).version


def test_an_upgrade_that_has_nothing_to_do_waits_for_nobody(toy):
    with waiting_lock(toy.path / WRITERS_LOCK, exclusive=True):
        assert upgrades.upgrade(toy.path) == (SCHEMA_VERSION, SCHEMA_VERSION)


def test_the_schema_after_an_upgrade_is_checksummed(oldest):
    assert CliRunner().invoke(main, ["upgrade", str(oldest)]).exit_code == 0
    assert unrecorded(oldest, attrdb.open(oldest).snapshot.tables) == []
