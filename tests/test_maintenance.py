"""Upkeep: optimize keeps every row and every answer, check finds what is wrong, status counts."""

import hashlib
import json
from datetime import UTC, datetime, timedelta

import lance
import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from conftest import rows

import attrdb
from attrdb.cli import main
from attrdb.errors import AttrdbError, Busy, InvalidValue, NotFound
from attrdb.search import index_build
from attrdb.store import jobs
from attrdb.store.locks import exclusive_lock
from attrdb.store.schema import feature_array
from attrdb.training.evaluate import evaluate
from attrdb.upkeep import health, optimize


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def images_table(db):
    return lance.dataset(str(db.path / "images.lance"))


def add_model(db, model_id, degrees=(3.0, 4.0)):
    entries = [(f"{model_id}/e", "exemplar", model_id, degrees[0])]
    entries += [(f"{model_id}/0/{n}", "sample", model_id, degree) for n, degree in enumerate(degrees[1:])]
    db.writer.append_model(rows(entries), {"model_id": model_id, "kind": "object"})


@pytest.fixture
def large(toy, monkeypatch):
    """The toy with 600 more pretraining images and an index of their features."""
    monkeypatch.setattr(index_build, "MIN_ROWS", 500)
    degrees = np.random.default_rng(0).uniform(100, 260, 600)
    toy.writer.append_images(rows([(f"c{n:04d}", "pretraining", None, degree) for n, degree in enumerate(degrees)]))
    index_build.build(toy.writer)
    return toy


def everything(db):
    return {name: db.sql(f"SELECT * FROM {name} ORDER BY ALL").to_pylist() for name in ("images", "models", "encoders")}


def test_rounds_of_append_and_optimize_leave_one_segment_and_every_row(large):
    for round_ in range(6):
        add_model(large, f"r{round_}")
        before = everything(large)
        result = optimize.optimize(large.writer)
        assert everything(large) == before
        assert [index["n_unindexed"] for index in result.after["indices"]] == [0, 0, 0, 0]
        assert [index["segments"] for index in result.after["indices"]] == [1, 1, 1, 1]
        assert result.after["tables"]["images"]["fragments"] == 1
    assert [one["column"] for one in result.after["indices"]] == ["image_id", "model_id", "role", "toy_2"]


@pytest.mark.parametrize(
    ("rows", "large"),
    [
        ({}, []),
        ({0: 10, 1: 4000}, []),  # small ones are always merged
        ({0: 131_072, 1: 131_072, 2: 81, 3: 81}, [0, 1]),
        ({0: 131_072, 1: 9_000, 2: 5_000}, [2, 1, 0]),  # 5,000 alone is not worth 9,000
        ({0: 131_072, 1: 9_000, 2: 4_096, 3: 500}, [0]),
    ],
)
def test_large_fragments_are_not_rewritten_for_small_ones(rows, large):
    assert optimize.large_fragments(rows) == large


def test_what_is_appended_is_found_before_it_is_indexed(large):
    optimize.optimize(large.writer)
    add_model(large, "new", degrees=(1.0, 1.5))
    assert [index["n_unindexed"] for index in large.status()["indices"]] == [2, 2, 2, 2]
    assert large.attribute("new/0/0", k=1)["image_id"].to_pylist() == ["new/e"]
    assert large.sql("SELECT image_id FROM samples WHERE model_id = 'new'")["image_id"].to_pylist() == ["new/0/0"]


def test_old_versions_stay_until_they_are_dropped(toy):
    first = toy.version
    add_model(toy, "n")
    optimize.optimize(toy.writer)
    assert len(attrdb.open(toy.path, at=first).sql("SELECT image_id FROM images")) == 7
    kept = toy.status()["tables"]["images"]
    after = optimize.optimize(toy.writer, timedelta(0)).after["tables"]["images"]
    assert after["versions_kept"] == 1 < kept["versions_kept"]
    assert after["bytes"] < kept["bytes"]
    with pytest.raises(NotFound, match=f"has no version {first}; it keeps 1 versions"):
        attrdb.open(toy.path, at=first)


def test_a_moment_whose_rows_were_dropped_is_not_made_up(toy):
    moment = datetime.now(UTC)
    toy.writer.upsert("failures", [{"failure_id": "x", "job_id": "j", "item": "i", "reason": "r"}])
    lance.dataset(str(toy.path / "failures.lance")).cleanup_old_versions(older_than=timedelta(0))
    with pytest.raises(NotFound, match="has deleted the version of failures of that time; its oldest version is of"):
        attrdb.open(toy.path, at=moment)


def test_a_reader_goes_on_while_it_is_compacted(toy):
    reader = attrdb.open(toy.path, read_only=True)
    add_model(toy, "n")
    optimize.optimize(toy.writer)
    assert len(reader.sql("SELECT image_id FROM images")) == 7


def test_an_empty_database(empty):
    assert optimize.optimize(empty.writer).after["n_images"] == 0
    assert health.check(empty.snapshot) == []


def test_two_at_once(toy):
    with (
        exclusive_lock(toy.path / ".maintenance.lock", "held"),
        pytest.raises(Busy, match="is being maintained by another process; wait for it"),
    ):
        optimize.optimize(toy.writer)


