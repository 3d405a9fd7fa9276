"""Printing Arrow tables: data on stdout, progress on stderr."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import click
import pyarrow as pa

FORMATS = ("table", "json", "nl", "csv")


def plain(value: Any) -> Any:
    """A value as JSON can hold it: bytes only by their length, NaN and infinity as null."""
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return value if isinstance(value, (str, int, type(None))) else str(value)


def shown(value: Any) -> str:
    """A value as a person reads it in a table."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and len(value) > 8:
        return f"[{', '.join(shown(item) for item in value[:3])}, ... {len(value)}]"
    return str(plain(value))


def print_table(table: pa.Table, form: str) -> None:
    """Write a result to stdout in one of FORMATS."""
    rows = [{name: plain(value) for name, value in row.items()} for row in table.to_pylist()]
    if form == "json":
        click.echo(json.dumps(rows, indent=2))
    elif form == "nl":
        for row in rows:
            click.echo(json.dumps(row))
    elif form == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, table.column_names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        click.echo(text.getvalue(), nl=False)
    else:
        _print_grid(table, rows)


def _print_grid(table: pa.Table, rows: list[dict]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in table.column_names:
        number = pa.types.is_integer(table.schema.field(name).type) or pa.types.is_floating(
            table.schema.field(name).type
        )
        grid.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(shown(value) for value in row.values()))
    # A pipe or a file gets whole lines, not lines folded at 80 columns.
    width = None if sys.stdout.isatty() else 10_000
    Console(width=width, markup=False, highlight=False).print(grid)


class Advance(Protocol):
    """Takes a stage, units done, units in all where that is known, and what else there is to say of them."""

    def __call__(self, stage: str, done: int, total: int | None, note: str = "") -> None: ...


SPEED_SECONDS = 3600  # that rate and ETA look back: a unit may be a model, which takes minutes


def per_time(speed: float) -> str:
    """A rate as a person reads it, from units a second."""
    unit, seconds = ("s", 1) if speed >= 1 else ("min", 60) if speed >= 1 / 60 else ("h", 3600)
    return f"{speed * seconds:.1f}/{unit}"


@contextmanager
def progress(quiet: bool) -> Iterator[Advance]:
    """A bar with rate and ETA for each stage that is reported; silent when quiet or when stderr is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        speed_estimate_period=SPEED_SECONDS,
        disable=quiet or not sys.stderr.isatty(),
    )
    tasks: dict[str, Any] = {}

    def advance(stage: str, done: int, total: int | None, note: str = "") -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total, rate="", note=note)
        task = bars.tasks[[one.id for one in bars.tasks].index(tasks[stage])]
        rate = per_time(task.speed) if task.speed else ""
        bars.update(tasks[stage], completed=done, total=total, rate=rate, note=note)

    with bars:
        yield advance
