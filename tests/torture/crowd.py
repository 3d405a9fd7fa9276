"""Eight writers and four readers at one database: no row is lost or doubled, and readers see whole models only."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

from conftest import TOY, rows

import attrdb
from attrdb.errors import Busy
from attrdb.upkeep import health, optimize
from torture.processes import READY
from torture.trials import Trial

SAMPLES = 5  # of a model
SECONDS_TO_END = 120  # that a writer may take for what it is at when time is up
APPENDED = [f"writer {number}" for number in range(4)]  # each appends models of its own
SHARED = ["shared a", "shared b"]  # both append the same models


def append(db: attrdb.Database, model_id: str) -> None:
    entries = [(f"{model_id}/e", "exemplar", model_id, 1.0)]
    entries += [(f"{model_id}/0/{seed}", "sample", model_id, 2.0 + seed) for seed in range(SAMPLES)]
    db.writer.append_model(rows(entries), {"model_id": model_id, "kind": "object"})


def append_models(path: Path, name: str, done: Event) -> int:
    db, n = attrdb.open(path), 0
    while not done.is_set():
        append(db, f"{name.split()[0] if name in SHARED else name} {n}")
        n += 1
    return n


def append_and_remove(path: Path, name: str, done: Event) -> int:
    """Every model that it appends goes again."""
    db, n = attrdb.open(path), 0
    while not done.is_set():
        append(db, f"gone {n}")
        while True:
            try:
                db.remove(where=f"model_id = 'gone {n}'", models="remove")
                break
            except Busy:  # it is optimized
                time.sleep(0.05)
        n += 1
    return n


def optimize_again_and_again(path: Path, name: str, done: Event) -> int:
    db, n = attrdb.open(path), 0
    while not done.is_set():
        try:
            optimize.optimize(db.writer)
            n += 1
        except Busy:  # images are removed
            pass
        done.wait(0.5)
    return n


def read(path: Path, name: str, done: Event) -> int:
    """raises: AssertionError if it sees half a model, or fewer images of those that stay than before"""
    db, n, before = attrdb.open(path, read_only=True), 0, 0
    while not done.is_set():
        db.refresh()
        models = db.sql(
            "SELECT models.model_id, n_exemplars, n_samples, count(*) FILTER (role = 'exemplar') AS exemplars, "
            "count(*) FILTER (role = 'sample') AS samples, count(DISTINCT image_id) AS n_ids "
            "FROM models LEFT JOIN images USING (model_id) WHERE models.model_id NOT LIKE 'gone %' GROUP BY ALL"
        ).to_pylist()
        half = [model for model in models if list(model.values())[1:] != [1, SAMPLES, 1, SAMPLES, 1 + SAMPLES]]
        assert not half, f"models that are not whole: {half[:3]}"
        strangers = db.sql(
            "SELECT image_id FROM images ANTI JOIN models USING (model_id) WHERE model_id NOT LIKE 'gone %'"
        )["image_id"].to_pylist()
        assert not strangers, f"images of hidden models: {strangers[:3]}"
        assert len(models) >= before, f"{before} models were stored, {len(models)} are"
        before, n = len(models), n + 1
    return n


def _one(says: Connection, work: Callable[[Path, str, Event], int], path: Path, name: str, done: Event) -> None:
    try:
        says.send((work(path, name, done), None))
    except BaseException as error:
        says.send((0, f"{type(error).__name__}: {error}"))


WORK = (
    *((name, append_models) for name in (*APPENDED, *SHARED)),
    ("remover", append_and_remove),
    ("optimizer", optimize_again_and_again),
    *((f"reader {number}", read) for number in range(4)),
)


def crowd(seconds: float, folder: Path) -> Iterator[Trial]:
    """One trial per process, and one for what is stored in the end."""
    db = attrdb.create(folder / "crowd.attrdb")
    db.writer.add_encoder(**TOY)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(READY)
    done = context.Event()
    running = []
    for name, work in WORK:
        hears, says = context.Pipe(duplex=False)
        process = context.Process(target=_one, args=(says, work, db.path, name, done))
        process.start()
        running.append((name, process, hears))
    time.sleep(seconds)
    done.set()
    rounds = {}
    for name, process, hears in running:
        rounds[name], problem = hears.recv() if hears.poll(SECONDS_TO_END) else (0, "does not end")
        process.kill()
        group = "reader" if name.startswith("reader") else "writer"
        yield Trial(group, f"{name}: {rounds[name]} rounds", [problem] if problem else [])
    yield Trial("stored", f"{sum(rounds.values())} rounds in all", list(_lost_or_doubled(db, rounds)))


def _lost_or_doubled(db: attrdb.Database, rounds: dict[str, int]) -> Iterator[str]:
    db.refresh()
    wanted = {f"{name} {n}" for name in APPENDED for n in range(rounds[name])}
    wanted |= {f"shared {n}" for n in range(max(rounds[name] for name in SHARED))}
    models = db.sql("SELECT model_id FROM models")["model_id"].to_pylist()
    if sorted(models) != sorted(wanted):
        yield f"models: lost {sorted(wanted - set(models))[:3]}, {len(models)} instead of {len(wanted)}"
    n_images = db.sql("SELECT count(*) AS n, count(DISTINCT image_id) AS n_ids FROM images").to_pylist()
    if n_images != [{"n": (1 + SAMPLES) * len(wanted), "n_ids": (1 + SAMPLES) * len(wanted)}]:
        yield f"images: {n_images} instead of {(1 + SAMPLES) * len(wanted)}"
    yield from (f"check {finding.check}: {finding.rows.to_pylist()[:3]}" for finding in health.check(db.snapshot))