def test_an_index_that_answers_wrongly_is_an_error(large, monkeypatch):
    monkeypatch.setattr(health, "RECALL_NEEDED", 1.01)
    with pytest.raises(AttrdbError, match=r"index 'toy_2_idx' of .* answers wrongly \(recall@10 .* 1.000"):
        optimize.optimize(large.writer)


def test_the_command_says_why_a_database_has_grown(toy):
    for number in range(12):
        toy.writer.append_images(rows([(f"q{number}", "pretraining", None, number)]))
    done = run("optimize", toy.path)
    assert "it has grown, because older versions keep the files that were merged; --drop-older-than DAYS" in done.stderr
    assert "it has grown" not in run("optimize", toy.path, "--drop-older-than", "0").stderr


def test_the_command_shows_before_and_after(toy):
    done = run("optimize", toy.path)
    assert done.exit_code == 0, done.output
    before, after = done.stdout.split("after:")
    assert "table images: 7 rows, 2 fragments" in before
    assert "table images: 7 rows, 1 fragments" in after
    assert "index on role (Bitmap): 1 segments, 0 rows not indexed" in after


# --- check ------------------------------------------------------------------------------------------------------------


def found(db):
    return {one.check: one.rows.to_pylist() for one in health.check(attrdb.open(db.path).snapshot)}


def test_a_sound_database(toy):
    evaluate(toy)
    assert found(toy) == {}
    assert "nothing found" in run("check", toy.path).stderr


def damage(db, statement):
    {
        "duplicate": lambda: lance.write_dataset(
            images_table(db).to_table(filter="image_id = 'p10'"), images_table(db).uri, mode="append"
        ),
        "length": lambda: images_table(db).update({"toy_2": "[3.0, 4.0]"}, where="image_id = 'p20'"),
        "role": lambda: images_table(db).update({"role": "'guess'"}, where="image_id = 'p90'"),
        "missing sample": lambda: images_table(db).delete("image_id = 'm/0/2'"),
        "rank": lambda: lance.dataset(str(db.path / "exemplar_ranks.lance")).update(
            {"rank": "99"}, where="exemplar_id = 'm/e0' AND sample_id = 'm/0/1'"
        ),
    }[statement]()


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("duplicate", {"duplicate_images": [{"image_id": "p10", "n_rows": 2}]}),
        ("length", {"feature_lengths": [{"image_id": "p20", "encoder_id": "toy_2", "squared_length": 25.0}]}),
        ("role", {"wrong_roles": [{"image_id": "p90", "role": "guess", "model_id": None}]}),
        (
            "missing sample",
            {
                "impossible_ranks": 2,
                "model_counts": [
                    {"model_id": "m", "n_exemplars": 2, "found_exemplars": 2, "n_samples": 2, "found_samples": 1}
                ],
            },
        ),
        ("rank", {"impossible_ranks": 1}),
    ],
)
def test_every_check_names_the_offending_rows(toy, what, expected):
    evaluate(toy)
    damage(toy, what)
    seen = {name: len(rows) if isinstance(expected.get(name), int) else rows for name, rows in found(toy).items()}
    assert seen == expected


def test_the_command_ends_with_1_and_shows_the_rows(toy):
    damage(toy, "role")
    done = run("check", toy.path)
    assert done.exit_code == 1
    assert "wrong_roles: Images with an unknown role" in done.stdout
    assert "p90" in done.stdout
    assert "1 rows in 1 checks are wrong" in done.stderr


def test_an_index_self_test_can_fail(large, monkeypatch):
    optimize.optimize(large.writer)
    assert list(health.index_self_test(large.snapshot)) == []
    monkeypatch.setattr(health, "_recall", lambda *_: 0.5)
    assert [row["index"] for row in health.index_self_test(large.snapshot)] == ["toy_2_idx"]


# --- unfinished models ------------------------------------------------------------------------------------------------


@pytest.fixture
def half(toy):
    """A model whose job was killed between its images and its row."""
    toy.writer.append_images(rows([("h/e", "exemplar", "h", 2.0), ("h/0/1", "sample", "h", 2.0)]))
    return toy


def test_nothing_of_an_unfinished_model_is_shown(half):
    assert half.snapshot.hidden_models == ("h",)
    assert half.sql("SELECT count(*) AS n FROM images")["n"].to_pylist() == [7]
    assert half.sql("SELECT count(*) AS n FROM features")["n"].to_pylist() == [7]
    assert half.attribute("m/0/1", k=1)["image_id"].to_pylist() == ["m/e0"]
    assert half.sql("SELECT image_id FROM attribute('m/0/1', k := 1)")["image_id"].to_pylist() == ["m/e0"]
    assert half.sql("SELECT image_id FROM nearest([1.0, 0.0], k := 1)")["image_id"].to_pylist() == ["m/e0"]
    with pytest.raises(NotFound, match="no image 'h/0/1'"):
        half.attribute("h/0/1")
    with pytest.raises(NotFound, match="no image 'h/0/1'"):
        half.query("influence", image_id="h/0/1")
    assert evaluate(half) == 4


