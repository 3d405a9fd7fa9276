"""Run the campaign, or parts of it, and keep its figures: cd tests && python -m torture --help."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from machine import describe

from torture.bit_flips import bit_flips
from torture.command_lines import command_lines
from torture.crowd import crowd
from torture.disks import NotPermitted
from torture.full_disk import full_disk
from torture.kills import kills
from torture.pictures import pictures
from torture.shortages import run_all
from torture.trials import Trial
from torture.workloads import CUSTOMIZE, WORKLOADS

SHOWN = 50  # trials with problems that are kept
FOLDERS = re.compile(r"(?<![\w.])(?:/[\w.+-]+)*/(?=[\w.+-])")  # of absolute paths, which are those of a machine
Part = Callable[[Path, float, int], Iterator[Trial]]

# Each of a folder, a share of the whole, and a seed.
PARTS: dict[str, Part] = {
    "kills": lambda folder, share, seed: kills(round(1000 * share), seed, folder, (*WORKLOADS, CUSTOMIZE)),
    "crowd": lambda folder, share, seed: crowd(600 * share, folder),
    "full disk": lambda folder, share, seed: full_disk(folder, every=round(1 / share)),
    "shortages": lambda folder, share, seed: run_all(folder, every=round(1 / share)),
    "command lines": lambda folder, share, seed: command_lines(round(1000 * share), seed, folder),
    "bit flips": lambda folder, share, seed: bit_flips(round(1000 * share), seed, folder),
    "pictures": lambda folder, share, seed: pictures(folder, every=round(1 / share)),
}


def run_part(name: str, folder: Path, share: float, seed: int) -> dict:
    """Counts of a part's trials by group, and those with problems."""
    folder.mkdir(parents=True)
    started, groups, wrong = time.monotonic(), Counter(), []
    not_run = None
    try:
        for trial in PARTS[name](folder, share, seed):
            groups[trial.group] += 1
            if trial.problems:
                problems = [FOLDERS.sub("", problem) for problem in trial.problems]
                wrong.append({"group": trial.group, "what": trial.what, "problems": problems})
                click.echo(f"{name}: {trial}")
            elif sum(groups.values()) % 25 == 0:
                click.echo(f"{name}: {sum(groups.values())} trials, {len(wrong)} with problems")
    except NotPermitted as error:
        not_run = str(error)
    seconds = round(time.monotonic() - started)
    click.echo(f"{name}: {sum(groups.values())} trials, {len(wrong)} with problems, {seconds} s {not_run or ''}")
    return {
        "groups": dict(groups),
        "n_wrong": len(wrong),
        "wrong": wrong[:SHOWN],
        "seconds": seconds,
        "seed": seed,
        "share": share,
        "not_run": not_run,
    }


@click.command()
@click.option("--part", "names", type=click.Choice(list(PARTS)), multiple=True, help="Default: every part.")
@click.option("--share", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Of the whole campaign.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--folder", type=click.Path(path_type=Path), required=True, help="Where databases are made; it is emptied."
)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Keep the figures in FILE, beside other parts'.")
def main(names: tuple[str, ...], share: float, seed: int, folder: Path, file: Path | None) -> None:
    """Try to make attrdb lose a row, print a traceback, or give a wrong answer."""
    n_wrong = 0
    for name in names or PARTS:
        part = folder / name.replace(" ", "-")
        shutil.rmtree(part, ignore_errors=True)
        figures = run_part(name, part, share, seed)
        n_wrong += figures["n_wrong"]
        if file:
            kept = json.loads(file.read_text()) if file.exists() else {}
            file.write_text(
                json.dumps(kept | {"machine": describe("pylance", "duckdb"), name: figures}, indent=1) + "\n"
            )
    sys.exit(1 if n_wrong else 0)


if __name__ == "__main__":
    main()
