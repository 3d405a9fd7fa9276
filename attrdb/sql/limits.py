"""What one statement may use: seconds, bytes of memory and rows; and the thread in which it runs, so that it can be ended."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import duckdb

from attrdb.errors import InvalidValue, OutOfMemory, QueryRefused
from attrdb.search.memory import free_memory
from attrdb.text import size_text

FREE_SHARE = 0.5  # of the free memory, which a statement may use by default
LEAST_MEMORY = 16 * 2**20
MOST = 2**60  # bytes or rows, from which on a limit is a mistake
SCAN_MEMORY = 2**30  # bytes by which the process may grow beyond the limit: Lance reads ahead
GRACE = 2.0  # seconds that DuckDB has to end a statement; it ends none within a call of one function
TICK = 0.1  # seconds between two looks at the memory of the process

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

Result = TypeVar("Result")


@dataclass(frozen=True)
class Limits:
    """The limits of a statement.

    seconds: None for no limit
    memory:  bytes; None for half of the memory that is free when the snapshot is first asked
    rows:    the first rows that are given; None for all
    raises:  InvalidValue
    """

    seconds: float | None = None
    memory: int | None = None
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.seconds is not None and not 0 < self.seconds < threading.TIMEOUT_MAX:
            raise InvalidValue(f"timeout is {self.seconds}; it must be a number of seconds above 0, or none")
        if self.memory is not None and not LEAST_MEMORY <= self.memory < MOST:
            raise InvalidValue(f"memory is {size_text(self.memory)}; it must be at least {size_text(LEAST_MEMORY)}")
        if self.rows is not None and not 0 <= self.rows < MOST:
            raise InvalidValue(f"rows is {self.rows}; it must be a count from 0 on")


UNLIMITED = Limits()


def parse_size(text: str) -> int:
    """Bytes from a text such as 4GB, 512MiB or 1.5g.

    raises: InvalidValue
    """
    number = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]i?)?b?\s*", text, re.ASCII | re.IGNORECASE)
    if not number or len(number[1]) > 18:
        raise InvalidValue(f"{text!r} is no size; write a number and a unit, such as 512MB or 4GB")
    return int(float(number[1]) * _UNITS[(number[2] or "").lower()])


def default_memory() -> int:
    """Bytes that a statement may use if nothing else is said."""
    return max(LEAST_MEMORY, int(free_memory() * FREE_SHARE))


def needs_more(memory: str) -> OutOfMemory:
    """The error of a statement that does not fit into its memory."""
    return OutOfMemory(
        f"the statement needs more than the {memory} of memory that it may use; select fewer columns or rows, "
        "filter or aggregate before joining and sorting, or allow more (--memory, in Python memory=)"
    )


def takes_longer(seconds: float) -> QueryRefused:
    """The error of a statement that has been ended for its time."""
    return QueryRefused(
        f"the statement was ended after {seconds:g} s; filter or aggregate earlier, or allow more time (--timeout, in "
        "Python timeout=)"
    )


def limited(
    connection: duckdb.DuckDBPyConnection | None, work: Callable[[], Result], limits: Limits = UNLIMITED
) -> Result:
    """The result of some work, ended by Ctrl-C, by its time or by the memory that the process takes.

    DuckDB counts most of the memory of a statement itself, but neither long texts that a function makes nor the result. So
    the memory of the process is looked at too, if a limit is given.
    connection: that the work is on; None where the work makes it
    The work runs in a thread of its own. Python handles Ctrl-C in the main thread only, and not while DuckDB has it.
    raises: KeyboardInterrupt, QueryRefused for its time, OutOfMemory; what the work raises
    """
    if limits.seconds is None and threading.current_thread() is not threading.main_thread():
        return work()
    outcome: Future[Result] = Future()
    try:
        threading.Thread(target=_settle, args=(outcome, work), daemon=True, name="attrdb-sql").start()
        error = _watch(outcome, limits)
    except KeyboardInterrupt:
        _end(connection, outcome)
        raise
    if error is not None:
        _end(connection, outcome)
        raise error
    return outcome.result()


def _settle(outcome: Future[Result], work: Callable[[], Result]) -> None:
    try:
        outcome.set_result(work())
    except BaseException as error:
        outcome.set_exception(error)


def _watch(outcome: Future[Result], limits: Limits) -> Exception | None:
    """Wait for the work; the error of the limit that it crosses first, if it does."""
    began, before, seconds, memory = time.monotonic(), resident_bytes(), limits.seconds, limits.memory
    done = threading.Event()
    outcome.add_done_callback(lambda _: done.set())
    while not done.is_set():
        left = TICK if seconds is None else min(TICK, began + seconds - time.monotonic())
        if left <= 0:
            assert seconds is not None
            return takes_longer(seconds)
        if not done.wait(left) and memory is not None and resident_bytes() - before > memory + SCAN_MEMORY:
            return needs_more(size_text(memory))
    return None


_left_behind: list[Future] = []  # type: ignore[type-arg]  # of any result


def _end(connection: duckdb.DuckDBPyConnection | None, outcome: Future[Result]) -> None:
    """Interrupt the work, and leave its thread behind if it does not end soon. A second Ctrl-C leaves it behind at once."""
    _left_behind[:] = [other for other in _left_behind if not other.done()] + [outcome]
    until = time.monotonic() + GRACE
    while not outcome.done() and time.monotonic() < until:
        if connection is not None:
            connection.interrupt()
        time.sleep(0.01)


def any_left_behind() -> bool:
    """Whether a statement that was ended still computes. Python then cannot end in its usual way, see `leave`."""
    return any(not outcome.done() for outcome in _left_behind)


@contextmanager
def closing_unless_busy(connection: duckdb.DuckDBPyConnection) -> Iterator[duckdb.DuckDBPyConnection]:
    """The connection, closed afterwards; one that a statement has been left behind on cannot be closed."""
    try:
        yield connection
    finally:
        if not any_left_behind():
            connection.close()


def leave(code: int) -> None:
    """End the process at once, if a statement that was ended still computes."""
    if any_left_behind():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def resident_bytes() -> int:
    """The memory of this process; 0 where the system does not report it."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
