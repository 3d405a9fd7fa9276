"""A run's folder: settings that may not change, one checkpoint per stage, and a log with a JSON line per report."""

from __future__ import annotations

import fcntl
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from attrdb.errors import Busy, InvalidValue

FIRST_REPORT = 5.0  # seconds
SAVE_SECONDS = 60.0  # between two checkpoints: on a GPU one takes as long as some steps


@dataclass(frozen=True)
class Execution:
    """How a call computes. It decides the time that a step takes, not the model.

    device:   cpu or cuda
    workers:  processes that draw scenes ahead; with 0 this process draws them
    recorded: a GPU repeats a recording of the step, see `Recorded`
    compiled: a CPU compiles the step of the U-Net first, which takes some minutes
    """

    device: str
    workers: int = 0
    recorded: bool = False
    compiled: bool = False


@contextmanager
def exclusive_run(folder: Path) -> Iterator[None]:
    """Hold a run's folder: two processes in one would overwrite each other's checkpoint.

    Not `attrdb.store.locks`, which needs the database's packages; a machine with a GPU may lack them.
    raises: Busy if another process holds it
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(f"run {folder} is being trained by another process; wait for it, or stop it") from error
        yield


@dataclass
class Counts:
    """The training of a run so far, over all calls. seconds: of its steps; loss: the mean of the last report"""

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    loss: float = math.nan


class Stage:
    """A stage of a run: its checkpoint, which is replaced atomically, its log, and the time that it may take.

    loss: the mean of the last report
    """

    def __init__(self, folder: Path, name: str, minutes: float = float("inf")):
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint = folder / f"{name}.pt"
        self.log_file = folder / f"{name}.jsonl"
        self.deadline = time.monotonic() + 60 * minutes
        self.saved = time.monotonic()
        self.next_report = FIRST_REPORT
        self.loss = math.nan

    @property
    def late(self) -> bool:
        return time.monotonic() >= self.deadline

    @property
    def save_is_due(self) -> bool:
        return time.monotonic() - self.saved >= SAVE_SECONDS

    def report_is_due(self, seconds: float) -> bool:
        """Whether a stage that has taken so many seconds reports; each report is a twentieth later than the last."""
        if seconds < self.next_report:
            return False
        self.next_report = max(1.05 * seconds, seconds + FIRST_REPORT)
        return True

    def take_steps(
        self,
        step: Callable[[float], torch.Tensor],
        figures: Callable[[], dict[str, float]],
        state: Callable[[float], dict[str, Any]],
        before: float = 0.0,
        finished: Callable[[float], bool] = lambda _seconds: False,
    ) -> dict[str, float]:
        """Take steps until the time is over or enough was learned; report and save when that is due, and after the last.

        The figures of the last report are returned.

        Seconds are those of the steps so far, `before` among them, which earlier calls took.
        step:     takes a step; its loss, a scalar
        figures:  what is logged besides loss and seconds
        state:    the checkpoint
        finished: whether enough was learned
        """
        losses: list[torch.Tensor] = []
        begun, seconds, is_last = time.monotonic(), before, False
        while not is_last:
            losses.append(step(seconds))
            seconds = before + time.monotonic() - begun
            is_last = self.late or finished(seconds)
            if self.report_is_due(seconds) or is_last:
                self.loss = round(float(torch.stack(losses).mean()), 5)
                losses.clear()
                found = figures()
                self.log(**found, loss=self.loss, seconds=round(seconds, 1))
            if self.save_is_due or is_last:
                self.save(state(seconds))
        return found

    def load(self) -> dict | None:
        return torch.load(self.checkpoint, map_location="cpu", weights_only=True) if self.checkpoint.exists() else None

    def save(self, state: dict) -> None:
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.checkpoint)
        self.saved = time.monotonic()

    def log(self, **figures: float) -> None:
        line = json.dumps(figures)
        click.echo(f"{self.checkpoint.stem} {line}", err=True)
        with self.log_file.open("a") as file:
            file.write(line + "\n")


def check_settings(settings: Any, folder: Path) -> None:
    """Store the settings of a new run, a dataclass, or compare them with those that the run began with.

    raises: InvalidValue if they differ
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    wanted = json.loads(json.dumps(asdict(settings)))
    if not path.exists():
        path.write_text(json.dumps(wanted, indent=2) + "\n")
        return
    stored = json.loads(path.read_text())
    for name, value in wanted.items():
        if stored.get(name) != value:
            raise InvalidValue(
                f"run {folder} began with {name}={stored.get(name)!r}, now it is {value!r}; use the old settings or choose "
                "another --run folder"
            )
