"""Locks between processes, which the system lets go when their process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrdb.errors import Busy, NotFound
from attrdb.store.lance_errors import storage

WRITERS_LOCK = ".writers.lock"  # shared by everyone who writes to a database


@contextmanager
def exclusive_lock(file: Path, doing: str) -> Iterator[None]:
    """Hold a lock file of a database; its folder within the database is made if there is none.

    doing:  what the holder does, such as "model 'vase-1' is being made"
    raises: Busy if another process holds it, StorageError for a full or read-only disk, NotFound if the database is gone
    """
    with storage(file.parent):
        if not file.parent.is_dir():
            _make_within_database(file.parent)
        lock = file.open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(f"{doing} by another process; wait for it") from error
        yield


def _make_within_database(folder: Path) -> None:
    """Make a folder of a database, but never a database: one that was deleted meanwhile does not come back as a stub."""
    database = next((parent for parent in folder.parents if (parent / "images.lance").is_dir()), None)
    if database is None:
        raise NotFound(f"{folder} cannot be made: the database that it belongs to is gone")
    folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def waiting_lock(file: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold a lock file once those who have it let go; holders that do not want it exclusively share it.

    Everyone waits for a turn first, so that one who wants it exclusively is not passed by others for ever.

    raises: StorageError for a full or read-only disk
    """
    with storage(file.parent):
        turn, lock = file.with_name(f"{file.name}.turn").open("a"), file.open("a")
    with lock:
        with turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            fcntl.flock(lock, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield


def alive(pid: int) -> bool:
    """Whether this machine has a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
