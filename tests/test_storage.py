"""Disks and files that fail: clear words, nothing lost, and the same command goes on once the disk has room."""

import os
import shutil

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TOY, picture, rows
from test_cli import run
from torture.disks import NotPermitted, small_disk

import attrdb
from attrdb.errors import AttrdbError, InvalidValue, NotFound, QueryRefused, StorageError
from attrdb.ingest.encode import Pixels
from attrdb.ingest.encode.add_encoder import backfill
from attrdb.ingest.read import corpus, embeddings
from attrdb.upkeep import health, optimize

N_PICTURES = 40
N_VECTORS = 400
FULL = "the disk of .* is full; what was committed before is kept: free some space, then rerun the command"
READ_ONLY = "cannot be written: .*; open it with read_only=True to read it"


@pytest.fixture
def disk(tmp_path):
    try:
        with small_disk(tmp_path / "disk", "size=800k") as disk:
            yield disk
    except NotPermitted as error:
        pytest.skip(str(error))


@pytest.fixture
def photos(tmp_path):
    chance = np.random.default_rng(0)
    for number in range(N_PICTURES):
        path = picture(tmp_path / "photos" / f"{number:02d}.png", (0, 0, 0))
        with corpus.Image.open(path) as image:
            noise = chance.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            corpus.Image.fromarray(noise).save(path, image.format)
    return tmp_path / "photos"


@pytest.fixture
def vectors(tmp_path):
    folder = tmp_path / "laion"
    for part in ("img_emb", "metadata"):
        (folder / part).mkdir(parents=True)
    features = np.random.default_rng(0).normal(size=(N_VECTORS, 256)).astype(np.float32)
    np.save(folder / "img_emb" / "img_emb_0.npy", features)
    pq.write_table(
        pa.table({"key": [f"{row:05d}" for row in range(N_VECTORS)]}), folder / "metadata/metadata_0.parquet"
    )
    return folder


