"""Purging removed images from the disk, and removals that are killed."""

import json
import shutil

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import add_index, angle
from removable import EVERYTHING, consistent, content, described, files, needles, places, sha

import attrdb
from attrdb.cli import main
from attrdb.errors import InvalidValue
from attrdb.search import index_build, planner
from attrdb.store.job_folders import encode_job, model_job, train_job
from attrdb.store.schema import TABLES, feature_array
from attrdb.store.writer import Writer
from attrdb.upkeep import health

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


def test_the_log_of_a_table_does_not_name_the_image(full):
    """A table's newest version says what made it: here a predicate, as when a failure was mended."""
    full.writer.delete("failures", "failure_id = 'encode p90'")
    assert any(file.startswith("failures.lance/") for file in places(full.path, "p90", 90)["id"])
    full.remove(ids=["p90"], purge=True)
    assert places(full.path, "p90", 90) == {}


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
    add_index(full.path, "toy_2")
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
    add_index(full.path, "toy_2", ivf_centroids=np.array([angle(90), angle(183)], np.float32))
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


@pytest.mark.parametrize(("models", "first"), [("mark", 0), ("remove", 2)])
def test_interrupted_before_any_commit_it_is_finished_by_a_rerun(
    removable_database, tmp_path, monkeypatch, models, first
):
    """Before every fourth of the first commits, and some of those of the purge."""
    commit, n_commits, last = Writer.commit, 0, None

    def counting(self, *arguments):
        nonlocal n_commits
        if n_commits == last:
            raise Killed
        n_commits += 1
        return commit(self, *arguments)

    monkeypatch.setattr(Writer, "commit", counting)
    options = OPTIONS | {"models": models}
    whole = attrdb.open(shutil.copytree(removable_database, tmp_path / "whole.attrdb"))
    whole.remove(**options)
    wanted, n_needed = state(whole), n_commits
    assert n_needed > 24
    for point in [*range(first, 14, 4), 20, n_needed - 2 + first // 2]:
        db = attrdb.open(shutil.copytree(removable_database, tmp_path / f"{point}.attrdb"))
        n_commits, last = 0, point
        with pytest.raises(Killed):
            db.remove(**options)
        last = None
        consistent(attrdb.open(db.path, read_only=True))
        attrdb.open(db.path).remove(**options)
        assert state(db) == wanted, point
        assert set(places(db.path, "m/e0", 0)) | set(places(db.path, "p90", 90)) <= {"hash"}  # which is blocked
        assert health.check(db.snapshot) == []


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
