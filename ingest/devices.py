"""Devices: where networks run, what they multiply in there, and what is said when their memory is full."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from attrdb.errors import InvalidValue, OutOfMemory
from attrdb.ingest.options import PRECISIONS, one_of


def default_device() -> str:
    """'cpu', or this thread's GPU with its number: threads that are started later have another one."""
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def gpu_of_worker(number: int) -> int | None:
    """The GPU of worker process `number` (from 1), in turn; None where there is none."""
    n_gpus = torch.cuda.device_count()
    return (number - 1) % n_gpus if n_gpus else None


def share_cores(n_processes: int) -> None:
    """Leave this process its part of the cores, where so many work at the same time.

    Threads of one that wait for their turn on a core keep those of the others waiting: at icon-sd two workers on two cores
    take 2.9 s a training step with two threads each, and 0.14 s with one. OMP_NUM_THREADS, where it is set, says it instead.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // n_processes))


def is_cpu(device: str) -> bool:
    return torch.device(device).type == "cpu"


def resolved_precision(precision: str, device: str | None = None) -> str:
    """'float32' or 'bf16'; 'auto' is bf16 where the device multiplies it faster by hardware.

    Measured at icon-sd on a CPU with AMX, one thread: a step of sampling takes 0.53 of the time, one of training 0.9. On a
    CPU with AVX2 alone bf16 takes eighteen times as long as float32.
    raises: InvalidValue for no such precision
    """
    if precision not in PRECISIONS:
        raise InvalidValue(f"precision is {precision!r}; it must be {one_of(PRECISIONS)}")
    if precision != "auto":
        return precision
    if is_cpu(device or default_device()):
        get_capabilities = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.9 has no such function yet
        capabilities: dict[str, bool] = get_capabilities()
        native = capabilities.get("amx_bf16", False)
    else:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "float32"


@contextmanager
def enough_memory(device: str, doing: str, advice: str) -> Iterator[None]:
    """In it a full memory, of a GPU or of the machine, raises OutOfMemory.

    doing:  such as "training 8 pictures of 512 pixels at a time"
    advice: what to give instead
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # Of a CPU's memory torch says no more than RuntimeError.
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        raise OutOfMemory(f"out of memory while {doing} on {device}{_free(device)}; {advice}") from error


def _free(device: str) -> str:
    if is_cpu(device):
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f" ({free / 2**30:.1f} of {total / 2**30:.1f} GiB were free)"