def ids(db):
    return attrdb.open(db, read_only=True).sql("SELECT image_id FROM images ORDER BY 1")["image_id"].to_pylist()


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["photos", "vectors"])
def test_a_full_disk_keeps_what_was_committed_and_the_same_command_goes_on(disk, what, request, monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK", 4)
    monkeypatch.setattr(embeddings, "PART_ROWS", 50)
    folder, db = request.getfixturevalue(what), disk.path / "db"
    encoder = {"photos": "pixels:2", "vectors": "clip:x"}[what]
    command = ["ingest", "corpus", db, folder, "--encoder", encoder, "--quiet"]
    everything = {
        "photos": [f"photos/{number:02d}.png" for number in range(N_PICTURES)],
        "vectors": [f"laion/{row:05d}" for row in range(N_VECTORS)],
    }[what]
    failed = run(*command, code=1)
    assert f"Error: the disk of {db} is full; what was committed before is kept" in failed.output
    stored = ids(db)
    assert 0 < len(stored) < len(everything)
    assert stored == everything[: len(stored)]
    assert "nothing found" in run("check", db).stderr
    disk.change("size=20m")
    again = run(*command)
    assert f"{len(everything) - len(stored)}" in again.stderr
    assert ids(db) == everything
    assert health.check(attrdb.open(db).snapshot) == []
    assert attrdb.open(db).sql("SELECT state FROM jobs").to_pylist() == [{"state": "done"}]


@pytest.mark.parametrize("kilobytes", [16, 48, 96, 144, 192])
def test_a_disk_that_is_full_while_the_database_is_made(disk, photos, kilobytes):
    disk.change(f"size={kilobytes}k")
    command = ["ingest", "corpus", disk.path / "db", photos, "--encoder", "pixels:2", "--quiet"]
    assert "is full; what was committed before is kept" in run(*command, code=1).output
    disk.change("size=20m")
    run(*command)
    assert len(ids(disk.path / "db")) == N_PICTURES


def test_a_model_that_does_not_fit_is_not_shown_at_all(disk):
    db = attrdb.create(disk.path / "db")
    db.writer.add_encoder(**TOY)
    db.writer.append_images(rows([("p", "pretraining", None, 3.0)]))
    large = rows(
        [("m/e", "exemplar", "m", 1.0), ("m/0/1", "sample", "m", 2.0)],
        image=pa.array([bytes(10), np.random.default_rng(0).bytes(700_000)]),
    )
    with pytest.raises(StorageError, match=FULL):
        db.writer.append_model(large, {"model_id": "m", "kind": "object"})
    assert ids(db.path) == ["p"]
    disk.change("size=20m")
    db.writer.append_model(large, {"model_id": "m", "kind": "object"})
    assert ids(db.path) == ["m/0/1", "m/e", "p"]


def test_optimize_and_encode_on_a_full_disk(disk, photos):
    db = disk.path / "db"
    disk.change("size=20m")
    run("ingest", "corpus", db, photos, "--encoder", "pixels:2", "--quiet")
    before = attrdb.open(db).sql("SELECT * FROM images ORDER BY image_id")
    with pytest.raises(OSError, match="No space left"):
        (disk.path / "filling").write_bytes(bytes(20 * 2**20))
    for command in (["optimize", db, "--quiet"], ["encode", db, "--encoder", "pixels:3", "--quiet"]):
        assert f"the disk of {db}" in run(*command, code=1).output
    assert (
        attrdb.open(db, read_only=True)
        .sql("SELECT * FROM images ORDER BY image_id")
        .select(before.column_names)
        .equals(before)
    )
    (disk.path / "filling").unlink()
    run("optimize", db, "--quiet")
    run("encode", db, "--encoder", "pixels:3", "--quiet")
    assert attrdb.open(db).status()["encoders"]["pixels_3"]["n_encoded"] == N_PICTURES
    assert attrdb.open(db).sql("SELECT * FROM images ORDER BY image_id").select(before.column_names).equals(before)


def without_versions(table):
    """What a kill leaves while the table is made."""
    for file in (table / "_versions").iterdir():
        file.unlink()


@pytest.mark.parametrize("n_made", range(6))
def test_a_database_whose_making_was_killed_is_completed_by_the_same_command(tmp_path, photos, n_made):
    tables = sorted(attrdb.create(tmp_path / "db").path.iterdir(), key=lambda table: table.name == "images.lance")
    without_versions(tables[n_made])
    for table in tables[n_made + 1 :]:
        shutil.rmtree(table)
    run("ingest", "corpus", tmp_path / "db", photos, "--encoder", "pixels:2", "--quiet")
    assert len(ids(tmp_path / "db")) == N_PICTURES


def test_a_database_that_lost_its_versions_is_not_taken_for_a_new_one(toy, photos):
    without_versions(toy.path / "images.lance")
    command = ["ingest", "corpus", toy.path, photos, "--encoder", "pixels:2", "--quiet"]
    assert "its table images cannot be opened" in run(*command, code=1).output
    shutil.rmtree(toy.path / "images.lance")
    assert "is not an empty directory; choose a path of its own" in run(*command, code=1).output
    with pytest.raises(InvalidValue, match="is not an empty directory"):
        attrdb.create(toy.path)


# --- a read-only directory -------------------------------------------------------------------------------------------


@pytest.fixture
def read_only(tmp_path, photos, request):
    """A database that cannot be written: on a disk that is read-only; without the rights to mount one, by its mode."""
    if os.geteuid():
        parent = tmp_path / "shut"
        parent.mkdir()
    else:
        disk = request.getfixturevalue("disk")
        disk.change("size=20m")
        parent = disk.path
    run("ingest", "corpus", parent / "db", photos, "--encoder", "pixels:2", "--quiet")
    if not os.geteuid():
        disk.change("ro")
        yield parent / "db"
        return
    folders = [parent, *(path for path in parent.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    yield parent / "db"
    for folder in folders:
        folder.chmod(0o755)


def test_a_read_only_directory_is_read(read_only):
    db = attrdb.open(read_only, read_only=True)
    assert db.sql("SELECT count(*) AS n FROM images").to_pylist() == [{"n": N_PICTURES}]
    assert len(db.attribute("photos/00.png", k=3)) == 3
    assert f"{N_PICTURES}" in run("sql", read_only, "SELECT count(*) FROM images").stdout
    assert f"{N_PICTURES} images, version" in run("status", read_only).stdout
    assert "nothing found" in run("check", read_only).stderr


def test_a_read_only_directory_is_not_written(read_only, photos, vectors):
    db = attrdb.open(read_only)
    writes = {
        "images": lambda: db.writer.append_images(pa.table({"image_id": ["x"], "role": ["pretraining"]})),
        "encoder": lambda: db.writer.add_encoder(**TOY),
        "optimize": lambda: optimize.optimize(db.writer),
        "encode": lambda: backfill(db, Pixels(3)),
        "encode again": lambda: backfill(db, Pixels(2)),
        "create": lambda: attrdb.create(read_only.parent / "other"),
    }
    for name, write in writes.items():
        with pytest.raises(StorageError, match=READ_ONLY):
            pytest.fail(f"{name} wrote: {write()}")
    (photos / "new.png").write_bytes((photos / "00.png").read_bytes())
    for command in (
        ["ingest", "corpus", read_only, photos, "--quiet"],
        ["ingest", "corpus", read_only, vectors, "--encoder", "clip:x", "--quiet"],
        ["encode", read_only, "--encoder", "pixels:3", "--quiet"],
        ["optimize", read_only, "--quiet"],
    ):
        output = run(*command, code=1).output
        assert "cannot be written" in output, command
        assert "Read-only file system" in output or "Permission denied" in output, command
    assert len(ids(read_only)) == N_PICTURES


def test_a_database_that_was_opened_read_only_is_not_written(toy):
    db = attrdb.open(toy.path, read_only=True)
    with pytest.raises(InvalidValue, match="was opened read-only; open it without read_only and at to change it"):
        db.writer.append_images(rows([("x", "pretraining", None, 1.0)]))


# --- damaged files ---------------------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scramble(path):
    """Other bytes in the second half, where Lance keeps what the columns are."""
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    content[half:] = bytes(255 - one for one in content[half:])
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, scramble, lambda path: path.write_bytes(b""), lambda path: path.unlink()])
@pytest.mark.parametrize("table", ["images", "models", "encoders"])
def test_a_damaged_data_file_is_named(toy, table, damage):
    files = sorted((toy.path / f"{table}.lance" / "data").glob("*.lance"))
    for file in files:
        damage(file)
    asked = {
        "images": lambda db: db.sql("SELECT * FROM images"),
        "models": lambda db: db.sql("SELECT * FROM models"),
        "encoders": lambda db: db.attribute("p10"),
    }[table]
    with pytest.raises(StorageError, match=f"{toy.path} cannot be read( or written)?: .*attrdb check {toy.path}"):
        asked(attrdb.open(toy.path))
    command = ["attribute", toy.path, "p10"] if table == "encoders" else ["sql", toy.path, f"SELECT * FROM {table}"]
    assert f"attrdb check {toy.path}" in run(*command, code=1).output
    [finding] = health.check(attrdb.open(toy.path).snapshot)
    assert finding.check == "damaged_files"
    assert {(row["table"], row["files"]) for row in finding.rows.to_pylist()} == {(table, file.name) for file in files}
    shown = run("check", toy.path, code=1)
    assert "damaged_files: Files that cannot be read; restore them from a copy of the directory." in shown.stdout
    assert files[0].name[:20] in shown.stdout


@pytest.mark.parametrize("table", ["images", "jobs"])
def test_damage_that_sql_meets_first(toy, table):
    toy.writer.upsert("jobs", [{"job_id": "a", "command": "encode", "state": "done"}])
    db = attrdb.open(toy.path)
    assert db.snapshot.hidden_models == ()  # which has been read by now
    for file in (toy.path / f"{table}.lance" / "data").glob("*.lance"):
        cut(file)
    with pytest.raises(
        StorageError, match=rf"{toy.path} cannot be read( or written)?: .*table {table}: .*attrdb check"
    ):
        db.sql(f"SELECT * FROM {table}")


@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"x" * 500)])
@pytest.mark.parametrize("table", ["images", "encoders"])
def test_a_damaged_manifest_is_named(toy, table, damage):
    newest = min((toy.path / f"{table}.lance" / "_versions").glob("*.manifest"))
    kept = newest.read_bytes()
    damage(newest)
    says = f"{toy.path} is not a whole attrdb database: its table {table} cannot be opened .*; restore {newest} from a copy"
    with pytest.raises(NotFound, match=says):
        attrdb.open(toy.path)
    for command in (["sql", toy.path, "SELECT 1"], ["status", toy.path], ["check", toy.path], ["optimize", toy.path]):
        assert f"restore {newest} from a copy" in run(*command, code=1).output
    newest.write_bytes(kept)
    assert len(ids(toy.path)) == 7


