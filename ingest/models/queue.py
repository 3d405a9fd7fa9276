"""Many customized models from one file of specs: a queue that several worker processes, and several commands, share.

The file is the queue. A model that is stored is done, one whose lease is held is being made, and any other may be taken. A
lease ends with its process, however that ends, or when it has been silent for too long, so that a rerun needs nothing else.
"""

from __future__ import annotations

import difflib
import json
import math
import multiprocessing
import signal
import time
from collections import Counter, deque
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

import torch

from attrdb.database import Database
from attrdb.errors import AttrdbError, Busy, InvalidValue, NotFound
from attrdb.ingest.base_model import OneBaseModel
from attrdb.ingest.devices import gpu_of_worker, share_cores
from attrdb.ingest.encode import Encoder, load_encoder
from attrdb.ingest.models.ingest_one import (
    Exemplar,
    ModelSettings,
    check_model,
    ingest_model,
    read_exemplar,
    read_exemplars,
    settings_for,
)
from attrdb.ingest.prompts import BANKS
from attrdb.ingest.read.corpus import register
from attrdb.store import jobs
from attrdb.store.ids import model_job
from attrdb.store.leases import LEASE_MINUTES, holder

SHOWN = 20  # bad lines that an error names
PAUSE = 0.5  # seconds until a model that another process is making is looked at again
LOOK = 5.0  # seconds until worker processes that say nothing are looked at
GRACE = 5.0  # seconds that a worker process has to end by itself
RETRIES = 1  # further attempts at a model after one that a library, the system or a lost process has ended


@dataclass(frozen=True)
class Key:
    """What a spec may say under a key, apart from its type."""

    type: type
    least: float | None = None
    required: bool = False

    def problem(self, value: object) -> str | None:
        """Why a value cannot be used."""
        wanted = (int, float) if self.type is float else self.type
        if not isinstance(value, wanted) or isinstance(value, bool) != (self.type is bool):
            what = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[self.type]
            return f"must be {what}, found {json.dumps(value)}"
        if self.least is not None and not (self.least <= value < math.inf):
            return f"must be at least {self.least}, found {json.dumps(value)}"
        return None


# A key's name is the option's of `attrdb ingest model`, with underscores.
KEYS = {
    "exemplars": Key(str, required=True),  # a folder; a list of files is seen to apart
    "category": Key(str, required=True),
    "kind": Key(str, required=True),
    "base_model": Key(str),
    "model_id": Key(str),
    "split": Key(str),
    "prompts": Key(str),
    "profile": Key(str),
    "prompts_per_scheme": Key(int, 1),
    "samples_per_prompt": Key(int, 1),
    "steps": Key(int, 1),
    "batch": Key(int, 1),
    "lr": Key(float, 1e-12),
    "solver_steps": Key(int, 1),
    "guidance": Key(float, 1),
    "sample_batch": Key(int, 1),
    "seed": Key(int),
    "method": Key(str),
    "precision": Key(str),
    "gradient_checkpointing": Key(bool),
    "augment": Key(str),
    "prior": Key(str),
    "prior_images": Key(int, 0),
    "prior_weight": Key(float, 1e-12),
    "token_from": Key(str),
}
OF_THE_MODEL = {
    "exemplars",
    "category",
    "kind",
    "base_model",
    "model_id",
    "split",
    "profile",
}  # the others are settings


@dataclass(frozen=True)
class ModelSpec:
    """A model that is wanted: a line of the file, checked, with its settings complete."""

    model_id: str
    exemplars: Path | tuple[Path, ...]  # a folder, or files
    settings: ModelSettings

    def read_exemplars(self) -> list[Exemplar]:
        """raises: NotFound or InvalidValue for a folder or a file that is gone or cannot be used"""
        if isinstance(self.exemplars, Path):
            return read_exemplars(self.exemplars)
        return [read_exemplar(path, path.parent.name) for path in self.exemplars]


@dataclass
class QueueResult:
    done: int = 0
    stored_already: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)  # model_id and the reason


# --- the file ---------------------------------------------------------------------------------------------------------


