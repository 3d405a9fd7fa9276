"""Leases: what one process works on, for as long as it says that it gets on with it.

A lease is a lock file with a line in it: who holds it, and how far that one is. The system frees the lock when its process
ends, however it ends. A holder that is silent for longer than the lease lasts, stuck or on a machine that is gone, loses it
to the next who asks, and is told so when it next says something.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from attrdb.errors import Busy
from attrdb.store.locks import alive

LEASE_MINUTES = 10.0
BEAT = 2.0  # seconds between two lines of a holder, at least
LINE = 256  # characters that a holder's line has at least, so that a shorter one covers it


@dataclass
class Lease:
    """A lease that this process holds."""

    file: Path
    lock: TextIO
    doing: str
    beaten: float = 0.0

    def beat(self, stage: str, done: int, total: int | None) -> None:
        """Say how far the work is.

        raises: Busy if another process has taken the lease over: what is being made is no longer this one's to make
        """
        if not _is(self.file, self.lock):
            raise Busy(f"{self.doing} by another process, which took it over: this one had been silent for too long")
        if time.monotonic() - self.beaten < BEAT:
            return
        said = _said(self.file)
        if self.beaten and not _mine(said):
            # Begun at the same moment, on a disk that does not pass locks on: the last to write goes on.
            raise Busy(f"{self.doing} by another process ({said.get('pid')} on {said.get('host')}); wait for it")
        self.beaten = time.monotonic()
        _write(self.lock, _me() | {"stage": stage, "done": done, "total": total})


@contextmanager
def leased(file: Path, doing: str, minutes: float = LEASE_MINUTES) -> Iterator[Lease]:
    """Hold a lease; the folder of its file is made if there is none.

    doing:   what the holder does, such as "model 'vase-1' is being made"
    minutes: that another holder may have been silent
    raises:  Busy if another process holds it, OSError for a full or read-only disk
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock, said = _locked(file), _said(file)
    # Not every disk that machines share passes a lock on from one to the other.
    if lock is None or said.get("host", socket.gethostname()) != socket.gethostname():
        if _silent(file) < 60 * minutes:
            who = f" ({said['pid']} on {said['host']})" if "pid" in said else ""
            raise Busy(f"{doing} by another process{who}; wait for it")
        lock = _taken_over(file)
    with lock:
        lease = Lease(file, lock, doing)
        lease.beat("begun", 0, 0)
        try:
            yield lease
        finally:
            if _is(file, lock) and _mine(_said(file)):
                _write(lock, {})


def holder(file: Path) -> dict[str, Any] | None:
    """Who holds a lease and how far it is: host, pid, stage, done, total, and seconds since it last said so.

    None if no one does, or its process has ended.
    """
    found = _said(file)
    if "pid" not in found or (found["host"] == socket.gethostname() and not alive(found["pid"])):
        return None
    return found | {"silent_seconds": _silent(file)}


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _mine(said: dict[str, Any]) -> bool:
    return _me().items() <= said.items()


def _locked(file: Path) -> TextIO | None:
    """The file, opened and locked; None if another process has locked it."""
    lock = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _taken_over(file: Path) -> TextIO:
    """A new file in the place of one whose holder is silent; that one's lock is on a file without a name then."""
    new = file.with_name(f"{file.name}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}")
    lock = _locked(new)
    assert lock is not None
    new.replace(file)
    return lock


def _said(file: Path) -> dict[str, Any]:
    """What a holder has written; nothing where there is none, or while it writes."""
    try:
        said: dict[str, Any] = json.loads(file.read_text())
        return said
    except (OSError, ValueError):
        return {}


def _is(file: Path, lock: TextIO) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(lock.fileno()))
    except FileNotFoundError:
        return False


def _silent(file: Path) -> float:
    """Seconds since its holder last said something."""
    try:
        return max(0.0, time.time() - file.stat().st_mtime)
    except FileNotFoundError:
        return 0.0


def _write(lock: TextIO, what: dict[str, Any]) -> None:
    """Put a line over the old one. The file is never empty meanwhile: others would take it for free."""
    lock.seek(0)
    lock.write(json.dumps(what).ljust(LINE))
    lock.truncate()
    lock.flush()
    os.fsync(lock.fileno())