def test_a_panic_inside_lance_is_an_error_like_others(toy):
    newest = min((toy.path / "encoders.lance" / "_versions").glob("*.manifest"))
    content = bytearray(newest.read_bytes())
    # Where the manifest begins in its file: its length is read from there, and is far too large.
    content[-16:-8] = (len(content) - 20).to_bytes(8, "little")
    content[-20:-16] = b"\xff\xff\xff\x7f"
    newest.write_bytes(content)
    try:
        lance.dataset(str(toy.path / "encoders.lance"))
    except BaseException as error:
        panic = error
    assert not isinstance(panic, Exception)
    with pytest.raises(NotFound, match=f"its table encoders cannot be opened .*; restore {newest}"):
        attrdb.open(toy.path)


def test_an_older_version_that_is_damaged_is_told(toy):
    oldest = max((toy.path / "images.lance" / "_versions").glob("*.manifest"))
    cut(oldest)
    assert len(ids(toy.path)) == 7
    with pytest.raises(StorageError, match=r"cannot be read( or written)?: .*attrdb check"):
        toy.status()
    [finding] = health.check(attrdb.open(toy.path).snapshot)
    [row] = finding.rows.to_pylist()
    assert (row["table"], row["files"]) == ("images", "images.lance/_versions")
    assert oldest.name in row["error"]


