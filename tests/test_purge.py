"""Purging removed images from the disk; removals that are killed, and others that work meanwhile."""

import json
import multiprocessing
import shutil

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import angle, rows
from removable import build, content, described, files, sha

import attrdb
from attrdb.attribution import batch
from attrdb.attribution.batch import attribute_samples
from attrdb.attribution.query import AttributionRequest
from attrdb.cli import main
from attrdb.errors import Busy, InvalidValue, NotFound
from attrdb.search import index_build, planner
from attrdb.store import snapshot as snapshots
from attrdb.store.ids import encode_job, model_job, train_job
from attrdb.store.leases import leased
from attrdb.store.locks import exclusive_lock
from attrdb.store.schema import TABLES, feature_array
from attrdb.store.writer import Writer
from attrdb.training import evaluate as evaluation
from attrdb.training.evaluate import evaluate
from attrdb.upkeep import health


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("built") / "full.attrdb")


@pytest.fixture
def full(built, tmp_path):
    return attrdb.open(shutil.copytree(built, tmp_path / "full.attrdb"))


def needles(image_id, degrees):
    """What tells of an image, and could stand in a file."""
    name = image_id.rpartition("/")[2]
    return {
        "id": image_id.encode(),
        "bytes": content(name),
        "caption": f"caption of {image_id}".encode(),
        "address": f"https://pictures.example/{image_id}.png".encode(),
        "hash": sha(name).encode(),
        "feature": np.array(angle(degrees), np.float32).tobytes(),
    }


def places(path, image_id, degrees):
    """Where each of the needles stands."""
    found = {}
    for file, data in files(path).items():
        for what, needle in needles(image_id, degrees).items():
            if needle in data:
                found.setdefault(what, []).append(file)
    return found


EVERYTHING = {"id", "bytes", "caption", "address", "hash", "feature"}


# --- nothing on the disk ---------------------------------------------------------------------------------------------


def test_without_a_purge_older_versions_keep_the_image(full):
    then = full.version
    full.remove(ids=["p90"])
    assert set(places(full.path, "p90", 90)) == EVERYTHING
    assert attrdb.open(full.path, at=then).sql("FROM images WHERE image_id = 'p90'").num_rows == 1
    assert not full.remove(ids=["nobody"], purge=True).purged
    assert set(places(full.path, "p90", 90)) == EVERYTHING
    purged = full.remove(ids=["p90"], purge=True)  # rerun with it: no image is named any more
    assert (purged.n_images, purged.purged) == (0, True)
    assert places(full.path, "p90", 90) == {}
    assert full.sql("SELECT n_images, purged FROM removals").to_pylist() == [{"n_images": 1, "purged": True}]
    assert not full.remove(ids=["p90"], purge=True).purged  # nothing is left to do


@pytest.mark.parametrize(("image_id", "degrees"), [("p90", 90), ("m/e40", 40), ("o/1/3", 61)])
def test_purged_nothing_of_an_image_is_in_any_file(full, image_id, degrees):
    full.writer.upsert(
        "failures", [{"failure_id": f"encode {image_id}", "job_id": "encode", "item": image_id, "reason": "it is grey"}]
    )
    message = f"InvalidValue: image '{image_id}' is grey"
    job = {"job_id": "encode", "command": "encode", "state": "failed", "message": message}
    full.writer.upsert("jobs", [job])
    before = places(full.path, image_id, degrees)
    assert set(before) == EVERYTHING  # they would be found
    removal = full.remove(ids=[image_id], purge=True, reason="opted out")
    assert places(full.path, image_id, degrees) == {}
    assert removal.purged
    assert full.sql("SELECT purged, n_images, reason FROM removals").to_pylist() == [
        {"purged": True, "n_images": 1, "reason": "opted out"}
    ]
    assert health.check(full.snapshot) == []
    for other, angles in (("p10", 10), ("m/e0", 0), ("m/0/2", 35)):
        assert set(places(full.path, other, angles)) == EVERYTHING
    kept = {name: table["versions_kept"] for name, table in full.status()["tables"].items()}
    assert kept == dict.fromkeys(TABLES, 1) | {"removals": 3}


def test_a_removed_model_is_in_no_file(full):
    full.remove(ids=["m/e0"], models="remove", purge=True)
    for image_id, degrees in (("m/e0", 0), ("m/e40", 40), ("m/0/1", 2), ("m/0/2", 35)):
        assert places(full.path, image_id, degrees) == {}
    assert health.check(full.snapshot) == []


