"""Executors, and the queue that they work off: what is attempted, how often, and in which order."""

import multiprocessing
import signal
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import attrdb
from attrdb.ingest.models import executors
from attrdb.ingest.models.executors import LocalExecutor, ModelMaker, Outcome, ProcessExecutor, Worker, lost_outcome
from attrdb.ingest.models.queue import Queue, ingest_models, run
from attrdb.ingest.models.specs import ModelSpec
from attrdb.ingest.options import QueueSettings
from attrdb.progress import no_progress
from attrdb.store import jobs

DONE = Outcome("done")
COLOURS = ("red", "green", "blue")


def specs(*model_ids):
    """Specs that no one reads."""
    return [ModelSpec(model_id, Path("nowhere"), None) for model_id in model_ids or COLOURS]


class ScriptedExecutor:
    """Ends the attempts at a model as its script says; `done` once the script has ended."""

    def __init__(self, n_slots=1, **script):
        self.n_slots, self.script = n_slots, {name: list(outcomes) for name, outcomes in script.items()}
        self.running, self.submitted, self.most_running, self.closed = [], [], 0, 0

    @property
    def n_free(self):
        return self.n_slots - self.n_running

    @property
    def n_running(self):
        return len(self.running)

    def submit(self, spec):
        assert self.n_free > 0
        self.running.append(spec)
        self.submitted.append(spec.model_id)
        self.most_running = max(self.most_running, self.n_running)

    def wait(self):
        assert self.running, "nothing to wait for"
        spec = self.running.pop(0)
        outcomes = self.script.get(spec.model_id)
        outcome = outcomes.pop(0) if outcomes else DONE
        if isinstance(outcome, BaseException):
            raise outcome
        yield spec, outcome

    def close(self):
        self.closed += 1


def work_off(tmp_path, executor, model_ids=(), progress=no_progress, retries=1):
    """The queue after an executor has worked it off, and its job's failures."""
    db = attrdb.create(tmp_path / "queue.attrdb")
    with jobs.running(db.writer, "ingest models", "wanted", {}) as job, closing(executor):
        queue = Queue(specs(*model_ids), job, progress, retries)
        run(queue, executor)
    return queue, db.sql("SELECT item, reason FROM failures").to_pylist()


# --- the queue --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_slots", [1, 2, 5])
def test_an_executor_is_kept_full_and_never_overfull(tmp_path, n_slots):
    executor = ScriptedExecutor(n_slots)
    queue, failures = work_off(tmp_path, executor, "abcdef")
    assert executor.submitted == list("abcdef")
    assert executor.most_running == n_slots
    assert (queue.result.n_done, queue.result.failures, failures) == (6, {}, [])


def test_a_failed_attempt_is_retried_after_the_others(tmp_path):
    executor = ScriptedExecutor(red=[Outcome("failed", "no memory")])
    queue, failures = work_off(tmp_path, executor)
    assert executor.submitted == ["red", "green", "blue", "red"]
    assert (queue.result.n_done, queue.result.failures, failures) == (3, {}, [])


def test_a_model_that_keeps_failing_is_given_up_and_recorded(tmp_path):
    executor = ScriptedExecutor(red=[Outcome("failed", "no memory")] * 9)
    queue, failures = work_off(tmp_path, executor, retries=2)
    assert executor.submitted.count("red") == 3
    assert queue.result.failures == {"red": "no memory (attempt 3)"}
    assert failures == [{"item": "red", "reason": "no memory (attempt 3)"}]


def test_a_refused_model_is_not_retried(tmp_path):
    executor = ScriptedExecutor(red=[Outcome("refused", "no such folder")])
    queue, failures = work_off(tmp_path, executor, retries=5)
    assert executor.submitted == ["red", "green", "blue"]
    assert queue.result.failures == {"red": "no such folder"}
    assert failures == [{"item": "red", "reason": "no such folder"}]


def test_a_busy_model_waits_and_costs_no_attempt(tmp_path):
    busy = [Outcome("busy")] * 4
    executor = ScriptedExecutor(red=[*busy, Outcome("failed", "no memory"), DONE])
    queue, _ = work_off(tmp_path, executor, retries=1)
    assert executor.submitted.count("red") == 6
    assert (queue.result.n_done, queue.result.failures) == (3, {})


