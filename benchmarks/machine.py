"""The machine that a figure was measured on, and the spread of a series of figures."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from statistics import median


def describe(*packages: str) -> dict:
    """Processor, cores, memory and the versions of some packages."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in packages},
    }


def icon_sd() -> str:
    """The bundled base model, by its weights."""
    from attrdb.ingest.customize.base_model import BUNDLED, base_model_folder, weights_hash

    return f"{BUNDLED}, weights {weights_hash(base_model_folder(BUNDLED))[:8]}"


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


def peak_gib() -> float:
    """Peak memory of this process. Not `ru_maxrss`, which begins at the parent's."""
    [line] = [line for line in _lines("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**20


def spread(values: list[float]) -> dict:
    return {"min": min(values), "median": median(values), "max": max(values), "n": len(values)}
