"""Many models from a file: every line checked first, then made by one process or several, each model once."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch
from click.testing import CliRunner
from conftest import picture

import attrdb
from attrdb.cli import main
from attrdb.errors import Busy, InvalidValue, NotFound
from attrdb.ingest.customize.customize import load_delta
from attrdb.ingest.devices import gpu_of_worker, share_cores
from attrdb.ingest.encode import load_encoder
from attrdb.ingest.models import executors
from attrdb.ingest.models.executors import ModelMaker, ProcessExecutor
from attrdb.ingest.models.queue import ingest_models
from attrdb.ingest.models.specs import read_specs
from attrdb.ingest.models.stages import leased_job
from attrdb.ingest.options import QueueSettings
from attrdb.progress import no_progress
from attrdb.store.job_folders import model_job
from attrdb.store.leases import holder

ENCODERS = ("pixels:2",)
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """In this process and in workers alike: how many threads compute moves a model's last digits."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def wanted(tmp_path, tiny_base):
    """A file that asks for three models of three colours."""
    for name, colour in COLOURS.items():
        picture(tmp_path / "wanted" / name / "a.png", colour)
    return write(
        tmp_path,
        *({"exemplars": name, "category": "vase", "kind": "object", "model_id": name} for name in COLOURS),
        base=tiny_base,
    )


def write(tmp_path, *lines, base=None):
    """The lines as a file in the folder of the exemplars, with a base model where one is given."""
    path = tmp_path / "wanted" / "models.jsonl"
    path.parent.mkdir(exist_ok=True)
    shared = {"base_model": str(base)} if base else {}
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line | shared) + "\n" for line in lines))
    return path


def rows(path):
    """All that a database holds of its models, but for when they were made and how long it took."""
    db = attrdb.open(path)
    stored = db.sql("SELECT * FROM models ORDER BY model_id").to_pylist()
    for row in stored:
        for name in ("created_at", "customize_seconds", "synthesize_seconds"):
            del row[name]
        # The weights themselves in the place of the file's hash: safetensors writes its metadata in any order.
        delta = load_delta(path / row["weights_path"])
        row["weights_hash"] = {name: weights.numpy().tobytes() for name, weights in delta.items()}
    return db.sql("SELECT * FROM images ORDER BY image_id").to_pylist(), stored


def ingest(path, specs, report=no_progress, executor=None, **settings):
    if not path.exists():
        attrdb.create(path)
    return ingest_models(path, specs, ENCODERS, QueueSettings(**settings), report, executor=executor)


@pytest.fixture
def whole(tmp_path, wanted):
    """What one undisturbed process makes of the file."""
    result = ingest(tmp_path / "whole.attrdb", read_specs(wanted))
    assert (result.n_done, result.n_stored, result.failures) == (3, 0, {})
    return rows(tmp_path / "whole.attrdb")


# --- making -----------------------------------------------------------------------------------------------------------


def test_every_line_is_a_model_and_run_twice_is_run_once(tmp_path, wanted, whole):
    images, stored = whole
    assert [(row["model_id"], row["n_exemplars"], row["n_samples"]) for row in stored] == [
        ("blue", 1, 4),
        ("green", 1, 4),
        ("red", 1, 4),
    ]
    assert len(images) == 15
    reports = []
    again = ingest(tmp_path / "whole.attrdb", read_specs(wanted), report=lambda *units: reports.append(units))
    assert (again.n_done, again.n_stored, again.failures) == (0, 3, {})
    assert set(reports) == {("models", 3, 3, "")}
    assert rows(tmp_path / "whole.attrdb") == whole


def test_two_workers_make_the_rows_of_one(tmp_path, wanted, whole):
    """And one that fails is listed, from a worker as from one process."""
    reports = []
    line = json.loads(wanted.read_text().splitlines()[0]) | {"model_id": "bad", "lr": 1e30, "steps": 5}
    wanted.write_text(json.dumps(line) + "\n" + wanted.read_text())
    specs = read_specs(wanted)
    result = ingest(tmp_path / "shared.attrdb", specs, workers=2, report=lambda *units: reports.append(units))
    assert result.n_done == 3
    ((model_id, reason),) = result.failures.items()
    assert model_id == "bad"
    assert "training diverged" in reason
    assert rows(tmp_path / "shared.attrdb") == whole
    stages = {stage for stage, *_ in reports}
    assert reports[-1] == ("models", 4, 4, "1 failed")
    assert {"models", "worker 1: customize", "worker 2: customize"} <= stages


