"""Removals beside others: readers, writers, jobs, and results that were computed with the images."""

import json
import multiprocessing
import threading
import time

import pytest
from conftest import rows
from removable import consistent, places, sha

import attrdb
from attrdb.attribution import batch
from attrdb.attribution.batch import attribute_samples
from attrdb.attribution.query import AttributionRequest
from attrdb.errors import Busy, InvalidValue, NotFound
from attrdb.store import snapshot as snapshots
from attrdb.store.job_folders import encode_job, model_job, train_job
from attrdb.store.leases import leased
from attrdb.store.locks import exclusive_lock
from attrdb.store.schema import TABLES
from attrdb.store.writer import Writer
from attrdb.training import evaluate as evaluation
from attrdb.training.evaluate import evaluate
from attrdb.upkeep import health


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


def test_attributions_that_are_refused_leave_those_that_are_stored(full):
    rows_of = "SELECT sample_id, k FROM attributions WHERE sample_id = 'm/0/1' ORDER BY rank"
    before, computed_on = full.sql(rows_of).to_pylist(), full.snapshot
    full.remove(ids=["p90"])
    nothing = TABLES["attributions"].empty_table()
    with pytest.raises(Busy, match="while this was computed"):
        full.writer.append_rows("attributions", nothing, computed_on, "true")
    assert full.sql(rows_of).to_pylist() == before != []


def test_a_model_is_not_taken_for_abandoned_while_it_is_appended(full, monkeypatch):
    """A removal that comes between the images of a model and its row waits for the row."""
    upsert, threads = Writer.upsert, []

    def slow(self, table, *arguments, **options):
        if table == "models" and not threads:
            other = attrdb.open(full.path)
            threads.append(threading.Thread(target=other.remove, kwargs={"ids": ["late/e"]}))
            threads[0].start()
            time.sleep(1)
        return upsert(self, table, *arguments, **options)

    monkeypatch.setattr(Writer, "upsert", slow)
    model = rows([("late/e", "exemplar", "late", 5), ("late/0/1", "sample", "late", 6)])
    full.writer.append_model(model, {"model_id": "late"})
    threads[0].join(60)
    full.refresh()
    assert full.sql("SELECT image_id FROM images WHERE model_id = 'late'")["image_id"].to_pylist() == ["late/0/1"]
    assert full.sql("SELECT n_exemplars, n_samples FROM models WHERE model_id = 'late'").to_pylist() == [
        {"n_exemplars": 0, "n_samples": 1}
    ]
    assert health.check(full.snapshot) == []


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
    newest_table = snapshots._newest_table
    done = []

    def opening(path, name, before):
        if name == "images" and "models" in done and len(done) == 1:
            done.append("removed")
            attrdb.open(path).remove(ids=["m/e0"])
        table = newest_table(path, name, before)
        if name == "models" and not done:
            done.append("models")
        return table

    monkeypatch.setattr(snapshots, "_newest_table", opening)
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
