"""Leases: the right of one process to do some work, for as long as it reports progress.

A lease is a lock file with a line in it: its holder, and the holder's progress. The system frees the lock when the process
ends, in any way. A holder that is silent for longer than the lease lasts, because it is stuck or its machine is gone, loses
the lease to the next process that asks. Its next report then raises Busy.
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
BEAT = 2.0  # seconds at least between two lines of a holder
LINE = 256  # characters at least of a line, so that a new line covers a longer old one


@dataclass
class Lease:
    """A lease that this process holds."""

    file: Path
    lock: TextIO
    doing: str
    beaten: float = 0.0

    def beat(self, stage: str, done: int, total: int | None) -> None:
        """Report progress.

        raises: Busy if another process has taken the lease over, which now does the work
        """
        if not _is_same(self.file, self.lock):
            raise Busy(f"{self.doing} by another process, which took it over: this one had been silent for too long")
        if time.monotonic() - self.beaten < BEAT:
            return
        line = _read(self.file)
        if self.beaten and not _is_mine(line):
            # Both began at the same moment, on a disk that does not share locks: the last one to write goes on.
            raise Busy(f"{self.doing} by another process ({line.get('pid')} on {line.get('host')}); wait for it")
        self.beaten = time.monotonic()
        _write(self.lock, _this_process() | {"stage": stage, "done": done, "total": total})


@contextmanager
def leased(file: Path, doing: str, minutes: float = LEASE_MINUTES) -> Iterator[Lease]:
    """Hold a lease; makes the folder of its file.

    doing:   the work, such as "model 'vase-1' is being made"
    minutes: for which another holder may be silent
    raises:  Busy if another process holds it, OSError for a full or read-only disk
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock, line = _open_locked(file), _read(file)
    # Some disks that machines share do not share locks.
    if lock is None or line.get("host", socket.gethostname()) != socket.gethostname():
        if _silent_seconds(file) < 60 * minutes:
            process = f" ({line['pid']} on {line['host']})" if "pid" in line else ""
            raise Busy(f"{doing} by another process{process}; wait for it")
        lock = _take_over(file)
    with lock:
        lease = Lease(file, lock, doing)
        lease.beat("begun", 0, 0)
        try:
            yield lease
        finally:
            if _is_same(file, lock) and _is_mine(_read(file)):
                _write(lock, {})


def holder(file: Path) -> dict[str, Any] | None:
    """The holder of a lease and its progress: host, pid, stage, done, total, and silent_seconds since it reported them.

    None if there is no holder, or its process has ended.
    """
    line = _read(file)
    if "pid" not in line or (line["host"] == socket.gethostname() and not alive(line["pid"])):
        return None
    return line | {"silent_seconds": _silent_seconds(file)}


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _is_mine(line: dict[str, Any]) -> bool:
    return _this_process().items() <= line.items()


def _open_locked(file: Path) -> TextIO | None:
    """The file, opened and locked; None if another process has locked it."""
    lock = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _take_over(file: Path) -> TextIO:
    """A new file in place of one whose holder is silent; the old holder's lock is then on a file without a name."""
    new = file.with_name(f"{file.name}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}")
    lock = _open_locked(new)
    assert lock is not None
    new.replace(file)
    return lock


def _read(file: Path) -> dict[str, Any]:
    """The holder's line; empty if there is none, or while it is written."""
    try:
        line: dict[str, Any] = json.loads(file.read_text())
        return line
    except (OSError, ValueError):
        return {}


def _is_same(file: Path, lock: TextIO) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(lock.fileno()))
    except FileNotFoundError:
        return False


def _silent_seconds(file: Path) -> float:
    """Seconds since the last line of the holder."""
    try:
        return max(0.0, time.time() - file.stat().st_mtime)
    except FileNotFoundError:
        return 0.0


def _write(lock: TextIO, line: dict[str, Any]) -> None:
    """Write a line over the old one. The file is never empty meanwhile; other processes would take the lease for free."""
    lock.seek(0)
    lock.write(json.dumps(line).ljust(LINE))
    lock.truncate()
    lock.flush()
    os.fsync(lock.fileno())
