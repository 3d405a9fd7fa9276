"""What a job reports while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Takes the stage a job is in, the units done and the units in all (None: not known), and a note on them."""

    def __call__(self, stage: str, done: int, total: int | None, note: str = "", /) -> None: ...


def no_progress(stage: str, done: int, total: int | None, note: str = "", /) -> None:
    """Report nothing."""


def counted(report: Progress, stage: str, total: int | None) -> Callable[[int], None]:
    """A function that takes further units done, and reports their sum."""
    done = 0

    def add(n: int) -> None:
        nonlocal done
        done += n
        report(stage, done, total)

    return add
