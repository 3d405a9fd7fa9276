"""Rows of images drawn at random: features to learn from, and questions whose answers tell how well an index answers."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from attrdb.store.features import stream
from attrdb.store.predicates import CANDIDATES, among
from attrdb.store.schema import feature_matrix
from attrdb.store.snapshot import Snapshot

N_QUERIES = 200
COUNTED, ESTIMATED_FROM = 50_000, 4_096  # images
SPARSE = 0.25  # share of images that have a feature below which they are looked for, and not met by chance
ROWS_LOOKED_AT = 20_000  # rows among which queries are looked for
MIN_SAMPLES = 50  # fewer say little about recall


def n_features(snapshot: Snapshot, encoder_id: str) -> int:
    """How many images have a feature; of many images an estimate, since counting would read every feature."""
    n_images = snapshot.tables["images"].count_rows()
    if n_images <= COUNTED:
        return snapshot.count(f"`{encoder_id}` IS NOT NULL")
    found = len(features(snapshot, encoder_id, ESTIMATED_FROM, n_images))
    if found < SPARSE * ESTIMATED_FROM:
        return snapshot.count(f"`{encoder_id}` IS NOT NULL")
    return round(found / ESTIMATED_FROM * n_images)


def features(snapshot: Snapshot, encoder_id: str, wanted: int, n_rows: int) -> np.ndarray:
    """About so many features, chosen at random from all n_rows of them."""
    images = snapshot.tables["images"]
    n_images, rng = images.count_rows(), np.random.default_rng(0)
    if n_rows < SPARSE * n_images:
        blocks = [block for _, block in stream(images, encoder_id, "true")]
        return np.concatenate([block[rng.random(len(block)) * n_rows < 1.1 * wanted] for block in blocks])
    chosen = rng.choice(n_images, min(n_images, wanted * n_images // n_rows), replace=False)
    return feature_matrix(images.take(np.sort(chosen), columns=[encoder_id])[encoder_id].drop_null())


def queries(snapshot: Snapshot, encoder_id: str) -> tuple[str, np.ndarray, np.ndarray]:
    """What recall is measured with, its ids, and its features: samples, or candidates where there are hardly any samples."""
    images, encoded = snapshot.tables["images"], f"`{encoder_id}` IS NOT NULL"
    rng = np.random.default_rng(1)
    chosen = rng.choice(images.count_rows(), min(images.count_rows(), ROWS_LOOKED_AT), replace=False)
    drawn = images.take(np.sort(chosen), columns=["image_id", "role"])
    said, role = "samples", pc.equal(drawn["role"], "sample")
    if snapshot.count("role = 'sample'") < MIN_SAMPLES:
        said, role = "candidates", pc.invert(role)
    ids = drawn.filter(role)["image_id"].to_numpy()
    where = among("image_id", rng.permutation(ids)[: 4 * N_QUERIES])
    found = snapshot.images(f"{where} AND {encoded}", ["image_id", encoder_id])[:N_QUERIES]
    if len(found) < min(N_QUERIES, MIN_SAMPLES):  # too rare to be met by chance
        where = f"role = 'sample' AND {encoded}" if said == "samples" else f"{CANDIDATES} AND {encoded}"
        found = snapshot.images(where, ["image_id", encoder_id])
        found = found.take(np.sort(rng.choice(len(found), min(len(found), N_QUERIES), replace=False)))
    return said, found["image_id"].to_numpy(), feature_matrix(found[encoder_id])
