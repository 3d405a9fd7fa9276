"""Build an encoder's index: choose its cells, divide all features among them, hand both to Lance, measure how it answers.

Lance (pylance 14.0) spends nearly all of a build on dividing the features, at a small part of what the machine's matrix
products could do (docs/DECISIONS.md); here that is a matrix product, and Lance takes its result over.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attrdb import ann, search
from attrdb.attribution import CANDIDATES, FEW, count
from attrdb.cells import nearest_centroids, train_centroids
from attrdb.database import Database
from attrdb.errors import Busy, InvalidValue, StorageError
from attrdb.locks import alone
from attrdb.mapper import Mapper
from attrdb.schema import feature_matrix
from attrdb.snapshot import Snapshot, literal, storage

SCALAR_INDICES = {"role": "BITMAP", "image_id": "BTREE", "model_id": "BTREE"}
ALL_SEGMENTS = 10_000
MIN_ROWS = FEW  # up to there, everything is compared
BUILDING = ".index-"  # folder, in the database's, of what lies beside an index while it is built
CELLS = 1.25  # times the square root of the number of features: more cells are quicker to ask and slower to build
SAMPLES_A_CELL = 20  # features that a centroid is trained on
ROUNDS = 6
N_QUERIES = 200
COUNTED, ESTIMATED_FROM = 50_000, 4_096  # images
SPARSE = 0.25  # share of images that have a feature below which they are looked for, and not met by chance
DRAWN = 20_000  # rows among which queries are looked for
FEW_SAMPLES = 50  # fewer say little about recall
K = 10
RECALL_WANTED = 0.99
OVERSAMPLING = (4, 16, 64)  # one bit a dimension says little of short features
MORE_FOR_A_MAPPER = ((1, 1), (1, 2), (2, 4), (4, 8), (8, 16))  # times as many cells and hits as without it
N_FITTED, RIDGE = (
    20_000,
    1e-6,
)  # features that a mapper's n(x) is fitted on, and what keeps that from depending on noise

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What a build will do, and what it takes.

    memory: bytes, at most; disk: bytes, of the index and of what lies beside it while it is built
    """

    encoder_id: str
    kind: str
    n_rows: int
    dimension: int
    n_partitions: int
    memory: int
    disk: int


