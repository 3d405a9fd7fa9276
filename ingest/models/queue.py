"""A queue of customized models: what is waiting, how often it is attempted, and what became of it.

Several worker processes, and several commands, may share a file of specs. A model that is stored is done, a model whose lease
is held is being made, and any other may be taken. A lease ends with its process, however that ends, or after a long silence,
so that rerunning the command resumes the queue.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Container, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from attrdb.database import Database
from attrdb.ingest.encode import load_encoder
from attrdb.ingest.models.executors import (
    Executor,
    LocalExecutor,
    Maker,
    ModelMaker,
    NewMaker,
    Outcome,
    ProcessExecutor,
    Task,
)
from attrdb.ingest.models.specs import ModelSpec
from attrdb.ingest.options import QueueSettings, check_options
from attrdb.ingest.read.corpus import register
from attrdb.progress import Progress, no_progress
from attrdb.store import jobs
from attrdb.store.jobs import JobResult

DEFAULTS = QueueSettings()


class Queue:
    """Models that wait, and the results of the others."""

    def __init__(self, specs: Sequence[Task], job: jobs.Job, report: Progress, retries: int):
        self.waiting = deque(specs)
        self.result = JobResult()
        self._job = job
        self._report = report
        self._total = len(specs)
        self._retries = retries
        self._attempts: Counter[str] = Counter()

    def take(self) -> Task | None:
        """The next model, which is then no longer waiting."""
        return self.waiting.popleft() if self.waiting else None

    def take_all(self, model_ids: Container[str]) -> list[Task]:
        """The models with these ids, which are then no longer waiting."""
        taken = [spec for spec in self.waiting if spec.model_id in model_ids]
        self.waiting = deque(spec for spec in self.waiting if spec.model_id not in model_ids)
        return taken

    def settle(self, spec: Task, outcome: Outcome) -> None:
        """Record how an attempt ended. A model that another process is making, or that may succeed yet, waits again."""
        if outcome.status == "busy":
            self.waiting.append(spec)
            return
        self._attempts[spec.model_id] += 1
        if outcome.status == "failed" and self._attempts[spec.model_id] <= self._retries:
            self.waiting.append(spec)
        elif outcome.status in ("failed", "refused"):
            self._record_failure(spec, outcome)
        else:
            self._record_success(spec, outcome)

    def report_progress(self) -> None:
        n_failed = len(self.result.failures)
        settled = self.result.n_done + self.result.n_stored + n_failed
        self._report("models", settled, self._total, f"{n_failed} failed" if n_failed else "")

    def _record_failure(self, spec: Task, outcome: Outcome) -> None:
        n_attempts = self._attempts[spec.model_id]
        reason = outcome.reason + (f" (attempt {n_attempts})" if n_attempts > 1 else "")
        self.result.failures[spec.model_id] = reason
        self._job.failed({spec.model_id: reason})
        self.report_progress()

    def _record_success(self, spec: Task, outcome: Outcome) -> None:
        self.result.n_done += outcome.status == "done"
        self.result.n_stored += outcome.status == "stored"
        self._job.n_done = self.result.n_done
        self._job.mended([spec.model_id])
        if outcome.status == "done":  # stored models come in bursts, which would distort the rate of progress
            self.report_progress()


def run(queue: Queue, executor: Executor) -> None:
    """Have an executor make the models of a queue until none is waiting or running."""
    while queue.waiting or executor.n_running:
        while executor.n_free and (spec := queue.take()):
            executor.submit(spec)
        for spec, outcome in executor.wait():
            queue.settle(spec, outcome)


def work_off(queue: Queue, executor: Executor) -> None:
    """`run`, with the progress of the whole before and after it; the executor is closed afterwards."""
    queue.report_progress()
    with closing(executor):
        run(queue, executor)
    queue.report_progress()


def executor_for(maker: Maker, new_maker: NewMaker, settings: QueueSettings) -> Executor:
    """This process with its own maker for one worker, worker processes for several."""
    if settings.workers == 1:
        return LocalExecutor(maker)
    return ProcessExecutor(new_maker, settings.workers, maker.report, settings.lease_minutes)


def ingest_models(
    db_path: Path,
    specs: Sequence[ModelSpec],
    encoder_specs: Sequence[str],
    settings: QueueSettings = DEFAULTS,
    report: Progress = no_progress,
    name: str = "models",
    executor: Executor | None = None,
) -> JobResult:
    """Make every model that is not stored yet. A failed model is recorded with its reason and stops no other.

    name:     of the job in the table `jobs`, such as the path of the specs file
    executor: makes the models, and is closed afterwards. Default: this process for one worker, worker processes for several

    A model that another command is making is waited for. Rerunning after an interruption or a kill resumes the queue.
    raises: InvalidValue for settings out of bounds, and for encoders as `register`
    """
    check_options(settings)
    encoders = [load_encoder(spec) for spec in encoder_specs]
    db = Database(db_path)
    register(db, encoders)
    job_settings = {"n_models": len(specs), "workers": settings.workers}
    with jobs.running(db.writer, "ingest models", name, job_settings) as job:
        queue = Queue(specs, job, report, settings.retries)
        maker = ModelMaker(db_path, encoders, report, settings.lease_minutes)
        stored = set(db.sql("SELECT model_id FROM models")["model_id"].to_pylist())
        for spec in queue.take_all(stored):  # only their settings are compared: no worker is needed
            queue.settle(spec, maker.attempt(spec))
        new_maker = partial(ModelMaker.of, db_path, tuple(encoder_specs), settings.lease_minutes)
        work_off(queue, executor or executor_for(maker, new_maker, settings))
    return queue.result