def test_two_commands_share_a_file(tmp_path, wanted, whole):
    """Each process reads the file for itself and knows nothing of the other."""
    path = tmp_path / "shared.attrdb"
    attrdb.create(path)
    program = (
        "import sys; from pathlib import Path\n"
        "from attrdb.ingest.models.queue import ingest_models; from attrdb.ingest.models.specs import read_specs\n"
        "result = ingest_models(Path(sys.argv[1]), read_specs(Path(sys.argv[2])), ['pixels:2'])\n"
        "print(result.n_done, result.n_stored, result.failures)"
    )
    command = [sys.executable, "-c", program, str(path), str(wanted)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0].split(maxsplit=2) for process in both]
    assert all(int(done) + int(stored) == 3 and failed.strip() == "{}" for done, stored, failed in said)
    assert rows(path) == whole


def test_a_model_that_another_process_makes_is_waited_for(tmp_path, wanted, monkeypatch):
    monkeypatch.setattr(executors, "BUSY_SECONDS", 0.01)
    path = tmp_path / "waits.attrdb"
    attrdb.create(path)
    settled, release = [], threading.Event()

    def hold():
        with leased_job(model_job(path, "red")):
            release.wait(60)

    def report(stage, done, _total, note=""):
        if stage == "models":
            settled.append(done)
            if done == 2:  # all but the one that is held
                release.set()

    other = threading.Thread(target=hold)
    other.start()
    while not (path / "jobs" / ".red.lock").exists():
        time.sleep(0.01)
    result = ingest(path, read_specs(wanted), report=report)
    other.join()
    assert (result.n_done, result.failures) == (3, {})
    assert list(dict.fromkeys(settled)) == [0, 1, 2, 3]
    made = attrdb.open(path).sql("SELECT model_id FROM models ORDER BY created_at")["model_id"].to_pylist()
    assert made[-1] == "red"


