"""Blocks worked on by all cores, one a core, up to WORKERS.

With all cores on one matrix product after the other, each waits for the slowest, and what is not a product runs on one.
A product has one thread: OpenBLAS, NumPy's, lets those that have several run only one after the other.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

import numpy  # noqa: F401  whose BLAS is to be found
from threadpoolctl import ThreadpoolController

WORKERS = 16  # at most, since each holds a block and the result of a product: half a GiB together


def map_blocks(work: Callable[[Any], Any], blocks: Iterable[Any], device: str = "cpu") -> Iterator[Any]:
    """What is made of each block, in their order; on an accelerator one after the other."""
    if device != "cpu":
        yield from map(work, blocks)
        return
    waiting: deque[Future[Any]] = deque()
    workers = min(_n_threads(), WORKERS)
    with one_thread_per_product(), ThreadPoolExecutor(workers) as pool:
        for block in blocks:
            waiting.append(pool.submit(work, block))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def one_thread_per_product() -> Iterator[None]:
    """One thread a matrix product of NumPy's, in this whole process; the last that asked for it lifts it."""
    with _Asked.lock:
        if not _Asked.n:
            _Asked.limited = _blas().limit(limits=1)
        _Asked.n += 1
    try:
        yield
    finally:
        with _Asked.lock:
            _Asked.n -= 1
            if not _Asked.n:
                _Asked.limited.restore_original_limits()


class _Asked:
    """By how many a limit is asked for now, and what undoes it."""

    lock, n = Lock(), 0
    limited: Any = None

    @classmethod
    def in_child(cls) -> None:
        """A process that is forked while others search has none of their searches."""
        if cls.n:
            cls.limited.restore_original_limits()
        cls.lock, cls.n, cls.limited = Lock(), 0, None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Asked.in_child)


@cache
def _n_threads() -> int:
    """Of a product as it was before any limit: the cores, or what the environment allows."""
    return max((library["num_threads"] for library in _blas().info()), default=os.cpu_count() or 1)


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")  # looks through all libraries that are loaded