def test_all_images_of_a_table_may_go(full):
    full.remove(where="true", models="remove", purge=True)
    assert full.sql("SELECT count(*) AS n FROM images")["n"].to_pylist() == [0]
    assert full.sql("SELECT count(*) AS n FROM models")["n"].to_pylist() == [0]
    assert places(full.path, "p10", 10) == places(full.path, "m/e0", 0) == {}
    assert full.writer.append_images(described([("p10", "pretraining", None, 10)])).n_appended == 1


@pytest.mark.parametrize("whole_fragment", [False, True])
def test_an_index_holds_no_removed_feature(full, monkeypatch, whole_fragment):
    """Lance leaves the entries of a fragment in the index when all of its rows were deleted."""
    more = [(f"c{n:04d}", "pretraining", None, 100 + n / 5) for n in range(600)]
    full.writer.append_images(described(more))
    full.writer.append_images(described([("late", "pretraining", None, 95), ("next", "pretraining", None, 97)]))
    index_build.cover_columns(full.writer)
    images = lance.dataset(str(full.path / "images.lance"))
    images.create_index("toy_2", "IVF_FLAT", metric="cosine", num_partitions=2)
    row = {
        "encoder_id": "toy_2",
        "kind": "IVF_FLAT",
        "n_partitions": 2,
        "n_probes": 2,
        "oversampling": 1,
        "recall": 1.0,
    }
    full.writer.upsert("indices", [row | {"n_rows": 600}])
    before = places(full.path, "late", 95)
    assert set(before) == EVERYTHING
    assert any(file.startswith("images.lance/_indices/") for file in before["feature"])
    removal = full.remove(ids=["late", "next"] if whole_fragment else ["late"], purge=True)
    assert removal.dropped_indices == []
    assert places(full.path, "late", 95) == {}
    full.refresh()
    assert set(planner.indices(full.snapshot)) == {"toy_2"}
    assert health.check(full.snapshot) == []
    assert [index["n_unindexed"] for index in full.status()["indices"]] == [0, 0, 0, 0]


def test_an_index_whose_centroid_is_the_feature_is_dropped(full):
    full.writer.append_images(described([(f"c{n:04d}", "pretraining", None, 180 + n / 100) for n in range(600)]))
    images = lance.dataset(str(full.path / "images.lance"))
    centroids = np.array([angle(90), angle(183)], np.float32)
    images.create_index("toy_2", "IVF_FLAT", metric="cosine", num_partitions=2, ivf_centroids=centroids)
    row = {
        "encoder_id": "toy_2",
        "kind": "IVF_FLAT",
        "n_partitions": 2,
        "n_probes": 2,
        "oversampling": 1,
        "recall": 1.0,
    }
    full.writer.upsert("indices", [row | {"n_rows": 600}])
    assert full.remove(ids=["p20"], purge=True).dropped_indices == []
    assert any("/_indices/" in file for file in places(full.path, "p90", 90)["feature"])
    assert full.remove(ids=["p90"], purge=True).dropped_indices == ["toy_2"]
    assert places(full.path, "p90", 90) == {}
    assert full.status()["encoders"]["toy_2"]["index"] == {"state": "none"}


def test_job_folders_hold_nothing_of_a_removed_image(full):
    """Features that wait to be committed, those of a mapper in training, a model that is half made, what a kill left."""
    folder = encode_job(full.path, "other").make()
    for name, image_id, degrees in (("a", "m/e0", 0), ("b", "p10", 10)):
        feature = feature_array(np.array([angle(degrees)], np.float32))
        pq.write_table(pa.table({"image_id": [image_id], "other": feature}), folder / f"{name}.parquet")
    training = train_job(full.path, "half").make()
    (training / "features.f32").write_bytes(needles("m/e0", 0)["feature"])
    half, other = model_job(full.path, "half").make(), model_job(full.path, "other").make()
    (half / "settings.json").write_text(json.dumps({"exemplars": [sha("e0")], "captions": ["caption of m/e0"]}))
    (other / "settings.json").write_text(json.dumps({"exemplars": [sha("x")], "regularization": ["p20"]}))
    (full.path / "weights").mkdir()
    for name in ("half", "other"):
        (full.path / "weights" / f"{name}.safetensors").write_bytes(b"learned")
    orphan = full.path / "images.lance" / "data" / "0123456789012345678901230123456789abcdef0123456789.lance"
    orphan.write_bytes(content("e0"))  # of an append that was killed
    removal = full.remove(ids=["m/e0"], purge=True)
    assert removal.unfinished_models == ["half"]
    assert places(full.path, "m/e0", 0) == {}
    left = [file for file in files(full.path) if file.startswith("jobs/") and not file.endswith(".lock")]
    assert left == ["jobs/.encode-other/b.parquet", "jobs/other/settings.json"]
    assert [path.name for path in (full.path / "weights").iterdir()] == ["other.safetensors"]


