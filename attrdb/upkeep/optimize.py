"""Maintenance: keeps a database quick that is appended to for years."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import lance

from attrdb.database import Database
from attrdb.errors import AttrdbError
from attrdb.search import index_build, index_tuning
from attrdb.store.locks import alone
from attrdb.store.snapshot import literal, storage
from attrdb.upkeep import health

# Of a fragment. Appends are merged into fragments of this size, and an encoder that is added later writes its features
# fragment by fragment, so this also bounds how much of them is in memory.
FRAGMENT_ROWS = 131_072
SMALL_ROWS = 4_096  # of a fragment that is always merged

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Optimized:
    """The state (see `health.status`) before and after."""

    before: dict[str, Any]
    after: dict[str, Any]


def optimize(
    db: Database,
    drop_older_than: timedelta | None = None,
    report: Report = lambda stage, done, total: None,
) -> Optimized:
    """Index what is not indexed, merge index segments, merge small fragments, then check the indices.

    drop_older_than: also forget versions of that age, and free the disk they take; `at` cannot go back to them
    raises:          Busy if maintenance runs already, AttrdbError if an index answers wrongly afterwards

    Readers and writers go on meanwhile. Killed and given again, it goes on from what was done.
    """
    with alone(db.path / ".maintenance.lock", f"{db.path} is being maintained"), storage(db.path):
        db.refresh()
        before = health.status(db.snapshot)
        steps: list[tuple[str, Callable[[], Any]]] = []
        if db.snapshot.tables["images"].count_rows():
            steps.append(("index", lambda: _index(db)))
        # Segments before fragments: appending and optimizing in turns otherwise leaves one segment a round.
        steps += [(f"compact {name}", lambda name=name: _compact(db, name)) for name in db.snapshot.tables]
        if drop_older_than is not None:
            steps.append(("drop old versions", lambda: _drop(db, drop_older_than)))
        for number, (stage, step) in enumerate(steps):
            report(stage, number, len(steps))
            step()
        report("check", len(steps), len(steps))
        db.refresh()
        _measure(db, before, report)
        wrong = list(health.index_self_test(db.snapshot))
        if wrong:
            cure = "drop it with a Lance client and give the command again"
            if wrong[0]["column"] in db.encoders:
                cure = f"build it again: attrdb index {db.path} --encoder {wrong[0]['column']}"
            raise AttrdbError(
                f"index {wrong[0]['index']!r} of {db.path} answers wrongly ({wrong[0]['found']}, needed "
                f"{wrong[0]['needed']}); {cure}"
            )
        return Optimized(before, health.status(db.snapshot))


def _measure(db: Database, before: dict[str, Any], report: Report) -> None:
    """Measure the indices again that have taken in many rows, and mappers that are not measured yet."""
    behind = {one["column"] for one in before["indices"] if one["n_unindexed"] > health.BEHIND * before["n_images"]}
    for encoder_id in db.snapshot.indices:
        if encoder_id in behind:
            [row] = db.snapshot.tables["indices"].to_table(filter=f"encoder_id = {literal(encoder_id)}").to_pylist()
            index_tuning.measure(db, row, report)
    index_tuning.measure_missing(db, report)


def _index(db: Database) -> None:
    index_build.cover_columns(db)
    for one in _images(db).describe_indices():
        index_build.cover(db, one)


def _compact(db: Database, name: str) -> None:
    def compact() -> None:
        table = _table(db, name)
        large = large_fragments({one.fragment_id: one.physical_rows for one in table.get_fragments()})
        table.optimize.compact_files(target_rows_per_fragment=FRAGMENT_ROWS, excluded_fragment_ids=large)

    db.commit(compact)


def large_fragments(rows: dict[int, int]) -> list[int]:
    """Fragments that are left as they are: larger than all smaller ones together, twice over.

    So a row is rewritten a logarithmic number of times over the years, and not whenever something is appended after it.
    rows: fragment id -> rows
    """
    smaller = 0
    ascending = sorted(rows, key=rows.__getitem__)
    for number, fragment_id in enumerate(ascending):
        if rows[fragment_id] > max(2 * smaller, SMALL_ROWS):
            return ascending[number:]
        smaller += rows[fragment_id]
    return []


def _drop(db: Database, age: timedelta) -> None:
    for name in db.snapshot.tables:
        _table(db, name).cleanup_old_versions(older_than=age)


def _images(db: Database) -> lance.LanceDataset:
    return _table(db, "images")


def _table(db: Database, name: str) -> lance.LanceDataset:
    return lance.dataset(str(db.path / f"{name}.lance"))
