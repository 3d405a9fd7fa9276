"""Health: the contents of a database, and whether they are consistent."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from attrdb.store import checksums
from attrdb.store.features import stream
from attrdb.store.ids import stored_file
from attrdb.store.lance_errors import by_lance, storage, words_of
from attrdb.store.leases import holder
from attrdb.store.locks import alive
from attrdb.store.predicates import CANDIDATES, literal
from attrdb.store.schema import SCHEMA_VERSION, Row, feature_columns, feature_matrix
from attrdb.store.snapshot import Snapshot

PROBES = 20  # ids and features that the index self-test searches for
GROWN = 2.0  # times the features that an index was built for, from which on it is outgrown
BEHIND = 0.2  # share of the rows that an index lacks, from which on it is behind
RECALL_NEEDED = 0.9  # recall@10 of a vector index against an exact scan; less is reported


# --- status ----------------------------------------------------------------------------------------------------------


def status(snapshot: Snapshot) -> dict[str, Any]:
    """The contents of the database, as plain values that JSON can take.

    Images by role and models by kind; every encoder with the numbers of images that have its feature and that lack it;
    mappers; calibrations with the number of pretraining images that they were fitted with; mappers and calibrations that
    were fitted with images that are gone; removals that are not done; indices with their segments and the rows that they do
    not cover; fragments, versions and bytes of every table; jobs that are not done; models in progress.
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
                "SELECT method_id, encoder_id, mapper_id, kind, tau, lam, unattributed, gallery_size FROM calibrations "
                "ORDER BY method_id, kind NULLS FIRST",
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
            "indices": [_index(snapshot.tables["images"], index) for index in _indices(snapshot)],
            "tables": {name: _table(snapshot, name) for name in snapshot.tables},
            "open_jobs": [_job(row) for row in jobs],
            "in_progress": _in_progress(snapshot.path),
            "bytes": _bytes(snapshot.path),
        }


def _index_state(snapshot: Snapshot, encoder_id: str, n_encoded: int) -> dict[str, Any]:
    """How an encoder's features are searched: state, and figures of the row of `indices` if attrdb built an index.

    state: none        every search is exact
           ready       searches use the index
           behind      `optimize` would make searches faster: the index lacks many rows
           outgrown    the index should be rebuilt: there are GROWN times the features that its partitions were chosen for
           dropped     attrdb built an index that no longer exists: every search is exact
           unknown     another client built an index, which attrdb does not use: every search is exact
    """
    images = snapshot.tables["images"]
    on_column = {index.name: index for index in _indices(snapshot) if index.field_names[0] == encoder_id}
    if encoder_id not in planner.indices(snapshot):
        n_built = snapshot.tables["indices"].count_rows(f"encoder_id = {literal(encoder_id)}")
        return {"state": "unknown" if on_column else "dropped" if n_built else "none"}
    [row] = snapshot.tables["indices"].to_table(filter=f"encoder_id = {literal(encoder_id)}").to_pylist()
    n_images = images.count_rows()
    n_indexed = on_column[planner.indices(snapshot)[encoder_id].name].num_rows_indexed
    figures = ("recall", "n_queries", "queries", "n_probes", "n_partitions", "oversampling")
    if n_encoded > GROWN * row["n_rows"]:
        state = "outgrown"
    else:
        state = "behind" if n_images - n_indexed > BEHIND * n_images else "ready"
    return {"state": state, **{name: row[name] for name in figures}}


def _encoder(snapshot: Snapshot, encoder_id: str, n_images: int) -> dict[str, Any]:
    row = snapshot.encoders[encoder_id]
    n_encoded = snapshot.count(f"`{encoder_id}` IS NOT NULL")
    n_left = snapshot.count(f"`{encoder_id}` IS NULL AND image IS NOT NULL") if n_encoded < n_images else 0
    return {
        "spec": row["spec"],
        "dimension": row["dimension"],
        "n_encoded": n_encoded,
        "n_to_encode": n_left,  # images that have their bytes stored and no feature
        "index": _index_state(snapshot, encoder_id, n_encoded),
    }


