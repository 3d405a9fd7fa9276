"""Commands that lack what they need: memory, descriptors, /tmp, a home, a clock that goes forward.

Each run is a process of its own. It ends with all done, or with an error that a person can read; afterwards the same command
ends, with nothing in short supply, in what a run leaves that was not disturbed.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from conftest import ROOT

from attrdb.errors import AttrdbError
from torture.kills import Undisturbed
from torture.processes import TIME_LIMIT, clear, log_of, run_whole
from torture.trials import Trial, traces_in
from torture.workloads import WORKLOADS, Application, Workload, make_inputs

MIB = 2**20
NO_PLACE = "/proc/nowhere/at/all"
# In a file system name space of its own, where the folders for temporary files cannot be written.
WITHOUT_TMP = ["unshare", "-Urm", "sh", "-c"]
READ_ONLY_TMP = 'for folder in /tmp /var/tmp; do mount -t tmpfs -o ro,size=4k none $folder; done; exec "$@"'


@dataclass(frozen=True)
class Shortage:
    """limit: set in the process before it begins. during: called again and again while it runs, with its folder."""

    group: str
    what: str
    limit: Callable[[], None] = lambda: None
    environment: Mapping[str, str | None] = field(default_factory=dict)
    before: tuple[str, ...] = ()
    during: Callable[[Path], None] = lambda folder: None


def _limited(kind: int, value: int) -> Callable[[], None]:
    return partial(resource.setrlimit, kind, (value, value))


def fake_time() -> Path | None:
    """The library that tells a process another time, if it is installed."""
    spec = find_spec("libfaketime")
    files = Path(spec.origin).parent.rglob("libfaketime.so.1") if spec and spec.origin else ()
    return next(iter(files), None)


def _jump(folder: Path) -> None:
    """The clock is an hour back, and back again, ten times a second."""
    late = int(10 * time.monotonic()) % 2
    (folder / "clock").write_text("-3600" if late else "+0")


def shortages(folder: Path) -> list[Shortage]:
    found = [
        *(
            Shortage("memory", f"{size} MiB of address space", _limited(resource.RLIMIT_AS, size * MIB))
            for size in (300, 600, 900, 1200, 1800, 2600, 4000)
        ),
        *(
            Shortage("descriptors", f"{n} open files", _limited(resource.RLIMIT_NOFILE, n))
            for n in (8, 12, 16, 24, 32, 48, 64)
        ),
        Shortage("no home", "HOME is no folder", environment={"HOME": NO_PLACE, "XDG_CACHE_HOME": None}),
        Shortage("no home", "no HOME", environment={"HOME": None}),
        Shortage("no /tmp", "TMPDIR is no folder", environment={"TMPDIR": NO_PLACE}),
        Shortage("no /tmp", "/tmp cannot be written", before=(*WITHOUT_TMP, READ_ONLY_TMP, "sh")),
    ]
    if library := fake_time():
        clock = {"LD_PRELOAD": str(library), "FAKETIME_NO_CACHE": "1"}
        found += [
            Shortage("clock", "400 days back", environment=clock | {"FAKETIME": "-400d"}),
            Shortage(
                "clock",
                "jumps back and forth by an hour",
                environment=clock | {"FAKETIME_TIMESTAMP_FILE": str(folder / "clock")},
                during=_jump,
            ),
        ]
    return found


def run_short(workload: Workload, shortage: Shortage, db: Path, inputs: Path, folder: Path) -> list[str]:
    """What is wrong with how the commands end, each in a process of its own that lacks something."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **shortage.environment}
    for words in workload.commands(db, inputs):
        shortage.during(folder)
        with log_of(db).open("w") as log:
            process = subprocess.Popen(
                [*shortage.before, sys.executable, "-m", "attrdb", *words],
                env={name: value for name, value in environment.items() if value is not None},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=shortage.limit,
            )
            until = time.monotonic() + TIME_LIMIT
            while process.poll() is None and time.monotonic() < until:
                shortage.during(folder)
                time.sleep(0.02)
            if process.poll() is None:
                process.kill()
                process.wait()
                return [f"did not end within {TIME_LIMIT} s"]
        if found := traces_in(log_of(db)):
            return found
    return []


def run_all(folder: Path, every: int = 1, workloads: tuple[Workload, ...] = WORKLOADS) -> Iterator[Trial]:
    """A trial for every `every`-th pair of a command and a shortage."""
    inputs = folder / "inputs"
    make_inputs(inputs)
    undisturbed: dict[str, Undisturbed] = {}
    commands = [workload for workload in workloads if not isinstance(workload, Application)]
    pairs = [(workload, shortage) for workload in commands for shortage in shortages(folder)]
    for number, (workload, shortage) in enumerate(pairs[::every]):
        if workload.name not in undisturbed:
            own = folder / workload.name.replace(" ", "-")
            own.mkdir()
            undisturbed[workload.name] = Undisturbed(workload, own, inputs)
        yield _tried(undisturbed[workload.name], shortage, number, folder)


def _tried(undisturbed: Undisturbed, shortage: Shortage, number: int, folder: Path) -> Trial:
    db, workload = undisturbed.copy(f"short-{number}.attrdb"), undisturbed.workload
    trial = Trial(shortage.group, f"{workload.name:18} {shortage.what}")
    trial.problems += run_short(workload, shortage, db, undisturbed.inputs, folder)
    try:
        has_ended = run_whole(workload.run, db, undisturbed.inputs) is not None
        trial.problems += undisturbed.compared(db, has_ended)
    except (AttrdbError, AssertionError, OSError) as error:
        trial.problems.append(f"{type(error).__name__}: {error}")
    if not trial.problems:
        clear(db)
    return trial
