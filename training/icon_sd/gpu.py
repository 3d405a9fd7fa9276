"""Run the tasks that need a GPU, in order, within some minutes: python3 training/icon_sd/gpu.py --minutes 9.5 --out OUT

It runs on a machine that has this folder, Python with torch, torchvision, transformers, timm, peft, safetensors, numpy,
pyarrow and click, and perhaps nothing else. attrdb need not be installed. Packages that are missing come from the wheels in
`.whl` (`make gpu-wheels` fetches them). This file imports only the standard library; every task is a process of its own.

A task that is done is skipped. A task that has too little time waits for the next call. A task that fails or overruns does
not stop the next. OUT gets a log per task and the results as `results.tar.00`, `.01` ..., in parts of at most PART bytes;
`--unpack OUT --into FOLDER` joins them.

Where the size of what is carried there is limited, delete what no task needs, and get it back afterwards:

    rm $(python3 training/icon_sd/gpu.py --unneeded)
    git restore $(python3 training/icon_sd/gpu.py --unneeded)
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PART = 15 * 2**20  # bytes
GRACE = 30  # seconds that a task may take beyond its minutes: to start, and to write its results
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOMS = ("ingest", "training", "queries")
# Tracked files that no task needs, the largest.
UNNEEDED = (
    "attrdb/assets/encoders/icon-clip.safetensors",
    "attrdb/assets/encoders/icon-moco.safetensors",
    "attrdb/assets/icon-sd/text_encoder/model.safetensors",
    "attrdb/assets/icon-sd/unet/diffusion_pytorch_model.safetensors",
    "benchmarks/iconabc/images.parquet",
)


Way = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Task:
    """A task of the queue.

    ways:  the fastest first; each is tried if the one before it failed. A way is some processes that run beside each other,
           each as what follows the interpreter; {root}, {run}, {out}, {minutes} and {sprites} are filled in
    share: of the time, relative to the shares of the other tasks that are not done
    least: minutes; with fewer it is not begun
    most:  minutes; it uses no more
    """

    name: str
    ways: tuple[Way, ...]
    share: float
    least: float = 0.0
    most: float = math.inf


def _module(name: str, *words: str) -> tuple[str, ...]:
    return ("-m", f"attrdb.training.icon_sd.{name}", *words)


FOLDERS = ("--run", "{run}", "--out", "{out}", "--minutes", "{minutes}")
AUTOENCODER = (
    *("--vae-channels", "32", "64", "96", "96"),  # twice the width of a CPU's at the two outer levels
    *("--vae-minutes", "2.3", "--vae-images", "12000000", "--vae-batch", "128", "--vae-lr", "6e-4"),
)
UNET = ("--unet-batch", "512", "--unet-lr", "8e-4", "--lr-end", "0.05", "--workers", "13")
SHAPE = ("{root}/benchmarks/shapes.py", "--json", "{out}/sd15.json", "--shape")
TINY_STEPS = (
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


def _encoders(*options: str) -> Way:
    """Both, beside each other: a GPU is idle for most of a step of one."""
    folders = ("--out", "{out}", "--minutes", "{minutes}")
    kinds = ("icon-clip", "icon-moco")
    return tuple(_module("encoders", kind, "--run", f"{{run}}/{kind}", *folders, *options) for kind in kinds)


BUILD = _module("build", *FOLDERS, *AUTOENCODER, *UNET)
TASKS = (
    Task("icon-sd", (((*BUILD, "--recorded"),), (BUILD,)), share=6.0, least=6.0),
    Task("encoders", (_encoders("--batch", "1024", "--workers", "6"),), share=1.0, least=1.0),
    Task("sd15", (((*SHAPE, "sd15", "--steps", "30"),),), share=1.0, least=1.2, most=3.0),
)
# The same tasks at sizes that take seconds on a CPU.
REHEARSAL = (
    Task("icon-sd", ((_module("build", *FOLDERS, "--tiny", "--sprites", "{sprites}"),),), 1.0, most=0.15),
    Task("encoders", (_encoders("--batch", "8", "--sprites", "{sprites}"),), 1.0, most=0.1),
    Task("sd15", (((*SHAPE, "icon-sd", *TINY_STEPS),),), 1.0),
)


def minutes_for(task: Task, waiting: tuple[Task, ...], left: float) -> float:
    """Minutes for a task, out of those that are left; 0 if they are not enough for it.

    waiting: the tasks that are not done, this one first; each gets GRACE besides its share
    """
    free = left - len(waiting) * GRACE / 60
    minutes = min(task.most, free * task.share / sum(other.share for other in waiting))
    if minutes < task.least:  # better one task whole than all of them too short
        minutes = min(task.least, left - GRACE / 60)
    return minutes if minutes >= task.least and minutes > 0 else 0.0


def environment(folder: Path) -> dict[str, str]:
    """The environment variables with which tasks find attrdb, its rooms by import name, and the packages of the wheels."""
    package = folder / "site" / "attrdb"
    package.mkdir(parents=True, exist_ok=True)
    for part in [*(ROOT / "attrdb").iterdir(), *(ROOT / room for room in ROOMS)]:
        link = package / part.name
        if not link.is_symlink():
            link.symlink_to(part)
    paths = [str(package.parent.resolve())]
    wheels = [wheel for wheel in sorted((ROOT / ".whl").glob("*.whl")) if find_spec(_package(wheel)) is None]
    if wheels:
        target = folder / "packages"
        quiet = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(target)]
        subprocess.run([sys.executable, "-m", "pip", "install", *quiet, *map(str, wheels)], check=True)
        paths.append(str(target))
    known = os.environ.get("PYTHONPATH")
    joined = os.pathsep.join([*paths, *([known] if known else [])])
    return {**os.environ, "PYTHONPATH": joined, "PYTHONUNBUFFERED": "1", **QUIET}


def _package(wheel: Path) -> str:
    """The import name of a wheel's package."""
    return wheel.name.split("-")[0].removesuffix("_torch")


