"""Memory that is free, and settings of a process that make Lance and large arrays fast, which attrdb's commands use."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


def keep_freed_memory(*, one_arena: bool = False) -> None:
    """Let this process keep up to 1 GiB of freed memory, where the C library is glibc.

    Otherwise every training step returns its activations to the system and fetches them again: 1,100 to 1,700 page faults
    per step of icon-sd on a CPU, with it 10, and 0.93 of the time.
    one_arena: all threads share one heap. A scan then reuses what Lance's threads allocate and the caller frees: reading
               1 M x 512 features took 0.8 s with it and 2.3 to 4 s without, nearly all of that page faults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
        if one_arena:
            mallopt(M_ARENA_MAX, 1)


def use_the_machine() -> None:
    """For a process that searches: Lance computes on all cores, not on all but two, and freed memory is kept.

    Call it before Lance's first search. Environment variables win. On two cores a batch of queries takes 0.7 of the time.
    """
    os.environ.setdefault("LANCE_CPU_THREADS", str(os.cpu_count() or 1))
    keep_freed_memory(one_arena=True)


def free_memory(system: Path = Path("/")) -> int:
    """Bytes, with the caches that the system would free, where it reports them; within the limit of a container.

    system: the root of the files in which Linux reports them
    """
    report = system / "proc/meminfo"
    lines = dict(line.split(":") for line in report.read_text().splitlines()) if report.exists() else {}
    if "MemAvailable" in lines:
        free = int(lines["MemAvailable"].split()[0]) * 1024
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = system / "sys/fs/cgroup"
    with suppress(OSError, ValueError, KeyError):  # no container, or "max": it has no limit
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        figures = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(figures["inactive_file"]))
    return max(0, free)