def test_weights_of_a_model_whose_job_only_left_its_folder_stay(full):
    job = model_job(full.path, "m").make()
    (job / "settings.json").write_text(json.dumps({"exemplars": [sha("e0")]}))
    weights = full.path / "weights" / "m.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"learned")
    assert full.remove(ids=["m/e0"]).unfinished_models == ["m"]
    assert weights.exists()
    assert not job.exists()


# --- tags ------------------------------------------------------------------------------------------------------------


def test_tags_keep_older_versions_until_they_are_dropped(full):
    for table, tag in (("images", "paper"), ("images", "audit"), ("models", "paper")):
        dataset = lance.dataset(str(full.path / f"{table}.lance"))
        dataset.tags.create(tag, dataset.version)
    before = files(full.path)
    with pytest.raises(InvalidValue, match=r"tags .* \(images: audit, paper; models: paper\); rerun with --drop-tags"):
        full.remove(ids=["p90"], purge=True)
    assert files(full.path) == before
    full.remove(ids=["p90"])  # without a purge tags do not matter
    assert lance.dataset(str(full.path / "images.lance"), version="paper").count_rows() == 9
    full.remove(ids=["p90"], purge=True, drop_tags=True)
    assert places(full.path, "p90", 90) == {}
    assert lance.dataset(str(full.path / "images.lance")).tags.list() == {}


# --- interrupted -----------------------------------------------------------------------------------------------------


def state(db):
    """All rows, without what tells one run from another."""
    db.refresh()
    moving = {"removal_id", "started_at", "ended_at", "marked_at", "blocked_at", "created_at", "images_version"}
    found = {}
    for name in TABLES:
        table = db.sql(f"SELECT * FROM {name} ORDER BY ALL")
        found[name] = table.drop_columns([column for column in table.column_names if column in moving]).to_pylist()
    return found


OPTIONS = {"ids": ["m/e0", "p90"], "models": "mark", "purge": True, "block": True}


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("models", "first"), [("mark", 0), ("remove", 1)])
def test_interrupted_before_any_commit_it_is_finished_by_a_rerun(built, tmp_path, monkeypatch, models, first):
    """Before every other of the first commits, and some of those of the purge."""
    commit, n_commits, last = Writer.commit, 0, None

    def counting(self, *arguments):
        nonlocal n_commits
        if n_commits == last:
            raise Killed
        n_commits += 1
        return commit(self, *arguments)

    monkeypatch.setattr(Writer, "commit", counting)
    options = OPTIONS | {"models": models}
    whole = attrdb.open(shutil.copytree(built, tmp_path / "whole.attrdb"))
    whole.remove(**options)
    wanted, n_needed = state(whole), n_commits
    assert n_needed > 24
    for point in [*range(first, 14, 2), 20, n_needed - 2 + first]:
        db = attrdb.open(shutil.copytree(built, tmp_path / f"{point}.attrdb"))
        n_commits, last = 0, point
        with pytest.raises(Killed):
            db.remove(**options)
        last = None
        consistent(attrdb.open(db.path, read_only=True))
        attrdb.open(db.path).remove(**options)
        assert state(db) == wanted, point
        assert set(places(db.path, "m/e0", 0)) | set(places(db.path, "p90", 90)) <= {"hash"}  # which is blocked
        assert health.check(db.snapshot) == []


def consistent(reader):
    """A reader sees no result that is about an image it does not see, and only the removal is unfinished."""
    found = {finding.check for finding in health.check(reader.snapshot)}
    assert found <= {"unfinished_removals", "unfinished_models"}
    for table, column in (
        ("exemplar_ranks", "sample_id"),
        ("exemplar_ranks", "exemplar_id"),
        ("attributions", "candidate_id"),
        ("scores", "candidate_id"),
    ):
        assert reader.sql(f"SELECT {column} FROM {table} ANTI JOIN images ON image_id = {column}").num_rows == 0
    for model_id in reader.sql("SELECT model_id FROM models")["model_id"].to_pylist():
        statement = "SELECT n_samples = (SELECT count(*) FROM samples WHERE model_id = $id) AS is_right FROM models "
        [row] = reader.sql(statement + "WHERE model_id = $id", {"id": model_id}).to_pylist()
        assert row["is_right"]


