"""Jobs in processes of their own, which can be disturbed."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from attrdb.ingest.encode import add_encoder
from attrdb.ingest.read import corpus, embeddings

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
    "attrdb.training.train",
    "pytest",
]
Job = Callable[[Path, Path], None]


def _child(says: Connection, run: Job, db: Path, inputs: Path) -> None:
    corpus.CHUNK, embeddings.PART_ROWS, add_encoder.CHECKPOINT = 8, 32, 4
    with log_of(db).open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    says.send("begins")
    run(db, inputs)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # one from here on would meet this program, not the job
    says.send("ended")


def log_of(db: Path) -> Path:
    """What the last run on a database printed."""
    return db.with_suffix(".log")


def clear(db: Path) -> None:
    """Delete a database and what lies beside it under its name."""
    for left in db.parent.glob(f"{db.stem}.*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def start(run: Job, db: Path, inputs: Path) -> tuple[multiprocessing.Process, Connection]:
    """A process that has begun with the job, and where it says that it has ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(READY)
    hears, says = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(says, run, db, inputs))
    process.start()
    says.close()
    hears.recv()
    return process, hears


def ends(process: multiprocessing.Process, hears: Connection, seconds: float = TIME_LIMIT) -> bool:
    """Whether a job ends within some seconds, with all of it done; it is killed if it does not."""
    try:
        done = hears.poll(seconds) and hears.recv() == "ended"
    except EOFError:
        done = False
    if not done:
        process.kill()
    process.join()
    return done


def run_whole(run: Job, db: Path, inputs: Path) -> float | None:
    """Seconds that an undisturbed run takes; None if it fails."""
    process, hears = start(run, db, inputs)
    started = time.monotonic()
    done = ends(process, hears)
    return time.monotonic() - started if done else None
