"""Evaluate an encoder: the exact ranks of every sample's exemplars, from which all metrics are queries."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from attrdb import search
from attrdb.attribution import CANDIDATES
from attrdb.database import Database
from attrdb.errors import InvalidValue, NotFound
from attrdb.schema import EXEMPLAR_RANKS, feature_matrix

GALLERIES = ("own", "all")
MODELS_A_PASS = 32


def evaluate(
    db: Database,
    encoder_id: str | None = None,
    gallery: str = "own",
    report: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Fill `exemplar_ranks` for all samples of an encoder; the number of ranks.

    gallery: 'own': the exemplars of the sample's model and the pretraining images; 'all': every exemplar of the database
             and the pretraining images. A rank is 1 + the candidates with a higher similarity, ties by image_id.
    raises:  InvalidValue for another gallery, NotFound if there is no such encoder, or no encoded model or corpus
    source:  Wang et al. 2023, section 5 (`own`)
    """
    if gallery not in GALLERIES:
        raise InvalidValue(f"gallery is {gallery!r}; it must be {' or '.join(GALLERIES)}")
    db.refresh()
    encoder_id = db.encoder_id(encoder_id)
    by_model = {role: _by_model(db, encoder_id, role) for role in ("sample", "exemplar")}
    models = sorted(by_model["sample"].keys() & by_model["exemplar"].keys())
    if not models:
        raise NotFound(f"{db.path} has no model whose samples have {encoder_id!r} features; ingest one first")
    if not db.images(f"role = 'pretraining' AND `{encoder_id}` IS NOT NULL", ["image_id"]).num_rows:
        raise NotFound(f"{db.path} has no pretraining image with a {encoder_id!r} feature; ingest a corpus first")
    rows: list[dict] = []
    for start in range(0, len(models), MODELS_A_PASS):
        report(start, len(models))
        part = models[start : start + MODELS_A_PASS]
        rows += _ranks(db, encoder_id, gallery, [(by_model["sample"][m], by_model["exemplar"][m]) for m in part])
    db.replace_exemplar_ranks(pa.Table.from_pylist(rows, EXEMPLAR_RANKS), encoder_id, gallery)
    report(len(models), len(models))
    return len(rows)


def _ranks(
    db: Database, encoder_id: str, gallery: str, models: list[tuple[search.Block, search.Block]]
) -> Iterator[dict]:
    """The rows of some models (their samples, their exemplars), from one pass over the gallery."""
    n_samples = sum(len(sample_ids) for (sample_ids, _), _ in models)
    most = max(len(exemplar_ids) for _, (exemplar_ids, _) in models)
    similarity = np.full((n_samples, most), np.inf)
    ids = np.full((n_samples, most), "", dtype=object)
    own_above = np.zeros((n_samples, most), dtype=np.int64)
    own_size = np.zeros(n_samples, dtype=np.int64)
    first = 0
    for (sample_ids, samples), (exemplar_ids, exemplars) in models:
        at = slice(first, first + len(sample_ids)), slice(0, len(exemplar_ids))
        sample, exemplar = np.indices((len(samples), len(exemplars))).reshape(2, -1)
        similarity[at] = search.exact_similarity(exemplars[exemplar], samples[sample]).reshape(len(samples), -1)
        ids[at] = exemplar_ids
        if gallery == "own":
            own = [(exemplar_ids, exemplars)]
            own_above[at], own_size[at[0]] = search.count_above(own, samples, similarity[at], ids[at])
        first += len(sample_ids)
    where = "role = 'pretraining'" if gallery == "own" else CANDIDATES
    queries = np.concatenate([samples for (_, samples), _ in models])
    above, size = search.count_above(db.features(encoder_id, where), queries, similarity, ids)
    all_samples = np.concatenate([sample_ids for (sample_ids, _), _ in models])
    for row, column in zip(*np.nonzero(np.isfinite(similarity)), strict=True):
        yield {
            "encoder_id": encoder_id,
            "mapper_id": "",
            "gallery": gallery,
            "sample_id": all_samples[row],
            "exemplar_id": ids[row, column],
            "rank": int(above[row, column] + own_above[row, column]) + 1,
            "gallery_size": int(size + own_size[row]),
            "images_version": db.version,
        }


def _by_model(db: Database, encoder_id: str, role: str) -> dict[str, search.Block]:
    """Ids and features of a role's images, model by model, in the order of their ids."""
    table = db.images(f"role = '{role}' AND `{encoder_id}` IS NOT NULL", ["image_id", "model_id", encoder_id])
    table = table.sort_by("image_id")
    ids = table["image_id"].to_numpy()
    features = feature_matrix(table[encoder_id])
    positions: dict[str, list[int]] = defaultdict(list)
    for position, model_id in enumerate(table["model_id"].to_pylist()):
        positions[model_id].append(position)
    return {model_id: (ids[at], features[at]) for model_id, at in positions.items()}
