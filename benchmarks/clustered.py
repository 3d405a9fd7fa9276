"""Synthetic features for timing searches. Like real ones they form clusters, whose spread differs between directions.

x = c + 0.46 B z + 0.5 e, made unit length. c is one of 4,096 centres, standard normal / sqrt(dimension), the i-th with weight
1 / sqrt(i); B holds 64 random directions whose lengths fall as 1 / sqrt(i), z and e are standard normal, e / sqrt(dimension).
A query is a stored feature moved by 0.7 e / sqrt(dimension), since a sample is not its exemplar. With these numbers an index
of 1 M features finds 0.95 of the first ten in a tenth of its partitions; with IconAbC's EfficientNet features, in an eighth.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

import attrdb
from attrdb.database import Database
from attrdb.store.schema import feature_array

N_CENTRES, RANK = 4096, 64
AT_ONCE = 125_000  # rows, as `ingest embeddings` commits them


def features(n: int, dimension: int, seed: int = 0) -> Iterator[np.ndarray]:
    """n unit vectors in blocks, float32; the centres depend on the dimension only, not on the seed."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    centres = fixed.standard_normal((N_CENTRES, dimension), np.float32) / np.float32(np.sqrt(dimension))
    lengths = 1 / np.sqrt(1 + np.arange(RANK, dtype=np.float32))
    basis = fixed.standard_normal((RANK, dimension), np.float32) / np.float32(np.sqrt(dimension)) * lengths[:, None]
    weights = 1 / np.sqrt(1 + np.arange(N_CENTRES))
    for start in range(0, n, AT_ONCE):
        m = min(AT_ONCE, n - start)
        x = centres[rng.choice(N_CENTRES, m, p=weights / weights.sum())]
        x += np.float32(0.46) * (rng.standard_normal((m, RANK), np.float32) @ basis)
        x += np.float32(0.5 / np.sqrt(dimension)) * rng.standard_normal((m, dimension), np.float32)
        yield unit(x)


def moved(x: np.ndarray, seed: int = 1) -> np.ndarray:
    """Queries near some features."""
    rng = np.random.default_rng(seed)
    return unit(x + np.float32(0.7 / np.sqrt(x.shape[1])) * rng.standard_normal(x.shape, np.float32))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def database(path: Path, n: int, dimension: int, roles: tuple[str, ...] = ("pretraining",)) -> Database:
    """A database of n features; the i-th image has the id `f/<i>`, and the roles in turn."""
    db = attrdb.create(path)
    encoder_id = db.writer.add_encoder(f"clustered:{dimension}", dimension, {}, "none")
    append(db, features(n, dimension), encoder_id, 0, roles)
    return db


def append(
    db: Database, blocks: Iterator[np.ndarray], encoder_id: str, first: int, roles: tuple[str, ...] = ("pretraining",)
) -> None:
    for x in blocks:
        numbers = range(first, first + len(x))
        rows = {
            "image_id": [f"f/{number:09d}" for number in numbers],
            "role": [roles[number % len(roles)] for number in numbers],
            "license": [f"{number % 100}" for number in numbers],
            encoder_id: feature_array(x),
        }
        db.writer.append_bulk(pa.table(rows))
        first += len(x)
