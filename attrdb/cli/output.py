"""Printing Arrow tables: data on stdout, progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from attrdb.formats import write_stdout
from attrdb.progress import Progress


def print_table(table: pa.Table, form: str = "table") -> None:
    """Write a result to stdout in one of `formats.FORMATS`."""
    end_sign_of_life()
    write_stdout(table, form)


SPEED_SECONDS = 3600  # that rate and ETA look back: a unit may be a model, which takes minutes


def per_time(speed: float) -> str:
    """A rate as a person reads it, from units a second."""
    unit, seconds = ("s", 1) if speed >= 1 else ("min", 60) if speed >= 1 / 60 else ("h", 3600)
    return f"{speed * seconds:.1f}/{unit}"


_waiting: list[Any] = []  # the spinner that is shown, if any


@contextmanager
def sign_of_life(quiet: bool) -> Iterator[None]:
    """A spinner from the start of a command until its first bar or row: loading packages and networks may take a minute.

    Silent as `progress`.
    """
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.live import Live
    from rich.spinner import Spinner

    spinner = Live(
        Spinner("dots", "starting"),
        console=Console(stderr=True),
        transient=True,
        refresh_per_second=5,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    spinner.start()
    _waiting.append(spinner)
    try:
        yield
    finally:
        end_sign_of_life()


def end_sign_of_life() -> None:
    """Take the spinner away, before something else is written."""
    while _waiting:
        _waiting.pop().stop()


@contextmanager
def progress(quiet: bool) -> Iterator[Progress]:
    """A bar with rate and ETA for each stage that is reported; silent when quiet or when stderr is no terminal."""
    from rich import progress as rich_progress
    from rich.console import Console

    end_sign_of_life()
    text = rich_progress.TextColumn
    bars = rich_progress.Progress(
        text("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        text("{task.fields[rate]}"),
        text("{task.fields[note]}"),
        rich_progress.TimeElapsedColumn(),
        text("ETA"),
        rich_progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        speed_estimate_period=SPEED_SECONDS,
        disable=quiet or not sys.stderr.isatty(),
    )
    tasks: dict[str, Any] = {}

    def advance(stage: str, done: int, total: int | None, note: str = "") -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total, rate="", note=note)
        task = bars.tasks[[bar.id for bar in bars.tasks].index(tasks[stage])]
        rate = per_time(task.speed) if task.speed else ""
        bars.update(tasks[stage], completed=done, total=total, rate=rate, note=note)

    with bars:
        yield advance
