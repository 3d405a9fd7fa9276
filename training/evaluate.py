"""Evaluate a method: store the exact ranks of every sample's exemplars. All metrics are queries on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from attrdb.attribution.methods import load_method, resolve_method
from attrdb.attribution.protocol import Method
from attrdb.attribution.similarity import Similarity
from attrdb.database import Database
from attrdb.errors import InvalidValue, NotFound
from attrdb.progress import Progress, no_progress
from attrdb.search import exact as exact_search
from attrdb.search.mapper import Mapper
from attrdb.store.features import Block
from attrdb.store.predicates import CANDIDATES
from attrdb.store.schema import TABLES, feature_matrix

GALLERIES = ("own", "all")
SAMPLES_PER_PASS = 8192
_RANKS = pa.schema(
    [TABLES["exemplar_ranks"].field(name) for name in ("sample_id", "exemplar_id", "score", "rank", "gallery_size")]
)


def evaluate(
    db: Database,
    method: str | None = None,
    gallery: str = "own",
    report: Progress = no_progress,
    device: str = "cpu",
) -> int:
    """Fill `exemplar_ranks` for all samples with the ranks of a method; the number of ranks.

    method:  a method_id, encoder_id or mapper_id; similarity of the first encoder for None
    gallery: 'own': the exemplars of the sample's model and the pretraining images; 'all': every exemplar of the database
             and the pretraining images. A rank is 1 + the number of candidates with a higher score; ties go by image_id.
             With a stored method, only candidates with a score count
    device:  of the matrix products, `cpu` or one of torch's; it does not change the ranks
    raises:  InvalidValue for another gallery, NotFound for an unknown method, or if there is nothing to rank
    source:  Wang et al. 2023, section 5 (`own`)
    """
    if gallery not in GALLERIES:
        raise InvalidValue(f"gallery is {gallery!r}; it must be {' or '.join(GALLERIES)}")
    db.refresh()
    method_id = resolve_method(db.snapshot, method)
    loaded = load_method(db.snapshot, method_id)
    if isinstance(loaded, Similarity):
        rows = _similarity_ranks(db, loaded, gallery, report, device)
    else:
        rows = _stored_ranks(db, loaded, gallery, report)
    shared = {"method_id": method_id, "gallery": gallery, "images_version": db.version}
    for name, value in shared.items():
        rows = rows.append_column(name, pa.array([value] * len(rows)))
    db.writer.replace_exemplar_ranks(rows, method_id, gallery)
    return len(rows)


def _stored_ranks(db: Database, method: Method, gallery: str, report: Progress) -> pa.Table:
    report(f"evaluate {method.method_id}", 0, 1)
    rows = db.query("stored_ranks", method=method.method_id, gallery=gallery)
    if not len(rows):
        raise NotFound(f"{db.path} has no sample with a {method.scored} for an exemplar of its model")
    report(f"evaluate {method.method_id}", 1, 1)
    return rows.replace_schema_metadata(None)


def _similarity_ranks(db: Database, method: Similarity, gallery: str, report: Progress, device: str) -> pa.Table:
    encoder_id = method.encoder_id
    by_model = {role: features_by_model(db, encoder_id, f"role = '{role}'") for role in ("sample", "exemplar")}
    models = sorted(by_model["sample"].keys() & by_model["exemplar"].keys())
    if not models:
        raise NotFound(f"{db.path} has no model whose samples have {encoder_id!r} features; ingest one first")
    if not db.snapshot.count(f"role = 'pretraining' AND `{encoder_id}` IS NOT NULL"):
        raise NotFound(f"{db.path} has no pretraining image with a {encoder_id!r} feature; ingest a corpus first")
    where = "role = 'pretraining'" if gallery == "own" else CANDIDATES
    rows: list[dict] = []
    done = 0
    for names in _passes(models, {name: len(ids) for name, (ids, _) in by_model["sample"].items()}):
        report(f"evaluate {method.method_id}", done, len(models))
        part = [(by_model["sample"][name], by_model["exemplar"][name]) for name in names]
        candidates = db.features(encoder_id, where)
        rows += ranks(part, candidates, own=gallery == "own", mapper=method.mapper, device=device)
        done += len(names)
    report(f"evaluate {method.method_id}", len(models), len(models))
    return pa.Table.from_pylist(rows, _RANKS)


def _passes(models: list[str], n_samples: dict[str, int]) -> Iterator[list[str]]:
    """The models in parts of at most SAMPLES_PER_PASS samples; a model with more is a part by itself."""
    part: list[str] = []
    for model_id in models:
        if part and sum(n_samples[other] for other in part) + n_samples[model_id] > SAMPLES_PER_PASS:
            yield part
            part = []
        part.append(model_id)
    yield part


def ranks(
    models: list[tuple[Block, Block]],
    gallery: Iterable[Block],
    *,
    own: bool,
    mapper: Mapper | None = None,
    device: str = "cpu",
) -> Iterator[dict]:
    """sample_id, exemplar_id, score, rank and gallery_size of some models' exemplars, from one pass over the gallery.

    models:  samples and exemplars of each
    gallery: the candidates that all models share
    own:     whether the exemplars of a model are further candidates of its own samples
    """
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
        exact = exact_search.exact_similarity(exemplars, samples, exemplar, sample, mapper)
        similarity[at] = exact.reshape(len(samples), -1)
        ids[at] = exemplar_ids.to_numpy(zero_copy_only=False)
        if own:
            block = [(exemplar_ids, exemplars)]
            own_above[at], own_size[at[0]] = exact_search.count_above(
                block, samples, similarity[at], ids[at], mapper=mapper
            )
        first += len(sample_ids)
    queries = np.concatenate([samples for (_, samples), _ in models])
    above, size = exact_search.count_above(gallery, queries, similarity, ids, mapper=mapper, device=device)
    all_samples = [sample_id for (sample_ids, _), _ in models for sample_id in sample_ids.to_pylist()]
    for row, column in zip(*np.nonzero(np.isfinite(similarity)), strict=True):
        yield {
            "sample_id": all_samples[row],
            "exemplar_id": ids[row, column],
            "score": float(similarity[row, column]),
            "rank": int(above[row, column] + own_above[row, column]) + 1,
            "gallery_size": int(size + own_size[row]),
        }


def features_by_model(db: Database, encoder_id: str, where: str) -> dict[str, Block]:
    """By model, ids and features of the encoded images that a predicate keeps, in the order of their ids."""
    table = db.images(f"({where}) AND `{encoder_id}` IS NOT NULL", ["image_id", "model_id", encoder_id])
    table = table.sort_by("image_id")
    ids = table["image_id"].combine_chunks()
    features = feature_matrix(table[encoder_id])
    positions: dict[str, list[int]] = defaultdict(list)
    for position, model_id in enumerate(table["model_id"].to_pylist()):
        positions[model_id].append(position)
    return {model_id: (ids.take(pa.array(at)), features[at]) for model_id, at in positions.items()}