def read_specs(path: Path, base_model: str | None = None) -> list[ModelSpec]:
    """The models that a JSON Lines file asks for, one a line, in its order; a line that repeats another counts once.

    Every line is checked, exemplars included, before any is returned. Paths are relative to the file's folder.
    base_model: for the lines that name none
    raises:     NotFound if there is no file, InvalidValue with every bad line's number and reason, SHOWN at most
    """
    if not path.is_file():
        raise NotFound(f"no file {path}; write one JSON object a line, a model each")
    specs: dict[str, ModelSpec] = {}
    seen: dict[str, tuple[int, list[str]]] = {}  # by model_id: line, hashes of the exemplars
    problems = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                spec, hashes = _spec(line, path.parent, base_model)
                first, known = seen.setdefault(spec.model_id, (number, hashes))
                differing = _differing(specs.setdefault(spec.model_id, spec).settings, spec.settings)
                differing += ["exemplars"] * (known != hashes)
                if differing:
                    raise InvalidValue(
                        f"it makes model {spec.model_id!r} as line {first} does, with other {', '.join(differing)}; "
                        "give each a model_id of its own"
                    )
            except AttrdbError as error:
                problems.append(f"line {number}: {error}")
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise InvalidValue(
            f"{path} has {len(problems)} lines that cannot be used; nothing was begun\n  "
            + "\n  ".join(problems[:SHOWN])
            + more
        )
    if not specs:
        raise InvalidValue(f"{path} has no model in it; write one JSON object a line, a model each")
    return list(specs.values())


def _differing(one: ModelSettings, other: ModelSettings) -> list[str]:
    return [name.name for name in fields(one) if getattr(one, name.name) != getattr(other, name.name)]


def _spec(line: bytes, folder: Path, base_model: str | None) -> tuple[ModelSpec, list[str]]:
    """A line's spec and the hashes of its exemplars."""
    given = _checked(line)
    exemplars: Path | tuple[Path, ...]
    if isinstance(given["exemplars"], list):
        exemplars = tuple(folder / name for name in given["exemplars"])
    else:
        exemplars = folder / given["exemplars"]
    base = given.get("base_model", base_model)
    if base is None:
        raise InvalidValue("no base_model; name one in the line, or one for all lines with --base-model")
    if "base_model" in given and (folder / base).exists():
        base = str(folder / base)
    options = {name: value for name, value in given.items() if name not in OF_THE_MODEL}
    if options.get("prompts", BANKS[0]) not in BANKS:
        options["prompts"] = str(folder / options["prompts"])
    settings = settings_for(base, given["kind"], given["category"], options, given.get("split"), given.get("profile"))
    draft = ModelSpec("", exemplars, settings)
    read = draft.read_exemplars()
    model_id = check_model(settings, read, given.get("model_id"))
    return ModelSpec(model_id, exemplars, settings), [exemplar.picture.sha256 for exemplar in read]


def _checked(line: bytes) -> dict:
    """A line's object, every key of it known and of its type."""
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidValue(f"not JSON: {error}") from error
    if not isinstance(given, dict):
        raise InvalidValue(f"must be a JSON object, found {type(given).__name__}")
    for name in given.keys() - KEYS.keys():
        near = difflib.get_close_matches(name, KEYS, n=1, cutoff=0)
        raise InvalidValue(f"unknown key {name!r}; nearest is {near[0]!r}")
    for name, key in KEYS.items():
        if name not in given:
            if key.required:
                raise InvalidValue(f"key {name!r} is missing")
        elif name == "exemplars" and isinstance(given[name], list):
            files = given[name]
            if not files or not all(isinstance(one, str) for one in files) or len(set(files)) < len(files):
                raise InvalidValue(f"exemplars must be a folder, or a list of image files, each once; found {files}")
        elif problem := key.problem(given[name]):
            raise InvalidValue(f"{name} {problem}")
    return given


# --- the queue --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How an attempt at a model ended: 'done', 'stored' (it was there already), 'busy' (another process is at it),
    'refused' (it would be again) or 'failed', for a reason."""

    how: str
    reason: str = ""


class Report(Protocol):
    """What is told of a queue: stage, units done, units in all, and what else there is to say of them."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...


