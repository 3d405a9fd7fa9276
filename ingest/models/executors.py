"""Executors: how the models of a queue are worked on, in this process or in worker processes.

An executor makes attempts and returns their outcomes. What to attempt, and how often, is the queue's business. What an
attempt does is a `Maker`'s.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_messages
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from attrdb.database import Database
from attrdb.errors import AttrdbError, Busy, InvalidValue, NotFound
from attrdb.ingest.customize.base_model import OneBaseModel
from attrdb.ingest.devices import gpu_of_worker, share_cores
from attrdb.ingest.encode import Encoder, load_encoder
from attrdb.ingest.models.ingest_one import ingest_model
from attrdb.ingest.models.specs import ModelSpec
from attrdb.progress import Progress
from attrdb.store.job_folders import model_job
from attrdb.store.leases import LEASE_MINUTES, holder

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

BUSY_SECONDS = 0.5  # pause after a model that another process is making
CHECK_SECONDS = 5.0  # between two checks for worker processes that are silent
GRACE_SECONDS = 5.0  # that a worker process has to end by itself


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    done:    the model is made
    stored:  it was stored already
    busy:    another process is making it
    refused: it cannot be made, and a further attempt would end the same way
    failed:  an error that may not come again
    """

    status: Literal["done", "stored", "busy", "refused", "failed"]
    reason: str = ""


class Task(Protocol):
    """What is to be done about one model."""

    @property
    def model_id(self) -> str: ...


class Maker(ABC):
    """Attempts at tasks in this process, which keep the last base model loaded."""

    def __init__(self, db_path: Path, report: Progress, lease_minutes: float):
        self.db_path = db_path
        self.report = report
        self.lease_minutes = lease_minutes
        self.base_model = OneBaseModel()

    @abstractmethod
    def make(self, task: Any) -> Outcome:
        """Do a task. raises: Busy if another process is at it"""

    def attempt(self, task: Task) -> Outcome:
        """Do a task, whatever it raises."""
        try:
            return self.make(task)
        except Busy:
            time.sleep(BUSY_SECONDS)
            return Outcome("busy")
        except (InvalidValue, NotFound) as error:
            return Outcome("refused", str(error))
        except Exception as error:  # an error of any library in one model must not end the others
            self.base_model.forget()
            known = isinstance(error, AttrdbError)
            return Outcome("failed", str(error) if known else f"{type(error).__name__}: {error}")


NewMaker = Callable[[Progress], Maker]  # of what reports progress; worker processes are sent it


class Executor(Protocol):
    """Works on models, several at a time if it can. Used by one thread."""

    @property
    def n_free(self) -> int:
        """Number of models that can be submitted now."""

    @property
    def n_running(self) -> int:
        """Number of models that were submitted and have no outcome yet."""

    def submit(self, spec: Task) -> None:
        """Begin an attempt; only while `n_free` is above 0."""

    def wait(self) -> Iterator[tuple[Task, Outcome]]:
        """Wait until there is news, and yield the attempts that have ended; there may be none.

        A model is no longer running when its outcome is yielded. An attempt that is lost with its process has failed.
        """

    def close(self) -> None:
        """End all attempts that are running, and free what the executor holds."""


class ModelMaker(Maker):
    """Makes models, and keeps encoders loaded."""

    def __init__(
        self, db_path: Path, encoders: Sequence[Encoder], report: Progress, lease_minutes: float = LEASE_MINUTES
    ):
        super().__init__(db_path, report, lease_minutes)
        self.encoders = encoders

    @classmethod
    def of(cls, db_path: Path, encoder_specs: Sequence[str], lease_minutes: float, report: Progress) -> ModelMaker:
        return cls(db_path, [load_encoder(spec) for spec in encoder_specs], report, lease_minutes)

    def make(self, task: ModelSpec) -> Outcome:
        db = Database(self.db_path)
        maker = holder(model_job(db.path, task.model_id).lock)
        if maker and maker["silent_seconds"] < 60 * self.lease_minutes:
            raise Busy(task.model_id)  # before the base model is loaded in vain
        result = ingest_model(
            db,
            task.read_exemplars(),
            task.settings,
            self.encoders,
            task.model_id,
            self.report,
            self.base_model.load,
            self.lease_minutes,
        )
        return Outcome("done" if result.appended else "stored")


class LocalExecutor:
    """Works on one model at a time, in this process."""

    def __init__(self, maker: Maker):
        self._maker = maker
        self._spec: Task | None = None

    @property
    def n_free(self) -> int:
        return 1 - self.n_running

    @property
    def n_running(self) -> int:
        return int(self._spec is not None)

    def submit(self, spec: Task) -> None:
        self._spec = spec

    def wait(self) -> Iterator[tuple[Task, Outcome]]:
        spec, self._spec = self._spec, None
        if spec:
            yield spec, self._maker.attempt(spec)

    def close(self) -> None:
        self._spec = None


# --- worker processes -------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """A worker process, as the process that started it sees it."""

    number: int
    process: BaseProcess
    connection: Connection
    spec: Task | None = None  # that it is making
    last_message: float = 0.0  # when it came, by time.monotonic()
    stuck: bool = False  # it was killed for its silence

    def assign(self, spec: Task) -> bool:
        """Hand a model over; False if the process has ended."""
        self.spec, self.last_message = spec, time.monotonic()
        try:
            self.connection.send(spec)
        except OSError:
            return False
        return True


