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
from attrdb.upkeep import health
from torture.comparing import Tables, differences, tables
from torture.processes import ends, log_of, start
from torture.trials import TRACES, Trial

SECONDS = 60  # that reading everything, or a check, may take


def bit_flips(n: int, seed: int, folder: Path) -> Iterator[Trial]:
    """A trial per flip, in turn over the kinds of file; grouped by kind."""
    folder.mkdir(exist_ok=True)
    base = build(folder / "base.attrdb")
    add_index(base, "toy_2")
    (base / "weights").mkdir(exist_ok=True)
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
        trial.problems += _wrong(db, wanted)
        shutil.rmtree(db)
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
        found[f"attribute {image_id}"] = {
            row["candidate_id"]: row for row in opened.attribute(image_id, k=4).to_pylist()
        }
    return found


def _wrong(db: Path, wanted: Tables) -> list[str]:
    """A wrong answer without a word, if a check does not find the damage either; or a process that dies without a word."""
    said = db.with_suffix(".said")
    process, hears = start(partial(_ask, said, wanted), db, db)
    if not ends(process, hears, SECONDS):
        return [f"reading it ended with exit code {process.exitcode}: {log_of(db).read_text(errors='replace')[-300:]}"]
    outcome = said.read_text()
    log = log_of(db).read_text(errors="replace")
    if outcome.startswith("fault"):
        return [outcome]
    if outcome.startswith("differ") and not outcome.endswith("found by check"):
        return [outcome]
    return [f"printed {trace}" for trace in TRACES[:1] if trace in log]


def _ask(said: Path, wanted: Tables, db: Path, inputs: Path) -> None:
    """Runs in a process of its own: damaged files may end it."""
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
