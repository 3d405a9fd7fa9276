"""Search, beside other ways to do it: python benchmarks/search.py evaluation exact ann growth --json FILE

    evaluation   ranks of true exemplars, against one matrix-vector product and a full argsort of the gallery per query
    exact        the first ten, against faiss IndexFlatIP in memory and LanceDB's flat search
    ann          recall@10 and time, against faiss IVF-PQ with refinement, hnswlib and usearch in memory, and Lance's defaults
    growth       the index as the gallery grows
    later        with rows that were added after the index was built
    predicates   with few candidates that fulfil a predicate
    real         indices of the features of an existing database, with its mappers folded into the query
    accelerator  ranks and builds on a GPU, against the CPU of the same machine
    folding      a mapper folded into the query, against a column of mapped features with an index of its own

attrdb does not depend on the peers: pip install faiss-cpu hnswlib usearch. A part is measured in one run, on the same data
(clustered.py), with one thread per core. Parts are added to FILE.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import clustered
import lance
import numpy as np
import pyarrow as pa
from machine import describe, spread

import attrdb
from attrdb.database import Database
from attrdb.search import exact as exact_search
from attrdb.search import index_build, index_tuning, ivf, planner
from attrdb.search.mapper import Mapper, stored_mapper
from attrdb.search.memory import use_the_machine
from attrdb.store.features import BLOCK_ROWS, Block
from attrdb.store.predicates import CANDIDATES, literal
from attrdb.store.schema import Row
from attrdb.store.snapshot import Snapshot

N_CORES = os.cpu_count() or 1
PROBES = (16, 32, 64, 96, 112, 128, 192, 256)
GRAPH_WIDTHS = (64, 256, 512, 1024, 2048, 4096)
ROUNDS = 3


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def limits() -> dict[str, float]:
    """The rates of the machine: large float32 matrix products, and reading memory, with all cores; the best of five.

    They are measured before and after a part, since other work on the machine varies; the higher rate counts.
    """
    a = np.random.default_rng(0).standard_normal((3000, 3000), np.float32)
    wide = np.ones(128 << 20, np.float32)
    half = np.array_split(wide, N_CORES)

    def read() -> None:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(N_CORES) as pool:
            list(pool.map(np.sum, half))

    a @ a
    return {
        "gflops": 2 * 3000**3 / min(seconds(lambda: a @ a) for _ in range(5)) / 1e9,
        "read_gb_a_second": wide.nbytes / min(seconds(read) for _ in range(5)) / 1e9,
    }


@dataclasses.dataclass
class Data:
    """A database of clustered features, the same features in memory, and queries.

    of_query: the row that each query was moved from
    """

    db: Database
    x: np.ndarray
    queries: np.ndarray
    of_query: np.ndarray

    @property
    def encoder_id(self) -> str:
        return self.db.encoder_id()

    @property
    def images(self) -> lance.LanceDataset:
        return self.db.snapshot.tables["images"]

    def blocks(self) -> Iterator[Block]:
        return self.db.snapshot.features(self.encoder_id, CANDIDATES)

    def in_memory(self) -> list[Block]:
        ids = [f"f/{row:09d}" for row in range(len(self.x))]
        starts = range(0, len(ids), BLOCK_ROWS)
        return [(pa.array(ids[start : start + BLOCK_ROWS]), self.x[start : start + BLOCK_ROWS]) for start in starts]


def make(folder: Path, rows: int, dimension: int, n_queries: int) -> Data:
    db = clustered.database(Path(tempfile.mkdtemp(dir=folder)) / f"{rows}.attrdb", rows, dimension)
    x = np.concatenate(list(clustered.features(rows, dimension)))
    of_query = np.random.default_rng(2).choice(rows, n_queries, replace=False)
    return Data(db, x, clustered.moved(x[of_query]), of_query)


def rows_of(hits: exact_search.Hits, k: int = 10) -> np.ndarray:
    """(n_queries, k) row numbers, -1 where there are fewer."""
    return np.array([[int(image_id[2:]) for image_id in ids] + [-1] * (k - len(ids)) for ids in hits.ids])


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.mean([len({*a} & {*b}) / len(b) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]))


# --- evaluation ------------------------------------------------------------------------------------------------------


def scan_peak(path: Path, queries: np.ndarray) -> dict:
    """Memory of a new process that searches exactly: before the search, and its peak."""
    np.save(path.parent / "queries.npy", queries)
    code = (
        "import sys, numpy as np, attrdb; sys.path.insert(0, sys.argv[3]); from machine import peak_gib\n"
        "from attrdb.search import exact; db = attrdb.open(sys.argv[1]); q = np.load(sys.argv[2])\n"
        "e = db.encoder_id(); before = peak_gib()\n"
        "exact.top_k(db.snapshot.features(e, \"role <> 'sample'\"), q, 10); print(before, peak_gib())"
    )
    command = [sys.executable, "-c", code, str(path), str(path.parent / "queries.npy"), str(Path(__file__).parent)]
    before, peak = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    return {"before_gib": before, "peak_gib": peak}


def evaluation(data: Data, n_queries: int = 1000) -> dict:
    queries, of_query = data.queries[:n_queries], data.of_query[:n_queries]
    places = np.arange(n_queries)
    similarity = exact_search.exact_similarity(data.x[of_query], queries, places, places)[:, None]
    ids = np.array([[f"f/{row:09d}"] for row in of_query], dtype=object)
    ours, ranks = [], None
    for _ in range(ROUNDS):
        started = time.perf_counter()
        above, size = exact_search.count_above(data.blocks(), queries, similarity, ids)
        ours.append(time.perf_counter() - started)
        ranks = above[:, 0] + 1
    started = time.perf_counter()
    reference = np.empty(n_queries, np.int64)
    for number, query in enumerate(queries):
        order = np.argsort(-(data.x @ query))
        reference[number] = 1 + np.flatnonzero(order == of_query[number])[0]
    theirs = time.perf_counter() - started
    flops = 2 * n_queries * size * data.x.shape[1]
    return {
        "n_queries": n_queries,
        "seconds": spread(ours),
        "reference_seconds": theirs,
        "times": theirs / np.median(ours),
        "n_ranks_different": int((ranks != reference).sum()),
        "gflops": flops / np.median(ours) / 1e9,
        "memory": scan_peak(data.db.path, queries),
    }


# --- exact -----------------------------------------------------------------------------------------------------------


def exact(data: Data) -> dict:
    import faiss

    faiss.omp_set_num_threads(N_CORES)
    flat = faiss.IndexFlatIP(data.x.shape[1])
    adding = seconds(lambda: flat.add(data.x))
    in_memory = data.in_memory()
    blocks = []
    for n in (1, 16, 256, 1000):
        queries = data.queries[:n]
        ways = {
            "attrdb": lambda queries=queries: exact_search.top_k(data.blocks(), queries, 10),
            "attrdb, features in memory": lambda queries=queries: exact_search.top_k(in_memory, queries, 10),
            "faiss IndexFlatIP, in memory": lambda queries=queries: flat.search(queries, 10),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):  # in turn, so that other work on the machine affects all of them
            for way, run in ways.items():
                times[way].append(seconds(run))
        if n <= 16:
            times["LanceDB flat, query by query"] = [
                seconds(lambda queries=queries: lance_flat(data, queries)) for _ in range(ROUNDS)
            ]
        agree = recall(rows_of(exact_search.top_k(in_memory, queries, 10)), flat.search(queries, 10)[1])
        flops = 2 * n * len(data.x) * data.x.shape[1]
        blocks.append(
            {
                "n_queries": n,
                "seconds": {way: spread(of) for way, of in times.items()},
                "gflops": {way: flops / np.median(of) / 1e9 for way, of in times.items()},
                "agrees_with_faiss": agree,
            }
        )
    return {"faiss_adding_seconds": adding, "blocks": blocks}


def lance_flat(data: Data, queries: np.ndarray) -> None:
    for query in queries:
        nearest = {"column": data.encoder_id, "q": query, "k": 10, "use_index": False, "metric": "cosine"}
        data.images.to_table(columns=["image_id", "_distance"], nearest=nearest, filter=CANDIDATES, prefilter=True)


# --- ann -------------------------------------------------------------------------------------------------------------


def timed(ask: Callable[[np.ndarray], np.ndarray], queries: np.ndarray, truth: np.ndarray, single: int = 200) -> dict:
    """Recall and time of answers to one query at a time, and to 256 at once."""
    ask(queries[:1])
    singles = [seconds(lambda query=query: ask(query[None])) for query in queries[:single]]
    ask(queries[:256])
    batches = [seconds(lambda: ask(queries[:256])) / len(queries[:256]) for _ in range(ROUNDS)]
    return {
        "recall": recall(ask(queries), truth),
        "single_ms": {name: 1000 * value for name, value in spread(singles).items() if name != "n"},
        "single_p95_ms": 1000 * float(np.quantile(singles, 0.95)),
        "batch_ms": {name: 1000 * value for name, value in spread(batches).items() if name != "n"},
    }


def index_bytes(data: Data) -> int:
    data.db.refresh()
    return sum(index["bytes"] for index in data.db.status()["indices"] if index["column"] == data.encoder_id)


def ours(data: Data, truth: np.ndarray) -> dict:
    row = index_build.build(data.db.writer)
    snapshot = data.db.snapshot
    index = planner.indices(snapshot)[data.encoder_id]
    settings = []
    for n_probes in (n for n in PROBES if n <= index.n_partitions):
        changed = dataclasses.replace(index, n_probes=n_probes, oversampling=4)

        def ask(queries: np.ndarray, index: ivf.Index = changed) -> np.ndarray:
            planner.indices(snapshot)[data.encoder_id] = index
            return rows_of(planner.nearest(snapshot, data.encoder_id, queries, 10))

        settings.append({"setting": f"{n_probes} partitions", **timed(ask, data.queries, truth)})
    return {
        "what": f"attrdb ({row['kind']}, {row['n_partitions']:,} partitions), from disk",
        "build_seconds": row["seconds"],
        "bytes": index_bytes(data),
        "bytes_of_features": data.x.nbytes,
        "settings": settings,
        "chosen": {name: row[name] for name in ("n_probes", "oversampling", "recall")},
    }


def lance_building(data: Data) -> float:
    """Seconds of Lance's own build, with its own parameters."""
    column, n_sub_vectors = data.encoder_id, data.x.shape[1] // 8
    return seconds(
        lambda: data.images.create_index(
            column, "IVF_PQ", name=f"{column}_idx", metric="cosine", num_sub_vectors=n_sub_vectors, replace=True
        )
    )


