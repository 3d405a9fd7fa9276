"""Build an encoder's index: choose its partitions, assign all features to them, hand both to Lance, measure its recall.

Lance (pylance 14.0) spends nearly all of a build on assigning features to partitions, at a small part of the machine's rate
of matrix products (docs/DECISIONS.md). Here the assignment is a matrix product, and Lance is given its result.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lance
import numpy as np
import pyarrow as pa
from lance.lance import indices as lance_indices

from attrdb.errors import InvalidValue, StorageError
from attrdb.progress import Progress, no_progress
from attrdb.search import index_tuning, ivf, planner, sampling
from attrdb.search.kmeans import nearest_centroids, train_centroids
from attrdb.search.memory import free_memory
from attrdb.search.threads import map_blocks
from attrdb.store.features import Block, stream
from attrdb.store.lance_errors import storage
from attrdb.store.locks import exclusive_lock
from attrdb.store.predicates import literal
from attrdb.store.schema import Row
from attrdb.store.snapshot import Snapshot
from attrdb.store.writer import Writer
from attrdb.text import size_text

SCALAR_INDICES: dict[str, Literal["BITMAP", "BTREE"]] = {"role": "BITMAP", "image_id": "BTREE", "model_id": "BTREE"}
ALL_SEGMENTS = 10_000
MIN_ROWS = planner.EXACT_BELOW_ROWS  # below it, searches compare all candidates
BUILDING = ".index-"  # prefix of a folder in the database, for files that are needed while an index is built
# Partitions per square root of the number of features. With more, queries are faster and builds slower.
PARTITIONS_PER_ROOT = 1.25
TRAINING_ROWS_PER_PARTITION = 20  # features that a centroid is trained on
ROUNDS = 6


@dataclass(frozen=True)
class Plan:
    """Parameters of a build, and what it needs.

    memory: bytes, at most
    disk:   bytes, of the index and of the files that are needed while it is built
    """

    encoder_id: str
    kind: str
    n_rows: int
    dimension: int
    n_partitions: int
    memory: int
    disk: int


def plan(snapshot: Snapshot, encoder_id: str | None) -> Plan:
    """The parameters of a build, chosen from the number of features.

    raises: NotFound for an unknown encoder, InvalidValue if there are fewer than MIN_ROWS features
    """
    encoder_id = snapshot.encoder_id(encoder_id)
    n_rows, dimension = sampling.n_features(snapshot, encoder_id), snapshot.encoders[encoder_id]["dimension"]
    if n_rows < MIN_ROWS:
        raise InvalidValue(
            f"{snapshot.path} has {n_rows:,} features of {encoder_id!r}; an index is of use from {MIN_ROWS:,} on, and until "
            "then every search is exact"
        )
    n_partitions = round(PARTITIONS_PER_ROOT * np.sqrt(n_rows))
    # One bit per dimension, which Lance takes in whole bytes only; otherwise one byte per dimension.
    kind, width = ("IVF_RQ", dimension // 8) if dimension % 8 == 0 else ("IVF_SQ", dimension)
    n_training = TRAINING_ROWS_PER_PARTITION * n_partitions
    training_bytes = 2 * 4 * dimension * n_training  # twice: in the order of rows, and in that of partitions
    index_bytes = n_rows * (width + 24)
    memory = training_bytes + 2 * index_bytes + (512 << 20)
    return Plan(encoder_id, kind, n_rows, dimension, n_partitions, memory, 2 * index_bytes)


def build(
    writer: Writer,
    encoder_id: str | None = None,
    device: str = "cpu",
    report: Progress = no_progress,
) -> Row:
    """Build or rebuild an encoder's index, and measure it; the row of `indices`, with its recall.

    The searches of the encoder's mappers are measured too, see `attrdb.search.index_tuning`. Readers and writers go on
    meanwhile: rows that are added are searched without the index until `optimize` adds them to it.
    raises: as `plan`; Busy if maintenance runs already, StorageError if memory or disk are too small
    """
    with exclusive_lock(writer.path / ".maintenance.lock", f"{writer.path} is being maintained"), storage(writer.path):
        writer.commit(lambda: None)  # refuses a database that is read-only before anything is computed
        build_plan = plan(writer.snapshot, encoder_id)
        _check_room(writer.path, build_plan)
        cover_columns(writer)  # searches filter by them
        writer.refresh()
        started = time.perf_counter()
        images = writer.snapshot.tables["images"]
        report("partitions", 0, 1)
        n_training = TRAINING_ROWS_PER_PARTITION * build_plan.n_partitions
        features = sampling.features(writer.snapshot, build_plan.encoder_id, n_training, build_plan.n_rows)
        centroids = train_centroids(features, build_plan.n_partitions, ROUNDS, 0, device)
        del features
        for leftover in writer.path.glob(f"{BUILDING}*"):  # of a build that was killed
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(prefix=BUILDING, dir=writer.path) as folder:
            assigned = str(Path(folder) / "partitions.lance")
            # Lance takes the assignment as one file only.
            lance.write_dataset(
                _assigned(images, build_plan, centroids, device, report),
                assigned,
                schema=_ASSIGNMENTS,
                max_rows_per_file=2**30,
            )
            n_rows = lance.dataset(assigned).count_rows()
            report("index", 0, 1)
            # They were measured with other partitions. Until the new ones are measured, mappers compare all candidates.
            writer.delete("mapper_searches", f"encoder_id = {literal(build_plan.encoder_id)}")
            writer.commit(lambda: _create(writer.path, images.version, build_plan, centroids, assigned))
        seconds = time.perf_counter() - started
        entry = {
            "encoder_id": build_plan.encoder_id,
            "kind": build_plan.kind,
            "n_partitions": build_plan.n_partitions,
            "n_rows": n_rows,
            "device": device,
            "seconds": seconds,
        }
        return index_tuning.measure(writer, entry, report)


def cover_columns(writer: Writer) -> None:
    """Make those of SCALAR_INDICES that are missing, and let all of them cover all rows."""
    images = writer.path / "images.lance"
    present = {index.field_names[0] for index in lance.dataset(str(images)).describe_indices()}
    for column, kind in SCALAR_INDICES.items():
        if column not in present:
            writer.commit(partial(_index_column, images, column, kind))
    for index in lance.dataset(str(images)).describe_indices():
        if index.field_names[0] in SCALAR_INDICES:
            cover(writer, index)


def _index_column(images: Path, column: str, kind: Literal["BITMAP", "BTREE"]) -> None:
    lance.dataset(str(images)).create_scalar_index(column, kind, replace=False)


def cover(writer: Writer, index: Any) -> None:
    """Let one index, as Lance describes it, cover all rows in one segment."""
    images = lance.dataset(str(writer.path / "images.lance"))
    if len(index.segments) > 1 or index.num_rows_indexed < images.count_rows():
        writer.commit(
            lambda: lance.dataset(str(writer.path / "images.lance")).optimize.optimize_indices(
                num_indices_to_merge=ALL_SEGMENTS, index_names=[index.name]
            )
        )


_ASSIGNMENTS = pa.schema([("row_id", pa.uint64()), ("partition", pa.uint32())])


def _check_room(path: Path, build_plan: Plan) -> None:
    resources = {"memory": (build_plan.memory, free_memory()), "disk": (build_plan.disk, shutil.disk_usage(path).free)}
    for name, (needed, free) in resources.items():
        if needed > free:
            raise StorageError(
                f"an index of {build_plan.n_rows:,} features of {build_plan.encoder_id!r} needs {size_text(needed)} of "
                f"{name}, {size_text(free)} are free; nothing was changed"
            )


def _assigned(
    images: lance.LanceDataset, build_plan: Plan, centroids: np.ndarray, device: str, report: Progress
) -> Iterator[pa.RecordBatch]:
    """Every row that has a feature, and its partition."""

    def partitions_of(block: Block) -> tuple[pa.Array, np.ndarray]:
        rows, features = block
        return rows, nearest_centroids(features, centroids, device).astype(np.uint32)

    done = 0
    for rows, partitions in map_blocks(partitions_of, stream(images, build_plan.encoder_id, "true", "_rowid"), device):
        yield pa.record_batch([rows, pa.array(partitions)], _ASSIGNMENTS)
        done += len(partitions)
        report("divide", done, build_plan.n_rows)


def _rotation(dimension: int) -> str:
    """How Lance rotates features before it takes their signs: at random, but from a seed, so that a build can be repeated."""
    model = json.loads(lance_indices.build_rq_model(dimension, 1))
    n_bytes = len(model["fast_rotation_signs"])
    return json.dumps(model | {"fast_rotation_signs": list(np.random.default_rng(0).bytes(n_bytes))})


def _create(path: Path, version: int, build_plan: Plan, centroids: np.ndarray, assigned: str) -> None:
    # On the version that was assigned: Lance would count a later row as indexed, though it is in no partition.
    images = lance.dataset(str(path / "images.lance"), version=version)
    name = ivf.index_name(build_plan.encoder_id)
    for other in images.describe_indices():
        if other.field_names == [build_plan.encoder_id] and other.name != name:
            lance.dataset(str(path / "images.lance")).drop_index(other.name)
    one_bit: dict[str, Any] = {}
    if build_plan.kind == "IVF_RQ":
        one_bit = {"num_bits": 1, "rabitq_model": _rotation(build_plan.dimension)}
    images.create_index(
        build_plan.encoder_id,
        build_plan.kind,
        name=name,
        metric="cosine",
        replace=True,
        num_partitions=build_plan.n_partitions,
        ivf_centroids=centroids,
        precomputed_partition_dataset=assigned,
        **one_bit,
    )
