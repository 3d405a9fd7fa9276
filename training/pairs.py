"""Pairs for training a mapper: SQL chooses them, their features are read once, and batches take constant memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attrdb.database import Database
from attrdb.errors import InvalidValue
from attrdb.ingest.encode.stream import ahead
from attrdb.training.augment import augmented

BATCHES_AHEAD = 4


@dataclass(frozen=True)
class Choice:
    """Which pairs: the parameters of the query `pairs`, except the epoch.

    kind:          'object', 'style' or 'both', of the models
    prompt_scheme: 'gpt', 'procedural' or 'both', of the samples
    """

    kind: str = "both"
    split: str = "train"
    prompt_scheme: str = "both"
    seed: int = 0

    def of_images(self) -> dict[str, Any]:
        return {"kind": self.kind, "split": self.split, "prompt_scheme": self.prompt_scheme}

    def of_pairs(self, epoch: int) -> dict[str, Any]:
        return {**self.of_images(), "seed": self.seed, "epoch": epoch}


class Pairs:
    """The pairs of a choice, epoch by epoch.

    Every epoch needs the features of their images in another order, so they are copied to a file of plain float32. Gathering
    4,096 rows of 512 out of a million takes 2 ms from it, and 100 ms from Lance.

    augment: 'none'; else views of every image are encoded too (`augmented`), and each pair takes a random one of them
    raises:  InvalidValue for a choice without a model, with a single model, or with images that have no feature
    """

    def __init__(self, db: Database, encoder_id: str, choice: Choice, file: Path, augment: str = "none"):
        self.db, self.choice = db, choice
        pairs = db.query("pairs", **choice.of_pairs(0))
        self.n_pairs = len(pairs)
        _check_models(db, choice, pairs)
        _check_features(db, encoder_id, choice, pairs)
        self.ids, features = _stored(db, encoder_id, choice, file)
        self.features = features[:, None]  # (images, views, dimension)
        ordered = self.ids.sort()
        self.digest = hashlib.sha256("\n".join(ordered.to_pylist()).encode()).hexdigest()[:16]  # of the images' ids
        if augment != "none":
            views = file.with_suffix(f".{augment}.{self.digest}")
            self.ids, self.features = ordered, augmented(db, encoder_id, ordered, augment, choice.seed, views)

    def batches(self, epoch: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Features of exemplars and of their samples, (n, dimension) float32 each, n <= size, of n distinct models."""
        pairs = self.db.query("pairs", **self.choice.of_pairs(epoch))
        rows = np.stack(
            [
                pc.index_in(pairs[name], value_set=self.ids).to_numpy().astype(np.int64)
                for name in ("exemplar_id", "sample_id")
            ],
            axis=1,
        )
        views = np.random.default_rng((self.choice.seed, epoch)).integers(self.features.shape[1], size=rows.shape)
        parts = _parts(pairs["position"].to_numpy(), size)
        with closing(ahead(parts, lambda part: self._gathered(rows[part], views[part]), 1, BATCHES_AHEAD)) as gathered:
            yield from gathered

    def _gathered(self, rows: np.ndarray, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.features[rows[:, 0], views[:, 0]], self.features[rows[:, 1], views[:, 1]]


def _parts(positions: np.ndarray, size: int) -> list[slice]:
    """Slices of rows with the same position, of about equal sizes, at most `size`; a slice of one row is left out."""
    borders = np.flatnonzero(np.diff(positions, prepend=-1, append=-1))
    parts = []
    for start, end in pairwise(borders):
        cuts = np.linspace(start, end, -(-(end - start) // size) + 1).astype(int)
        parts += [slice(a, b) for a, b in pairwise(cuts) if b - a > 1]
    return parts


def _check_models(db: Database, choice: Choice, pairs: pa.Table) -> None:
    models = pairs["model_id"].unique().to_pylist()
    if len(models) > 1:
        return
    wanted = f"kind {choice.kind!r}, split {choice.split!r} and prompt scheme {choice.prompt_scheme!r}"
    counts = db.sql("SELECT kind, split, count(*) AS n FROM models GROUP BY ALL ORDER BY ALL").to_pylist()
    stored = ", ".join(f"{row['n']} of kind {row['kind']!r} in split {row['split']!r}" for row in counts) or "none"
    if not models:
        raise InvalidValue(f"no pair of {wanted} in {db.path}; its models: {stored}")
    raise InvalidValue(
        f"only one model of {wanted} in {db.path}, {models[0]!r}; training compares pairs of different models, so it needs "
        f"at least two; its models: {stored}"
    )


def _check_features(db: Database, encoder_id: str, choice: Choice, pairs: pa.Table) -> None:
    """raises: InvalidValue if an image that an epoch may draw has no feature"""
    without = db.images(
        f"role IN ('exemplar', 'sample') AND `{encoder_id}` IS NULL", ["image_id", "role", "model_id", "prompt_scheme"]
    )
    models = set(pairs["model_id"].unique().to_pylist())
    missing = [
        row["image_id"]
        for row in without.to_pylist()
        if row["model_id"] in models
        and (row["role"] == "exemplar" or choice.prompt_scheme in ("both", row["prompt_scheme"]))
    ]
    if missing:
        raise InvalidValue(
            f"{len(missing):,} images of the pairs have no {encoder_id!r} feature, such as {min(missing)!r}; encode them "
            f"first: attrdb encode {db.path} --encoder {db.encoders[encoder_id]['spec']}"
        )


def _stored(db: Database, encoder_id: str, choice: Choice, file: Path) -> tuple[pa.Array, np.ndarray]:
    """Ids and features, (n, dimension) float32, which are written to the file and mapped from it."""
    ids = []
    with file.open("wb") as opened:
        for batch in db.stream_query("training_features", encoder_id=encoder_id, **choice.of_images()):
            values: np.ndarray = batch["feature"].flatten().to_numpy(zero_copy_only=False)
            opened.write(np.ascontiguousarray(values, np.float32).data)
            ids.append(batch["image_id"])
    image_ids = pa.chunked_array(ids, pa.string()).combine_chunks()
    return image_ids, np.memmap(file, np.float32, "r", shape=(len(image_ids), db.encoders[encoder_id]["dimension"]))
