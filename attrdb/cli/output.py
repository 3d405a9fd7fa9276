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
    write_stdout(table, form)


SPEED_SECONDS = 3600  # that rate and ETA look back: a unit may be a model, which takes minutes


def per_time(speed: float) -> str:
    """A rate as a person reads it, from units a second."""
    unit, seconds = ("s", 1) if speed >= 1 else ("min", 60) if speed >= 1 / 60 else ("h", 3600)
    return f"{speed * seconds:.1f}/{unit}"


@contextmanager
def progress(quiet: bool) -> Iterator[Progress]:
    """A bar with rate and ETA for each stage that is reported; silent when quiet or when stderr is no terminal."""
    from rich import progress as rich_progress
    from rich.console import Console

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
