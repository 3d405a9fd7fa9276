"""Backups: one moment of a database that others write to, whole or not at all, and refused when a byte is wrong."""

import hashlib
import json
import multiprocessing
import shutil
import time
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import add_index, rows
from removable import files

import attrdb
from attrdb.cli import main
from attrdb.errors import Busy, InvalidValue, NotFound, StorageError
from attrdb.search import planner
from attrdb.store import upgrades
from attrdb.store.locks import exclusive_lock
from attrdb.store.schema import TABLES
from attrdb.store.writer import Writer
from attrdb.upkeep import backup as backups
from attrdb.upkeep import health
from attrdb.upkeep.backup import backup, restore

FIXTURES = Path(__file__).parent / "fixtures"


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def answers(db):
    """Everything a reader can ask, and some attributions."""
    tables = {name: db.sql(f"SELECT * FROM {name} ORDER BY ALL").to_pylist() for name in TABLES}
    samples = db.sql("SELECT image_id FROM samples ORDER BY 1")["image_id"].to_pylist()
    return tables, [db.attribute(sample, k=4).to_pylist() for sample in samples], db.version


@pytest.fixture
def full(full):
    """With weights, an index, deleted rows, older versions, and a job that is half done."""
    db = full
    entries = [(f"c{n:03d}", "pretraining", None, 100 + n / 5) for n in range(300)]
    db.writer.append_images(rows(entries))
    add_index(db.path, "toy_2")
    db.writer.delete("images", "image_id = 'c007'")
    (db.path / "weights").mkdir()
    for name in ("m.safetensors", "m.json", "half.safetensors"):
        (db.path / "weights" / name).write_bytes(name.encode())
    [model] = db.snapshot.rows("models", "model_id = 'm'")
    weights = {"weights_path": "weights/m.safetensors", "weights_hash": hashlib.sha256(b"m.safetensors").hexdigest()}
    db.writer.upsert("models", [model | weights])
    (db.path / "jobs" / "half").mkdir(parents=True)
    return db


def test_a_restored_database_gives_the_same_answers_and_passes_a_check(full, tmp_path):
    done = backup(full.path, tmp_path / "copy")
    again = restore(tmp_path / "copy", tmp_path / "again.attrdb")
    assert done == again
    assert done.images_version == full.version
    db = attrdb.open(tmp_path / "again.attrdb")
    assert answers(db) == answers(full)
    assert set(planner.indices(db.snapshot)) == {"toy_2"}
    assert health.check(db.snapshot) == health.check(full.snapshot) == []
    assert sorted(path.name for path in (db.path / "weights").iterdir()) == ["m.json", "m.safetensors"]
    assert {name: table["versions_kept"] for name, table in db.status()["tables"].items()} == dict.fromkeys(TABLES, 1)
    assert not (db.path / "jobs").exists()
    assert answers(attrdb.open(tmp_path / "copy" / "database", read_only=True)) == answers(full)  # also where it lies
    # It is a database like any other.
    assert db.writer.append_images(rows([("new", "pretraining", None, 1)])).version == full.version + 1
    assert db.attribute("m/0/1", k=1)["image_id"].to_pylist() == ["new"]
    db.remove(ids=["new"], purge=True)
    assert health.check(db.snapshot) == []


def test_the_manifest_lists_every_file_with_its_hash(full, tmp_path):
    done = backup(full.path, tmp_path / "copy")
    manifest = json.loads((tmp_path / "copy" / "manifest.json").read_text())
    assert manifest["versions"] == {name: table.version for name, table in full.snapshot.tables.items()}
    assert manifest["attrdb_version"] == attrdb.__version__
    copied = files(tmp_path / "copy" / "database")
    assert {entry["path"]: entry["sha256"] for entry in manifest["files"]} == {
        name: hashlib.sha256(data).hexdigest() for name, data in copied.items()
    }
    assert (done.n_files, done.n_bytes) == (len(copied), sum(map(len, copied.values())))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "full.attrdb"]
    original = files(full.path)
    assert all(original[name] == data for name, data in copied.items() if name != "checksums")  # written anew
    assert all((tmp_path / "copy" / "database" / name).stat().st_nlink == 1 for name in copied)  # no hard link


