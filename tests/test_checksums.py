"""Checksums of files: recorded by what writes, compared by `check --deep` and by backups; any bit that flips is found."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import lance
import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from conftest import TOY, rows

import attrdb
from attrdb.cli import main
from attrdb.errors import AttrdbError, StorageError
from attrdb.store import checksums
from attrdb.store.schema import feature_array
from attrdb.upkeep import health
from attrdb.upkeep.backup import backup, restore
from attrdb.upkeep.optimize import optimize


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A database that has a file of every kind: data, manifests, transactions, deletions, indices, weights; recorded."""
    db = attrdb.create(tmp_path_factory.mktemp("checksums") / "some.attrdb")
    db.writer.add_encoder(**TOY)
    angles = np.linspace(0, 6, 60)
    features = feature_array(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    corpus = {"image_id": [f"p{number}" for number in range(60)], "role": ["pretraining"] * 60, "toy_2": features}
    db.writer.append_images(pa.table(corpus))
    (db.path / "weights").mkdir()
    (db.path / "weights" / "m.safetensors").write_bytes(b"weights of m")
    (db.path / "weights" / "m.json").write_text('{"model_id": "m"}')
    model = {
        "model_id": "m",
        "kind": "style",
        "n_exemplars": 1,
        "n_samples": 1,
        "weights_path": "weights/m.safetensors",
    }
    db.writer.append_model(rows([("m/e0", "exemplar", "m", 0), ("m/0/1", "sample", "m", 2)]), model)
    optimize(db.writer)
    lance.dataset(str(db.path / "images.lance")).delete("image_id = 'p7'")
    db.refresh()
    checksums.record(db.path, db.snapshot.tables)
    return db.path


@pytest.fixture
def copy(built, tmp_path):
    return shutil.copytree(built, tmp_path / "copy.attrdb")


def kinds(path):
    return {"/".join(file.split("/")[1:2]) or file for file in live(path)}


def live(path):
    return list(checksums.live_files(path, attrdb.open(path).snapshot.tables))


def is_found(path):
    """Whether opening the database or `check --deep` says that something is wrong."""
    try:
        snapshot = attrdb.open(path, read_only=True).snapshot
        return bool(health.check(snapshot, deep=True))
    except AttrdbError:
        return True


def test_every_kind_of_file_is_recorded(built):
    folders = {"data", "_versions", "_transactions", "_deletions", "_indices", "m.safetensors", "m.json"}
    assert kinds(built) == folders
    assert set(live(built)) <= set(checksums.read(built).digests)
    assert health.check(attrdb.open(built).snapshot, deep=True) == []


def test_every_flipped_bit_is_found(copy):
    chance = np.random.default_rng(0)
    for file in [*live(copy), checksums.FILE]:
        content = (copy / file).read_bytes()
        for bit in chance.integers(0, 8 * len(content), 8 if "_versions" in file else 3):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << (bit % 8)
            (copy / file).write_bytes(changed)
            assert is_found(copy), (file, int(bit))
        (copy / file).write_bytes(content)
    assert not is_found(copy)


@pytest.mark.parametrize("damage", ["emptied", "cut", "gone", "longer"])
def test_other_damage_is_found_and_named(copy, damage):
    for file in live(copy):
        content = (copy / file).read_bytes()
        if damage == "gone":
            (copy / file).unlink()
        else:
            (copy / file).write_bytes({"emptied": b"", "cut": content[:-1], "longer": content + b"\0"}[damage])
        result = CliRunner().invoke(main, ["check", str(copy), "--deep", "--nl"])
        assert result.exit_code == 1, file
        named = [
            file,
            f"its table {file.partition('.')[0]} cannot be opened",
        ]  # the latter if all its versions are gone
        assert any(name in result.output for name in named), result.output
        assert "Traceback" not in result.output
        (copy / file).write_bytes(content)


def test_a_changed_feature_is_found_that_nothing_else_finds(toy):
    """The case that check without --deep cannot see: features have no sha256 of their own."""
    checksums.record(toy.path, toy.snapshot.tables)
    [data] = [file for file in live(toy.path) if file.startswith("images.lance/data/")][:1]
    content = bytearray((toy.path / data).read_bytes())
    feature = np.float32(np.cos(np.radians(10))).tobytes()
    at = bytes(content).find(feature)
    assert at >= 0
    content[at] ^= 1
    (toy.path / data).write_bytes(content)
    assert health.check(attrdb.open(toy.path).snapshot) == []
    [finding] = health.check(attrdb.open(toy.path).snapshot, deep=True)
    assert finding.check == "changed_files"
    assert finding.rows["file"].to_pylist() == [data]


def test_commands_record_what_they_write(tmp_path):
    path = tmp_path / "new.attrdb"
    assert CliRunner().invoke(main, ["init", str(path)]).exit_code == 0
    assert checksums.unrecorded(path, attrdb.open(path).snapshot.tables) == []
    db = attrdb.open(path)
    db.writer.add_encoder(**TOY)
    db.writer.append_images(rows([("p10", "pretraining", None, 10)]))
    unknown = checksums.unrecorded(path, db.snapshot.tables)
    assert unknown
    result = CliRunner().invoke(main, ["check", str(path), "--deep"])
    assert f"{len(unknown):,} files have no checksum yet, such as " in result.output
    assert CliRunner().invoke(main, ["check", str(path), "--deep", "--record"]).exit_code == 0
    assert checksums.unrecorded(path, db.snapshot.tables) == []
    result = CliRunner().invoke(main, ["remove", str(path), "--where", "image_id = 'p10'"])
    assert result.exit_code == 0, result.output
    assert checksums.unrecorded(path, attrdb.open(path).snapshot.tables) == []


def test_a_command_that_fails_or_reads_records_nothing(toy):
    for words in (["sql", "SELECT 1"], ["status"], ["remove", "--where", "nothing = 1"]):
        CliRunner().invoke(main, [words[0], str(toy.path), *words[1:]])
    assert not (toy.path / checksums.FILE).exists()


def test_damage_is_not_recorded_as_what_was_written(copy):
    victim = next(file for file in live(copy) if "/data/" in file)
    (copy / victim).write_bytes((copy / victim).read_bytes() + b"x")
    checksums.record(copy, attrdb.open(copy).snapshot.tables)
    assert is_found(copy)


def test_files_that_exist_no_more_are_forgotten(toy):
    checksums.record(toy.path, toy.snapshot.tables)
    before = set(checksums.read(toy.path).digests)
    toy.writer.append_images(rows([("p11", "pretraining", None, 11)]))
    optimize(toy.writer)
    assert before < set(checksums.read(toy.path).digests)  # older versions are there still
    optimize(toy.writer, timedelta(0))
    known = set(checksums.read(toy.path).digests)
    assert not before <= known
    assert all((toy.path / file).exists() for file in known)
    assert health.check(attrdb.open(toy.path).snapshot, deep=True) == []


def test_a_damaged_file_is_not_backed_up(copy, tmp_path):
    for victim in [file for file in live(copy) if "/data/" in file or "/_indices/" in file]:
        content = (copy / victim).read_bytes()
        (copy / victim).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(StorageError, match=r"no backup was made|not appear to be a Lance"):
            backup(copy, tmp_path / "backup")
        assert not (tmp_path / "backup").exists()
        (copy / victim).write_bytes(content)
    backup(copy, tmp_path / "backup")
    restore(tmp_path / "backup", tmp_path / "back.attrdb")
    assert health.check(attrdb.open(tmp_path / "back.attrdb").snapshot, deep=True) == []
    assert checksums.unrecorded(tmp_path / "back.attrdb", attrdb.open(tmp_path / "back.attrdb").snapshot.tables) == []


def test_two_that_record_at_once_lose_nothing(toy):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: checksums.record(toy.path, toy.snapshot.tables), range(8)))
    assert checksums.unrecorded(toy.path, toy.snapshot.tables) == []
    assert checksums.read(toy.path).damaged_lines == []


# --- damaged indices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["emptied", "cut", "noise", "gone"])
def test_check_names_the_file_of_an_index(copy, damage):
    for file in [file for file in live(copy) if "/_indices/" in file]:
        content = (copy / file).read_bytes()
        noise = np.random.default_rng(0).bytes(len(content))
        if damage == "gone":
            (copy / file).unlink()
        else:
            (copy / file).write_bytes({"emptied": b"", "cut": content[: len(content) // 2], "noise": noise}[damage])
        result = CliRunner().invoke(main, ["check", str(copy)])
        assert result.exit_code == 1
        assert type(result.exception) is SystemExit, file
        assert "damaged_files" in result.output, result.output
        assert file in "".join(result.output.split()), result.output
        (copy / file).write_bytes(content)
