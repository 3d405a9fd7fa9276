"""Importing embeddings, against `lance.write_dataset` on the same Arrow stream: seconds and peak memory.

    python benchmarks/importing.py --rows 1000000 --json importing.json

Every run is a process of its own, so that peak memory is that of the run. Both read and convert the same shards; attrdb also
checks ids and features, commits part by part, and keeps a job. `read` only reads and converts.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from machine import describe, peak_gib, spread

import attrdb
from attrdb.ingest.read.embedding_shards import open_embeddings
from attrdb.ingest.read.embeddings import ingest_embeddings, parts
from attrdb.store.schema import encoder_id_of

SPEC = "random:directions"  # of no known encoder, so that it can have any dimension
ENCODER_ID = encoder_id_of(SPEC)


def write_shards(folder: Path, rows: int, dimension: int, shards: int, seed: int) -> None:
    """Random directions as float16, with the metadata that img2dataset writes."""
    rng = np.random.default_rng(seed)
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for shard in range(shards):
        n = rows // shards
        vectors = rng.standard_normal((n, dimension), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        np.save(folder / "img_emb" / f"img_emb_{shard:04d}.npy", vectors.astype(np.float16))
        keys = [f"{shard:05d}{row:07d}" for row in range(n)]
        columns = {
            "image_path": keys,
            "caption": [f"a picture of thing number {row}" for row in range(n)],
            "url": [f"https://example.org/pictures/{key}.jpg" for key in keys],
            "key": keys,
            "status": ["success"] * n,
            "original_width": [640] * n,
            "original_height": [480] * n,
            "sha256": [f"{int(key):064x}" for key in keys],
            "NSFW": ["UNLIKELY"] * n,
            "similarity": rng.random(n),
            "LICENSE": ["?"] * n,
        }
        pq.write_table(pa.table(columns), folder / "metadata" / f"metadata_{shard:04d}.parquet")


def stream(shards: Path) -> pa.RecordBatchReader:
    tables = (part.images(ENCODER_ID)[0] for part in parts(open_embeddings(str(shards)), "laion"))
    first = next(tables)

    def batches():
        yield from first.to_batches()
        for table in tables:
            yield from table.to_batches()

    return pa.RecordBatchReader.from_batches(first.schema, batches())


def run(way: str, shards: Path, target: Path) -> None:
    """One run in this process; prints its seconds and its peak memory in GiB as JSON."""
    started = time.perf_counter()
    if way == "attrdb":
        ingest_embeddings(attrdb.create(target), open_embeddings(str(shards)), SPEC, "laion")
    elif way == "again":
        ingest_embeddings(attrdb.open(target), open_embeddings(str(shards)), SPEC, "laion")
    elif way == "lance":
        lance.write_dataset(stream(shards), str(target))
    else:
        for _ in stream(shards):
            pass
    seconds = time.perf_counter() - started
    click.echo(json.dumps({"seconds": seconds, "peak_gib": peak_gib()}))


@click.command()
@click.option("--rows", type=click.IntRange(1), default=1_000_000, show_default=True)
@click.option("--dimension", type=click.IntRange(1), default=512, show_default=True)
@click.option("--shards", type=click.IntRange(1), default=4, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there too.")
@click.option("--one", nargs=3, hidden=True)
def main(
    rows: int, dimension: int, shards: int, rounds: int, seed: int, out: Path | None, one: tuple[str, str, str] | None
) -> None:
    if one:
        run(one[0], Path(one[1]), Path(one[2]))
        return
    figures: dict[str, list[dict]] = {way: [] for way in ("lance", "attrdb", "again", "read")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder / "laion", rows, dimension, shards, seed)
        for _ in range(rounds):
            for way in figures:
                target = folder / ("lance" if way == "lance" else "db.attrdb")
                if way in ("lance", "attrdb"):
                    shutil.rmtree(target, ignore_errors=True)
                words = [sys.executable, __file__, "--one", way, str(folder / "laion"), str(target)]
                done = subprocess.run(words, check=True, capture_output=True, text=True)
                figures[way].append(json.loads(done.stdout))
                click.echo(f"{way:7} {figures[way][-1]['seconds']:7.2f} s  {figures[way][-1]['peak_gib']:.2f} GiB")
    seconds = {way: [run["seconds"] for run in runs] for way, runs in figures.items()}
    result = {
        "machine": describe("pylance", "pyarrow", "numpy"),
        "sizes": {"rows": rows, "dimension": dimension, "shards": shards},
        "seed": seed,
        "seconds": {way: spread(values) for way, values in seconds.items()},
        "ratio": spread([ours / theirs for ours, theirs in zip(seconds["attrdb"], seconds["lance"], strict=True)]),
        "peak_gib": {way: max(run["peak_gib"] for run in runs) for way, runs in figures.items()},
    }
    click.echo(f"attrdb / lance: {result['ratio']}")
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
