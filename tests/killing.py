"""Kills jobs at random moments, gives them again, and compares what they leave with a run that was not disturbed.

    python tests/killing.py --points 60 --seed 0

One line a point: the job, when it was killed (seconds, and the share of an undisturbed run), whether that was before its
end, how many images were visible then, and what was wrong. The exit code is 1 if anything was.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import add_index
from PIL import Image

import attrdb
from attrdb.cli import main as attrdb_command
from attrdb.errors import AttrdbError, NotFound
from attrdb.ingest.encode import add_encoder
from attrdb.ingest.read import corpus, embeddings
from attrdb.store.schema import TABLES, feature_array
from attrdb.upkeep import health

N_PICTURES = 60
N_VECTORS = 320  # a shard
N_MODELS = 6
KEYS = {
    "images": "image_id",
    "models": "model_id",
    "encoders": "encoder_id",
    "jobs": "job_id",
    "failures": "failure_id",
    "marked_models": "model_id",
    "blocked_digests": "digest",
    "removals": "digest",
}
# What says when, where or for how long something ran, and how much of it the last run did.
NOT_COMPARED = {"created_at", "started_at", "ended_at", "failed_at", "customize_seconds", "synthesize_seconds"} | {
    "host",
    "pid",
    "n_done",
    "removal_id",
    "marked_at",
    "blocked_at",
    "images_version",
}
TIME_LIMIT = 120  # seconds that one run may take
# Importing them starts none of Lance's threads, so that the fork server may hold them ready.
READY = [
    "attrdb.cli",
    "attrdb.upkeep.health",
    "attrdb.upkeep.optimize",
    "attrdb.ingest.encode.add_encoder",
    "attrdb.ingest.read.corpus",
    "attrdb.ingest.read.embeddings",
    "attrdb.ingest.customize.base_model",
    "attrdb.ingest.models.ingest_one",
    "pytest",
]

Rows = dict[str, dict]
Tables = dict[str, Rows]


# --- the jobs that are killed ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """A job as a user gives it. before: makes the database that it is given, if it needs one."""

    name: str
    run: Callable[[Path, Path], None]
    before: Callable[[Path, Path], None] | None = None


def attrdb_runs(*words: str | Path) -> None:
    try:
        attrdb_command([str(word) for word in words], standalone_mode=False)
    except click.ClickException as error:
        if "were left out" not in str(error):  # the broken picture and the zero vectors
            raise


def ingest_corpus(db: Path, inputs: Path) -> None:
    attrdb_runs("ingest", "corpus", db, inputs / "photos", "--encoder", "pixels:2", "--quiet")


def ingest_two(db: Path, inputs: Path) -> None:
    """Most of it is making the database."""
    attrdb_runs("ingest", "corpus", db, inputs / "vase", "--encoder", "pixels:2", "--quiet")


def ingest_embeddings(db: Path, inputs: Path) -> None:
    attrdb_runs("ingest", "corpus", db, inputs / "vectors", "--encoder", "clip:x", "--source", "web", "--quiet")


def append_models(db: Path, inputs: Path) -> None:
    opened = attrdb.open(db)
    for number in range(N_MODELS):
        opened.writer.append_model(*model(f"m{number}", number))


def ingest_model(db: Path, inputs: Path) -> None:
    what = "--category vase --kind object --base-model icon-sd --prompts-per-scheme 2 --samples-per-prompt 1"
    small = "--steps 3 --batch 2 --solver-steps 2 --quiet"
    attrdb_runs("ingest", "model", db, "--exemplars", inputs / "vase", *what.split(), *small.split())


def encode(db: Path, inputs: Path) -> None:
    attrdb_runs("encode", db, "--encoder", "pixels:3", "--quiet")


def optimize(db: Path, inputs: Path) -> None:
    attrdb_runs("optimize", db, "--drop-older-than", "0", "--quiet")


def remove(db: Path, inputs: Path) -> None:
    """A model with all of its images, then a part of the corpus and an exemplar of a model that stays."""
    attrdb_runs("remove", db, "--where", "image_id = 'm1/e0'", "--models", "remove", "--quiet")
    attrdb_runs("remove", db, "--ids", inputs / "opt-out.txt", "--models", "mark", "--purge", "--block", "--quiet")


def corpus_stored(db: Path, inputs: Path) -> None:
    ingest_corpus(db, inputs)


def much_stored(db: Path, inputs: Path) -> None:
    """A corpus, models and features that others made, in many fragments, with a vector index."""
    ingest_corpus(db, inputs)
    append_models(db, inputs)
    add_index(db, "pixels_2")
    attrdb.open(db).writer.append_model(*model("late", 99))


def model(model_id: str, seed: int) -> tuple[pa.Table, dict]:
    """Rows of a model with two exemplars and five samples, and its row in models."""
    features = np.random.default_rng(seed).normal(size=(7, 12)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1)[:, None]
    names = [f"{model_id}/e{n}" for n in range(2)] + [f"{model_id}/0/{n}" for n in range(5)]
    table = pa.table(
        {
            "image_id": names,
            "role": ["exemplar"] * 2 + ["sample"] * 5,
            "model_id": [model_id] * 7,
            "pixels_2": feature_array(features),
        }
    )
    return table, {"model_id": model_id, "kind": "object", "created_at": datetime(2026, 1, 1, tzinfo=UTC)}


WORKLOADS = (
    Workload("new database", ingest_two),
    Workload("ingest corpus", ingest_corpus),
    Workload("ingest embeddings", ingest_embeddings),
    Workload("append models", append_models, corpus_stored),
    Workload("encode", encode, corpus_stored),
    Workload("optimize", optimize, much_stored),
    Workload("remove", remove, much_stored),
)
CUSTOMIZE = Workload("ingest model", ingest_model, corpus_stored)


def make_inputs(folder: Path) -> None:
    """Pictures (one of them broken), vectors (two of them zero) and exemplars."""
    chance = np.random.default_rng(0)
    for name, count in (("photos", N_PICTURES), ("vase", 2)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = chance.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.png")
    (folder / "photos" / "broken.png").write_bytes(b"not a picture")
    (folder / "opt-out.txt").write_text("m0/e1\nphotos/050.png\nnobody\n")
    for part in ("img_emb", "metadata"):
        (folder / "vectors" / part).mkdir(parents=True)
    for shard in range(2):
        vectors = chance.normal(size=(N_VECTORS, 8)).astype(np.float16)
        vectors[3 + shard] = 0
        np.save(folder / "vectors" / "img_emb" / f"img_emb_{shard}.npy", vectors)
        keys = [f"{shard}-{row}" for row in range(N_VECTORS)]
        metadata = pa.table({"key": keys, "caption": [f"picture {key}" for key in keys]})
        pq.write_table(metadata, folder / "vectors" / "metadata" / f"metadata_{shard}.parquet")


# --- running and killing ---------------------------------------------------------------------------------------------


def _child(says: Connection, run: Callable[[Path, Path], None], db: Path, inputs: Path) -> None:
    corpus.CHUNK, embeddings.PART_ROWS, add_encoder.CHECKPOINT = 8, 32, 4
    with log_of(db).open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    says.send("begins")
    run(db, inputs)
    says.send("ended")


def log_of(db: Path) -> Path:
    """What the last run on a database printed."""
    return db.with_suffix(".log")


def start(run: Callable[[Path, Path], None], db: Path, inputs: Path) -> tuple[multiprocessing.Process, Connection]:
    """A process that has begun with the job, and where it says that it has ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(READY)
    hears, says = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(says, run, db, inputs))
    process.start()
    says.close()
    hears.recv()
    return process, hears


