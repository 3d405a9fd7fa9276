"""What every part of the campaign yields: trials, and what was wrong after each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

# What no command prints, whatever is done to it: the traces of Python, of Rust and of C++, and attrdb's own last resort.
TRACES = ("Traceback (most recent call last)", "panicked at", "terminate called after", "this is a fault of attrdb")


@dataclass
class Trial:
    """One thing that was done.

    group:  under which it is counted, such as a signal
    what:   what was done, to which command
    """

    group: str
    what: str
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n    ".join([f"{self.group:14} {self.what}", *self.problems])


def traces(printed: str) -> list[str]:
    """A problem for each trace that a command printed, with the last lines of it."""
    return [f"printed {trace!r}: ...{printed[-600:]}" for trace in TRACES if trace in printed]


def traces_in(log: Path) -> list[str]:
    return traces(log.read_text(errors="replace")) if log.exists() else []