def plan(snapshot: Snapshot, encoder_id: str) -> Plan:
    """The parameters that a build chooses from the number of features.

    raises: NotFound for an unknown encoder, InvalidValue if there are fewer than MIN_ROWS features
    """
    encoder_id = snapshot.encoder_id(encoder_id)
    n_rows, dimension = _n_features(snapshot, encoder_id), snapshot.encoders[encoder_id]["dimension"]
    if n_rows < MIN_ROWS:
        raise InvalidValue(
            f"{snapshot.path} has {n_rows:,} features of {encoder_id!r}; an index is of use from {MIN_ROWS:,} on, and until "
            "then every search is exact"
        )
    n_partitions = round(CELLS * np.sqrt(n_rows))
    # One bit a dimension, which Lance makes of whole bytes only; a byte a dimension otherwise.
    kind, width = ("IVF_RQ", dimension // 8) if dimension % 8 == 0 else ("IVF_SQ", dimension)
    sample = 2 * 4 * dimension * SAMPLES_A_CELL * n_partitions  # in the order of rows, and in that of cells
    index = n_rows * (width + 24)
    return Plan(encoder_id, kind, n_rows, dimension, n_partitions, sample + 2 * index + (512 << 20), 2 * index)


def build(
    db: Database,
    encoder_id: str | None = None,
    device: str = "cpu",
    report: Report = lambda stage, done, total: None,
) -> dict:
    """Build, or build again, an encoder's index; the row of `indices` that says how well it answers.

    The searches of its mappers are measured too, see `measure_mapper`.

    Readers and writers go on meanwhile: rows that come later are searched without the index until `optimize` takes them in.
    raises: as `plan`; Busy if maintenance runs already, StorageError if memory or disk are too small
    """
    with alone(db.path / ".maintenance.lock", f"{db.path} is being maintained"), storage(db.path):
        db.commit(lambda: None)  # refuses a database that is read-only before anything is computed
        what = plan(db.snapshot, encoder_id)
        _check_room(db.path, what)
        cover_columns(db)  # searches filter by them
        db.refresh()
        started = time.perf_counter()
        images = db.snapshot.tables["images"]
        report("cells", 0, 1)
        features = _some_features(images, what.encoder_id, SAMPLES_A_CELL * what.n_partitions, what.n_rows)
        centroids = train_centroids(features, what.n_partitions, ROUNDS, 0, device)
        del features
        for left in db.path.glob(f"{BUILDING}*"):  # of a build that was killed
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(prefix=BUILDING, dir=db.path) as folder:
            divided = str(Path(folder) / "cells.lance")
            # Lance wants it in one file.
            lance.write_dataset(
                _divided(images, what, centroids, device, report), divided, schema=_CELLS, max_rows_per_file=2**30
            )
            n_rows = lance.dataset(divided).count_rows()
            report("index", 0, 1)
            # Measured with other cells; until they are measured again, mappers are searched exactly.
            db.delete("mapper_searches", f"encoder_id = {literal(what.encoder_id)}")
            db.commit(lambda: _create(db.path, images.version, what, centroids, divided))
        seconds = time.perf_counter() - started
        entry = {
            "encoder_id": what.encoder_id,
            "kind": what.kind,
            "n_partitions": what.n_partitions,
            "n_rows": n_rows,
            "device": device,
            "seconds": seconds,
        }
        row = measure(db, entry, report)
        for mapper_id in mapper_ids(db.snapshot, what.encoder_id):
            measure_mapper(db, mapper_id, report)
        return row


def cover_columns(db: Database) -> None:
    """Make the indices of SCALAR_INDICES where they are missing, and let them cover all rows."""
    images = db.path / "images.lance"
    present = {one.field_names[0] for one in lance.dataset(str(images)).describe_indices()}
    for column, kind in SCALAR_INDICES.items():
        if column not in present:
            db.commit(
                lambda column=column, kind=kind: lance.dataset(str(images)).create_scalar_index(
                    column, kind, replace=False
                )
            )
    for one in lance.dataset(str(images)).describe_indices():
        if one.field_names[0] in SCALAR_INDICES:
            cover(db, one)


def cover(db: Database, index: Any) -> None:
    """Let one index, as Lance describes it, cover all rows in one segment."""
    images = lance.dataset(str(db.path / "images.lance"))
    if len(index.segments) > 1 or index.num_rows_indexed < images.count_rows():
        db.commit(
            lambda: lance.dataset(str(db.path / "images.lance")).optimize.optimize_indices(
                num_indices_to_merge=ALL_SEGMENTS, index_names=[index.name]
            )
        )


def measure(db: Database, entry: dict, report: Report = lambda stage, done, total: None) -> dict:
    """Choose how many cells a query looks into and how many hits are compared exactly, and store that with its recall.

    The least that finds RECALL_WANTED of the exact first K; where nothing does, all that was tried.
    """
    snapshot = db.snapshot
    encoder_id, n_partitions = entry["encoder_id"], entry["n_partitions"]
    said, ids, queries = _queries(snapshot, encoder_id)
    report("recall", 0, 1)
    exact = search.top_k(snapshot.features(encoder_id, CANDIDATES), queries, K + 1)
    probes = sorted({min(2**power, n_partitions) for power in range(2, n_partitions.bit_length() + 1)})
    covers = ann.coverage(snapshot.tables["images"], encoder_id)
    tries = [
        ann.Index(encoder_id, entry["kind"], n_partitions, n_probes, oversampling, **covers)
        for n_probes in probes
        for oversampling in OVERSAMPLING
    ]
    for number, index in enumerate(tries):
        report("recall", number, len(tries))
        recall = _recall_of(snapshot, index, ids, queries, exact)
        if recall >= RECALL_WANTED:
            break
    report("recall", len(tries), len(tries))
    row = entry | {
        "n_probes": index.n_probes,
        "oversampling": index.oversampling,
        "recall": recall,
        "n_queries": len(queries),
        "queries": said,
        "images_version": snapshot.version,
        "created_at": datetime.now(UTC),
    }
    db.upsert("indices", [row], on="encoder_id")
    return row


def measure_mapper(db: Database, mapper_id: str, report: Report = lambda stage, done, total: None) -> dict | None:
    """See what a mapper, folded into the query, finds through its encoder's index, and store how it is asked for that.

    The least that finds RECALL_WANTED of the exact first K; where not even the most does, all candidates are compared.
    returns: the row of `mapper_searches`; None where there is no index, or rows that it does not cover yet (`optimize`
             measures then), or nothing to ask, or a mapper that cannot be folded or is broken
    """
    db.refresh()
    snapshot = db.snapshot
    mapper = snapshot.mapper(mapper_id)
    own = snapshot.indices.get(mapper.encoder_id)
    if own is None or own.later or mapper.form not in ann.FOLDABLE:
        return None
    report(f"recall of {mapper_id}", 0, 1)
    _, ids, queries = _queries(snapshot, mapper.encoder_id)
    try:
        exact = search.top_k(snapshot.features(mapper.encoder_id, CANDIDATES), queries, K + 1, mapper=mapper)
    except InvalidValue:  # said when it is searched with
        return None
    if not any(map(len, exact.ids)):
        return None
    tilt = _tilt(snapshot, mapper, exact)
    tries = [
        replace(
            own, n_probes=min(more * own.n_probes, own.n_partitions), oversampling=hits * own.oversampling, tilt=tilt
        )
        for more, hits in MORE_FOR_A_MAPPER
    ]
    # The most is tried first: it says whether anything else need be.
    recall, index = _recall_of(snapshot, tries[-1], ids, queries, exact, mapper), tries[-1]
    if used := recall >= RECALL_WANTED:
        for number, index in enumerate(tries):
            report(f"recall of {mapper_id}", number, len(tries))
            recall = _recall_of(snapshot, index, ids, queries, exact, mapper)
            if recall >= RECALL_WANTED:
                break
    report(f"recall of {mapper_id}", len(tries), len(tries))
    row = {
        "mapper_id": mapper_id,
        "encoder_id": mapper.encoder_id,
        "used": used,
        "n_probes": index.n_probes,
        "oversampling": index.oversampling,
        "tilt": tilt,
        "recall": recall,
        "n_queries": len(queries),
        "images_version": snapshot.version,
        "created_at": datetime.now(UTC),
    }
    db.upsert("mapper_searches", [row], on="mapper_id")
    return row


def measure_trained(db: Database, mapper_id: str) -> None:
    """`measure_mapper` for a new mapper; left to `optimize` where maintenance runs already."""
    with suppress(Busy), alone(db.path / ".maintenance.lock", f"{db.path} is being maintained"):
        measure_mapper(db, mapper_id)


def measure_missing(db: Database, report: Report = lambda stage, done, total: None) -> None:
    """Measure the mappers of indexed encoders that are not measured: the job that should have was killed."""
    done = set(db.snapshot.tables["mapper_searches"].to_table(columns=["mapper_id"])["mapper_id"].to_pylist())
    for encoder_id in db.snapshot.indices:
        for mapper_id in mapper_ids(db.snapshot, encoder_id):
            if mapper_id not in done:
                measure_mapper(db, mapper_id, report)


def mapper_ids(snapshot: Snapshot, encoder_id: str) -> list[str]:
    """Of the encoder's mappers that can be folded."""
    forms = ", ".join(map(literal, ann.FOLDABLE))
    where = f"encoder_id = {literal(encoder_id)} AND form IN ({forms})"
    return sorted(snapshot.tables["mappers"].to_table(columns=["mapper_id"], filter=where)["mapper_id"].to_pylist())


def _tilt(snapshot: Snapshot, mapper: Mapper, exact: search.Hits) -> np.ndarray:
    """(dimension,) float32: t g, where n(x) is nearly a + g . x, and t is the mean similarity of the K-th candidates."""
    images = snapshot.tables["images"]
    n_rows = _n_features(snapshot, mapper.encoder_id)
    x = _some_features(images, mapper.encoder_id, N_FITTED, n_rows).astype(np.float64)
    n = mapper.norms(x)
    centre = x.mean(axis=0)
    x -= centre
    square = x.T @ x
    square[np.diag_indices_from(square)] += RIDGE * (1 + np.trace(square) / len(square))
    g = np.linalg.solve(square, x.T @ (n - n.mean()))
    t = np.mean([similarity[:K][-1] for similarity in exact.similarity if len(similarity)])
    return (t * g).astype(np.float32)


def _recall_of(
    snapshot: Snapshot,
    index: ann.Index,
    ids: np.ndarray,
    queries: np.ndarray,
    exact: search.Hits,
    mapper: Mapper | None = None,
) -> float:
    where = snapshot.visible(CANDIDATES)
    found = ann.top_k(snapshot.tables["images"], index, where, count(snapshot), queries, K + 1, mapper)
    return _recall(found, exact, ids)


_CELLS = pa.schema([("row_id", pa.uint64()), ("partition", pa.uint32())])


def _n_features(snapshot: Snapshot, encoder_id: str) -> int:
    """How many images have a feature; of many images an estimate, since counting would read every feature."""
    n_images = snapshot.tables["images"].count_rows()
    if n_images <= COUNTED:
        return snapshot.count(f"`{encoder_id}` IS NOT NULL")
    found = len(_some_features(snapshot.tables["images"], encoder_id, ESTIMATED_FROM, n_images))
    if found < SPARSE * ESTIMATED_FROM:
        return snapshot.count(f"`{encoder_id}` IS NOT NULL")
    return round(found / ESTIMATED_FROM * n_images)


def _check_room(path: Path, what: Plan) -> None:
    found = {"memory": (what.memory, _free_memory()), "disk": (what.disk, shutil.disk_usage(path).free)}
    for name, (needed, free) in found.items():
        if needed > free:
            raise StorageError(
                f"an index of {what.n_rows:,} features of {what.encoder_id!r} needs {needed / 2**30:.1f} GiB of {name}, "
                f"{free / 2**30:.1f} GiB are free; nothing was changed"
            )


def _free_memory() -> int:
    """Bytes; what the system would give up for it included, where it says so."""
    told = Path("/proc/meminfo")
    lines = dict(line.split(":") for line in told.read_text().splitlines()) if told.exists() else {}
    if "MemAvailable" in lines:
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _some_features(images: lance.LanceDataset, encoder_id: str, wanted: int, n_rows: int) -> np.ndarray:
    """About so many features, chosen at random from all n_rows of them."""
    n_images, rng = images.count_rows(), np.random.default_rng(0)
    if n_rows < SPARSE * n_images:
        blocks = [features for _, features in search.stream(images, encoder_id, "true")]
        return np.concatenate([block[rng.random(len(block)) * n_rows < 1.1 * wanted] for block in blocks])
    chosen = rng.choice(n_images, min(n_images, wanted * n_images // n_rows), replace=False)
    return feature_matrix(images.take(np.sort(chosen), columns=[encoder_id])[encoder_id].drop_null())


def _divided(
    images: lance.LanceDataset, what: Plan, centroids: np.ndarray, device: str, report: Report
) -> Iterator[pa.RecordBatch]:
    """Every row that has a feature, and its cell."""
    done = 0
    for rows, features in search.stream(images, what.encoder_id, "true", "_rowid"):
        cells = nearest_centroids(features, centroids, device).astype(np.uint32)
        yield pa.record_batch([rows, pa.array(cells)], _CELLS)
        done += len(cells)
        report("divide", done, what.n_rows)


def _create(path: Path, version: int, what: Plan, centroids: np.ndarray, divided: str) -> None:
    # Of the version that was divided: a row that came later would count as indexed, and be in no cell.
    images = lance.dataset(str(path / "images.lance"), version=version)
    name = ann.index_name(what.encoder_id)
    for other in images.describe_indices():
        if other.field_names == [what.encoder_id] and other.name != name:
            lance.dataset(str(path / "images.lance")).drop_index(other.name)
    images.create_index(
        what.encoder_id,
        what.kind,
        name=name,
        metric="cosine",
        replace=True,
        num_partitions=what.n_partitions,
        ivf_centroids=centroids,
        precomputed_partition_dataset=divided,
        **({"num_bits": 1} if what.kind == "IVF_RQ" else {}),
    )


def _queries(snapshot: Snapshot, encoder_id: str) -> tuple[str, np.ndarray, np.ndarray]:
    """What recall is measured with, its ids, and its features: samples, or candidates where there are hardly any samples."""
    images, encoded = snapshot.tables["images"], f"`{encoder_id}` IS NOT NULL"
    rng = np.random.default_rng(1)
    chosen = rng.choice(images.count_rows(), min(images.count_rows(), DRAWN), replace=False)
    drawn = images.take(np.sort(chosen), columns=["image_id", "role"])
    said, role = "samples", pc.equal(drawn["role"], "sample")
    if snapshot.count("role = 'sample'") < FEW_SAMPLES:
        said, role = "candidates", pc.invert(role)
    ids = drawn.filter(role)["image_id"].to_numpy()
    where = f"image_id IN ({', '.join(map(literal, rng.permutation(ids)[: 4 * N_QUERIES]))})" if len(ids) else "false"
    found = snapshot.images(f"{where} AND {encoded}", ["image_id", encoder_id])[:N_QUERIES]
    if len(found) < min(N_QUERIES, FEW_SAMPLES):  # too rare to be met by chance
        where = f"role = 'sample' AND {encoded}" if said == "samples" else f"{CANDIDATES} AND {encoded}"
        found = snapshot.images(where, ["image_id", encoder_id])
        found = found.take(np.sort(rng.choice(len(found), min(len(found), N_QUERIES), replace=False)))
    return said, found["image_id"].to_numpy(), feature_matrix(found[encoder_id])


def _recall(found: search.Hits, exact: search.Hits, own_ids: np.ndarray) -> float:
    """Share of the exact first K candidates that were found, a query's own image left out; ties with the last count."""
    shares = []
    for own, ids, similarity, best_ids, best in zip(
        own_ids, found.ids, found.similarity, exact.ids, exact.similarity, strict=True
    ):
        best = best[best_ids != own][:K]
        hits = similarity[ids != own][:K]
        shares.append(np.count_nonzero(hits >= best[-1]) / len(best) if len(best) else 1.0)
    return float(np.mean(shares))