def lance_default(data: Data, truth: np.ndarray) -> dict:
    """Lance's own build with its own parameters, searched by Lance alone."""
    column, build = data.encoder_id, lance_building(data)
    data.db.refresh()
    settings = []
    for n_probes in (5, 10, 20, 40, 80):

        def ask(queries: np.ndarray, n_probes: int = n_probes) -> np.ndarray:
            answer = data.images.to_table(
                columns=["image_id", "_distance"],
                nearest={
                    "column": column,
                    "q": queries if len(queries) > 1 else queries[0],
                    "k": 10,
                    "nprobes": n_probes,
                    "refine_factor": 10,
                },
                filter=CANDIDATES,
                prefilter=True,
            )
            rows = np.array([int(image_id[2:]) for image_id in answer["image_id"].to_pylist()])
            return rows.reshape(len(queries), -1)

        settings.append(
            {"setting": f"nprobes {n_probes}, refine 10", **timed(ask, data.queries[:256], truth[:256], 50)}
        )
    return {
        "what": "Lance's defaults (IVF_PQ), from disk",
        "build_seconds": build,
        "bytes": index_bytes(data),
        "bytes_of_features": data.x.nbytes,
        "settings": settings,
    }


def faiss_ivf(data: Data, truth: np.ndarray) -> dict:
    import faiss

    faiss.omp_set_num_threads(N_CORES)
    n_partitions = round(index_build.PARTITIONS_PER_ROOT * np.sqrt(len(data.x)))
    index = faiss.index_factory(
        data.x.shape[1], f"IVF{n_partitions},PQ{data.x.shape[1] // 8},RFlat", faiss.METRIC_INNER_PRODUCT
    )
    n_training = min(len(data.x), 40 * n_partitions)
    sample = data.x[np.random.default_rng(0).choice(len(data.x), n_training, replace=False)]

    def build() -> None:
        index.train(sample)
        index.add(data.x)

    took = seconds(build)
    settings = []
    for n_probes, k_factor in ((probes, k) for k in (4, 16) for probes in PROBES[2:] if probes <= n_partitions):
        faiss.extract_index_ivf(index).nprobe = n_probes
        index.k_factor = k_factor

        def ask(queries: np.ndarray) -> np.ndarray:
            return index.search(queries, 10)[1]

        settings.append({"setting": f"nprobe {n_probes}, k_factor {k_factor}", **timed(ask, data.queries, truth)})
    return {
        "what": "faiss IVF-PQ with refinement, in memory",
        "build_seconds": took,
        "bytes": len(data.x) * (data.x.shape[1] // 8 + 8),
        "bytes_of_features": data.x.nbytes,
        "settings": settings,
    }


def graph_hnswlib(data: Data, truth: np.ndarray) -> dict:
    import hnswlib

    index = hnswlib.Index("ip", data.x.shape[1])
    index.init_index(len(data.x), M=16, ef_construction=100)
    index.set_num_threads(N_CORES)
    took = seconds(lambda: index.add_items(data.x))
    settings = []
    for ef in GRAPH_WIDTHS:
        index.set_ef(ef)

        def ask(queries: np.ndarray) -> np.ndarray:
            return index.knn_query(queries, 10)[0]

        settings.append({"setting": f"ef {ef}", **timed(ask, data.queries, truth)})
    return {
        "what": "hnswlib (M 16, ef_construction 100), in memory",
        "build_seconds": took,
        "bytes": index.index_file_size() - data.x.nbytes,
        "bytes_of_features": data.x.nbytes,
        "settings": settings,
    }


def graph_usearch(data: Data, truth: np.ndarray) -> dict:
    from usearch.index import Index

    settings = []
    index = Index(ndim=data.x.shape[1], metric="ip", dtype="f32", connectivity=16, expansion_add=100)
    took = seconds(lambda: index.add(np.arange(len(data.x)), data.x, threads=N_CORES))
    for expansion in GRAPH_WIDTHS:
        index.expansion_search = expansion

        def ask(queries: np.ndarray) -> np.ndarray:
            answer = index.search(queries, 10, threads=N_CORES).keys
            return np.atleast_2d(answer)

        settings.append({"setting": f"expansion {expansion}", **timed(ask, data.queries, truth)})
    return {
        "what": "usearch (connectivity 16, expansion_add 100), in memory",
        "build_seconds": took,
        "bytes": index.serialized_length - data.x.nbytes,
        "bytes_of_features": data.x.nbytes,
        "settings": settings,
    }


PEERS = {
    "attrdb": ours,
    "lance": lance_default,
    "faiss": faiss_ivf,
    "hnswlib": graph_hnswlib,
    "usearch": graph_usearch,
}


def approximate(data: Data, peers: tuple[str, ...]) -> list[dict]:
    truth = rows_of(exact_search.top_k(data.in_memory(), data.queries, 10))
    results = []
    for peer in peers:
        results.append(PEERS[peer](data, truth))
        click.echo(json.dumps(results[-1]), err=True)
    return results


# --- growth ----------------------------------------------------------------------------------------------------------


def growth(folder: Path, sizes: tuple[int, ...], dimension: int) -> list[dict]:
    """The index at several sizes; no index where there are too few features."""
    results = []
    for rows in sizes:
        data = make(folder, rows, dimension, 200)
        results.append({"rows": rows, **(_indexed(data) if rows >= index_build.MIN_ROWS else _times(data))})
        shutil.rmtree(data.db.path)
        click.echo(json.dumps(results[-1]), err=True)
    return results


def later(folder: Path, rows: int, dimension: int) -> list[dict]:
    """With rows that were added after the index was built, before `optimize`."""
    data = make(folder, rows, dimension, 200)
    index_build.build(data.db.writer)
    results = []
    total = rows
    for share in (0.0, 0.05, 0.2):
        more = round(rows * (1 + share)) - total
        if more:
            block = np.concatenate(list(clustered.features(more, dimension, seed=10 + more)))
            clustered.append(data.db, iter([block]), data.encoder_id, total)
            data.x = np.concatenate([data.x, block])
            total += more
        results.append({"appended": share, **_times(data)})
    return results


def predicates(folder: Path, rows: int, dimension: int) -> list[dict]:
    """With predicates on a column without an index, which 1, 20 and 100 percent of the candidates fulfil."""
    data = make(folder, rows, dimension, 200)
    index_build.build(data.db.writer)
    by_percent = {1: "license = '7'", 20: "length(license) = 2 AND license < '30'", 100: None}
    results = []
    for percent, predicate in by_percent.items():
        n = planner.count(data.db.snapshot, predicate)
        results.append({"kept": percent, "n_candidates": n, **_times(data, predicate)})
    return results


def _indexed(data: Data) -> dict:
    row = index_build.build(data.db.writer)
    figures = {name: row[name] for name in ("seconds", "n_partitions", "n_probes", "oversampling", "recall")}
    return {**figures, "bytes": index_bytes(data), **_times(data)}


def _times(data: Data, predicate: str | None = None) -> dict:
    snapshot = data.db.snapshot

    def ask(queries: np.ndarray, exact: bool = False) -> np.ndarray:
        return rows_of(planner.nearest(snapshot, data.encoder_id, queries, 10, candidates=predicate, exact=exact))

    truth = ask(data.queries, True)
    return timed(ask, data.queries, truth, 50)


# --- folding ---------------------------------------------------------------------------------------------------------


def some_mapper(x: np.ndarray, encoder_id: str, wanted: float, seed: int = 0) -> Mapper:
    """An affine mapper with std(n) / mean(n) as wanted over the features x.

    Like a trained mapper, it turns every direction a little, and stretches and moves the 32 in which features differ most.
    """
    rng = np.random.default_rng(seed)
    dimension = x.shape[1]
    leading = np.linalg.eigh(np.cov(x[:20_000].T))[1][:, -32:]
    turned = np.eye(dimension) + 0.3 * rng.standard_normal((dimension, dimension)) / np.sqrt(dimension)
    stretch, bias = rng.standard_normal((2, 32))

    def of(scale: float) -> Mapper:
        weight = turned @ (np.eye(dimension) + leading * (scale * stretch) @ leading.T)
        arrays = {"weight": weight, "bias": scale * leading @ bias / 4}
        both = {
            f"{side}.{name}": np.float32(value) for side in ("exemplar", "sample") for name, value in arrays.items()
        }
        return Mapper("some", encoder_id, "affine", both)

    scale = 0.1
    for _ in range(20):
        scale *= wanted / unevenness(of(scale), x[:20_000])
    return of(scale)


def unevenness(mapper: Mapper, x: np.ndarray) -> float:
    """std(n) / mean(n), with n(x) = |W x + b|."""
    n = mapper.norms(x)
    return float(n.std() / n.mean())


def folding(data: Data) -> list[dict]:
    """Mappers folded into queries of the encoder's index, beside indices over features that were mapped and stored."""
    if data.encoder_id not in planner.indices(data.db.snapshot):
        index_build.build(data.db.writer)
    return [_folding(data, some_mapper(data.x, data.encoder_id, wanted)) for wanted in (0.03, 0.1, 0.2)]


def _folding(data: Data, mapper: Mapper) -> dict:
    truth = rows_of(exact_search.top_k(data.in_memory(), data.queries[:256], 10, mapper=mapper))
    data.db.writer.upsert("mappers", [mapper.row() | {"trained_on": "both"}])
    data.db.refresh()
    took = seconds(lambda: index_tuning.measure_mapper(data.db.writer, mapper.mapper_id))
    data.db.refresh()
    snapshot = data.db.snapshot
    columns = ["used", "n_probes", "oversampling", "recall"]
    [row] = snapshot.tables["mapper_searches"].to_table(columns=columns).to_pylist()

    def folded(queries: np.ndarray) -> np.ndarray:
        return rows_of(planner.nearest(snapshot, data.encoder_id, queries, 10, mapper=mapper))

    result = {
        "norms": unevenness(mapper, data.x),
        "folded": {**row, "recall_measured": row["recall"], "measuring_seconds": took},
    }
    result["folded"] |= timed(folded, data.queries[:256], truth, 50)
    folder = Path(tempfile.mkdtemp(dir=data.db.path.parent))
    mapped_db = attrdb.create(folder / "mapped.attrdb")
    column = mapped_db.writer.add_encoder(f"mapped:{data.x.shape[1]}", data.x.shape[1], {}, "none")
    started = time.perf_counter()
    for start in range(0, len(data.x), clustered.AT_ONCE):
        block = mapper.exemplars(data.x[start : start + clustered.AT_ONCE])
        clustered.append(mapped_db, iter([block]), column, start)
    storing = time.perf_counter() - started
    built = index_build.build(mapped_db.writer)
    mapped_db.refresh()
    mapped = mapped_db.snapshot

    def by_column(queries: np.ndarray) -> np.ndarray:
        return rows_of(planner.nearest(mapped, column, mapper.samples(queries), 10))

    result["column"] = {
        "storing_seconds": storing,
        "build_seconds": built["seconds"],
        "bytes": 4 * data.x.size + index_bytes(Data(mapped_db, data.x, data.queries, data.of_query)),
        **{name: built[name] for name in ("n_probes", "oversampling")},
        **timed(by_column, data.queries[:256], truth, 50),
    }
    shutil.rmtree(folder)
    click.echo(json.dumps(result), err=True)
    return result


# --- real features --------------------------------------------------------------------------------------------------


def real(path: Path) -> list[dict]:
    """Every encoder of a database: its index, and the recall of its mappers through it, with the database's own queries.

    `recall_at_the_third` of a mapper: with its norm correction and without, at the third of the settings tried for mappers.
    """
    db = attrdb.open(path)
    results = []
    for encoder_id in db.encoders:
        row = index_build.build(db.writer, encoder_id)
        snapshot = db.snapshot
        figures = ("encoder_id", "kind", "n_rows", "n_partitions", "n_probes", "oversampling", "recall", "seconds")
        searches = snapshot.rows("mapper_searches", f"encoder_id = {literal(encoder_id)}")
        x = np.concatenate([block for _, block in snapshot.features(encoder_id, CANDIDATES)])
        mappers = [
            _real_mapper(snapshot, planner.indices(snapshot)[encoder_id], search, x)
            for search in sorted(searches, key=lambda search: search["mapper_id"])
        ]
        results.append({**{name: row[name] for name in figures}, "mappers": mappers})
    return results


def _real_mapper(snapshot: Snapshot, index: ivf.Index, search: Row, x: np.ndarray) -> dict:
    mapper = stored_mapper(snapshot, search["mapper_id"])
    trial = index_tuning.Trial.of(snapshot, index.encoder_id, mapper)
    probes, hits = index_tuning.MIDDLE_TRY
    recalls = {}
    for name, correction in (("plain", None), ("tilted", np.asarray(search["norm_correction"], np.float32))):
        n_probes = min(probes * index.n_probes, index.n_partitions)
        recalls[name] = trial.recall(
            dataclasses.replace(
                index, n_probes=n_probes, oversampling=hits * index.oversampling, norm_correction=correction
            )
        )
    figures = {name: search[name] for name in ("mapper_id", "used", "n_probes", "oversampling", "recall")}
    result = {**figures, "norms": unevenness(mapper, x), "recall_at_the_third": recalls}
    click.echo(json.dumps(result), err=True)
    return result


# --- accelerator ----------------------------------------------------------------------------------------------------


def accelerator(data: Data) -> dict:
    """Ranks of exemplars, with the features on the GPU and from disk, and builds of an index, beside the CPU."""
    import torch

    of_query = np.random.default_rng(2).choice(len(data.x), min(8192, len(data.x)), replace=False)
    data = dataclasses.replace(data, queries=clustered.moved(data.x[of_query]), of_query=of_query)
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "limits": gpu_limits(), "ranks": []}
    for ranks in ranks_on_gpu(data):
        results["ranks"].append(ranks)
        click.echo(json.dumps(ranks), err=True)
    return results | {"builds": builds_on_gpu(data)}


