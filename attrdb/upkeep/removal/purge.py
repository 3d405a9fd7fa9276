"""Purging: after it, the files of a database hold nothing but what its tables show now.

Lance only marks rows as deleted, and keeps older versions. So fragments with deleted rows are written anew, indices too, then
every older version and every file that belongs to none is deleted.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lance

from attrdb.errors import AttrdbError, InvalidValue
from attrdb.progress import Progress
from attrdb.search.index_build import ALL_SEGMENTS, BUILDING, SCALAR_INDICES
from attrdb.store.lance_errors import storage
from attrdb.store.schema import SCHEMA_VERSION, TABLES
from attrdb.store.tables import STAMP, open_table
from attrdb.store.writer import Writer
from attrdb.upkeep.optimize import FRAGMENT_ROWS

BATCH_ROWS = 1024  # images of which the bytes are held at a time


def check_purgeable(path: Path, drop_tags: bool) -> None:
    """raises: InvalidValue, with their names, if versions are kept by tags or branches of another client"""
    kept = {}
    for name in TABLES:
        table = open_table(path, name)
        if branches := table.branches.list():
            raise InvalidValue(
                f"table {name} of {path} has branches, made by another client ({', '.join(sorted(branches))}), which hold "
                "older versions; delete them with that client, then rerun the command"
            )
        if tags := table.tags.list():
            kept[name] = sorted(tags)
    if kept and not drop_tags:
        listed = "; ".join(f"{name}: {', '.join(tags)}" for name, tags in kept.items())
        raise InvalidValue(
            f"tags in {path} keep older versions, which hold the images ({listed}); rerun with --drop-tags to delete these "
            "tags, or leave --purge out"
        )


def purge(writer: Writer, report: Progress) -> None:
    """Leave one version of every table, whose files hold no deleted row. The caller holds the maintenance lock.

    Others may read and write meanwhile; while files are deleted, they wait to write. Readers that are pinned to an older
    version fail from then on.
    """
    steps: list[tuple[str, Callable[[], Any]]] = [
        *((f"rewrite {name}", partial(_rewrite, writer, name)) for name in TABLES),
        ("rewrite indices", lambda: _rewrite_indices(writer)),
        ("delete older versions", lambda: _drop_versions(writer)),
    ]
    for number, (stage, step) in enumerate(steps):
        report("purge", number, len(steps), stage)
        with storage(writer.path):
            step()
    report("purge", len(steps), len(steps))


def _rewrite(writer: Writer, name: str) -> None:
    """Write the fragments with deleted rows anew; the others stay as they are."""

    def rewrite() -> None:
        table = open_table(writer.path, name)
        clean = [fragment.fragment_id for fragment in table.get_fragments() if not fragment.num_deletions]
        if len(clean) < len(table.get_fragments()):
            table.optimize.compact_files(
                target_rows_per_fragment=FRAGMENT_ROWS,
                batch_size=BATCH_ROWS,
                excluded_fragment_ids=clean,
                materialize_deletions=True,
                materialize_deletions_threshold=0.0,
            )

    writer.commit(rewrite)


def _rewrite_indices(writer: Writer) -> None:
    """Write every index on images anew: Lance leaves the entries of a fragment in it whose rows were all deleted."""
    for index in open_table(writer.path, "images").describe_indices():
        column = index.field_names[0]
        if column in SCALAR_INDICES:
            writer.commit(partial(_replace_scalar, writer.path, column, index.name))
        else:
            before = {str(segment.uuid) for segment in index.segments}
            writer.commit(partial(_merge_segments, writer.path, index.name))
            after = {
                str(segment.uuid) for one in _indices(writer.path) if one.name == index.name for segment in one.segments
            }
            if before & after:  # an index of a kind that attrdb does not know
                writer.commit(partial(drop_index, writer.path, index.name))


def _indices(path: Path) -> list[Any]:
    indices: list[Any] = open_table(path, "images").describe_indices()
    return indices


def _replace_scalar(path: Path, column: str, name: str) -> None:
    images = open_table(path, "images")
    images.create_scalar_index(column, SCALAR_INDICES[column], name=name, replace=True)


def _merge_segments(path: Path, name: str) -> None:
    images = open_table(path, "images")
    images.optimize.optimize_indices(num_indices_to_merge=ALL_SEGMENTS, index_names=[name])


def drop_index(path: Path, name: str) -> None:
    open_table(path, "images").drop_index(name)


def _drop_versions(writer: Writer) -> None:
    with writer.exclusive():
        for name in TABLES:
            table: lance.LanceDataset = open_table(writer.path, name)
            made_by = table.read_transaction(table.version)
            if made_by is None or isinstance(made_by.operation, lance.LanceOperation.Delete):
                # The newest version holds the predicate by which rows were deleted.
                table.update_schema_metadata({STAMP.decode(): str(SCHEMA_VERSION)})
            for tag in table.tags.list():
                table.tags.delete(tag)
            stats = table.cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)
            if stats.failed_deletes or len(table.versions()) > 1:
                raise AttrdbError(
                    f"older versions of table {name} of {writer.path} could not all be deleted; rerun the command"
                )
        for folder in writer.path.glob(f"{BUILDING}*"):  # of an index build that was killed
            shutil.rmtree(folder, ignore_errors=True)