def run_whole(run: Callable[[Path, Path], None], db: Path, inputs: Path) -> float | None:
    """Seconds that an undisturbed run takes; None if it fails."""
    process, hears = start(run, db, inputs)
    started = time.monotonic()
    try:
        ended = hears.poll(TIME_LIMIT) and hears.recv() == "ended"
    except EOFError:
        ended = False
    took = time.monotonic() - started
    if not ended:
        process.kill()
    process.join()
    return took if ended else None


def run_killed(run: Callable[[Path, Path], None], db: Path, inputs: Path, after: float) -> float | None:
    """Kill the job after some seconds; the seconds it took if it had ended by then."""
    process, hears = start(run, db, inputs)
    started = time.monotonic()
    ended = hears.poll(after)
    took = time.monotonic() - started
    process.kill()
    process.join()
    return took if ended else None


# --- comparing -------------------------------------------------------------------------------------------------------


def tables(db: Path) -> Tables:
    """All that a reader sees, by table and key, without what tells one run from another.

    raises: AssertionError if a key stands twice
    """
    opened = attrdb.open(db, read_only=True)
    found = {}
    for name in TABLES:
        rows = opened.sql(f"SELECT * FROM {name}").to_pylist()
        rows = [{column: value for column, value in row.items() if column not in NOT_COMPARED} for row in rows]
        keys = [row[KEYS[name]] if name in KEYS else str(row) for row in rows]
        assert len(set(keys)) == len(keys), f"{name}: {len(keys) - len(set(keys))} rows stand twice"
        found[name] = dict(zip(keys, rows, strict=True))
    return found