def test_it_is_told_and_completed_by_its_command(half):
    assert half.status()["unfinished_models"] == ["h"]
    assert "model h is unfinished and not shown; give its ingest command again" in run("status", half.path).stdout
    assert found(half) == {"unfinished_models": [{"model_id": "h"}]}
    half.writer.append_model(rows([("h/e", "exemplar", "h", 2.0), ("h/0/1", "sample", "h", 2.0)]), {"model_id": "h"})
    assert half.snapshot.hidden_models == ()
    assert half.sql("SELECT count(*) AS n FROM images")["n"].to_pylist() == [9]
    assert half.sql("SELECT n_exemplars, n_samples FROM models WHERE model_id = 'h'").to_pylist() == [
        {"n_exemplars": 1, "n_samples": 1}
    ]


def test_an_abandoned_attempt_is_not_taken_for_the_new_one(half):
    """Its job was deleted, and the model is made again with other samples."""
    new = rows([("h/e", "exemplar", "h", 2.0), ("h/1/7", "sample", "h", 3.0)])
    half.writer.append_model(new, {"model_id": "h"})
    found = half.sql("SELECT image_id FROM images WHERE model_id = 'h' ORDER BY 1")["image_id"].to_pylist()
    assert found == ["h/1/7", "h/e"]
    assert health.check(half.snapshot) == []


def test_bytes_that_are_not_those_that_were_written(toy):
    stored = {"image_id": ["a", "b"], "role": ["pretraining"] * 2, "image": [b"one", b"two"]}
    hashes = [hashlib.sha256(b"one").hexdigest(), hashlib.sha256(b"other").hexdigest()]
    toy.writer.append_images(pa.table({**stored, "sha256": hashes}))
    weights = toy.path / "weights"
    weights.mkdir()
    for name in ("kept", "lost"):
        (weights / name).write_bytes(b"weights")
        right = hashlib.sha256(b"weights").hexdigest()
        row = {
            "model_id": name,
            "weights_path": f"weights/{name}",
            "weights_hash": right,
            "n_exemplars": 0,
            "n_samples": 0,
        }
        toy.writer.upsert("models", [row])
    (weights / "lost").write_bytes(b"weight")
    changed = found(toy)["changed_bytes"]
    assert [(row["table"], row["id"]) for row in changed] == [("models", "lost"), ("images", "b")]


# --- status and jobs --------------------------------------------------------------------------------------------------


def test_status_tells_what_is_left_to_encode(toy):
    toy.writer.append_images(pa.table({"image_id": ["a", "b"], "role": ["pretraining"] * 2, "image": [b"x", None]}))
    assert toy.status()["encoders"]["toy_2"] == {"spec": "toy:2", "dimension": 2, "n_encoded": 7, "n_to_encode": 1} | {
        "index": {"state": "none"}
    }
    assert "toy_2: 2-d, 7 of 9 encoded, 1 to encode" in run("status", toy.path).stdout


def test_a_job_is_recorded_from_its_start_to_its_end(toy):
    def state():
        return toy.sql("SELECT job_id, state, n_done, n_failed, message FROM jobs").to_pylist()

    with jobs.running(toy.writer, "encode", "x", {"spec": "x"}) as job:
        assert [row["state"] for row in state()] == ["running"]
        assert toy.status()["open_jobs"][0]["state"] == "running"
        job.n_done = 3
        job.failed({"a": "is broken", "b": "is broken"})
    done = {"job_id": "encode/x", "state": "incomplete", "n_done": 3, "n_failed": 2, "message": None}
    assert state() == [done]
    with jobs.running(toy.writer, "encode", "x", {"spec": "x"}) as job:
        assert job.failures == {"a": "is broken", "b": "is broken"}
        job.mended(["a", "c"])
    assert state() == [done | {"n_done": 0, "n_failed": 1}]
    assert toy.sql("SELECT item FROM failures")["item"].to_pylist() == ["b"]
    with pytest.raises(ValueError, match="boom"), jobs.running(toy.writer, "encode", "x", {}):
        raise ValueError("boom")
    assert state() == [done | {"state": "failed", "n_done": 0, "n_failed": 1, "message": "ValueError: boom"}]


def test_a_killed_job_is_told_from_a_running_one(toy):
    with jobs.running(toy.writer, "encode", "x", {}):
        toy.writer.upsert("jobs", [{**toy.sql("SELECT * FROM jobs").to_pylist()[0], "pid": 2**22 + 1}])
        assert toy.status()["open_jobs"][0]["state"] == "killed"
        assert "job encode/x: killed, 0 done, 0 failed" in run("status", toy.path).stdout


def test_status_as_json(toy):
    assert json.loads(run("status", toy.path, "--json").stdout) == json.loads(json.dumps(toy.status()))


def test_features_of_no_length_never_reach_the_table(toy):
    with pytest.raises(InvalidValue, match="length 0"):
        toy.writer.append_bulk(
            pa.table({"image_id": ["z"], "role": ["pretraining"], "toy_2": feature_array(np.zeros((1, 2)))})
        )
