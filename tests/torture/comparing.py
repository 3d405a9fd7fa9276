"""What a reader sees of two databases, and what tells them apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import attrdb
from attrdb.store.schema import TABLES
from attrdb.upkeep import health
from torture.workloads import Rows

KEYS = {
    "images": "image_id",
    "models": "model_id",
    "concepts": "concept_id",
    "encoders": "encoder_id",
    "mappers": "mapper_id",
    "jobs": "job_id",
    "failures": "failure_id",
    "marked_models": "model_id",
    "blocked_digests": "digest",
    "removals": "digest",
}
# What says when, where or for how long something ran, and how much of it the last run did.
NOT_COMPARED = {"created_at", "started_at", "ended_at", "failed_at", "customize_seconds", "synthesize_seconds"} | {
    "host",
    "pid",
    "n_done",
    "removal_id",
    "marked_at",
    "blocked_at",
    "images_version",
}
Tables = dict[str, Rows]


def tables(db: Path) -> Tables:
    """All that a reader sees, by table and key, without what tells one run from another.

    raises: AssertionError if a key stands twice
    """
    opened = attrdb.open(db, read_only=True)
    found = {}
    for name in TABLES:
        rows = opened.sql(f"SELECT * FROM {name}").to_pylist()
        rows = [{column: value for column, value in row.items() if column not in NOT_COMPARED} for row in rows]
        keys = [row[KEYS[name]] if name in KEYS else str(row) for row in rows]
        assert len(set(keys)) == len(keys), f"{name}: {len(keys) - len(set(keys))} rows stand twice"
        found[name] = dict(zip(keys, rows, strict=True))
    return found


def differences(found: Tables, wanted: Tables) -> Iterator[str]:
    """What tells two databases apart, a line a table."""
    for name in wanted:
        lost, extra = wanted[name].keys() - found[name].keys(), found[name].keys() - wanted[name].keys()
        if lost or extra:
            yield f"{name}: lost {sorted(lost)[:3]}, more than it should have {sorted(extra)[:3]}"
        for key in sorted(found[name].keys() & wanted[name].keys()):
            if found[name][key] != wanted[name][key]:
                yield f"{name}: {key} is {found[name][key]}, should be {wanted[name][key]}"
                break


def half_visible(seen: Tables, before: Tables, wanted: Tables) -> Iterator[str]:
    """What a reader should not see after a kill: rows lost, rows not yet whole, models without all of their images."""
    for name in TABLES:
        if name in ("jobs", "removals"):  # whose state changes
            continue
        if lost := (before[name].keys() & wanted[name].keys()) - seen[name].keys():
            yield f"{name}: {sorted(lost)[:3]} were stored before and are gone"
        for key, row in seen[name].items():
            old, new = before[name].get(key), wanted[name].get(key)
            # What is to be taken out may still be there, as it was.
            if row != old and (new is None or (old is None and row != new)):
                yield f"{name}: {key} is {row}, should be {new}"
            elif (
                old is not None
                and new is not None
                and any(row[column] not in (old.get(column), new[column]) for column in row)
            ):
                yield f"{name}: {key} is {row}, was {old} and becomes {new}"
    removing = any(row["state"] != "done" for row in seen["removals"].values())
    for model_id, row in seen["models"].items():
        if removing:  # it counts what will be left
            continue
        roles = [image["role"] for image in seen["images"].values() if image["model_id"] == model_id]
        counted = {"n_exemplars": roles.count("exemplar"), "n_samples": roles.count("sample")}
        if any(row[name] != n for name, n in counted.items()):
            yield f"model {model_id} is shown with {counted}"
    strangers = {image["model_id"] for image in seen["images"].values()} - seen["models"].keys() - {None}
    if strangers:
        yield f"images of {sorted(strangers)} are shown, which have no row in models"


def unsound(db: Path, allowed: frozenset[str] = frozenset()) -> Iterator[str]:
    """What a check finds."""
    for finding in health.check(attrdb.open(db, read_only=True).snapshot):
        if finding.check not in allowed:
            yield f"check {finding.check}: {finding.rows.to_pylist()[:3]}"
