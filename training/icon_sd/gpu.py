"""What waits for a GPU, done in order within some minutes: python3 training/icon_sd/gpu.py --minutes 11 --out OUT

Runs on a machine that holds this folder, Python with torch, torchvision, transformers, timm, peft, safetensors, numpy,
pyarrow and click, and perhaps nothing else: attrdb need not be installed, and what is missing is taken from the wheels in
`.whl` (`make gpu-wheels` fetches them). It imports nothing but the standard library; every task is a process of its own.

A task that is done is skipped, one that has too little time left waits for the next call, one that fails or overruns does not
stop the next. OUT gets what came of them as `results.tar.00`, `.01` ..., in parts of at most PART bytes, and a log;
`--unpack OUT --into FOLDER` puts them together again.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PART = 15 * 2**20  # bytes
GRACE = 60  # seconds that a task may take beyond its minutes: to start, and to write what it has
ROOMS = ("ingest", "training", "queries")


@dataclass(frozen=True)
class Task:
    """command: after the interpreter; {run}, {out} and {minutes} are filled in. minutes: of eleven. least: to begin with."""

    name: str
    command: tuple[str, ...]
    minutes: float
    least: float


def _module(name: str, *words: str) -> tuple[str, ...]:
    return ("-m", f"attrdb.training.icon_sd.{name}", *words)


KEPT = ("--run", "{run}", "--out", "{out}", "--minutes", "{minutes}")
AUTOENCODER = ("--vae-minutes", "1.8", "--vae-images", "8000000", "--vae-batch", "128", "--vae-lr", "6e-4")
UNET = ("--unet-batch", "1024", "--unet-lr", "1e-3", "--lr-end", "0.1")
TINY_SHAPE = (
    "--steps",
    "1",
    "--batch",
    "1",
    "--sample-batch",
    "1",
    "--solver-steps",
    "1",
    "--method",
    "custom-diffusion",
)
TASKS = (
    Task(
        "icon-sd",
        _module("build", *KEPT, *AUTOENCODER, *UNET, "--workers", "12"),
        minutes=6.4,
        least=3.0,
    ),
    Task("icon-clip", _module("encoders", "icon-clip", *KEPT, "--batch", "1024", "--workers", "12"), 1.3, 0.8),
    Task("icon-moco", _module("encoders", "icon-moco", *KEPT, "--batch", "512", "--workers", "12"), 1.2, 0.8),
    Task("sd15", ("benchmarks/shapes.py", "--shape", "sd15", "--json", "{out}/sd15.json"), 2.0, 1.5),
)
# The same at sizes for which seconds on a CPU are enough.
REHEARSAL = (
    Task("icon-sd", _module("build", *KEPT, "--tiny", "--sprites", "{sprites}"), 0.3, 0.0),
    Task("icon-clip", _module("encoders", "icon-clip", *KEPT, "--batch", "8", "--sprites", "{sprites}"), 0.1, 0.0),
    Task("icon-moco", _module("encoders", "icon-moco", *KEPT, "--batch", "8", "--sprites", "{sprites}"), 0.1, 0.0),
    Task(
        "sd15",
        ("benchmarks/shapes.py", "--shape", "icon-sd", "--json", "{out}/sd15.json", *TINY_SHAPE),
        minutes=1.5,
        least=0.0,
    ),
)


def environment(folder: Path) -> dict[str, str]:
    """The variables with which tasks find attrdb, its rooms under their published names, and the wheels' packages."""
    package = folder / "site" / "attrdb"
    package.mkdir(parents=True, exist_ok=True)
    for part in [*(ROOT / "attrdb").iterdir(), *(ROOT / room for room in ROOMS)]:
        link = package / part.name
        if not link.is_symlink():
            link.symlink_to(part)
    paths = [str(package.parent.resolve())]
    wheels = sorted((ROOT / ".whl").glob("*.whl"))
    wanted = [wheel for wheel in wheels if find_spec(wheel.name.split("-")[0]) is None]
    if wanted:
        target = folder / "packages"
        quiet = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(target)]
        subprocess.run([sys.executable, "-m", "pip", "install", *quiet, *map(str, wanted)], check=True)
        paths.append(str(target.resolve()))
    known = os.environ.get("PYTHONPATH")
    joined = os.pathsep.join([*paths, *([known] if known else [])])
    return {**os.environ, "PYTHONPATH": joined, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def run(tasks: tuple[Task, ...], minutes: float, runs: Path, out: Path, sprites: Path | None) -> list[dict]:
    """What became of each task: done, skipped, no time, failed (with its exit code)."""
    end = time.monotonic() + 60 * minutes
    share = min(1.0, minutes / 11) if tasks is TASKS else 1.0
    runs.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    variables = environment(runs)
    said = []
    for task in tasks:
        done, results = runs / f"{task.name}.done", runs / "results" / task.name
        left = (end - time.monotonic()) / 60
        planned = min(task.minutes * share, left - GRACE / 60 if tasks is TASKS else task.minutes)
        if done.exists():
            said.append({"task": task.name, "state": "done before"})
        elif planned < task.least:
            said.append({"task": task.name, "state": "no time", "minutes_left": round(left, 1)})
        else:
            results.mkdir(parents=True, exist_ok=True)
            fills = {"run": runs / task.name, "out": results, "minutes": planned, "sprites": sprites}
            command = [sys.executable, *(word.format(**fills) for word in task.command)]
            started = time.monotonic()
            with (out / f"{task.name}.log").open("wb") as log:
                state = _run(command, log, variables, 60 * planned + GRACE)
            if state == "done":
                done.touch()
            said.append({"task": task.name, "state": state, "seconds": round(time.monotonic() - started)})
        print(json.dumps(said[-1]), flush=True)
        pack(runs / "results", out)  # after each task: the machine may be taken back at any time
    return said


def _run(command: list[str], log: io.BufferedWriter, variables: dict[str, str], seconds: float) -> str:
    try:
        found = subprocess.run(
            command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"ended after {seconds:.0f} s"
    return "done" if found.returncode == 0 else f"failed with {found.returncode}"


def pack(results: Path, out: Path) -> list[Path]:
    """The results as parts of one tar."""
    if not results.is_dir():
        return []
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        tar.add(results, arcname=".")
    content = whole.getvalue()
    parts = []
    for number, start in enumerate(range(0, len(content), PART)):
        parts.append(out / f"results.tar.{number:02d}")
        parts[-1].write_bytes(content[start : start + PART])
    return parts


def unpack(parts: Path, into: Path) -> None:
    """What `pack` has made of a folder, in a folder again."""
    content = b"".join(part.read_bytes() for part in sorted(parts.glob("results.tar.*")))
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.extractall(into, filter="data")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run what waits for a GPU, within some minutes.")
    parser.add_argument("--minutes", type=float, default=11.0)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "gpu", help="Checkpoints; kept between calls.")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-out", help="Results, in parts, and logs.")
    parser.add_argument("--rehearse", type=Path, metavar="SPRITES", help="Tiny sizes, with the sprites of this file.")
    parser.add_argument("--unpack", type=Path, metavar="OUT", help="Put the parts in OUT together instead.")
    parser.add_argument("--into", type=Path, default=Path("results"), help="Where --unpack puts them.")
    given = parser.parse_args()
    if given.unpack:
        unpack(given.unpack, given.into)
        return 0
    said = run(REHEARSAL if given.rehearse else TASKS, given.minutes, given.runs, given.out, given.rehearse)
    return 0 if all(one["state"].startswith("done") for one in said) else 1


if __name__ == "__main__":
    sys.exit(main())
