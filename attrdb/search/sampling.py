"""Random rows of images: features to train centroids on, and queries to measure an index with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attrdb.store.features import stream
from attrdb.store.predicates import CANDIDATES, among
from attrdb.store.schema import CANDIDATE_ROLES, feature_matrix
from attrdb.store.snapshot import Snapshot

N_QUERIES = 200
COUNTED, ESTIMATED_FROM = 50_000, 4_096  # images
SPARSE = 0.25  # share of images with a feature; below it, these images are searched for, not drawn
ROWS_LOOKED_AT = 20_000  # rows that queries are drawn from
MIN_SAMPLES = 50  # fewer say little about recall


@dataclass(frozen=True)
class QuerySample:
    """Stored images as queries.

    source:   samples or candidates
    ids:      (n_queries,) image ids
    features: (n_queries, dimension) float32, unit length
    """

    source: str
    ids: np.ndarray
    features: np.ndarray


def n_features(snapshot: Snapshot, encoder_id: str) -> int:
    """The number of images that have a feature; of many images an estimate, since counting would read every feature."""
    n_images = snapshot.tables["images"].count_rows()
    if n_images <= COUNTED:
        return snapshot.count(f"`{encoder_id}` IS NOT NULL")
    n_drawn = len(features(snapshot, encoder_id, ESTIMATED_FROM, n_images))
    if n_drawn < SPARSE * ESTIMATED_FROM:
        return snapshot.count(f"`{encoder_id}` IS NOT NULL")
    return round(n_drawn / ESTIMATED_FROM * n_images)


def features(snapshot: Snapshot, encoder_id: str, wanted: int, n_rows: int) -> np.ndarray:
    """(n, dimension) float32: about `wanted` features, chosen at random from all n_rows of them."""
    images = snapshot.tables["images"]
    n_images, rng = images.count_rows(), np.random.default_rng(0)
    if n_rows < SPARSE * n_images:
        blocks = [block for _, block in stream(images, encoder_id, "true")]
        return np.concatenate([block[rng.random(len(block)) * n_rows < 1.1 * wanted] for block in blocks])
    chosen = rng.choice(n_images, min(n_images, wanted * n_images // n_rows), replace=False)
    return feature_matrix(images.take(np.sort(chosen), columns=[encoder_id])[encoder_id].drop_null())


def queries(snapshot: Snapshot, encoder_id: str) -> QuerySample:
    """At most N_QUERIES samples with a feature; candidates if there are hardly any samples."""
    images, encoded = snapshot.tables["images"], f"`{encoder_id}` IS NOT NULL"
    rng = np.random.default_rng(1)
    chosen = rng.choice(images.count_rows(), min(images.count_rows(), ROWS_LOOKED_AT), replace=False)
    rows = images.take(np.sort(chosen), columns=["image_id", "role"])
    source, is_source = "samples", pc.equal(rows["role"], "sample")
    if snapshot.count("role = 'sample'") < MIN_SAMPLES:
        source, is_source = "candidates", pc.is_in(rows["role"], pa.array(CANDIDATE_ROLES))
    ids = rows.filter(is_source)["image_id"].to_numpy()
    where = among("image_id", rng.permutation(ids)[: 4 * N_QUERIES])
    drawn = snapshot.images(f"{where} AND {encoded}", ["image_id", encoder_id])[:N_QUERIES]
    if len(drawn) < min(N_QUERIES, MIN_SAMPLES):  # too rare among the rows drawn
        where = f"role = 'sample' AND {encoded}" if source == "samples" else f"{CANDIDATES} AND {encoded}"
        drawn = snapshot.images(where, ["image_id", encoder_id])
        drawn = drawn.take(np.sort(rng.choice(len(drawn), min(len(drawn), N_QUERIES), replace=False)))
    return QuerySample(source, drawn["image_id"].to_numpy(), feature_matrix(drawn[encoder_id]))
