"""The disk is full at every 4 KiB of one model's append: all of it is stored, or nothing, and it can be appended again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

import attrdb
from attrdb.errors import StorageError
from torture.comparing import differences, tables, unsound
from torture.disks import small_disk
from torture.processes import run_whole
from torture.trials import Trial
from torture.workloads import corpus_stored, make_inputs, model

PAGE = 4096
LARGE = "size=50m"
PICTURE = 20_000  # bytes of each of the model's pictures


def full_disk(folder: Path, every: int = 1) -> Iterator[Trial]:
    """A trial for every `every`-th page that the disk still has when the append begins, up to those that suffice.

    raises: NotPermitted
    """
    inputs = folder / "inputs"
    make_inputs(inputs)
    base = folder / "base.attrdb"
    run_whole(corpus_stored, base, inputs)
    before, appended = tables(base), folder / "appended.attrdb"
    shutil.copytree(base, appended)
    append(appended)
    wanted = tables(appended)
    with small_disk(folder / "disk", LARGE) as disk:
        db, n_pages, is_stored = disk.path / "db", 0, False
        while not is_stored:
            disk.change(LARGE)
            shutil.rmtree(db, ignore_errors=True)
            shutil.copytree(base, db)
            used = PAGE * round(shutil.disk_usage(disk.path).used / PAGE)
            disk.change(f"size={used + n_pages * PAGE}")
            trial = Trial("4 KiB steps", f"{n_pages * 4} KiB are left")
            try:
                append(db)
                is_stored = True
            except StorageError as error:
                trial.problems += [] if "is full; what was committed before is kept" in str(error) else [str(error)]
            except Exception as error:
                trial.problems.append(f"{type(error).__name__}: {error}")
            seen = tables(db)
            if list(differences(seen, wanted)):
                trial.problems += differences(seen, before)
            disk.change(LARGE)
            append(db)
            trial.problems += [*differences(tables(db), wanted), *unsound(db)]
            yield trial
            n_pages += every


def append(db: Path) -> None:
    table, row = model("m", 0)
    pictures = [np.random.default_rng(n).bytes(PICTURE) for n in range(len(table))]
    attrdb.open(db).writer.append_model(table.append_column("image", pa.array(pictures, pa.binary())), row)
