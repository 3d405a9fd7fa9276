"""Several processes at one database: no row is lost or stored twice, and a reader sees only whole models."""

import multiprocessing
import time

import pytest
from conftest import TOY, ToyEncoder, picture, rows
from torture.processes import READY

import attrdb
from attrdb.ingest.read import corpus
from attrdb.ingest.read.corpus import ingest_corpus
from attrdb.ingest.read.discover import open_corpus
from attrdb.store.locks import waiting_lock
from attrdb.upkeep import health, optimize

N_MODELS = 8  # a writer's own
SHARED = 4  # models that two writers append
SAMPLES = 5
N_PICTURES = 24
OVERLAP = 12  # pictures that two folders have
SECONDS = 60  # that a process may take


def model_ids(writer):
    """A writer's own models, with those that both append in between."""
    own = [f"{writer}{number}" for number in range(N_MODELS)]
    shared = [f"shared{number}" for number in range(SHARED)]
    return [one for pair in zip(own, shared, strict=False) for one in pair] + own[SHARED:]


def append_models(path, writer, go):
    go.wait()
    db = attrdb.open(path)
    for model_id in model_ids(writer):
        entries = [(f"{model_id}/e", "exemplar", model_id, 1.0)]
        entries += [(f"{model_id}/0/{seed}", "sample", model_id, 2.0 + seed) for seed in range(SAMPLES)]
        db.writer.append_model(rows(entries), {"model_id": model_id, "kind": "object"})


def import_folder(path, folder, go):
    corpus.CHUNK = 3
    go.wait()
    result = ingest_corpus(attrdb.open(path), open_corpus(folder, "photos"), [ToyEncoder()])
    assert result.failures == {}


def optimize_until(path, done, go):
    go.wait()
    db = attrdb.open(path)
    while not done.is_set():
        optimize.optimize(db.writer)


def read_until(path, done, go, says):
    """Sends what a reader found wrong, and how many times it looked."""
    db = attrdb.open(path, read_only=True)
    go.wait()
    wrong, n_looks, before = [], 0, (0, 0)
    while not done.is_set():
        db.refresh()
        found = db.sql(
            "SELECT models.model_id, n_exemplars, n_samples, count(*) FILTER (role = 'exemplar') AS exemplars, "
            "count(*) FILTER (role = 'sample') AS samples, count(DISTINCT image_id) AS n_ids "
            "FROM models LEFT JOIN images USING (model_id) GROUP BY ALL"
        ).to_pylist()
        wrong += [row for row in found if list(row.values())[1:] != [1, SAMPLES, 1, SAMPLES, 1 + SAMPLES]]
        [strangers] = db.sql(
            "SELECT count(*) AS n FROM images ANTI JOIN models USING (model_id) WHERE model_id IS NOT NULL"
        ).to_pylist()
        now = (len(found), db.sql("SELECT count(*) AS n FROM images")["n"][0].as_py())
        if strangers["n"] or now < before or now[1] < before[1]:
            wrong.append(f"{strangers['n']} images of hidden models, {before} models and images became {now}")
        before, n_looks = now, n_looks + 1
    says.send((wrong, n_looks))


