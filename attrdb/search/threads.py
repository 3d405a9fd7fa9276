"""Work on blocks by all cores, one block per core, up to WORKERS.

If all cores worked on one matrix product after another, each would wait for the slowest, and all else would run on one core.
So a product has one thread. OpenBLAS, which NumPy uses, runs products of several threads only one after another.
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

import numpy  # noqa: F401  loads the BLAS that is limited here
from threadpoolctl import ThreadpoolController

WORKERS = 16  # at most: each holds a block and the result of a product, half a GiB together


def map_blocks(work: Callable[[Any], Any], blocks: Iterable[Any], device: str = "cpu") -> Iterator[Any]:
    """The results of `work` on each block, in their order; on an accelerator one after another."""
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
    """One thread per matrix product of NumPy, in the whole process, until the last block that needs it ends."""
    with _Limit.lock:
        if not _Limit.n_users:
            _Limit.limiter = _blas().limit(limits=1)
        _Limit.n_users += 1
    try:
        yield
    finally:
        with _Limit.lock:
            _Limit.n_users -= 1
            if not _Limit.n_users:
                _Limit.limiter.restore_original_limits()


class _Limit:
    """The number of blocks that need the limit now, and the object that lifts it."""

    lock, n_users = Lock(), 0
    limiter: Any = None

    @classmethod
    def reset_in_child(cls) -> None:
        """Lift the limit in a process that was forked during a search: none of the searches runs in it."""
        if cls.n_users:
            cls.limiter.restore_original_limits()
        cls.lock, cls.n_users, cls.limiter = Lock(), 0, None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Limit.reset_in_child)


@cache
def _n_threads() -> int:
    """Threads of a product without the limit: the cores, or what the environment allows."""
    return max((library["num_threads"] for library in _blas().info()), default=os.cpu_count() or 1)


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")  # slow: searches all libraries that are loaded
