"""Broken pictures of every kind that the generator makes: each ends as stored, or as a failure with a reason."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import broken_pictures
from click.testing import CliRunner

import attrdb
from attrdb.cli import main
from attrdb.upkeep import health
from torture.trials import Trial, traces

PER_FOLDER = 2000
FAMILIES = ("odd_exif", "truncated", "flipped", "odd_metadata", "odd_sizes", "odd_modes")


def pictures(folder: Path, every: int = 1) -> Iterator[Trial]:
    """One import per some thousand pictures, and a trial per picture."""
    everything = islice(chain(*(getattr(broken_pictures, name)() for name in FAMILIES)), 0, None, every)
    number = 0
    while batch := list(islice(everything, PER_FOLDER)):
        yield from _imported(folder / f"{number}", batch)
        number += 1


def _imported(folder: Path, batch: list[tuple[str, bytes]]) -> Iterator[Trial]:
    (folder / "odd").mkdir(parents=True)
    for number, (_, encoded) in enumerate(batch):
        (folder / "odd" / f"{number:05d}.png").write_bytes(encoded)
    db = folder / "db"
    words = ["ingest", "corpus", db, folder / "odd", "--encoder", "pixels:2", "--quiet"]
    done = CliRunner().invoke(main, [str(word) for word in words])
    opened = attrdb.open(db, read_only=True)
    stored = {name.rpartition("/")[2] for name in opened.sql("SELECT image_id FROM images")["image_id"].to_pylist()}
    failed = {row["item"].rpartition("/")[2]: row["reason"] for row in opened.sql("FROM failures").to_pylist()}
    whole = traces(done.output) + [f"check {finding.check}" for finding in health.check(opened.snapshot)]
    yield Trial("imports", f"{len(batch)} pictures, {len(stored)} stored, {len(failed)} left out", whole)
    for number, (what, _) in enumerate(batch):
        name = f"{number:05d}.png"
        trial = Trial("pictures", what)
        if (name in stored) == (name in failed):
            trial.problems.append("it is stored and left out" if name in stored else "nothing became of it")
        elif name in failed and not failed[name].strip():
            trial.problems.append("it was left out without a reason")
        yield trial