def differences(found: Tables, wanted: Tables) -> Iterator[str]:
    """What tells two databases apart, a line a table."""
    for name in wanted:
        lost, extra = wanted[name].keys() - found[name].keys(), found[name].keys() - wanted[name].keys()
        if lost or extra:
            yield f"{name}: lost {sorted(lost)[:3]}, more than it should have {sorted(extra)[:3]}"
        for key in sorted(found[name].keys() & wanted[name].keys()):
            if found[name][key] != wanted[name][key]:
                yield f"{name}: {key} is {found[name][key]}, should be {wanted[name][key]}"
                break


def half_visible(seen: Tables, before: Tables, wanted: Tables) -> Iterator[str]:
    """What a reader should not see after a kill: rows lost, rows not yet whole, models without all of their images."""
    for name in TABLES:
        if name in ("jobs", "removals"):  # whose state changes
            continue
        if lost := (before[name].keys() & wanted[name].keys()) - seen[name].keys():
            yield f"{name}: {sorted(lost)[:3]} were stored before and are gone"
        for key, row in seen[name].items():
            old, new = before[name].get(key), wanted[name].get(key)
            # What is to be taken out may still be there, as it was.
            if row != old and (new is None or (old is None and row != new)):
                yield f"{name}: {key} is {row}, should be {new}"
            elif (
                old is not None
                and new is not None
                and any(row[column] not in (old.get(column), new[column]) for column in row)
            ):
                yield f"{name}: {key} is {row}, was {old} and becomes {new}"
    removing = any(row["state"] != "done" for row in seen["removals"].values())
    for model_id, row in seen["models"].items():
        if removing:  # it counts what will be left
            continue
        roles = [image["role"] for image in seen["images"].values() if image["model_id"] == model_id]
        counted = {"n_exemplars": roles.count("exemplar"), "n_samples": roles.count("sample")}
        if any(row[name] != n for name, n in counted.items()):
            yield f"model {model_id} is shown with {counted}"
    strangers = {image["model_id"] for image in seen["images"].values()} - seen["models"].keys() - {None}
    if strangers:
        yield f"images of {sorted(strangers)} are shown, which have no row in models"


def unsound(db: Path, allowed: frozenset[str] = frozenset()) -> Iterator[str]:
    """What a check finds."""
    for finding in health.check(attrdb.open(db, read_only=True).snapshot):
        if finding.check not in allowed:
            yield f"check {finding.check}: {finding.rows.to_pylist()[:3]}"


# --- points ----------------------------------------------------------------------------------------------------------


@dataclass
class Point:
    """One kill. n_visible: images that a reader saw afterwards, None where there was no database yet."""

    workload: str
    seconds: float
    share: float  # of an undisturbed run
    inside: bool
    n_visible: int | None = None
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        where = "inside" if self.inside else "after the end"
        seen = "no database yet" if self.n_visible is None else f"{self.n_visible} images visible"
        what = f"{self.workload:18} {self.seconds:6.3f} s {self.share:4.0%}  {where:13} {seen}"
        return "\n    ".join([what, *self.problems])


