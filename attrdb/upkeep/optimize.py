"""Maintenance: keeps a database fast that grows for years."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import lance

from attrdb.errors import AttrdbError, InvalidValue
from attrdb.progress import Progress, no_progress
from attrdb.search import index_build, index_tuning, planner
from attrdb.store import checksums
from attrdb.store.lance_errors import storage
from attrdb.store.locks import exclusive_lock
from attrdb.store.predicates import literal
from attrdb.store.writer import Writer
from attrdb.upkeep import health

# Appends are merged into fragments of this size. An encoder that is added later writes its features fragment by fragment, so
# this also bounds the features in memory.
FRAGMENT_ROWS = 131_072
LONGEST = timedelta(days=36_500)  # age of versions; Lance counts days in fewer bits than Python
SMALL_ROWS = 4_096  # a fragment of at most so many rows is always merged


@dataclass(frozen=True)
class Optimized:
    """The state (see `health.status`) before and after."""

    before: dict[str, Any]
    after: dict[str, Any]


def optimize(
    writer: Writer,
    drop_older_than: timedelta | None = None,
    report: Progress = no_progress,
) -> Optimized:
    """Index what is not indexed, merge index segments, merge small fragments, then check the indices.

    Readers and writers go on meanwhile. After a kill, rerunning it resumes.
    drop_older_than: also delete versions of that age, at most LONGEST, and free their disk space; `at` cannot go back to them
    raises:          InvalidValue for another age, Busy if maintenance runs already, AttrdbError if an index answers wrongly
                     afterwards
    """
    if drop_older_than is not None and not timedelta() <= drop_older_than <= LONGEST:
        raise InvalidValue(f"drop_older_than is {drop_older_than.days:,} days; it must be 0 to {LONGEST.days:,}")
    with exclusive_lock(writer.path / ".maintenance.lock", f"{writer.path} is being maintained"), storage(writer.path):
        writer.refresh()
        before = health.status(writer.snapshot)
        steps: list[tuple[str, Callable[[], Any]]] = []
        if writer.snapshot.tables["images"].count_rows():
            steps.append(("index", lambda: _index(writer)))
        # Segments before fragments; otherwise every round of appending and optimizing leaves one more segment.
        steps += [(f"compact {name}", partial(_compact, writer, name)) for name in writer.snapshot.tables]
        if drop_older_than is not None:
            steps.append(("drop old versions", lambda: _drop(writer, drop_older_than)))
        for number, (stage, step) in enumerate(steps):
            report(stage, number, len(steps))
            step()
        report("check", len(steps), len(steps))
        writer.refresh()
        _measure(writer, before, report)
        wrong = list(health.index_self_test(writer.snapshot))
        if wrong:
            cure = "drop it with a Lance client and rerun the command"
            if wrong[0]["column"] in writer.snapshot.encoders:
                cure = f"rebuild it: attrdb index {writer.path} --encoder {wrong[0]['column']}"
            raise AttrdbError(
                f"index {wrong[0]['index']!r} of {writer.path} answers wrongly ({wrong[0]['found']}, needed "
                f"{wrong[0]['needed']}); {cure}"
            )
        checksums.record(writer.path, writer.snapshot.tables, report)
        return Optimized(before, health.status(writer.snapshot))


def _measure(writer: Writer, before: dict[str, Any], report: Progress) -> None:
    """Measure again the indices that have taken in many rows, and the mappers that are not measured yet."""
    behind = {row["column"] for row in before["indices"] if row["n_unindexed"] > health.BEHIND * before["n_images"]}
    for encoder_id in planner.indices(writer.snapshot):
        if encoder_id in behind:
            [row] = writer.snapshot.tables["indices"].to_table(filter=f"encoder_id = {literal(encoder_id)}").to_pylist()
            index_tuning.measure(writer, row, report)
    index_tuning.measure_missing(writer, report)


def _index(writer: Writer) -> None:
    index_build.cover_columns(writer)
    for index in _images(writer).describe_indices():
        index_build.cover(writer, index)


def _compact(writer: Writer, name: str) -> None:
    def compact() -> None:
        table = _table(writer, name)
        large = large_fragments({part.fragment_id: part.physical_rows for part in table.get_fragments()})
        table.optimize.compact_files(target_rows_per_fragment=FRAGMENT_ROWS, excluded_fragment_ids=large)

    writer.commit(compact)


def large_fragments(rows: dict[int, int]) -> list[int]:
    """Fragments that are left as they are: those of more than twice the rows of all smaller ones together.

    So a row is rewritten a logarithmic number of times over the years, and not after every append.
    rows: fragment id -> rows
    """
    smaller = 0
    ascending = sorted(rows, key=rows.__getitem__)
    for number, fragment_id in enumerate(ascending):
        if rows[fragment_id] > max(2 * smaller, SMALL_ROWS):
            return ascending[number:]
        smaller += rows[fragment_id]
    return []


def _drop(writer: Writer, age: timedelta) -> None:
    for name in writer.snapshot.tables:
        _table(writer, name).cleanup_old_versions(older_than=age)


def _images(writer: Writer) -> lance.LanceDataset:
    return _table(writer, "images")


def _table(writer: Writer, name: str) -> lance.LanceDataset:
    return lance.dataset(str(writer.path / f"{name}.lance"))
