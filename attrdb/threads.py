"""Blocks worked on by all cores, one a core.

With all cores on one matrix product after the other, each waits for the slowest, and what is not a product runs on one.
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

from threadpoolctl import ThreadpoolController

N_CORES = os.cpu_count() or 1
WORKERS = min(N_CORES, 8)  # each holds the result of a product


def worked(work: Callable[[Any], Any], blocks: Iterable[Any], device: str = "cpu") -> Iterator[Any]:
    """What is made of each block, in their order; on an accelerator one after the other."""
    if device != "cpu":
        yield from map(work, blocks)
        return
    waiting: deque[Future] = deque()
    with product_threads(max(1, N_CORES // WORKERS)), ThreadPoolExecutor(WORKERS) as pool:
        for block in blocks:
            waiting.append(pool.submit(work, block))
            if len(waiting) > WORKERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def product_threads(n: int) -> Iterator[None]:
    """So many threads a matrix product of NumPy's, in this whole process; the last that asked for it lifts it."""
    with _Asked.lock:
        if not _Asked.n:
            _Asked.limited = _blas().limit(limits=n, user_api="blas")
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

    lock, n, limited = Lock(), 0, None


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()  # looks through all libraries that are loaded