def test_another_removal_finishes_one_that_was_interrupted(full, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Writer, "delete_matching", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            full.remove(ids=["p90"])
    [row] = full.status()["unfinished_removals"]
    assert row["state"] == "begun"
    assert "unfinished (begun); rerun its command" in CliRunner().invoke(main, ["status", str(full.path)]).output
    removal = full.remove(ids=["p20"])
    assert (removal.n_images, removal.resumed) == (1, False)
    assert full.sql("SELECT n_images, state FROM removals").to_pylist() == [{"n_images": 1, "state": "done"}] * 2
    assert full.sql("SELECT image_id FROM pretraining_images")["image_id"].to_pylist() == ["p10"]


# --- others meanwhile ------------------------------------------------------------------------------------------------


def test_attributions_that_were_computed_with_the_image_are_refused(full, monkeypatch):
    attribute_stored = batch.attribute_stored

    def slow(*arguments):
        answers = attribute_stored(*arguments)
        attrdb.open(full.path).remove(ids=["p10"])
        return answers

    with monkeypatch.context() as patched:
        patched.setattr(batch, "attribute_stored", slow)
        with pytest.raises(Busy, match=r"images were taken out of .* while this was computed; rerun the command"):
            attribute_samples(full.writer, "true", AttributionRequest(k=4))
    attribute_samples(full.writer, "true", AttributionRequest(k=4))
    consistent(full)


def test_ranks_that_were_computed_with_the_image_are_refused(full, monkeypatch):
    ranks = evaluation.ranks

    def slow(*arguments, **options):
        attrdb.open(full.path).remove(ids=["m/e0"])
        return ranks(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "ranks", slow)
        with pytest.raises(Busy, match="while this was computed"):
            evaluate(full)
    assert evaluate(full) == 3
    consistent(full)


def test_a_reader_never_has_models_of_before_and_images_of_after(full, monkeypatch):
    """Tables are opened one after the other, and images are taken out in between."""
    open_table = snapshots.open_table
    done = []

    def opening(path, name, **options):
        if name == "images" and "models" in done and len(done) == 1:
            done.append("removed")
            attrdb.open(path).remove(ids=["m/e0"])
        if name == "models" and not done:
            table = open_table(path, name, **options)
            done.append("models")
            return table
        return open_table(path, name, **options)

    monkeypatch.setattr(snapshots, "open_table", opening)
    full.refresh()
    assert done == ["models", "removed"]
    assert full.sql("SELECT n_exemplars FROM models WHERE model_id = 'm'")["n_exemplars"].to_pylist() == [1]
    assert health.check(full.snapshot) == []


def test_a_removal_waits_for_those_who_write_and_they_wait_for_it(full):
    context = multiprocessing.get_context("forkserver")
    go = context.Event()
    process = context.Process(target=append_until, args=(full.path, go))
    process.start()
    assert go.wait(60)
    for name in ("p10", "p20", "p90"):
        full.remove(ids=[name], purge=True)
    (full.path / "stop").touch()
    process.join(60)
    assert process.exitcode == 0
    (full.path / "stop").unlink()
    full.refresh()
    assert health.check(full.snapshot) == []
    names = full.sql("SELECT image_id FROM images WHERE image_id LIKE 'new%' ORDER BY 1")["image_id"].to_pylist()
    assert names == [f"new{n:04d}" for n in range(len(names))]
    assert len(names) > 3
    assert places(full.path, "p90", 90) == {}


def append_until(path, go):
    db, n = attrdb.open(path), 0
    while not (path / "stop").exists():
        db.writer.append_images(rows([(f"new{n:04d}", "pretraining", None, 200 + n / 7)]))
        n += 1
        if n == 2:
            go.set()


def test_it_does_not_run_beside_maintenance_or_jobs_on_the_images(full):
    with (
        exclusive_lock(full.path / ".maintenance.lock", "x"),
        pytest.raises(Busy, match="is being maintained by another"),
    ):
        full.remove(ids=["p90"])
    half = model_job(full.path, "half")
    (half.make() / "settings.json").write_text(json.dumps({"exemplars": [sha("e0")]}))
    with leased(half.lock, "x"), pytest.raises(Busy, match="model 'half', which uses one of the images, is being made"):
        full.remove(ids=["m/e0"])
    encoding, training = encode_job(full.path, "other"), train_job(full.path, "half")
    for folder, said in ((encoding, "images are encoded"), (training, "mapper 'half'")):
        folder.make()
        with exclusive_lock(folder.lock, "x"), pytest.raises(Busy, match=said):
            full.remove(ids=["m/e0"])
    assert full.sql("FROM removals").num_rows == 0
    with pytest.raises(InvalidValue, match="was opened read-only"):
        attrdb.open(full.path, read_only=True).remove(ids=["p90"])
    with pytest.raises(NotFound, match="does not exist"):
        attrdb.open(full.path / "nowhere")
