"""What a process of attrdb's own sets for itself, so that Lance and large arrays are quick; an application decides itself."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


def keep_freed_memory(*, one_arena: bool = False) -> None:
    """Let this process keep up to 1 GiB of freed memory, where the C library is glibc.

    Otherwise the activations of every training step are given back to the system and fetched again: 1,100 to 1,700 page
    faults a step at icon-sd on a CPU, 10 with it, and 0.93 of the time.
    one_arena: all threads take from one heap, as suits a scan: what Lance's threads fetch and the caller frees is used
               again. Reading 1 M x 512 features took 0.8 s with it and 2.3 to 4 s without, nearly all of that page faults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
        if one_arena:
            mallopt(M_ARENA_MAX, 1)


def use_the_machine() -> None:
    """For a process that searches: all cores for Lance, which leaves two of them to reading otherwise, and memory kept.

    To be called before Lance's first search; what the environment says goes first. On two cores a batch of queries takes
    0.7 of the time.
    """
    os.environ.setdefault("LANCE_CPU_THREADS", str(os.cpu_count() or 1))
    keep_freed_memory(one_arena=True)