@pytest.mark.parametrize("file", ["data", "_versions", "_indices", "_deletions", "m.safetensors"])
@pytest.mark.parametrize("damage", ["a byte", "the end", "all", "a link"])
def test_a_damaged_backup_names_the_file_and_restores_nothing(full, tmp_path, file, damage):
    backup(full.path, tmp_path / "copy")
    [victim, *_] = [
        path for path in sorted((tmp_path / "copy" / "database").rglob("*")) if path.is_file() and file in str(path)
    ]
    data = bytearray(victim.read_bytes())
    if damage == "a byte":
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif damage == "the end":
        victim.write_bytes(data[:-1])
    else:
        victim.unlink()
        if damage == "a link":
            (tmp_path / "elsewhere").write_bytes(data)
            victim.symlink_to(tmp_path / "elsewhere")
    name = victim.relative_to(tmp_path / "copy" / "database").as_posix()
    with pytest.raises(StorageError) as caught:
        restore(tmp_path / "copy", tmp_path / "again.attrdb")
    assert f"is damaged, and nothing was restored: {name} is missing or not as backed up" in str(caught.value)
    assert not list(tmp_path.glob("again*"))


@pytest.mark.parametrize("change", ["a byte", "no hash", "a path"])
def test_a_manifest_that_was_changed_is_refused(full, tmp_path, change):
    backup(full.path, tmp_path / "copy")
    manifest = tmp_path / "copy" / "manifest.json"
    if change == "no hash":
        (tmp_path / "copy" / "manifest.sha256").unlink()
    elif change == "a byte":
        manifest.write_bytes(manifest.read_bytes().replace(b'"bytes": 1', b'"bytes": 2', 1))
    else:
        text = manifest.read_bytes().replace(b'"path": "images.lance', b'"path": "../images.lance', 1)
        manifest.write_bytes(text)
        (tmp_path / "copy" / "manifest.sha256").write_text(hashlib.sha256(text).hexdigest())
    kind, said = (InvalidValue, "lies outside of it") if change == "a path" else (StorageError, "nothing was restored")
    with pytest.raises(kind, match=said):
        restore(tmp_path / "copy", tmp_path / "again.attrdb")
    assert not list(tmp_path.glob("again*"))


def test_a_backup_of_a_newer_attrdb_is_refused(full, tmp_path, monkeypatch):
    monkeypatch.setattr(backups, "FORMAT", 2)
    backup(full.path, tmp_path / "copy")
    monkeypatch.undo()
    with pytest.raises(InvalidValue, match=r"was made by attrdb .*; install a newer attrdb"):
        restore(tmp_path / "copy", tmp_path / "again.attrdb")


def test_nothing_is_overwritten(full, tmp_path):
    backup(full.path, tmp_path / "copy")
    before = files(tmp_path)
    (tmp_path / "empty").mkdir()
    for target in ("copy", "empty", "full.attrdb/inside", "full.attrdb"):
        with pytest.raises(InvalidValue, match=r"exists already; name a new directory|lies inside the database"):
            backup(full.path, tmp_path / target)
    with pytest.raises(InvalidValue, match="exists already; name a new directory"):
        restore(tmp_path / "copy", full.path)
    (tmp_path / "mine.part").mkdir()
    (tmp_path / "mine.part" / "thesis.txt").write_text("years of work")
    with pytest.raises(InvalidValue, match=r"mine\.part exists, and attrdb did not make it"):
        backup(full.path, tmp_path / "mine")
    assert (tmp_path / "mine.part" / "thesis.txt").read_text() == "years of work"
    shutil.rmtree(tmp_path / "mine.part")
    assert files(tmp_path) == before
    with pytest.raises(NotFound, match="is not an attrdb database"):
        backup(tmp_path / "nowhere", tmp_path / "other")
    with pytest.raises(NotFound, match="is no backup of a database"):
        restore(full.path, tmp_path / "other")


def test_a_database_of_an_older_schema_is_backed_up_as_it_is(tmp_path):
    with zipfile.ZipFile(FIXTURES / "schema-5.zip") as archive:
        archive.extractall(tmp_path / "five.attrdb")
    backup(tmp_path / "five.attrdb", tmp_path / "copy")
    restore(tmp_path / "copy", tmp_path / "again.attrdb")
    with pytest.raises(InvalidValue, match="bring it up with"):
        attrdb.open(tmp_path / "again.attrdb")
    for path in ("five.attrdb", "again.attrdb"):
        upgrades.upgrade(tmp_path / path)
    statement = "SELECT * EXCLUDE (created_at) FROM methods ORDER BY ALL"
    again, five = attrdb.open(tmp_path / "again.attrdb"), attrdb.open(tmp_path / "five.attrdb")
    assert again.sql(statement).to_pylist() == five.sql(statement).to_pylist()
    assert again.sql("FROM images ORDER BY ALL").to_pylist() == five.sql("FROM images ORDER BY ALL").to_pylist()
    assert health.check(again.snapshot) == []


