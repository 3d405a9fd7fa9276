"""Health: what a database holds, and whether it holds together."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from attrdb import queries, sql
from attrdb.errors import InvalidValue
from attrdb.progress import Progress, no_progress
from attrdb.search import exact as exact_search
from attrdb.search import ivf, planner
from attrdb.store.features import stream
from attrdb.store.ids import stored_file
from attrdb.store.lance_errors import storage, words_of
from attrdb.store.leases import holder
from attrdb.store.locks import alive
from attrdb.store.predicates import CANDIDATES, literal
from attrdb.store.schema import SCHEMA_VERSION, Row, feature_columns, feature_matrix
from attrdb.store.snapshot import Snapshot

PROBES = 20  # ids and features that the index self-test asks for
GROWN = 2.0
BEHIND = 0.2  # share of the rows that come after an index
RECALL_NEEDED = 0.9  # recall@10 of a vector index against an exact scan below which it is reported


# --- status ----------------------------------------------------------------------------------------------------------


def status(snapshot: Snapshot) -> dict[str, Any]:
    """What the database holds, as plain values that JSON can take.

    Rows by role, models by kind, every encoder with how many images it has encoded and how many it still could, mappers,
    calibrations and how many pretraining images they were made for, which of these were fitted with images that are
    gone, removals that are not done, indices with their segments and the rows they do not cover yet, fragments, versions and
    bytes of every table, jobs that are not done, models that are being made and how far they are.
    """
    with storage(snapshot.path), sql.connect(snapshot) as connection:
        roles, kinds, jobs, mappers, calibrations, removals, before_removals = (
            sql.run(connection, statement).to_pylist()
            for statement in (
                "SELECT role, count(*) AS n FROM images GROUP BY role ORDER BY role",
                "SELECT kind, count(*) AS n FROM models GROUP BY kind ORDER BY kind",
                "SELECT job_id, state, n_done, n_failed, message, host, pid FROM jobs WHERE state <> 'done' ORDER BY job_id",
                "SELECT mapper_id, m.encoder_id, form, trained_on, used AS by_index, recall FROM mappers AS m "
                "LEFT JOIN mapper_searches USING (mapper_id) ORDER BY mapper_id",
                "SELECT method_id, encoder_id, mapper_id, tau, lam, gallery_size FROM calibrations ORDER BY method_id",
                "SELECT removal_id, state FROM removals WHERE state <> 'done' ORDER BY removal_id",
                queries.load("fitted_before_removals").sql,
            )
        )
        n_images = sum(row["n"] for row in roles)
        return {
            "path": str(snapshot.path),
            "schema_version": SCHEMA_VERSION,
            "version": snapshot.version,
            "n_images": n_images,
            "images_by_role": {row["role"]: row["n"] for row in roles},
            "models_by_kind": {row["kind"]: row["n"] for row in kinds},
            "unfinished_models": list(snapshot.hidden_models),
            "encoders": {name: _encoder(snapshot, name, n_images) for name in snapshot.encoders},
            "mappers": [_mapper(snapshot, row) for row in mappers],
            "calibrations": calibrations,
            "fitted_before_removals": before_removals,
            "unfinished_removals": removals,
            "indices": [_index(snapshot.tables["images"], one) for one in _indices(snapshot)],
            "tables": {name: _table(snapshot, name) for name in snapshot.tables},
            "open_jobs": [_job(row) for row in jobs],
            "in_progress": _in_progress(snapshot.path),
            "bytes": _bytes(snapshot.path),
        }


def _index_state(snapshot: Snapshot, encoder_id: str, n_encoded: int) -> dict[str, Any]:
    """How an encoder's features are searched: state, and the row of `indices` where attrdb built an index.

    state: none        every search is exact
           ready       searches look into the index
           behind      so many rows came after it that `optimize` would make searches quicker
           outgrown    there are GROWN times the features its cells were chosen for: build it again
           dropped     attrdb built one and it is gone: every search is exact
           unknown     another client built one, which attrdb does not ask: every search is exact
    """
    images = snapshot.tables["images"]
    there = {one.name: one for one in _indices(snapshot) if one.field_names[0] == encoder_id}
    if encoder_id not in planner.indices(snapshot):
        known = snapshot.tables["indices"].count_rows(f"encoder_id = {literal(encoder_id)}")
        return {"state": "unknown" if there else "dropped" if known else "none"}
    [row] = snapshot.tables["indices"].to_table(filter=f"encoder_id = {literal(encoder_id)}").to_pylist()
    one = there[planner.indices(snapshot)[encoder_id].name]
    n_images, n_indexed = images.count_rows(), one.num_rows_indexed
    said = {name: row[name] for name in ("recall", "n_queries", "queries", "n_probes", "n_partitions", "oversampling")}
    if n_encoded > GROWN * row["n_rows"]:
        state = "outgrown"
    else:
        state = "behind" if n_images - n_indexed > BEHIND * n_images else "ready"
    return {"state": state, **said}


def _encoder(snapshot: Snapshot, encoder_id: str, n_images: int) -> dict[str, Any]:
    row = snapshot.encoders[encoder_id]
    n_encoded = snapshot.count(f"`{encoder_id}` IS NOT NULL")
    n_left = snapshot.count(f"`{encoder_id}` IS NULL AND image IS NOT NULL") if n_encoded < n_images else 0
    return {
        "spec": row["spec"],
        "dimension": row["dimension"],
        "n_encoded": n_encoded,
        "n_to_encode": n_left,  # images whose bytes are stored and that have no feature yet
        "index": _index_state(snapshot, encoder_id, n_encoded),
    }


def _indices(snapshot: Snapshot) -> list[Any]:
    return sorted(snapshot.tables["images"].describe_indices(), key=lambda one: one.name)


def _mapper(snapshot: Snapshot, row: dict[str, Any]) -> dict[str, Any]:
    """A mapper's row, with by_index: whether searches with it look into its encoder's index; None where that is not known."""
    return row if row["encoder_id"] in planner.indices(snapshot) else row | {"by_index": None, "recall": None}


def _index(images: lance.LanceDataset, one: Any) -> dict[str, Any]:
    return {
        "name": one.name,
        "column": one.field_names[0],
        "type": one.index_type,
        "segments": len(one.segments),
        "n_unindexed": max(0, images.count_rows() - one.num_rows_indexed),
        "bytes": one.total_size_bytes,
    }


def _table(snapshot: Snapshot, name: str) -> dict[str, Any]:
    table = snapshot.tables[name]
    return {
        "rows": table.count_rows(),
        "version": table.version,
        "versions_kept": len(table.versions()),
        "fragments": len(table.get_fragments()),
        "bytes": _bytes(snapshot.path / f"{name}.lance"),
    }


def _in_progress(path: Path) -> list[dict[str, Any]]:
    files = sorted((path / "jobs").glob(".*.lock"))
    held = ((file.name[1:].removesuffix(".lock"), holder(file)) for file in files)
    return [{"model_id": model_id, **who} for model_id, who in held if who]


def _job(row: dict[str, Any]) -> dict[str, Any]:
    """A job's row; one that says it runs and whose process is gone was killed."""
    if row["state"] == "running" and row["host"] == socket.gethostname() and not alive(row["pid"]):
        row = row | {"state": "killed"}
    return row


