"""One bit of one file of a database is flipped, in every kind of file: a check finds it, or every answer stays right."""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

from conftest import add_index
from removable import build

import attrdb
from attrdb.errors import AttrdbError
from attrdb.store import checksums
from attrdb.upkeep import health
from torture.comparing import Tables, differences, tables
from torture.processes import clear, ends, log_of, start
from torture.trials import Trial, traces_in

SECONDS = 60  # that reading everything, or a check, may take


def bit_flips(n: int, seed: int, folder: Path) -> Iterator[Trial]:
    """A trial per flip, in turn over the kinds of file; grouped by kind, and whether `check --deep` finds it."""
    folder.mkdir(exist_ok=True)
    base = build(folder / "base.attrdb")
    add_index(base, "toy_2")
    (base / "weights").mkdir(exist_ok=True)
    opened = attrdb.open(base)
    checksums.record(base, opened.snapshot.tables)
    wanted, chance, kinds = answers(base), Random(seed), defaultdict(list)
    for file in sorted(file.relative_to(base) for file in base.rglob("*") if file.is_file() and file.stat().st_size):
        if not file.name.endswith((".lock", ".turn")):
            kinds[kind(file)].append(file)
    for number in range(n):
        name = sorted(kinds)[number % len(kinds)]
        file = chance.choice(kinds[name])
        db = shutil.copytree(base, folder / f"{number}.attrdb")
        content = bytearray((db / file).read_bytes())
        bit = chance.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        (db / file).write_bytes(content)
        trial = Trial(name, f"{file} bit {bit}")
        outcome, problems = _outcome(db, wanted)
        trial.problems += problems
        trial.group += ", found" if outcome.endswith("; found by check") else ", not found"
        clear(db)
        yield trial


def kind(file: Path) -> str:
    """Such as 'data' or 'versions', by the folder in a table; an index's files by their names."""
    parts = [re.sub(r"^_", "", part) for part in file.parts[1:-1]]
    return f"{parts[0]} {file.name}" if parts[:1] == ["indices"] else parts[0] if parts else file.suffix or file.name


def answers(db: Path) -> Tables:
    """Every row of every table, and the candidates of some images by the index."""
    opened = attrdb.open(db, read_only=True)
    found = tables(db)
    for image_id in ("m/0/1", "m/0/2", "o/1/3"):
        found[f"attribute {image_id}"] = {row["image_id"]: row for row in opened.attribute(image_id, k=4).to_pylist()}
    return found


def _outcome(db: Path, wanted: Tables) -> tuple[str, list[str]]:
    """What reading and checking it came to, and the problems.

    A problem is a wrong answer while a check finds nothing, and a process that dies of what it reads.
    """
    said = db.with_suffix(".said")
    process, hears = start(partial(_ask, said, wanted), db, db)
    log = log_of(db)
    if not ends(process, hears, SECONDS):
        return "", [f"reading it ended with exit code {process.exitcode}: {log.read_text(errors='replace')[-300:]}"]
    outcome = said.read_text()
    silent = outcome.startswith("differ") and not outcome.endswith("; found by check")
    problems = [outcome] if silent or outcome.startswith("fault") else []
    return outcome, problems + [trace for trace in traces_in(log) if "panicked" not in trace]


def _ask(said: Path, wanted: Tables, db: Path, inputs: Path) -> None:
    """Runs in a process of its own: damaged files may end it. A panic that Lance prints becomes an error of attrdb."""
    try:
        different = list(differences(answers(db), wanted))
        outcome = f"differ: {different[:2]}" if different else "same"
    except AttrdbError as error:
        outcome = f"refused: {error}"
    except AssertionError as error:
        outcome = f"differ: {error}"
    except Exception as error:
        outcome = f"fault: {type(error).__name__}: {error}"
    try:
        found = health.check(attrdb.open(db, read_only=True).snapshot, deep=True)
        outcome += "; found by check" if found else "; not found by check"
    except AttrdbError:
        outcome += "; found by check"
    except Exception as error:
        outcome = f"fault in check: {type(error).__name__}: {error}"
    said.write_text(outcome)