def _indices(snapshot: Snapshot) -> list[Any]:
    return sorted(snapshot.tables["images"].describe_indices(), key=lambda index: index.name)


def _mapper(snapshot: Snapshot, row: dict[str, Any]) -> dict[str, Any]:
    """A mapper's row; by_index says whether its searches use its encoder's index, None that it is not known."""
    return row if row["encoder_id"] in planner.indices(snapshot) else row | {"by_index": None, "recall": None}


def _index(images: lance.LanceDataset, index: Any) -> dict[str, Any]:
    return {
        "name": index.name,
        "column": index.field_names[0],
        "type": index.index_type,
        "segments": len(index.segments),
        "n_unindexed": max(0, images.count_rows() - index.num_rows_indexed),
        "bytes": index.total_size_bytes,
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
    return [{"model_id": model_id, **process} for model_id, process in held if process]


def _job(row: dict[str, Any]) -> dict[str, Any]:
    """A job's row; a running job whose process is gone was killed."""
    if row["state"] == "running" and row["host"] == socket.gethostname() and not alive(row["pid"]):
        row = row | {"state": "killed"}
    return row


def _bytes(folder: Any) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # another process deleted it meanwhile
                continue
    return total


# --- check -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """A problem: the check that found it, its meaning, and the offending rows."""

    check: str
    meaning: str
    rows: pa.Table


def check(snapshot: Snapshot, report: Progress = no_progress, deep: bool = False) -> list[Finding]:
    """Damaged files, rows that contradict each other, and indices that answer wrongly; an empty list if there are none.

    Every stored byte is read, and images and weights are compared with their sha256. Then every query of the group
    `checks` runs, and the indices are tested with queries whose answers are known.
    deep: first compare every file with its checksum (`checksums.verify`); any change of any byte is found
    """
    if deep and (wrong_files := checksums.verify(snapshot.path, snapshot.tables, report)):
        meaning = "Files that are not as they were written; restore them from a backup."
        return [Finding("changed_files", meaning, pa.Table.from_pylist(wrong_files))]
    damaged, changed = _read_everything(snapshot, report)
    if damaged:  # queries over damaged files only fail
        rows = pa.Table.from_pylist(damaged)
        return [Finding("damaged_files", "Files that cannot be read; restore them from a copy of the directory.", rows)]
    if unreadable := _unreadable_indices(snapshot):
        meaning = (
            "Files of an index that cannot be read; restore them from a backup, or build the index again: attrdb index for "
            "features; any other is dropped with a Lance client and built again by attrdb optimize."
        )
        return [Finding("damaged_files", meaning, pa.Table.from_pylist(unreadable))]
    findings = []
    if changed:
        meaning = "Stored images and weights whose bytes are not those that were written; restore them from a copy."
        findings.append(Finding("changed_bytes", meaning, pa.Table.from_pylist(changed)))
    checks = [query for query in queries.all_queries().values() if query.group == "checks"]
    with storage(snapshot.path), sql.connect(snapshot) as connection:
        for number, query in enumerate(checks):
            report("queries", number, len(checks))
            rows = sql.run(connection, query.sql, query.bind({}))
            if len(rows):
                findings.append(Finding(query.name, query.summary, rows))
        report("queries", len(checks), len(checks))
    wrong = list(index_self_test(snapshot))
    if wrong:
        meaning = (
            "Index answers that an exact scan contradicts; rebuild an index of features (attrdb index), drop any other."
        )
        findings.append(Finding("index_self_test", meaning, pa.Table.from_pylist(wrong)))
    return findings


def _read_everything(snapshot: Snapshot, report: Progress) -> tuple[list[Row], list[Row]]:
    """The files that cannot be read, and the images and weights whose bytes do not match their sha256."""
    damaged: list[Row] = []
    changed: list[Row] = []
    for name, table in snapshot.tables.items():
        try:
            table.versions()
        except Exception as error:  # its text names the manifest of an older version
            damaged.append({"table": name, "files": f"{name}.lance/_versions", "error": words_of(error)})
    fragments = [(name, fragment) for name, table in snapshot.tables.items() for fragment in table.get_fragments()]
    for number, (name, fragment) in enumerate(fragments):
        report("files", number, len(fragments))
        try:
            for batch in fragment.to_batches(batch_size=1024):
                if name == "images":
                    changed += _changed_images(batch)
                elif name == "models":
                    changed += _changed_weights(snapshot, batch)
        except Exception as error:  # a damaged file makes Lance raise many kinds, down to ValueError
            files = ", ".join(file.path for file in fragment.data_files())
            damaged.append({"table": name, "files": files, "error": words_of(error)})
    report("files", len(fragments), len(fragments))
    return damaged, changed


def _changed_images(batch: pa.RecordBatch) -> Iterator[Row]:
    for image_id, sha256, image in zip(batch["image_id"], batch["sha256"], batch["image"], strict=True):
        if sha256.is_valid and image.is_valid and hashlib.sha256(image.as_buffer()).hexdigest() != sha256.as_py():
            yield {"table": "images", "id": image_id.as_py(), "needed": sha256.as_py()}


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


def _unreadable_indices(snapshot: Snapshot) -> list[Row]:
    """The indices that cannot answer at all, with their files."""
    unreadable = []
    for index in _indices(snapshot):
        try:
            _ask(snapshot, index.field_names[0])
        except BaseException as error:
            if not isinstance(error, Exception) and not by_lance(error):
                raise
            folders = [f"images.lance/_indices/{segment.uuid}" for segment in index.segments]
            files = checksums.changed_in(snapshot.path, folders) or folders
            unreadable.append({"index": index.name, "files": ", ".join(files), "error": words_of(error)})
    return unreadable


def _ask(snapshot: Snapshot, column: str) -> None:
    """Ask the index of a column in all its parts; one that attrdb does not use is not asked."""
    images = snapshot.tables["images"]
    if column in snapshot.encoders:
        if index := planner.indices(snapshot).get(column):
            feature = np.eye(1, snapshot.encoders[column]["dimension"], dtype=np.float32)
            ivf.top_k(images, replace(index, n_probes=index.n_partitions), "true", planner.count(snapshot), feature, 1)
        return
    of_text = (f"{column} > ''", f"{column} = 'a'") if pa.types.is_string(images.schema.field(column).type) else ()
    for where in (*of_text, f"{column} IS NULL"):
        images.scanner(columns=[], filter=where, with_row_id=True).count_rows()


def index_self_test(snapshot: Snapshot) -> Iterator[Row]:
    """One row per index that answers otherwise than an exact scan, for a few ids, roles and features."""
    images = snapshot.tables["images"]
    n = images.count_rows()
    if not n:
        return
    chosen = np.linspace(0, n - 1, min(PROBES, n)).astype(int)
    for index in _indices(snapshot):
        column = index.field_names[0]
        if column in feature_columns(images.schema):
            if column not in planner.indices(snapshot) or index.name != planner.indices(snapshot)[column].name:
                continue  # of another client, and not used
            recall = _recall(snapshot, column, chosen)
            if recall < RECALL_NEEDED:
                found = f"recall@10 against an exact scan is {recall:.3f} over {len(chosen)} features"
                yield {"index": index.name, "column": column, "found": found, "needed": f"at least {RECALL_NEEDED}"}
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
                found = f"{where}: {indexed} rows"
                yield {"index": index.name, "column": column, "found": found, "needed": f"{scanned}"}


def _recall(snapshot: Snapshot, encoder_id: str, chosen: np.ndarray) -> float:
    """recall@10 of attrdb's index on some stored features."""
    images = snapshot.tables["images"]
    rows = images.take(chosen, columns=["image_id", encoder_id])
    rows = rows.filter(rows[encoder_id].is_valid())
    if not len(rows):
        return 1.0
    queries, where = feature_matrix(rows[encoder_id]), snapshot.visible(CANDIDATES)
    exact = exact_search.top_k(stream(images, encoder_id, where), queries, 11)
    hits = ivf.top_k(images, planner.indices(snapshot)[encoder_id], where, planner.count(snapshot), queries, 11)
    return exact_search.recall(hits, exact, 10, rows["image_id"].to_pylist())