def test_it_does_not_run_beside_maintenance_or_another_backup_or_after_half_a_removal(full, tmp_path, monkeypatch):
    with exclusive_lock(full.path / ".maintenance.lock", "x"), pytest.raises(Busy, match="is being maintained"):
        backup(full.path, tmp_path / "copy")
    add, second = backups.counted, []

    def counting(*arguments):
        with pytest.raises(Busy, match="is being written by another process") as caught:
            restore(tmp_path / "first", tmp_path / "copy")
        second.append(caught)
        return add(*arguments)

    backup(full.path, tmp_path / "first")
    with monkeypatch.context() as patched:
        patched.setattr(backups, "counted", counting)
        backup(full.path, tmp_path / "copy")
    assert len(second) == 1

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Writer, "delete_matching", killed)
        with pytest.raises(KeyboardInterrupt):
            full.remove(ids=["p10"])
    with pytest.raises(InvalidValue, match=r"a removal of .* is unfinished"):
        backup(full.path, tmp_path / "other")
    full.remove(ids=["p10"])
    backup(full.path, tmp_path / "other")


def test_a_full_disk_is_found_before_anything_is_copied(full, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match=r"needs \d+\.\d\d KiB of disk, .* are free; nothing was written"):
        backup(full.path, tmp_path / "copy")
    assert not list(tmp_path.glob("copy*"))


def test_the_commands(full, tmp_path):
    done = run("backup", full.path, tmp_path / "copy")
    assert done.exit_code == 0
    assert f"version {full.version} of images" in done.stderr
    assert run("backup", full.path, tmp_path / "copy").exit_code == 1
    restored = run("restore", tmp_path / "copy", tmp_path / "again.attrdb")
    assert (restored.exit_code, restored.stdout) == (0, "")
    assert run("check", tmp_path / "again.attrdb").exit_code == 0
    [victim, *_] = (tmp_path / "copy" / "database" / "images.lance" / "data").iterdir()
    victim.write_bytes(b"")
    damaged = run("restore", tmp_path / "copy", tmp_path / "other.attrdb")
    assert damaged.exit_code == 1
    assert f"images.lance/data/{victim.name} is missing or not as backed up" in damaged.stderr


# --- writers and kills -----------------------------------------------------------------------------------------------


def append_models(path, go):
    db, n = attrdb.open(path), 0
    while not (path / "stop").exists():
        entries = [(f"n{n}/e", "exemplar", f"n{n}", 200.0), (f"n{n}/0/1", "sample", f"n{n}", 201.0)]
        db.writer.append_model(rows(entries), {"model_id": f"n{n}", "kind": "object"})
        n += 1
        if n == 2:
            go.set()


def test_a_writer_appends_while_the_backup_runs(full, tmp_path):
    context = multiprocessing.get_context("forkserver")
    go = context.Event()
    process = context.Process(target=append_models, args=(full.path, go))
    process.start()
    assert go.wait(60)
    for number in range(4):
        backup(full.path, tmp_path / f"copy{number}")
    (full.path / "stop").touch()
    process.join(60)
    assert process.exitcode == 0
    n_models = []
    for number in range(4):
        restore(tmp_path / f"copy{number}", tmp_path / f"again{number}.attrdb")
        db = attrdb.open(tmp_path / f"again{number}.attrdb")
        # Images of a model may be there before its row; nothing else may be missing or too much.
        assert {finding.check for finding in health.check(db.snapshot)} <= {"unfinished_models"}
        names = db.sql("SELECT model_id FROM models WHERE model_id LIKE 'n%'")["model_id"].to_pylist()
        assert set(names) == {f"n{n}" for n in range(len(names))}
        n_models.append(len(names))
    assert n_models == sorted(n_models)
    assert n_models[-1] > n_models[0] >= 2


def back_up(path, target, slow):
    copy = backups._copy

    def copying(*arguments):
        time.sleep(slow)
        return copy(*arguments)

    backups._copy = copying
    backup(path, target)


@pytest.mark.parametrize("n_copied", [0, 3, 25])
def test_killed_it_leaves_no_backup_and_a_rerun_makes_one(full, tmp_path, n_copied):
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=back_up, args=(full.path, tmp_path / "copy", 0.05))
    process.start()
    until = time.monotonic() + 60
    while time.monotonic() < until and len(list((tmp_path / "copy.part").rglob("*.*"))) < n_copied:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (tmp_path / "copy").exists()
    with pytest.raises(NotFound, match="is no backup"):
        restore(tmp_path / "copy.part", tmp_path / "again.attrdb")
    backup(full.path, tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "full.attrdb"]
    restore(tmp_path / "copy", tmp_path / "again.attrdb")
    assert answers(attrdb.open(tmp_path / "again.attrdb")) == answers(full)


def test_a_backup_that_is_interrupted_leaves_nothing(full, tmp_path):
    def interrupt(stage, done, total, note=""):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backup(full.path, tmp_path / "copy", interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["full.attrdb"]