class Queue:
    """The models that are still to be made, and what became of the others."""

    def __init__(self, specs: Sequence[ModelSpec], job: jobs.Job, report: Report, retries: int = RETRIES):
        self.job = job
        self.waiting = deque(specs)
        self.total = len(specs)
        self.report = report
        self.retries = retries
        self.attempts: Counter[str] = Counter()
        self.result = QueueResult()

    def take(self) -> ModelSpec | None:
        return self.waiting.popleft() if self.waiting else None

    def take_all(self, model_ids: Container[str]) -> list[ModelSpec]:
        """The models of these ids."""
        taken = [spec for spec in self.waiting if spec.model_id in model_ids]
        self.waiting = deque(spec for spec in self.waiting if spec.model_id not in model_ids)
        return taken

    def settle(self, spec: ModelSpec, outcome: Outcome) -> None:
        """Note how an attempt ended; one that another process is making, or that may succeed yet, comes up again later."""
        if outcome.how == "busy":
            self.waiting.append(spec)
            return
        self.attempts[spec.model_id] += 1
        n_attempts = self.attempts[spec.model_id]
        if outcome.how == "failed" and n_attempts <= self.retries:
            self.waiting.append(spec)
            return
        if outcome.how in ("failed", "refused"):
            reason = outcome.reason + (f" (attempt {n_attempts})" if n_attempts > 1 else "")
            self.result.failed.append((spec.model_id, reason))
            self.job.failed({spec.model_id: reason})
        else:
            self.result.done += outcome.how == "done"
            self.result.stored_already += outcome.how == "stored"
            self.job.n_done = self.result.done
            self.job.mended([spec.model_id])
        if outcome.how != "stored":  # they come in bursts, which would pass for the rate at which models are made
            self.tell()

    def tell(self) -> None:
        n_failed = len(self.result.failed)
        settled = self.result.done + self.result.stored_already + n_failed
        self.report("models", settled, self.total, f"{n_failed} failed" if n_failed else "")

    def lost(self, spec: ModelSpec, exit_code: int | None, silent_minutes: float | None = None) -> None:
        """Note that a worker process ended under a model; silent_minutes: it was ended, having said nothing for so long."""
        how = f"signal {-exit_code}" if (exit_code or 0) < 0 else f"exit code {exit_code}"
        reason = f"the worker process that made it ended with {how}"
        if silent_minutes is not None:
            reason = (
                f"the worker process that made it said nothing for {silent_minutes:g} minutes and was ended; if the work is "
                "that slow, give more (--lease-minutes)"
            )
        self.settle(spec, Outcome("failed", reason))


def ingest_models(
    db_path: Path,
    specs: Sequence[ModelSpec],
    encoder_specs: Sequence[str],
    workers: int = 1,
    report: Report = lambda stage, done, total, note="": None,
    name: str = "models",
    retries: int = RETRIES,
    lease_minutes: float = LEASE_MINUTES,
) -> QueueResult:
    """Make every model that is not stored yet; one that fails is recorded with its reason and stops no other.

    name:          of the job in the table `jobs`, such as that of the specs' file
    retries:       further attempts at a model, after errors that may not come again
    lease_minutes: after which a process that says nothing more counts as stuck; a worker of this call is then ended

    With one worker they are made in this process, with more in as many processes of their own, each with a GPU of its own
    where there are as many. A model that another command is making is waited for. Interrupted or killed, it goes on where
    it was when given again.
    raises: InvalidValue for workers < 1, retries < 0 or lease_minutes <= 0, or an encoder as `register`
    """
    if workers < 1:
        raise InvalidValue(f"workers is {workers}; at least one is needed")
    if retries < 0:
        raise InvalidValue(f"retries is {retries}; 0 is the least")
    if not lease_minutes > 0:
        raise InvalidValue(f"lease_minutes is {lease_minutes}; it must be above 0")
    encoders = [load_encoder(spec) for spec in encoder_specs]
    db = Database(db_path)
    register(db, encoders)
    with jobs.running(db, "ingest models", name, {"n_models": len(specs), "workers": workers}) as job:
        queue, kept = Queue(specs, job, report, retries), OneBaseModel()
        stored = set(db.sql("SELECT model_id FROM models")["model_id"].to_pylist())
        for spec in queue.take_all(stored):
            queue.settle(spec, make(db_path, spec, encoders, report, kept, lease_minutes))
        queue.tell()
        if workers == 1:
            while spec := queue.take():
                queue.settle(spec, make(db_path, spec, encoders, report, kept, lease_minutes))
        else:
            _share_out(queue, db_path, encoder_specs, workers, lease_minutes)
        queue.tell()
    return queue.result