def _bytes(folder: Any) -> int:
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(where, name)).st_size
            except FileNotFoundError:  # another process tidied up meanwhile
                continue
    return total


# --- check -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What a check found: its name, what it means, and the offending rows."""

    check: str
    meaning: str
    rows: pa.Table


def check(snapshot: Snapshot, report: Progress = no_progress) -> list[Finding]:
    """What does not hold together: damaged files, rows that contradict each other, indices that answer wrongly.

    Every stored byte is read, and images and weights are compared with their sha256; then every query of the group
    `checks` runs, and the indices are asked for things whose answers are known. An empty list: nothing was found.
    """
    damaged, changed = _read_everything(snapshot, report)
    if damaged:  # queries over damaged files only fail
        rows = pa.Table.from_pylist(damaged)
        return [Finding("damaged_files", "Files that cannot be read; restore them from a copy of the directory.", rows)]
    found = []
    if changed:
        meaning = "Stored images and weights whose bytes are not those that were written; restore them from a copy."
        found.append(Finding("changed_bytes", meaning, pa.Table.from_pylist(changed)))
    checks = [query for query in queries.all_queries().values() if query.group == "checks"]
    with storage(snapshot.path), sql.connect(snapshot) as connection:
        for number, query in enumerate(checks):
            report("queries", number, len(checks))
            rows = sql.run(connection, query.sql, query.bind({}))
            if len(rows):
                found.append(Finding(query.name, query.summary, rows))
        report("queries", len(checks), len(checks))
    wrong = list(index_self_test(snapshot))
    if wrong:
        meaning = (
            "Index answers that an exact scan contradicts; build a feature's index again (attrdb index), drop another."
        )
        found.append(Finding("index_self_test", meaning, pa.Table.from_pylist(wrong)))
    return found


