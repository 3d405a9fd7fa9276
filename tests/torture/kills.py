"""Jobs that get a signal at a random moment, and are given again: they leave what a run leaves that was not disturbed."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from attrdb.errors import AttrdbError, NotFound
from attrdb.store.schema import TABLES
from torture.comparing import Tables, differences, half_visible, tables, unsound
from torture.processes import clear, ends, log_of, run_whole, start
from torture.trials import Trial, traces_in
from torture.workloads import WORKLOADS, Application, Workload, make_inputs

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP)
SECONDS_TO_END = 30  # that a job may take to end after TERM or INT, on a loaded machine


@dataclass
class Kill(Trial):
    """inside: the signal came before the job's end. n_visible: images that a reader saw then; None: no database yet."""

    inside: bool = False
    n_visible: int | None = None


class Undisturbed:
    """A workload's database before it, and what a run without a signal leaves."""

    def __init__(self, workload: Workload, folder: Path, inputs: Path):
        self.workload, self.folder, self.inputs = workload, folder, inputs
        self.base = folder / "before.attrdb" if workload.before else None
        if self.base and run_whole(workload.before, self.base, inputs) is None:
            raise RuntimeError(f"{workload.name!r} cannot begin: {log_of(self.base).read_text()}")
        self.before = tables(self.base) if self.base and not self._is_old() else {name: {} for name in TABLES}
        seconds = []
        for number in range(2):
            db = self.copy(f"undisturbed-{number}.attrdb")
            seconds.append(run_whole(workload.run, db, inputs))
            if seconds[-1] is None:
                raise RuntimeError(f"{workload.name!r} fails without a signal: {log_of(db).read_text()}")
            found = self.outcome(db)
            if number and (different := list(differences(found, self.wanted))):
                raise RuntimeError(f"two undisturbed runs of {workload.name!r} differ: {different}")
            self.wanted = found
        self.seconds = min(seconds)

    def _is_old(self) -> bool:
        """Before an upgrade nothing can be read."""
        return self.workload.name == "upgrade"

    def copy(self, name: str) -> Path:
        db = self.folder / name
        if self.base:
            shutil.copytree(self.base, db)
        return db

    def outcome(self, db: Path) -> Tables:
        made = {"made": self.workload.made(db)} if self.workload.made else {}
        return tables(db) | made

    def kill(self, share: float, number: int, what: signal.Signals) -> Kill:
        """Send a signal to a run after a share of its time, look, run it whole (after STOP: let it go on), and compare."""
        db = self.copy(f"killed-{number}.attrdb")
        process, hears = start(self.workload.run, db, self.inputs)
        started = time.monotonic()
        ended = hears.poll(share * self.seconds)
        if ended:  # the time was measured while the machine did other things too
            self.seconds = min(self.seconds, time.monotonic() - started)
        trial = Kill(what.name, f"{self.workload.name:18} at {share:4.0%} of {self.seconds:.2f} s", inside=not ended)
        if process.is_alive():
            os.kill(process.pid, what)
        if what in (signal.SIGTERM, signal.SIGINT):
            self._ends_quietly(process, db, trial)
        elif what == signal.SIGKILL:
            process.join()
        try:
            self._look(db, trial)
            if what == signal.SIGSTOP:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGCONT)
                goes_on = ended or ends(process, hears)
            else:
                goes_on = run_whole(self.workload.run, db, self.inputs) is not None
            trial.problems += self.compared(db, goes_on)
        except (AttrdbError, AssertionError, OSError) as error:
            trial.problems.append(f"{type(error).__name__}: {error}")
        finally:
            if process.is_alive():
                process.kill()
        if not trial.problems:
            clear(db)
        return trial

    def compared(self, db: Path, has_ended: bool) -> list[str]:
        """What a run that was given again has left otherwise than an undisturbed one."""
        if not has_ended:
            return [f"given again, it failed: {log_of(db).read_text()[-2000:]}"]
        return [*differences(self.outcome(db), self.wanted), *unsound(db)]

    def _ends_quietly(self, process, db: Path, trial: Kill) -> None:
        process.join(SECONDS_TO_END)
        if process.is_alive():
            trial.problems.append(f"did not end within {SECONDS_TO_END} s")
            process.kill()
            process.join()
        if not isinstance(self.workload, Application):  # Python itself prints where an application was interrupted
            trial.problems += traces_in(log_of(db))

    def _look(self, db: Path, trial: Kill) -> None:
        if self._is_old():
            return
        try:
            seen = tables(db)
        except NotFound:
            if self.base:
                raise
            return
        trial.n_visible = len(seen["images"])
        trial.problems += half_visible(seen, self.before, self.wanted)
        trial.problems += unsound(db, frozenset({"unfinished_models", "unfinished_removals"}))


def kills(
    n: int,
    seed: int,
    folder: Path,
    workloads: tuple[Workload, ...] = WORKLOADS,
    signals: tuple[signal.Signals, ...] = SIGNALS,
) -> Iterator[Kill]:
    """Signals in turn over the workloads, each at a moment that is uniform in the time of an undisturbed run."""
    inputs = folder / "inputs"
    make_inputs(inputs)
    chance = Random(seed)
    undisturbed: dict[str, Undisturbed] = {}
    for number in range(n):
        workload = workloads[number % len(workloads)]
        if workload.name not in undisturbed:
            own = folder / workload.name.replace(" ", "-")
            own.mkdir()
            undisturbed[workload.name] = Undisturbed(workload, own, inputs)
        turn = number // len(workloads) + number  # so that every workload gets every signal
        yield undisturbed[workload.name].kill(chance.random(), number, signals[turn % len(signals)])