def test_progress_counts_failures_and_leaves_out_retries(tmp_path):
    reports = []
    executor = ScriptedExecutor(red=[Outcome("refused", "x")], green=[Outcome("failed", "y")], blue=[Outcome("stored")])
    work_off(tmp_path, executor, progress=lambda *units: reports.append(units))
    assert reports == [("models", 1, 3, "1 failed"), ("models", 3, 3, "1 failed")]


def test_a_model_that_takes_its_workers_with_it_is_given_up(tmp_path):
    executor = ScriptedExecutor(red=[lost_outcome(-signal.SIGKILL)] * 2)
    queue, failures = work_off(tmp_path, executor, ["red"])
    reason = "its worker process ended with signal 9 (attempt 2)"
    assert queue.result.failures == {"red": reason}
    assert failures == [{"item": "red", "reason": reason}]


def test_the_reason_of_a_stuck_worker_names_the_lease():
    assert lost_outcome(3).reason == "its worker process ended with exit code 3"
    assert lost_outcome(-9, 10.0) == Outcome(
        "failed",
        "its worker process was silent for 10 minutes and was ended; if the work is that slow, raise --lease-minutes",
    )


def test_a_queue_takes_any_executor_and_closes_it(tmp_path):
    db, executor = attrdb.create(tmp_path / "queue.attrdb"), ScriptedExecutor(2, blue=[Outcome("refused", "why")])
    result = ingest_models(db.path, specs(), ["pixels:2"], QueueSettings(workers=9), executor=executor)
    assert (result.n_done, result.failures, executor.closed) == (2, {"blue": "why"}, 1)
    [job] = attrdb.open(db.path).sql("SELECT * FROM jobs").to_pylist()
    assert (job["state"], job["n_done"], job["n_failed"]) == ("incomplete", 2, 1)