def gpu_seconds(run: Callable[[], Any], n: int = 5) -> list[float]:
    import torch

    times = []
    for _ in range(n + 1):  # the first compiles
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return times[1:]


def gpu_limits() -> dict[str, float]:
    """Large matrix products, in TFLOP/s, by number format."""
    import torch

    a, b = torch.randn(2, 8192, 8192, device="cuda")
    rates = {}
    for name, tf32, dtype in (
        ("float32", False, torch.float32),
        ("tf32", True, torch.float32),
        ("bf16", False, torch.bfloat16),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        x, y = a.to(dtype), b.to(dtype)
        rates[name] = 2 * 8192**3 / min(gpu_seconds(lambda x=x, y=y: x @ y.T)) / 1e12
    torch.backends.cuda.matmul.allow_tf32 = False
    return rates


def ranks_on_gpu(data: Data) -> Iterator[dict]:
    """Ranks of the feature that a query was moved from, and of a random one, which has many others near it."""
    import torch

    rows = exact_search.ROWS_COUNTED
    on_gpu = [
        (
            pa.array([f"f/{i:09d}" for i in range(at, min(at + rows, len(data.x)))]),
            torch.tensor(data.x[at : at + rows]).cuda(),
        )
        for at in range(0, len(data.x), rows)
    ]
    random_rows = np.random.default_rng(3).integers(len(data.x), size=len(data.queries))
    for given, of_query in (("the true exemplar", data.of_query), ("drawn from all", random_rows)):
        similarity = exact_search.exact_similarity(data.x, data.queries, of_query, np.arange(len(data.queries)))[
            :, None
        ]
        ids = np.array([[f"f/{row:09d}"] for row in of_query], dtype=object)
        for n in (1000, len(data.queries)):
            asked = data.queries[:n], similarity[:n], ids[:n]
            times = {
                "GPU, features on it": gpu_seconds(
                    lambda asked=asked: exact_search.count_above(on_gpu, *asked, device="cuda")
                ),
                "GPU, from disk": gpu_seconds(
                    lambda asked=asked: exact_search.count_above(data.blocks(), *asked, device="cuda"), 3
                ),
            }
            result = {
                "given": given,
                "n_queries": n,
                "seconds": {way: spread(of) for way, of in times.items()},
                "tflops": 2 * n * data.x.size / np.median(times["GPU, features on it"]) / 1e12,
            }
            if n == 1000:
                started = time.perf_counter()
                exact = exact_search.count_above(data.blocks(), *asked)[0]
                result["seconds"]["CPU, from disk"] = spread([time.perf_counter() - started])
                counted = exact_search.count_above(on_gpu, *asked, device="cuda")[0]
                result["n_ranks_different"] = int((counted != exact).sum())
                result |= {
                    f"n_ranks_different_{name}": int(
                        (by_product(on_gpu, asked[0], of_query[:n], tf32) != exact[:, 0]).sum()
                    )
                    for name, tf32 in (("float32", False), ("tf32", True))
                }
            yield result


def by_product(gallery: list[Block], queries: np.ndarray, of_query: np.ndarray, tf32: bool) -> np.ndarray:
    """(n_queries,): the number of features that torch's product alone puts above that of the row `of_query`."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = tf32
    q, row = torch.tensor(queries).cuda(), torch.tensor(of_query).cuda()
    parts = [x[at : at + 65_536] for _, x in gallery for at in range(0, len(x), 65_536)]
    threshold, first = torch.empty(len(queries), 1, device=q.device), 0
    for x in parts:
        inside = (row >= first) & (row < first + len(x))
        threshold[inside] = (q @ x.T)[inside].gather(1, row[inside, None] - first)
        first += len(x)
    above = sum(((q @ x.T) > threshold).sum(dim=1) for x in parts)
    torch.backends.cuda.matmul.allow_tf32 = False
    return above.cpu().numpy()


def builds_on_gpu(data: Data) -> list[dict]:
    results = []
    for device in ("cuda", "cpu") * 2:
        began, start = {}, time.perf_counter()

        def report(stage: str, done: int, total: int, began: dict = began, start: float = start) -> None:
            began.setdefault(stage, time.perf_counter() - start)

        row = index_build.build(data.db.writer, device=device, report=report)
        names = ("device", "seconds", "n_partitions", "n_probes", "oversampling", "recall")
        began = {stage: at for stage, at in began.items() if at <= row["seconds"]}
        ends = [*list(began.values())[1:], row["seconds"]]
        stages = {stage: end - at for (stage, at), end in zip(began.items(), ends, strict=True)}
        results.append({**{name: row[name] for name in names}, "stages": stages})
        click.echo(json.dumps(results[-1]), err=True)
    return [*results, {"device": "cpu", "what": "Lance's defaults (IVF_PQ)", "seconds": lance_building(data)}]


# --- the command -----------------------------------------------------------------------------------------------------


@click.command()
@click.argument(
    "parts",
    nargs=-1,
    required=True,
    type=click.Choice(
        ["evaluation", "exact", "ann", "growth", "later", "predicates", "folding", "real", "accelerator"]
    ),
)
@click.option("--rows", type=click.IntRange(1000), default=1_000_000, show_default=True)
@click.option("--dimension", type=click.IntRange(8), default=512, show_default=True)
@click.option("--sizes", default="10000,100000,1000000,2000000", show_default=True, help="Of the part growth.")
@click.option("--peer", "peers", multiple=True, type=click.Choice(list(PEERS)), help="Of the part ann; default: all.")
@click.option(
    "--database", type=click.Path(exists=True, path_type=Path), help="Of the part real, which builds indices in it."
)
@click.option("--folder", type=click.Path(path_type=Path), help="For databases; default: a temporary one.")
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(
    parts: tuple[str, ...],
    rows: int,
    dimension: int,
    sizes: str,
    peers: tuple[str, ...],
    database: Path | None,
    folder: Path | None,
    out: Path | None,
) -> None:
    """Measure searches."""
    use_the_machine()
    if "real" in parts and database is None:
        raise click.UsageError("the part real needs a database; name one with --database")
    peers = peers or tuple(PEERS)
    packages = ["numpy", "pylance"]
    if "exact" in parts or ("ann" in parts and "faiss" in peers):
        packages += ["faiss-cpu"]
    if "accelerator" in parts:
        packages += ["torch", "triton"]
    if "ann" in parts:
        packages += [package for package in ("hnswlib", "usearch") if package in peers]
    work = Path(tempfile.mkdtemp(prefix="attrdb-", dir=folder))
    try:
        of_data = {"evaluation", "exact", "ann", "folding", "accelerator"} & {*parts}
        data = make(work, rows, dimension, 1000) if of_data else None
        for part in parts:
            run: dict[str, Callable[[], Any]] = {
                "evaluation": lambda: evaluation(data),
                "exact": lambda: exact(data),
                "ann": lambda: approximate(data, peers),
                "growth": lambda: growth(work, tuple(map(int, sizes.split(","))), dimension),
                "later": lambda: later(work, rows, dimension),
                "predicates": lambda: predicates(work, rows, dimension),
                "real": lambda: real(database),
                "folding": lambda: folding(data),
                "accelerator": lambda: accelerator(data),
            }
            machine, before = describe(*packages), limits()
            found = run[part]()
            after = limits()
            name = part if part in ("growth", "real") else f"{part} {rows}"
            result = {
                "machine": machine,
                "limits": {rate: max(before[rate], after[rate]) for rate in before},
                "sizes": {"rows": rows, "dimension": dimension},
                "command": " ".join(sys.argv[1:]),
                "found": found,
            }
            click.echo(json.dumps({name: found}))
            if out:
                stored = json.loads(out.read_text()) if out.exists() else {}
                out.write_text(json.dumps(stored | {name: result}, indent=1) + "\n")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
