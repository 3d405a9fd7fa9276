"""Odd command lines: any command and any of its options, with values that nobody meant. Each ends, with a readable error.

The database is whole afterwards, and nothing beside it has changed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import click

from attrdb.cli import main
from attrdb.errors import AttrdbError
from torture.comparing import tables, unsound
from torture.processes import log_of, start
from torture.trials import Trial, traces_in
from torture.workloads import beside, learnable_stored, make_inputs

SECONDS = 60  # that a command may take
NOT_RUN = {"demo", "shell"}  # minutes of work; a prompt
MAY_TAKE_LONG = {("ingest", "model"), ("ingest", "models")}  # what they are told may be right, and means to customize
MAY_TAKE_OUT = {("remove",)}

ODD = [
    "",
    " ",
    "-",
    "--",
    ".",
    "..",
    "/proc/nowhere/at/all",  # root could make a folder anywhere else
    "/proc/self/mem",
    "../precious",
    "../../precious",
    "nope",
    "a\nb",
    "a\tb",
    "\x1b[31mred",
    "\udcff\udcfe",
    "name\udce9",
    "☃",
    "e\u0301",
    "\u202etxt",
    "x" * 300,
    "x" * 100_000,
    "0",
    "-1",
    "1",
    "3",
    "999999999999999999999999",
    "1e400",
    "nan",
    "inf",
    "-inf",
    "0x10",
    "true",
    "NULL",
    "9999-12-31",
    "0000-00-00",
    "2026-11-27T00:00:00+99:00",
    "'",
    '"',
    "''",
    "$1",
    "?",
    ":x",
    "%s",
    "{}",
    "*",
    "role",
    "role = 'exemplar'",
    '"role" = "exemplar"',
    "image_id = 'p000' OR 1 = 1",
    "1 = 1",
    "1/0 = 1",
    "(" * 2000,
    "SELECT 1",
    "SELECT * FROM images",
    "SELECT 'infinity'::TIMESTAMP, 'nan'::DOUBLE, 170141183460469231731687303715884105727",
    "FROM read_csv('/etc/passwd')",
    "DROP TABLE images",
    "p000",
    "m00/0/0",
    "m00",
    "toy_12",
    "toy:12",
    "pixels:2",
    "pixels:999999999",
    "open_clip:nope/none",
    "timm:nope",
    "torchscript:/dev/null",
    "s3://bucket/key",
    "http://127.0.0.1:9/x",
    "file:///etc/passwd",
    "icon-sd",
    "train",
    "own",
    "all",
]


@dataclass(frozen=True)
class Command:
    path: tuple[str, ...]
    command: click.Command


def commands(group: click.Group = main, path: tuple[str, ...] = ()) -> Iterator[Command]:
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        elif name not in NOT_RUN:
            yield Command((*path, name), command)


def odd_words(command: Command, chance: Random, db: Path, inputs: Path) -> list[str]:
    """A command with a database that is mostly there, and options with odd values."""
    places = [str(inputs / name) for name in ("photos", "vase", "vectors", "opt-out.txt")]
    places += [str(beside(db, "target")), str(db.parent / "nope"), str(db), str(db / "images.lance")]

    def value() -> str:
        return chance.choice(places) if chance.random() < 0.3 else chance.choice(ODD)

    words = list(command.path)
    for parameter in command.command.params:
        if isinstance(parameter, click.Argument):
            if parameter.name == "db" and chance.random() < 0.9:
                words.append(str(db))
            elif parameter.required or chance.random() < 0.7:
                words.append(value())
        elif chance.random() < 0.25 or (parameter.required and chance.random() < 0.8):
            words.append(chance.choice([*parameter.opts, *parameter.secondary_opts]))
            if not parameter.is_flag:  # type: ignore[attr-defined]
                of_choice = getattr(parameter.type, "choices", ())
                words.append(chance.choice(list(of_choice)) if of_choice and chance.random() < 0.7 else value())
    if chance.random() < 0.1:
        words.insert(chance.randrange(len(words) + 1), value())
    return words


def runs(words: list[str], db: Path, inputs: Path) -> None:
    os.chdir(db.parent)  # what a relative path names lies in the trial's folder
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    main(words)


def command_lines(n: int, seed: int, folder: Path) -> Iterator[Trial]:
    inputs = folder / "inputs"
    make_inputs(inputs)
    base = folder / "base.attrdb"
    learnable_stored(base, inputs)
    before, chance = tables(base), Random(seed)
    every = list(commands())
    for number in range(n):
        command = every[number % len(every)]
        place = folder / f"{number}" / "work"
        place.mkdir(parents=True)
        precious = [place.parent / "precious", place / "precious", inputs]
        for kept in precious[:2]:
            kept.mkdir()
            (kept / "kept.txt").write_text("mine")
        db = shutil.copytree(base, place / "some.attrdb")
        words = odd_words(command, chance, db, inputs)
        trial = Trial(
            command.path[0], ascii(" ".join(word if len(word) < 200 else word[:40] + "..." for word in words))
        )
        digests = [digest(kept) for kept in precious]
        _run(command, words, db, inputs, trial)
        if [digest(kept) for kept in precious] != digests:
            trial.problems.append("what lies beside the database has changed")
        try:
            if command.path not in MAY_TAKE_OUT and (gone := before["images"].keys() - tables(db)["images"].keys()):
                trial.problems.append(f"images are gone: {sorted(gone)[:3]}")
            trial.problems += unsound(db, frozenset({"unfinished_models", "unfinished_removals"}))
        except (AttrdbError, AssertionError) as error:
            trial.problems.append(f"afterwards {type(error).__name__}: {error}")
        if not trial.problems:
            shutil.rmtree(place.parent)
        yield trial


def _run(command: Command, words: list[str], db: Path, inputs: Path, trial: Trial) -> None:
    process, _ = start(partial(runs, words), db, inputs)
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        if command.path not in MAY_TAKE_LONG:
            trial.problems.append(f"did not end within {SECONDS} s")
    elif process.exitcode not in (0, 1, 2):
        trial.problems.append(f"exit code {process.exitcode}: {log_of(db).read_text(errors='replace')[-300:]}")
    trial.problems += traces_in(log_of(db))


def digest(folder: Path) -> str:
    """Of all files in a folder, with their names."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        total.update(str(file.relative_to(folder)).encode(errors="surrogateescape"))
        if file.is_file() and not file.is_relative_to(folder / "learnable.attrdb"):
            total.update(file.read_bytes())
    return total.hexdigest()