def test_any_damage_gives_an_error_of_attrdb_or_an_answer(toy, tmp_path):
    """Bytes changed or cut at random: never another kind of exception, and check finds what asking finds."""
    chance = np.random.default_rng(0)
    for number in range(25):
        copy = tmp_path / f"damaged-{number}"
        shutil.copytree(toy.path, copy)
        files = sorted([*copy.glob("*.lance/data/*.lance"), *copy.glob("*.lance/_versions/*.manifest")])
        file = files[chance.integers(len(files))]
        content = bytearray(file.read_bytes())
        at = int(chance.integers(len(content)))
        if number % 3:
            content[at : at + 16] = bytes(255 - one for one in content[at : at + 16])
        else:
            del content[at:]
        file.write_bytes(content)
        errors = []
        for ask in (
            lambda db: db.sql("SELECT * FROM images"),
            lambda db: db.sql("SELECT * FROM models"),
            lambda db: db.attribute("m/0/1"),
            lambda db: db.status(),
        ):
            try:
                ask(attrdb.open(copy))
            except AttrdbError as error:
                errors.append(str(error))
        assert [error for error in errors if str(copy) not in error] == []
        try:
            found = health.check(attrdb.open(copy).snapshot)
        except NotFound:
            continue
        assert found or not errors, f"{file.name} is damaged at {at}, and check says nothing"


# --- statements that are wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("SELEC image_id FROM images", 'syntax error at or near "SELEC"'),
        ("SELECT image_id FROM pictures", "Table with name pictures does not exist"),
        ("SELECT image_id FROM images WHERE", "syntax error at or near"),
        ("", "one SELECT is needed, found: nothing"),
        ("DELETE FROM images", "one SELECT is needed, found: DELETE; attrdb's tables change through attrdb ingest"),
        ("INSERT INTO models VALUES (1)", "one SELECT is needed, found: INSERT"),
        ("UPDATE images SET role = 'sample'", "one SELECT is needed, found: UPDATE"),
        ("DROP VIEW images", "one SELECT is needed, found: DROP"),
        ("SELECT 1; DROP VIEW images", "one SELECT is needed, found: SELECT, DROP"),
        ("CREATE TABLE mine AS SELECT 1", "one SELECT is needed, found: CREATE"),
        ("SELECT $wanted AS x", "wanted"),
    ],
)
def test_a_statement_that_is_wrong_changes_nothing(toy, statement, says):
    before = toy.sql("SELECT * FROM images ORDER BY image_id")
    with pytest.raises(QueryRefused) as refused:
        toy.sql(statement)
    assert says in str(refused.value)
    shown = run("sql", toy.path, statement, code=1).output
    assert shown.startswith("Error: ")
    assert says in shown
    assert attrdb.open(toy.path).sql("SELECT * FROM images ORDER BY image_id").equals(before)


def test_parameters_that_no_one_asked_for(toy):
    with pytest.raises(QueryRefused, match="colour"):
        toy.sql("SELECT $x::INTEGER AS x", {"x": 1, "colour": "red"})
    assert "colour" in run("sql", toy.path, "SELECT $x AS x", "-p", "x=1", "-p", "colour=red", code=1).output
    assert "has no parameter 'colour'" in run("query", toy.path, "recall_at_k", "-p", "colour=red", code=1).output
    assert "parameter 'x' is not of the form name=value" in run("sql", toy.path, "SELECT 1", "-p", "x", code=1).output