def _read_everything(snapshot: Snapshot, report: Progress) -> tuple[list[Row], list[Row]]:
    """The files that cannot be read, and the images and weights whose bytes do not have their sha256."""
    damaged: list[Row] = []
    changed: list[Row] = []
    for name, table in snapshot.tables.items():
        try:
            table.versions()
        except Exception as error:  # names the manifest of an older version
            damaged.append({"table": name, "files": f"{name}.lance/_versions", "error": words_of(error)})
    fragments = [(name, one) for name, table in snapshot.tables.items() for one in table.get_fragments()]
    for number, (name, fragment) in enumerate(fragments):
        report("files", number, len(fragments))
        try:
            for batch in fragment.to_batches(batch_size=1024):
                if name == "images":
                    changed += _changed_images(batch)
                elif name == "models":
                    changed += _changed_weights(snapshot, batch)
        except Exception as error:  # a damaged file makes Lance raise many kinds, down to ValueError
            files = ", ".join(one.path for one in fragment.data_files())
            damaged.append({"table": name, "files": files, "error": words_of(error)})
    report("files", len(fragments), len(fragments))
    return damaged, changed


def _changed_images(batch: pa.RecordBatch) -> Iterator[Row]:
    for image_id, wanted, image in zip(batch["image_id"], batch["sha256"], batch["image"], strict=True):
        if wanted.is_valid and image.is_valid and hashlib.sha256(image.as_buffer()).hexdigest() != wanted.as_py():
            yield {"table": "images", "id": image_id.as_py(), "needed": wanted.as_py()}


def _changed_weights(snapshot: Snapshot, batch: pa.RecordBatch) -> Iterator[Row]:
    for row in batch.select(["model_id", "weights_path", "weights_hash"]).to_pylist():
        if row["weights_path"] is None or row["weights_hash"] is None:
            continue
        try:
            file = stored_file(snapshot.path, row["weights_path"])
        except InvalidValue:
            file = None
        if not (file and file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == row["weights_hash"]):
            yield {"table": "models", "id": row["model_id"], "needed": row["weights_hash"]}


def index_self_test(snapshot: Snapshot) -> Iterator[Row]:
    """One row for every index that does not answer as an exact scan does: of a few ids, roles and features."""
    images = snapshot.tables["images"]
    n = images.count_rows()
    if not n:
        return
    chosen = np.linspace(0, n - 1, min(PROBES, n)).astype(int)
    for one in _indices(snapshot):
        column = one.field_names[0]
        if column in feature_columns(images.schema):
            if column not in planner.indices(snapshot) or one.name != planner.indices(snapshot)[column].name:
                continue  # of another client, and not asked
            recall = _recall(snapshot, column, chosen)
            if recall < RECALL_NEEDED:
                said = f"recall@10 against an exact scan is {recall:.3f} over {len(chosen)} features"
                yield {"index": one.name, "column": column, "found": said, "needed": f"at least {RECALL_NEEDED}"}
            continue
        values = sorted(
            {value for value in images.take(chosen, columns=[column])[column].to_pylist() if value is not None}
        )
        for value in values:
            where = f"{column} = {literal(value)}"
            indexed, scanned = (
                images.scanner(columns=[], filter=where, use_scalar_index=use, with_row_id=True).count_rows()
                for use in (True, False)
            )
            if indexed != scanned:
                yield {"index": one.name, "column": column, "found": f"{where}: {indexed} rows", "needed": f"{scanned}"}


def _recall(snapshot: Snapshot, encoder_id: str, chosen: np.ndarray) -> float:
    """recall@10 of attrdb's index on some stored features."""
    images = snapshot.tables["images"]
    rows = images.take(chosen, columns=["image_id", encoder_id])
    rows = rows.filter(rows[encoder_id].is_valid())
    if not len(rows):
        return 1.0
    queries, where = feature_matrix(rows[encoder_id]), snapshot.visible(CANDIDATES)
    exact = exact_search.top_k(stream(images, encoder_id, where), queries, 11)
    found = ivf.top_k(images, planner.indices(snapshot)[encoder_id], where, planner.count(snapshot), queries, 11)
    return exact_search.recall(found, exact, 10, rows["image_id"].to_pylist())