def test_interrupted_and_rerun_is_run_once(tmp_path, wanted, whole):
    path = tmp_path / "interrupted.attrdb"

    def interrupt(stage, done, _total, note=""):
        if (stage, done) == ("worker 1: sample", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(path, read_specs(wanted), workers=2, report=interrupt)
    assert not children()
    ingest(path, read_specs(wanted))
    assert rows(path) == whole


def children() -> list[int]:
    """Worker processes of this one that still run."""
    return [process.pid for process in multiprocessing.active_children()]


def test_a_killed_worker_leaves_its_model_to_another(tmp_path, wanted, whole):
    path = tmp_path / "killed.attrdb"
    killed = []

    def report(stage, _done, _total, note=""):
        if stage == "worker 1: customize" and not killed:
            killed.extend(children()[:1])
            os.kill(killed[0], signal.SIGKILL)

    result = ingest(path, read_specs(wanted), workers=2, report=report)
    assert (result.n_done, result.failures) == (3, {})
    assert killed
    assert rows(path) == whole


def test_a_worker_that_is_stuck_is_ended_and_its_model_made_by_another(tmp_path, wanted, whole, monkeypatch):
    """Stopped by a signal, it lives and holds its lease, and sends nothing more."""
    monkeypatch.setattr(executors, "CHECK_SECONDS", 0.1)
    path, stuck = tmp_path / "stuck.attrdb", []

    def report(stage, _done, _total, note=""):
        if stage == "worker 1: customize" and not stuck:
            worker = executor._workers[1]
            stuck.append(worker)
            os.kill(worker.process.pid, signal.SIGSTOP)
            while worker.connection.poll():  # its messages from before
                worker.connection.recv()
            worker.last_message -= 3600

    new_maker = partial(executors.ModelMaker.of, path, tuple(ENCODERS), 10.0)
    executor = ProcessExecutor(new_maker, 2, report, lease_minutes=10.0)
    result = ingest(path, read_specs(wanted), report, executor)
    assert (result.n_done, result.failures) == (3, {})
    [worker] = stuck
    assert worker.stuck
    assert worker.process.exitcode == -signal.SIGKILL
    assert rows(path) == whole


def test_a_lease_that_another_command_has_let_run_out_is_taken_over(tmp_path, wanted, whole):
    """The stuck one is told so when it wakes, and leaves the model to the other."""
    path = tmp_path / "taken.attrdb"
    db = attrdb.create(path)
    spec = read_specs(wanted)[0]
    lock, told = model_job(path, "red").lock, []

    def sleep(stage, done, _total, _note=""):
        if (stage, done) == ("customize", 1):
            long_ago = time.time() - 3600
            os.utime(lock, (long_ago, long_ago))
            told.append(ingest(path, [spec]).n_done)

    outcome = ModelMaker(path, [load_encoder(name) for name in ENCODERS], sleep).attempt(spec)
    assert (outcome.status, told) == ("busy", [1])
    db.refresh()
    assert db.sql("SELECT model_id FROM models")["model_id"].to_pylist() == ["red"]
    ingest(path, read_specs(wanted))
    assert rows(path) == whole


def test_status_says_who_makes_what(tmp_path):
    db = attrdb.create(tmp_path / "some.attrdb")
    with leased_job(model_job(db.path, "red")) as lease:
        lease.beaten = 0.0
        lease.beat("customize", 20, 100)
        (one,) = db.status()["in_progress"]
        assert one["silent_seconds"] < 60
        assert (one["model_id"], one["pid"], one["stage"], one["done"], one["total"]) == (
            "red",
            os.getpid(),
            "customize",
            20,
            100,
        )
        said = CliRunner().invoke(main, ["status", str(db.path)]).output
        assert f"model red is being made: customize 20 of 100, by process {os.getpid()} on " in said
    assert db.status()["in_progress"] == []


def test_a_shorter_line_covers_a_longer_one(tmp_path):
    job = model_job(tmp_path, "red")
    with leased_job(job) as lease:
        for stage in ("x" * 300, "sample"):
            lease.beaten = 0.0
            lease.beat(stage, 1, 2)
            assert holder(job.lock)["stage"] == stage


def test_of_two_that_begin_at_once_one_goes_on(tmp_path, monkeypatch):
    """On a disk that does not pass locks on."""
    monkeypatch.setattr("attrdb.store.leases.fcntl.flock", lambda *_: None)
    monkeypatch.setattr("attrdb.store.leases.BEAT", 0.0)
    job, me = model_job(tmp_path, "red"), os.getpid()
    first, second = leased_job(job), leased_job(job)

    def as_process(number):
        monkeypatch.setattr("attrdb.store.leases.os.getpid", lambda: number)

    one = first.__enter__()
    as_process(me + 1)
    other = second.__enter__()
    as_process(me)
    with pytest.raises(Busy, match=f"'red' is being made by another process .{me + 1} on"):
        one.beat("customize", 1, 2)
    first.__exit__(None, None, None)
    as_process(me + 1)
    other.beat("customize", 1, 2)
    assert json.loads(job.lock.read_text())["stage"] == "customize"
    second.__exit__(None, None, None)
    assert holder(job.lock) is None


def test_what_a_killed_process_held_is_free(tmp_path):
    job = model_job(tmp_path, "red")
    program = (
        "import os, sys; from pathlib import Path; from attrdb.store.job_folders import model_job\n"
        "from attrdb.ingest.models.stages import leased_job\n"
        "with leased_job(model_job(Path(sys.argv[1]), 'red')): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == 9
    assert "pid" in json.loads(job.lock.read_text())
    assert holder(job.lock) is None
    with leased_job(job):
        assert holder(job.lock)["pid"] == os.getpid()


def test_a_lease_of_another_machine_is_heeded_until_it_runs_out(tmp_path):
    """Also on a disk that does not pass locks on from one machine to the other."""
    job = model_job(tmp_path, "red")
    job.make()
    job.lock.write_text(json.dumps({"host": "elsewhere", "pid": 7, "stage": "sample", "done": 1, "total": 2}))
    assert holder(job.lock)["host"] == "elsewhere"
    with pytest.raises(Busy, match=r"'red' is being made by another process \(7 on elsewhere\)"), leased_job(job):
        pass
    long_ago = time.time() - 3600
    os.utime(job.lock, (long_ago, long_ago))
    with leased_job(job):
        assert holder(job.lock)["pid"] == os.getpid()
    assert holder(job.lock) is None


@pytest.mark.parametrize(("n_gpus", "given"), [(0, [None] * 3), (1, [0, 0, 0]), (2, [0, 1, 0])])
def test_workers_take_gpus_in_turn(monkeypatch, n_gpus, given):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    assert [gpu_of_worker(number) for number in (1, 2, 3)] == given


@pytest.mark.parametrize(("n_workers", "given", "n_threads"), [(2, None, 4), (3, None, 2), (99, None, 1), (2, "8", 8)])
def test_workers_share_the_cores(monkeypatch, n_workers, given, n_threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        share_cores(n_workers)
        assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)


def test_a_model_that_fails_is_listed_and_stops_no_other(tmp_path, wanted):
    lines = [json.loads(line) for line in wanted.read_text().splitlines()]
    lines[1] |= {"lr": 1e30, "steps": 5}
    path = tmp_path / "some.attrdb"
    result = ingest(path, read_specs(write(tmp_path, *lines)))
    assert result.n_done == 2
    ((model_id, reason),) = result.failures.items()
    assert model_id == "green"
    assert "training diverged" in reason
    assert [row["model_id"] for row in rows(path)[1]] == ["blue", "red"]
    del lines[1]["lr"]
    mended = ingest(path, read_specs(write(tmp_path, *lines)))
    assert (mended.n_done, mended.n_stored) == (1, 2)


def test_an_unforeseen_error_is_of_its_model_alone_and_tried_again(tmp_path, wanted, monkeypatch):
    made, tried = executors.ingest_model, []

    def broken(db, exemplars, settings, encoders, model_id, *given):
        tried.append(model_id)
        if model_id == "red" or tried == ["red", "green"]:
            raise RuntimeError("the driver is gone")
        return made(db, exemplars, settings, encoders, model_id, *given)

    monkeypatch.setattr(executors, "ingest_model", broken)
    result = ingest(tmp_path / "some.attrdb", read_specs(wanted))
    assert tried == ["red", "green", "blue", "red", "green"]
    assert (result.n_done, result.failures) == (2, {"red": "RuntimeError: the driver is gone (attempt 2)"})
    tried.clear()
    ingest(tmp_path / "other.attrdb", read_specs(wanted), retries=0)
    assert tried == ["red", "green", "blue"]


def test_a_model_that_is_stored_with_other_settings_is_listed(tmp_path, wanted, whole):
    line = json.loads(wanted.read_text().splitlines()[0]) | {"steps": 7}
    result = ingest(tmp_path / "whole.attrdb", read_specs(write(tmp_path, line)))
    assert (result.n_done, result.n_stored) == (0, 0)
    assert "'steps': 3" in next(iter(result.failures.values()))
    assert "'steps': 7" in next(iter(result.failures.values()))


def test_no_workers(tmp_path):
    with pytest.raises(InvalidValue, match="workers is 0; it must be at least 1"):
        ingest(tmp_path, [], workers=0)
    with pytest.raises(InvalidValue, match="retries is -1; it must be at least 0"):
        ingest(tmp_path, [], retries=-1)
    with pytest.raises(InvalidValue, match="lease_minutes is 0; it must be above 0"):
        ingest(tmp_path, [], lease_minutes=0)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_line_says_what_the_command_can_say(tmp_path, tiny_base):
    files = [
        picture(tmp_path / "wanted" / name, colour) for name, colour in (("a.png", (9, 9, 9)), ("b.png", (1, 2, 3)))
    ]
    (tmp_path / "wanted" / "mine.txt").write_text("a V* on a table\n")
    spec_line = {
        "exemplars": [file.name for file in files],
        "category": "ink",
        "kind": "style",
        "split": "test",
        "prompts": "mine.txt",
        "steps": 9,
        "lr": 1,
        "guidance": 2.5,
        "seed": 4,
    }
    (spec,) = read_specs(write(tmp_path, spec_line), base_model=str(tiny_base))
    assert spec.model_id.startswith("ink-")
    assert [exemplar.fields["source"] for exemplar in spec.read_exemplars()] == ["wanted", "wanted"]
    settings = spec.settings
    assert (settings.base_model, settings.kind, settings.split) == (str(tiny_base), "style", "test")
    assert (settings.customize.steps, settings.customize.lr, settings.customize.seed) == (9, 1, 4)
    assert (settings.synthesize.guidance, settings.synthesize.seed, settings.synthesize.solver_steps) == (2.5, 4, 2)
    assert settings.prompts == str(tmp_path / "wanted" / "mine.txt")


def test_a_base_model_beside_the_file_is_found(tmp_path, wanted, tiny_base):
    (wanted.parent / "tiny").symlink_to(tiny_base)
    line = {"exemplars": "red", "category": "vase", "kind": "object", "base_model": "tiny"}
    (spec,) = read_specs(write(tmp_path, line))
    assert spec.settings.base_model == str(wanted.parent / "tiny")


def test_a_line_that_stands_twice_counts_once(tmp_path, wanted):
    wanted.write_text(wanted.read_text() + "\n" + wanted.read_text())
    assert [spec.model_id for spec in read_specs(wanted)] == ["red", "green", "blue"]


GOOD = {"exemplars": "red", "category": "vase", "kind": "object"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{'exemplars': 1}\n", "line 2: not JSON: "),
        ("[1]\n", "line 2: must be a JSON object, found list"),
        (GOOD | {"colour": "red"}, "line 2: unknown key 'colour'; nearest is "),
        (GOOD | {"sample_per_prompt": 2}, "unknown key 'sample_per_prompt'; nearest is 'samples_per_prompt'"),
        ({"exemplars": "red", "kind": "object"}, "line 2: key 'category' is missing"),
        (GOOD | {"kind": "thing"}, 'line 2: kind is "thing"; it must be object, style, mixed or concepts'),
        (GOOD | {"category": 7}, "line 2: category is 7; it must be text"),
        (GOOD | {"steps": "many"}, 'line 2: steps is "many"; it must be a whole number'),
        (GOOD | {"steps": True}, "line 2: steps is true; it must be a whole number"),
        (GOOD | {"steps": 0}, "line 2: steps is 0; it must be at least 1"),
        (GOOD | {"gradient_checkpointing": 1}, "line 2: gradient_checkpointing is 1; it must be true or false"),
        (GOOD | {"lr": None}, "line 2: lr is null; it must be a number"),
        (GOOD | {"exemplars": []}, r"a list of image files, each once; found \[\]"),
        (GOOD | {"exemplars": ["red/a.png", 3]}, r"each once; found \['red/a.png', 3\]"),
        (GOOD | {"exemplars": "nowhere"}, "line 2: no folder .*nowhere"),
        (GOOD | {"exemplars": ["red/b.png"]}, r"line 2: image .*red/b\.png cannot be read: No such file"),
        (GOOD | {"exemplars": ["red/a.png", "red/a.png"]}, "line 2: exemplars must be .* each once"),
        (GOOD | {"exemplars": ["red/a.png", "copy.png"]}, r"line 2: exemplars .*copy\.png are the same file; keep one"),
        (GOOD | {"model_id": "../x"}, r"line 2: model id '\.\./x' \(4 characters\) cannot be used"),
        (GOOD | {"model_id": "red", "steps": 5}, "line 2: it makes model 'red' as line 1 does, with other customize"),
        (GOOD | {"model_id": "red", "exemplars": "blue"}, "makes model 'red' as line 1 does, with other exemplars"),
        (GOOD | {"prompts": "none.txt"}, r"line 2: no prompt bank .*none\.txt"),
    ],
)
def test_lines_that_cannot_be_used(tmp_path, wanted, tiny_base, line, says):
    picture(tmp_path / "wanted" / "copy.png", COLOURS["red"])
    bad = write(tmp_path, GOOD | {"model_id": "red"}, line)
    with pytest.raises(InvalidValue, match=says):
        read_specs(bad, base_model=str(tiny_base))


def test_a_base_model_that_no_one_names(tmp_path, wanted):
    with pytest.raises(InvalidValue, match="line 1: no base_model; name one in the line, or one for all"):
        read_specs(write(tmp_path, GOOD))
    with pytest.raises(InvalidValue, match="line 1: no base model 'nowhere'"):
        read_specs(write(tmp_path, GOOD | {"base_model": "nowhere"}))


def test_all_bad_lines_are_listed_and_the_first_twenty_shown(tmp_path, wanted, tiny_base):
    bad = write(tmp_path, GOOD, *([GOOD | {"kind": "thing"}] * 25))
    with pytest.raises(InvalidValue) as caught:
        read_specs(bad, base_model=str(tiny_base))
    said = str(caught.value)
    assert "has 25 lines that cannot be used; nothing was begun" in said
    assert "line 21:" in said
    assert "line 22:" not in said
    assert said.endswith("and 5 more")


def test_files_without_a_model(tmp_path):
    with pytest.raises(NotFound, match=r"no file .*models\.jsonl; write one JSON object per line"):
        read_specs(tmp_path / "models.jsonl")
    with pytest.raises(InvalidValue, match="has no model in it"):
        read_specs(write(tmp_path, "\n"))