def test_four_writers_and_a_reader(tmp_path):
    """Two append models (some of them the same), two import overlapping folders, and one optimizes all the while."""
    db = attrdb.create(tmp_path / "db")
    db.writer.add_encoder(**TOY)
    for number in range(N_PICTURES):
        for folder, kept in (("first", number < N_PICTURES - 6), ("second", number >= N_PICTURES - 6 - OVERLAP)):
            if kept:
                picture(tmp_path / folder / f"{number:02d}.png", (9 * number, 200, 40))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(READY)  # one server serves all tests
    go, done = context.Event(), context.Event()
    hears, says = context.Pipe(duplex=False)
    jobs = [
        context.Process(target=append_models, args=(db.path, "a", go)),
        context.Process(target=append_models, args=(db.path, "b", go)),
        context.Process(target=import_folder, args=(db.path, tmp_path / "first", go)),
        context.Process(target=import_folder, args=(db.path, tmp_path / "second", go)),
    ]
    others = [
        context.Process(target=optimize_until, args=(db.path, done, go)),
        context.Process(target=read_until, args=(db.path, done, go, says)),
    ]
    try:
        for process in (*jobs, *others):
            process.start()
        go.set()
        until = time.monotonic() + SECONDS
        for process in jobs:
            process.join(max(0, until - time.monotonic()))
        done.set()
        assert hears.poll(SECONDS), "the reader failed"
        wrong, n_looks = hears.recv()
        for process in others:
            process.join(SECONDS)
        assert [process.exitcode for process in (*jobs, *others)] == [0] * 6
    finally:
        for process in (*jobs, *others):
            process.kill()
    assert wrong == []
    assert n_looks > 1
    db.refresh()
    everyone = sorted({*model_ids("a"), *model_ids("b")})
    assert db.sql("SELECT model_id, n_exemplars, n_samples FROM models ORDER BY ALL").to_pylist() == [
        {"model_id": model_id, "n_exemplars": 1, "n_samples": SAMPLES} for model_id in everyone
    ]
    names = [f"{one}/{rest}" for one in everyone for rest in ("e", *(f"0/{seed}" for seed in range(SAMPLES)))]
    names += [f"photos/{number:02d}.png" for number in range(N_PICTURES)]
    assert db.sql("SELECT image_id FROM images ORDER BY 1")["image_id"].to_pylist() == sorted(names)
    assert health.check(db.snapshot) == []
    # One of each folder.
    assert db.sql("SELECT state, n_failed FROM jobs").to_pylist() == [{"state": "done", "n_failed": 0}] * 2


def hold_again_and_again(file, done):
    while not done.is_set():
        with waiting_lock(file, exclusive=False):
            time.sleep(0.1)


def test_who_wants_a_lock_for_himself_is_not_passed_by_others_for_ever(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(READY)
    done, file = context.Event(), tmp_path / "lock"
    sharing = [context.Process(target=hold_again_and_again, args=(file, done)) for _ in range(4)]
    for process in sharing:
        process.start()
    waits = []
    for _ in range(10):
        began = time.monotonic()
        with waiting_lock(file, exclusive=True):
            waits.append(time.monotonic() - began)
        time.sleep(0.05)
    done.set()
    for process in sharing:
        process.join(SECONDS)
    assert sum(waits) < SECONDS / 4, waits  # it never came to it while four shared


@pytest.mark.parametrize("round_", range(3))
def test_three_that_make_the_same_database(tmp_path, round_):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(READY)  # one server serves all tests
    go = context.Event()
    makers = [context.Process(target=make, args=(tmp_path / "db", name, go)) for name in ("a", "b", "c")]
    for process in makers:
        process.start()
    go.set()
    for process in makers:
        process.join(SECONDS)
    assert [process.exitcode for process in makers] == [0] * 3
    db = attrdb.open(tmp_path / "db")
    assert db.sql("SELECT image_id FROM images ORDER BY 1")["image_id"].to_pylist() == ["a", "b", "c"]
    assert health.check(db.snapshot) == []


def make(path, name, go):
    from attrdb.cli.common import open_with_encoders

    go.wait()
    db, _ = open_with_encoders(path, ("pixels:2",))
    db.writer.add_encoder(**TOY)
    db.writer.append_images(rows([(name, "pretraining", None, 3.0)]))


def test_two_that_have_not_seen_each_other_once_ids_are_indexed(toy):
    optimize.optimize(toy.writer)
    others = [attrdb.open(toy.path), attrdb.open(toy.path)]
    for db in others:
        db.refresh = lambda: None  # neither sees what the other has stored
        db.writer.append_images(rows([("late", "pretraining", None, 30.0), ("p10", "pretraining", None, 10.0)]))
    toy.refresh()
    ids = toy.sql("SELECT image_id FROM images")["image_id"].to_pylist()
    assert ids.count("late") == ids.count("p10") == 1
