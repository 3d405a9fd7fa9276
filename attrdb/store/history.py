"""Older moments of a database: the version of each table at a version of images, or at a time."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import lance

from attrdb.errors import InvalidValue, NotFound
from attrdb.store.tables import open_table

History = dict[str, list[tuple[int, datetime]]]  # by table, the versions that are kept, oldest first


def tables_at(
    path: Path, tables: dict[str, lance.LanceDataset], at: int | str | datetime
) -> dict[str, lance.LanceDataset]:
    """The tables as they were at an older moment.

    at:     a version of images, with the other tables as they were until the next one; or a time, as datetime or ISO 8601
            text (UTC if it names no zone)
    raises: NotFound if that moment is not kept, InvalidValue for a text that is no time
    """
    history = {
        name: [(version["version"], _utc(cast(datetime, version["timestamp"]))) for version in table.versions()]
        for name, table in tables.items()
    }
    if isinstance(at, str) and at.isdecimal():
        at = int(at)
    if isinstance(at, int) and not isinstance(at, bool):
        versions = _at_version(path, history, at)
    else:
        versions = _at_time(path, history, _moment(at))
    return {name: open_table(path, name, version=version) for name, version in versions.items()}


def _at_version(path: Path, history: History, at: int) -> dict[str, int]:
    kept = [version for version, _ in history["images"]]
    if at not in kept:
        raise NotFound(f"{path} has no version {at}; it keeps {len(kept)} versions, {kept[0]} to {kept[-1]}")
    newer = [moment for version, moment in history["images"] if version > at]
    until = min(newer) if newer else datetime.max.replace(tzinfo=UTC)
    before = {name: [version for version, moment in kept if moment < until] for name, kept in history.items()}
    return _last_versions(path, history, before | {"images": [at]})


def _at_time(path: Path, history: History, moment: datetime) -> dict[str, int]:
    before = {name: [version for version, written in kept if written <= moment] for name, kept in history.items()}
    if not before["images"]:
        oldest = history["images"][0][1].isoformat()
        raise NotFound(f"{path} has no version as old as {moment.isoformat()}; its oldest is of {oldest}")
    return _last_versions(path, history, before)


def _last_versions(path: Path, history: History, before: dict[str, list[int]]) -> dict[str, int]:
    """The newest version before a moment; for a table that is younger, its first version, which is empty."""
    for name, kept in history.items():
        if not before[name] and kept[0][0] > 1:
            oldest = kept[0][1].isoformat()
            raise NotFound(f"{path} has deleted the version of {name} of that time; its oldest version is of {oldest}")
    return {name: max(versions, default=1) for name, versions in before.items()}


def _moment(at: object) -> datetime:
    try:
        moment = datetime.fromisoformat(at) if isinstance(at, str) else at
    except ValueError:
        moment = None
    if not isinstance(moment, datetime):
        raise InvalidValue(f"{at!r} is neither a version nor a time such as 2026-11-23T12:00:00")
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _utc(timestamp: datetime) -> datetime:
    return timestamp.astimezone(UTC)  # Lance gives local time without a zone