class Undisturbed:
    """A workload's database before it, and what a run without a kill leaves."""

    def __init__(self, workload: Workload, folder: Path, inputs: Path):
        self.workload, self.folder, self.inputs = workload, folder, inputs
        self.base = folder / "before.attrdb" if workload.before else None
        if self.base and run_whole(workload.before, self.base, inputs) is None:
            raise RuntimeError(f"{workload.name!r} cannot begin: {log_of(self.base).read_text()}")
        self.before = tables(self.base) if self.base else {name: {} for name in TABLES}
        seconds = []
        for number in range(2):
            db = self.copy(f"undisturbed-{number}.attrdb")
            seconds.append(run_whole(workload.run, db, inputs))
            if seconds[-1] is None:
                raise RuntimeError(f"{workload.name!r} fails without being killed: {log_of(db).read_text()}")
            found = tables(db)
            if number and (different := list(differences(found, self.wanted))):
                raise RuntimeError(f"two undisturbed runs of {workload.name!r} differ: {different}")
            self.wanted = found
        self.seconds = min(seconds)

    def copy(self, name: str) -> Path:
        db = self.folder / name
        if self.base:
            shutil.copytree(self.base, db)
        return db

    def kill(self, share: float, number: int) -> Point:
        """Kill a run after a share of its time, look, run it whole, and compare."""
        db = self.copy(f"killed-{number}.attrdb")
        after = share * self.seconds
        took = run_killed(self.workload.run, db, self.inputs, after)
        if took is not None:  # the time was measured while the machine did other things too
            self.seconds = min(self.seconds, took)
        point = Point(self.workload.name, after, share, inside=took is None)
        try:
            self._look(db, point)
            if run_whole(self.workload.run, db, self.inputs) is None:
                point.problems.append(f"given again, it failed: {log_of(db).read_text()[-2000:]}")
            else:
                point.problems += differences(tables(db), self.wanted)
                point.problems += unsound(db)
        except (AttrdbError, AssertionError) as error:
            point.problems.append(f"{type(error).__name__}: {error}")
        if not point.problems:
            shutil.rmtree(db)
        return point

    def _look(self, db: Path, point: Point) -> None:
        try:
            seen = tables(db)
        except NotFound:
            if self.base:
                raise
            return
        point.n_visible = len(seen["images"])
        point.problems += half_visible(seen, self.before, self.wanted)
        point.problems += unsound(db, frozenset({"unfinished_models", "unfinished_removals"}))


def kill_at_random(
    n_points: int,
    seed: int,
    folder: Path,
    workloads: tuple[Workload, ...] = WORKLOADS,
    seconds: float | None = None,
    says: Callable[[str], None] = lambda line: None,
) -> list[Point]:
    """Points in turn over the workloads, each uniform in the time that an undisturbed run takes.

    seconds: no point begins later than that
    """
    started = time.monotonic()
    inputs = folder / "inputs"
    make_inputs(inputs)
    chance = Random(seed)
    undisturbed = []
    for workload in workloads:
        own = folder / workload.name.replace(" ", "-")
        own.mkdir()
        undisturbed.append(Undisturbed(workload, own, inputs))
        says(f"{workload.name:18} {undisturbed[-1].seconds:6.3f} s undisturbed")
    points = []
    for number in range(n_points):
        if seconds is not None and time.monotonic() - started > seconds:
            break
        points.append(undisturbed[number % len(undisturbed)].kill(chance.random(), number))
        says(str(points[-1]))
    return points


@click.command()
@click.option("--points", type=click.IntRange(1), default=60, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--minutes", type=float, help="Begin no point after so many.")
@click.option("--customize/--no-customize", default=True, help="Also kill a real customization of a tiny model.")
def main(points: int, seed: int, minutes: float | None, customize: bool) -> None:
    """Kill jobs at random points, give them again, and compare with undisturbed runs."""
    workloads = (*WORKLOADS, CUSTOMIZE) if customize else WORKLOADS
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        seconds = 60 * minutes if minutes else None
        found = kill_at_random(points, seed, Path(folder), workloads, seconds, click.echo)
    inside, wrong = sum(point.inside for point in found), sum(bool(point.problems) for point in found)
    took = time.monotonic() - started
    click.echo(f"{len(found)} points, {inside} before the job's end, {wrong} with problems, {took:.0f} s")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