class ProcessExecutor:
    """Works on models in worker processes, each with a GPU where there are as many.

    A process that ends, is silent for longer than a lease, or reports a failure is replaced by a new one.
    """

    def __init__(self, new_maker: NewMaker, n_workers: int, report: Progress, lease_minutes: float):
        self.new_maker = new_maker
        self.n_workers = n_workers
        self.report = report
        self.lease_minutes = lease_minutes
        self._workers: dict[int, Worker] = {}  # by number, from 1

    @property
    def n_free(self) -> int:
        return self.n_workers - self.n_running

    @property
    def n_running(self) -> int:
        return len(self._busy())

    def submit(self, spec: Task) -> None:
        busy = {worker.number for worker in self._busy()}
        number = next(number for number in range(1, self.n_workers + 1) if number not in busy)
        idle = self._workers.get(number)
        if idle and idle.assign(spec):
            return
        if idle:  # it has ended since its last model
            self._dismiss(idle)
        self._workers[number] = self._start(number)
        self._workers[number].assign(spec)  # should it have ended, `wait` reports the model as lost

    def wait(self) -> Iterator[tuple[Task, Outcome]]:
        self._kill_silent()
        workers: dict[Any, Worker] = {worker.connection: worker for worker in self._busy()}
        for connection in wait_for_messages(list(workers), CHECK_SECONDS):
            yield from self._receive(workers[connection])

    def close(self) -> None:
        self._dismiss(*self._workers.values())

    def _busy(self) -> list[Worker]:
        return [worker for worker in self._workers.values() if worker.spec]

    def _receive(self, worker: Worker) -> Iterator[tuple[Task, Outcome]]:
        """Take a worker's message: progress is reported, an outcome is yielded."""
        spec = worker.spec
        assert spec is not None
        worker.last_message = time.monotonic()
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            lost = lost_outcome(worker.process.exitcode, self.lease_minutes if worker.stuck else None)
            worker.spec = None
            self._dismiss(worker)
            yield spec, lost
            return
        if not isinstance(message, Outcome):
            stage, *units = message
            self.report(f"worker {worker.number}: {stage}", *units)
            return
        worker.spec = None
        yield spec, message
        if message.status == "failed":  # its next models may fail too, such as after an error of its GPU
            self._dismiss(worker)

    def _kill_silent(self) -> None:
        for worker in self._busy():
            silent = time.monotonic() - worker.last_message > 60 * self.lease_minutes
            if silent and not worker.connection.poll():
                worker.stuck = True
                worker.process.kill()  # its connection ends, and `_receive` reports the model as lost

    def _dismiss(self, *workers: Worker) -> None:
        """End worker processes. Each ends by itself at its next message, and is killed after GRACE_SECONDS."""
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            worker.process.join(max(0, deadline - time.monotonic()))
            worker.process.kill()  # also a process that a signal has stopped
            worker.process.join()
            self._workers.pop(worker.number, None)

    def _start(self, number: int) -> Worker:
        context = _context()
        connection, worker_end = context.Pipe()
        arguments = (worker_end, number, self.n_workers, self.new_maker)
        process = context.Process(target=_work, args=arguments, daemon=True)
        with _interrupts_blocked():
            process.start()
        worker_end.close()  # so that `connection` ends with the process
        return Worker(number, process, connection)


def _context() -> ForkServerContext | SpawnContext:
    """How worker processes are started. Neither CUDA nor Lance works after a fork of a process that has used it.

    On Linux without a GPU they fork from a process that has imported what takes longest, and has used none of it: the first
    worker starts in 8 seconds of a core, the others in half a second each.
    """
    if sys.platform != "linux" or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    multiprocessing.set_forkserver_preload(["attrdb.ingest.customize.customize"])
    return multiprocessing.get_context("forkserver")


def lost_outcome(exit_code: int | None, silent_minutes: float | None = None) -> Outcome:
    """The outcome of a model whose worker process has ended; silent_minutes: it was killed after such a silence."""
    if silent_minutes is not None:
        return Outcome(
            "failed",
            f"its worker process was silent for {silent_minutes:g} minutes and was ended; if the work is that slow, raise "
            "--lease-minutes",
        )
    end = f"signal {-exit_code}" if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
    return Outcome("failed", f"its worker process ended with {end}")


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes started inside the block ignore Ctrl-C. The process that starts them receives it too, and ends them."""
    resource_tracker.ensure_running()  # its start would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(
    connection: Connection,
    number: int,
    n_workers: int,
    new_maker: NewMaker,
) -> None:
    """A worker process: does the tasks that it receives until it is ended."""
    share_cores(n_workers)
    if (gpu := gpu_of_worker(number)) is not None:
        torch.cuda.set_device(gpu)

    def report(stage: str, done: int, total: int | None, note: str = "") -> None:
        connection.send((stage, done, total, note))

    maker = new_maker(report)
    try:
        while True:
            connection.send(maker.attempt(connection.recv()))
    except (EOFError, OSError):  # the process that started it is gone
        return