def test_an_interrupted_queue_closes_its_executor(tmp_path):
    db, executor = attrdb.create(tmp_path / "queue.attrdb"), ScriptedExecutor(green=[KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        ingest_models(db.path, specs(), ["pixels:2"], executor=executor)
    assert (executor.submitted, executor.closed) == (["red", "green"], 1)
    [job] = attrdb.open(db.path).sql("SELECT * FROM jobs").to_pylist()
    assert (job["state"], job["n_done"]) == ("failed", 1)


# --- the protocol -----------------------------------------------------------------------------------------------------


class ThreadWorkers:
    """Worker processes that are threads: `act(number of the worker, n-th process of it, connection)` for every model."""

    def __init__(self, monkeypatch, act):
        self.act, self.started, self.kill = act, [], lambda: None
        monkeypatch.setattr(ProcessExecutor, "_start", lambda _executor, number: self.start(number))

    def start(self, number):
        connection, worker_end = multiprocessing.Pipe()
        self.started.append(number)
        nth = self.started.count(number)

        def work():
            while True:
                try:
                    worker_end.recv()
                    self.act(number, nth, worker_end)
                except (EOFError, OSError):
                    return

        threading.Thread(target=work, daemon=True).start()
        process = SimpleNamespace(join=lambda *_: None, kill=self.kill, exitcode=-9)
        return Worker(number, process, connection)


def send_done(_number, _nth, connection):
    connection.send(DONE)


def processes(n_workers=2, report=no_progress, lease_minutes=10.0):
    new_maker = partial(ModelMaker.of, Path("nowhere"), ("pixels:2",), lease_minutes)
    return ProcessExecutor(new_maker, n_workers, report, lease_minutes)


@pytest.mark.parametrize("kind", ["scripted", "local", "processes"])
def test_every_executor_keeps_the_protocol(monkeypatch, kind):
    ThreadWorkers(monkeypatch, send_done)
    executor = {
        "scripted": lambda: ScriptedExecutor(2),
        "local": lambda: LocalExecutor(SimpleNamespace(attempt=lambda spec: DONE)),
        "processes": processes,
    }[kind]()
    n_slots = executor.n_free
    assert (n_slots, executor.n_running) == ({"scripted": 2, "local": 1, "processes": 2}[kind], 0)
    waiting, ended = specs(*"abcde"), []
    with closing(executor):
        while waiting or executor.n_running:
            while waiting and executor.n_free:
                executor.submit(waiting.pop(0))
                assert executor.n_free + executor.n_running == n_slots
            for spec, outcome in executor.wait():
                assert executor.n_free > 0  # the slot is free when the outcome is there
                ended.append((spec.model_id, outcome.status))
    assert sorted(ended) == [(model_id, "done") for model_id in "abcde"]


def test_a_worker_that_fails_is_replaced(tmp_path, monkeypatch):
    """Its error, such as one of its GPU, would fail all further models of that process."""

    def act(number, nth, connection):
        if number == 1 and nth == 1:
            connection.send(Outcome("failed", "CUDA error"))
        else:
            time.sleep(0.05)
            connection.send(DONE)

    workers = ThreadWorkers(monkeypatch, act)
    queue, _ = work_off(tmp_path, processes())
    assert (queue.result.n_done, queue.result.failures) == (3, {})
    assert workers.started.count(1) <= 2


def test_a_worker_that_fails_makes_no_further_model(monkeypatch):
    workers = ThreadWorkers(monkeypatch, lambda _number, _nth, line: line.send(Outcome("failed", "CUDA error")))
    with closing(processes(1)) as executor:
        for spec in specs("red", "green"):
            executor.submit(spec)
            assert [outcome.status for _, outcome in executor.wait()] == ["failed"]
    assert workers.started == [1, 1]


def test_workers_that_have_reported_are_not_stuck_when_the_parent_was(tmp_path, monkeypatch):
    def act(_number, _nth, connection):
        connection.send(("customize", 1, 2))
        connection.send(DONE)

    workers = ThreadWorkers(monkeypatch, act)
    executor = processes(lease_minutes=0.001, report=lambda *_: time.sleep(0.1))
    queue, _ = work_off(tmp_path, executor, retries=0)
    assert (queue.result.n_done, queue.result.failures) == (3, {})
    assert workers.started == [1, 2]


def test_a_silent_worker_is_killed_and_its_model_made_by_another(tmp_path, monkeypatch):
    def act(_number, nth, connection):
        if nth == 1:
            killed.wait(30)
            connection.close()
        else:
            connection.send(DONE)

    killed, workers = threading.Event(), ThreadWorkers(monkeypatch, act)
    workers.kill = killed.set
    monkeypatch.setattr(executors, "CHECK_SECONDS", 0.05)
    queue, _ = work_off(tmp_path, processes(1, lease_minutes=0.01), ["red"], retries=1)
    assert killed.is_set()
    assert (queue.result.n_done, queue.result.failures, workers.started) == (1, {}, [1, 1])


def test_a_model_is_not_charged_for_a_worker_that_had_ended_before(tmp_path, monkeypatch):
    def act(_number, nth, connection):
        connection.send(DONE)
        if nth == 1:
            connection.close()  # after its first model
            ended.set()

    ended = threading.Event()
    workers = ThreadWorkers(monkeypatch, act)
    queue, _ = work_off(tmp_path, processes(), progress=lambda *_: ended.wait(), retries=0)
    assert (queue.result.n_done, queue.result.failures) == (3, {})
    assert len(workers.started) == 3


def test_a_worker_that_never_starts_costs_an_attempt_and_does_not_hang(tmp_path, monkeypatch):
    """Such as one whose process ends while it imports."""

    def start(_executor, number):
        connection, worker_end = multiprocessing.Pipe()
        worker_end.close()
        return Worker(number, SimpleNamespace(join=lambda *_: None, kill=lambda: None, exitcode=1), connection)

    monkeypatch.setattr(ProcessExecutor, "_start", start)
    queue, _ = work_off(tmp_path, processes(), ["red"], retries=1)
    assert queue.result.failures == {"red": "its worker process ended with exit code 1 (attempt 2)"}


@pytest.mark.parametrize(
    ("platform", "has_gpu", "started"),
    [("linux", False, "forkserver"), ("linux", True, "spawn"), ("darwin", False, "spawn"), ("win32", False, "spawn")],
)
def test_how_workers_are_started(monkeypatch, platform, has_gpu, started):
    monkeypatch.setattr(executors.sys, "platform", platform)
    monkeypatch.setattr(executors.torch.cuda, "is_available", lambda: has_gpu)
    assert executors._context().get_start_method() == started