def run(tasks: tuple[Task, ...], minutes: float, runs: Path, out: Path, sprites: Path | None) -> list[dict]:
    """The state of each task: done, done before, no time, or failed with its exit code."""
    end = time.monotonic() + 60 * minutes
    runs, out = runs.resolve(), out.resolve()
    runs.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    variables, empty = environment(runs), runs / "empty"
    empty.mkdir(exist_ok=True)
    states: list[dict[str, str | float]] = []
    for number, task in enumerate(tasks):
        done, results = runs / f"{task.name}.done", runs / "results" / task.name
        left = (end - time.monotonic()) / 60
        waiting = tuple(other for other in tasks[number:] if not (runs / f"{other.name}.done").exists())
        if done.exists():
            states.append({"task": task.name, "state": "done before"})
        elif not (planned := minutes_for(task, waiting, left)):
            states.append({"task": task.name, "state": "no time", "minutes_left": round(left, 1)})
        else:
            results.mkdir(parents=True, exist_ok=True)
            fills: dict[str, object] = {
                "root": ROOT,
                "run": runs / task.name,
                "out": results,
                "sprites": sprites and sprites.resolve(),
            }
            started, state = time.monotonic(), ""
            with (out / f"{task.name}.log").open("wb") as log:
                for way in task.ways:
                    fills["minutes"] = minutes = planned - (time.monotonic() - started) / 60
                    commands = [[sys.executable, *(word.format(**fills) for word in command)] for command in way]
                    state = _run(commands, empty, log, variables, 60 * minutes + GRACE)
                    if not state.startswith("failed"):
                        break
            if state == "done":
                done.touch()
            states.append({"task": task.name, "state": state, "seconds": round(time.monotonic() - started)})
        print(json.dumps(states[-1]), flush=True)
        pack(runs / "results", out)  # after each task, since the machine may be taken away at any time
    return states


def _run(
    commands: list[list[str]], folder: Path, log: io.BufferedWriter, variables: dict[str, str], seconds: float
) -> str:
    """Run commands beside each other; when their time is over, kill them and all processes that they started.

    folder: working directory; empty, because a folder `attrdb` or `icon-sd` in it would be taken for the package or a model
    """
    end = time.monotonic() + seconds
    processes = [
        subprocess.Popen(
            command, cwd=folder, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        for command in commands
    ]
    try:
        codes = [process.wait(timeout=max(0.0, end - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return f"ended after {seconds:.0f} s"
    failed = [code for code in codes if code]
    return f"failed with {failed[0]}" if failed else "done"


def pack(results: Path, out: Path) -> list[Path]:
    """The results as parts of one tar."""
    if not results.is_dir():
        return []
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(results, arcname=".")
    content = archive.getvalue()
    parts = []
    for number, start in enumerate(range(0, len(content), PART)):
        parts.append(out / f"results.tar.{number:02d}")
        parts[-1].write_bytes(content[start : start + PART])
    return parts


def unpack(parts: Path, into: Path) -> None:
    """Write the files that `pack` packed into a folder."""
    content = b"".join(part.read_bytes() for part in sorted(parts.glob("results.tar.*")))
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.extractall(into, filter="data")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the tasks that need a GPU, within some minutes.")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "gpu", help="Checkpoints; kept between calls.")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-out", help="Results, in parts, and logs.")
    parser.add_argument("--rehearse", type=Path, metavar="SPRITES", help="Tiny sizes, with the sprites of this file.")
    parser.add_argument("--unpack", type=Path, metavar="OUT", help="Join the parts in OUT instead.")
    parser.add_argument("--into", type=Path, default=Path("results"), help="Where --unpack puts them.")
    parser.add_argument("--unneeded", action="store_true", help="List tracked files that no task needs instead.")
    options = parser.parse_args()
    if options.unneeded:
        print("\n".join(str(ROOT / name) for name in UNNEEDED))
        return 0
    if options.unpack:
        unpack(options.unpack, options.into)
        return 0
    tasks = REHEARSAL if options.rehearse else TASKS
    states = run(tasks, options.minutes, options.runs, options.out, options.rehearse)
    return 0 if all(state["state"].startswith("done") for state in states) else 1


if __name__ == "__main__":
    sys.exit(main())
