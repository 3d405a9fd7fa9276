"""Jobs: what ran, how far it came, and the items it could not do."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from attrdb.errors import AttrdbError
from attrdb.store.predicates import among, literal
from attrdb.store.writer import Writer


@dataclass
class JobResult:
    """How many items a run finished, how many were stored before it, and how many it could not use.

    n_skipped: items that have not what the job needs, such as a picture whose bytes are not stored
    failures:  item -> reason; those of earlier runs that still hold are among them
    """

    n_done: int = 0
    n_stored: int = 0
    n_skipped: int = 0
    failures: dict[str, str] = field(default_factory=dict)


class Job:
    """A running job: counts what it does and keeps what it could not."""

    def __init__(self, writer: Writer, job_id: str):
        self.writer = writer
        self.job_id = job_id
        self.n_done = 0
        self.n_stored = 0
        self.n_skipped = 0
        rows = writer.snapshot.rows("failures", f"job_id = {literal(job_id)}")
        self.failures: dict[str, str] = {row["item"]: row["reason"] for row in rows}

    def result(self, items: Container[str] | None = None) -> JobResult:
        """The counts so far, with the failures of some items, or of all."""
        failures = {item: why for item, why in self.failures.items() if items is None or item in items}
        return JobResult(self.n_done, self.n_stored, self.n_skipped, failures)

    def failed(self, reasons: Mapping[str, str]) -> None:
        """Store items with the reasons why they failed."""
        if reasons:
            shared = {"job_id": self.job_id, "failed_at": datetime.now(UTC)}
            rows = [
                {**shared, "failure_id": f"{self.job_id} {item}", "item": item, "reason": reason}
                for item, reason in reasons.items()
            ]
            self.writer.upsert("failures", rows)
            self.failures |= reasons

    def mended(self, items: Iterable[str]) -> None:
        """Take out items that have failed before and are done now."""
        done = [item for item in items if item in self.failures]
        if done:
            self.writer.delete("failures", among("failure_id", (f"{self.job_id} {item}" for item in done)))
            for item in done:
                del self.failures[item]


@contextmanager
def running(writer: Writer, command: str, subject: str, settings: Mapping[str, Any]) -> Iterator[Job]:
    """A job's row in `jobs`, from its start to its end, however it ends."""
    job = Job(writer, f"{command}/{subject}")
    row = {
        "job_id": job.job_id,
        "command": command,
        "settings": json.dumps(settings, sort_keys=True),
        "state": "running",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started_at": datetime.now(UTC),
    }
    writer.upsert("jobs", [row])
    try:
        yield job
    except BaseException as error:
        row |= {"state": "failed", "message": f"{type(error).__name__}: {error}"}
        with suppress(AttrdbError):  # a disk that is full cannot take this row either
            _end(job, row)
        raise
    _end(job, row | {"state": "incomplete" if job.failures else "done"})


def _end(job: Job, row: dict[str, Any]) -> None:
    counts = {"n_done": job.n_done, "n_failed": len(job.failures), "ended_at": datetime.now(UTC)}
    job.writer.upsert("jobs", [row | counts])