def make(
    db_path: Path,
    spec: ModelSpec,
    encoders: Sequence[Encoder],
    report: Report,
    kept: OneBaseModel,
    lease_minutes: float = LEASE_MINUTES,
) -> Outcome:
    """One attempt at a model, with the base model that an earlier one has loaded if it is the same."""
    try:
        db = Database(db_path)
        other = holder(model_job(db.path, spec.model_id).lock)
        if other and other["silent_seconds"] < 60 * lease_minutes:
            raise Busy(spec.model_id)  # before the base model is loaded for nothing
        result = ingest_model(
            db, spec.read_exemplars(), spec.settings, encoders, spec.model_id, report, kept.load, lease_minutes
        )
    except Busy:
        time.sleep(PAUSE)
        return Outcome("busy")
    except (InvalidValue, NotFound) as error:
        return Outcome("refused", str(error))
    except Exception as error:  # whatever a library raises for one model must not end the others
        kept.forget()
        return Outcome("failed", str(error) if isinstance(error, AttrdbError) else f"{type(error).__name__}: {error}")
    return Outcome("done" if result.appended else "stored")


# --- worker processes -------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    number: int
    process: BaseProcess
    line: Connection
    spec: ModelSpec | None = None  # that it is making
    heard: float = 0.0  # when it last said something
    stuck: bool = False  # and was killed for it


def _share_out(queue: Queue, db_path: Path, encoder_specs: Sequence[str], n_workers: int, lease_minutes: float) -> None:
    """Hand the queue's models to worker processes, a new one in the place of each that ends or is stuck."""
    crew: dict[int, Worker] = {}
    try:
        while True:
            for number in range(1, n_workers + 1):
                if queue.waiting and (number not in crew or crew[number].spec is None):
                    worker = crew.get(number) or _start(number, n_workers, db_path, encoder_specs, lease_minutes)
                    crew[number] = worker
                    worker.spec, worker.heard = queue.take(), time.monotonic()
                    try:
                        worker.line.send(worker.spec)
                    except OSError:  # it has ended while it had nothing to do
                        queue.waiting.appendleft(worker.spec)
                        _dismiss([crew.pop(number)])
            busy = {worker.line: worker for worker in crew.values() if worker.spec}
            if not busy:
                if queue.waiting:  # what was meant for workers that had ended
                    continue
                return
            for worker in busy.values():
                if time.monotonic() - worker.heard > 60 * lease_minutes and not worker.line.poll():
                    worker.stuck = True
                    worker.process.kill()  # its line ends, and says so below
            for line in wait(list(busy), LOOK):
                worker = busy[line]
                worker.heard = time.monotonic()
                try:
                    message = line.recv()
                except (EOFError, OSError):
                    line.close()
                    worker.process.join()
                    queue.lost(worker.spec, worker.process.exitcode, lease_minutes if worker.stuck else None)
                    del crew[worker.number]
                    continue
                if isinstance(message, Outcome):
                    queue.settle(worker.spec, message)
                    worker.spec = None
                    if message.how == "failed":  # so may all that this process tries, such as after an error of its GPU
                        _dismiss([crew.pop(worker.number)])
                else:
                    stage, done, total = message
                    queue.report(f"worker {worker.number}: {stage}", done, total)
    finally:
        _dismiss(crew.values())


def _dismiss(crew: Iterable[Worker]) -> None:
    """End worker processes: each goes by itself when it next says something, or after GRACE it is made to."""
    deadline = time.monotonic() + GRACE
    for worker in crew:
        worker.line.close()
    for worker in crew:
        worker.process.join(max(0, deadline - time.monotonic()))
        worker.process.kill()  # also one that a signal has stopped
        worker.process.join()


def _start(number: int, n_workers: int, db_path: Path, encoder_specs: Sequence[str], lease_minutes: float) -> Worker:
    # Not forked: neither CUDA nor Lance outlives a fork.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    given = (there, number, n_workers, db_path, tuple(encoder_specs), lease_minutes)
    process = context.Process(target=_work, args=given, daemon=True)
    with _no_interrupts():
        process.start()
    there.close()  # so that `here` ends with the process
    return Worker(number, process, here)


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Processes that are started meanwhile never see Ctrl-C: who started them gets it too, and ends them."""
    resource_tracker.ensure_running()  # as it starts it lifts the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(
    line: Connection,
    number: int,
    n_workers: int,
    db_path: Path,
    encoder_specs: Sequence[str],
    lease_minutes: float,
) -> None:
    """A worker process: makes the models that come down the line until it is ended."""
    share_cores(n_workers)
    if (gpu := gpu_of_worker(number)) is not None:
        torch.cuda.set_device(gpu)
    encoders, kept = [load_encoder(spec) for spec in encoder_specs], OneBaseModel()

    def report(stage: str, done: int, total: int) -> None:
        line.send((stage, done, total))

    try:
        while True:
            line.send(make(db_path, line.recv(), encoders, report, kept, lease_minutes))
    except (EOFError, OSError):  # who started it is gone
        return
