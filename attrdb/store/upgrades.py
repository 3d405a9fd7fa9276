"""Upgrade steps: from every schema version to the next. A released step is never edited.

A step states the columns of the tables at its time, so that later changes of schema.py do not change it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa

from attrdb.errors import NotFound
from attrdb.store.checksums import CHANGED
from attrdb.store.lance_errors import storage
from attrdb.store.locks import WRITERS_LOCK, waiting_lock
from attrdb.store.schema import SCHEMA_VERSION, TABLES, Row
from attrdb.store.tables import STAMP, check_schema_version, database_path, open_table, schema_version, table_exists

_TYPES = {
    "text": pa.string(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "timestamp": pa.timestamp("us", tz="UTC"),
    "float32s": pa.list_(pa.float32()),
    "texts": pa.list_(pa.string()),
    "arrays": pa.list_(
        pa.struct([("name", pa.string()), ("shape", pa.list_(pa.int32())), ("values", pa.list_(pa.float32()))])
    ),
}

JOBS_2 = """
    job_id text key, command text required, settings text, state text required, n_done int64, n_failed int64, message text,
    host text, pid int64, started_at timestamp, ended_at timestamp
"""
FAILURES_2 = "failure_id text key, job_id text required, item text required, reason text required, failed_at timestamp"
MAPPERS_3 = """
    mapper_id text key, encoder_id text required, form text required, trained_on text, parameters arrays, settings text,
    images_version int64, curves text, metrics text, created_at timestamp
"""
CALIBRATIONS_3 = """
    calibration_id text key, encoder_id text required, mapper_id text required, tau float64 required, lam float64 required,
    kl float64, kl_before float64, n_samples int64, gallery_size int64, split text, reliability text, images_version int64,
    created_at timestamp
"""
ATTRIBUTIONS_4 = """
    encoder_id text required, mapper_id text required, sample_id text required, rank int64 required,
    candidate_id text required, similarity float64 required, influence float64 required, complete bool required,
    missing_influence float64, k int64, exact bool, tau float64, lam float64, images_version int64
"""
INDICES_4 = """
    encoder_id text key, kind text required, n_partitions int32 required, n_probes int32 required,
    oversampling int32 required, recall float64 required, n_queries int32, queries text, n_rows int64, device text,
    seconds float64, images_version int64, created_at timestamp
"""
MAPPER_SEARCHES_5 = """
    mapper_id text key, encoder_id text required, used bool required, n_probes int32 required, oversampling int32 required,
    tilt float32s required, recall float64 required, n_queries int32, images_version int64, created_at timestamp
"""
METHODS_6 = """
    method_id text key, kind text required, encoder_id text, mapper_id text, unit text required, lowest float64,
    highest float64, tau float64 required, lam float64 required, settings text, created_at timestamp
"""
SCORES_6 = "method_id text required, sample_id text required, candidate_id text required, score float64 required"
CALIBRATIONS_6 = """
    method_id text key, tau float64 required, lam float64 required, kl float64, kl_before float64, n_samples int64,
    gallery_size int64, split text, reliability text, images_version int64, created_at timestamp
"""
EXEMPLAR_RANKS_6 = """
    method_id text required, gallery text required, sample_id text required, exemplar_id text required, score float64,
    rank int64 required, gallery_size int64 required, images_version int64
"""
ATTRIBUTIONS_6 = """
    method_id text required, sample_id text required, rank int64 required, candidate_id text required,
    score float64 required, influence float64 required, complete bool required, missing_influence float64, k int64,
    exact bool, tau float64, lam float64, images_version int64
"""
REMOVALS_7 = """
    removal_id text key, state text required, chosen_by text required, digest text required, reason text,
    n_images int64 required, n_features int64 required, n_models int64 required, models text required,
    n_results int64 required, n_blocked int64 required, purged bool required, images_version int64, attrdb_version text,
    started_at timestamp, ended_at timestamp
"""
MARKED_MODELS_7 = """
    model_id text key, removal_id text required, n_exemplars int32 required, n_regularization int32 required,
    marked_at timestamp
"""
BLOCKED_DIGESTS_7 = "digest text key, kind text required, removal_id text required, blocked_at timestamp"

CONCEPTS_8 = """
    concept_id text key, model_id text required, token text required, kind text required, category text,
    train_prompt text required, n_exemplars int32
"""
MONITOR_STEPS_8 = """
    model_id text required, step int32 required, slot int32 required, image_id text required, is_exemplar bool required,
    view int32 required, timestep int32 required, loss float64 required, gradient_norm float64
"""
MONITOR_CHANGES_8 = """
    model_id text required, concept_id text, quarter int32 required, cause text required, image_id text, n_visits int32,
    change_norm float64, progress float64 required
"""
MONITOR_PROBES_8 = """
    model_id text required, concept_id text, step int32 required, timestep int32 required, seed int64 required,
    vector float32s required, attention float32s
"""
ATTRIBUTION_TABLES_8 = """
    model_id text required, measure text required, concept_id text, image_id text required, value float64 required,
    share float64 required, n_visits int32 required
"""
RETRAININGS_9 = """
    retraining_id text key, model_id text required, leave text required, name text required, draws text required,
    seed int64 required, left_out texts required, n_draws int32 required, train_loss float64 required, same_weights bool,
    seconds float64 required, created_at timestamp
"""
COUNTERFACTUALS_9 = """
    retraining_id text required, model_id text required, sample_id text required, loss float64 required
"""
CALIBRATIONS_10 = """
    calibration_id text key, method_id text required, kind text, tau float64 required, lam float64 required,
    unattributed float64, kl float64, kl_before float64, n_samples int64, gallery_size int64, split text, reliability text,
    images_version int64, created_at timestamp
"""
KEY_SETS_11 = """
    key_set_id text key, source text required, strategy text required, descriptor text required,
    descriptor_hash text, n_answers int32 required, settings text, created_at timestamp
"""
KEYS_11 = """
    key_id text key, key_set_id text required, number int32 required, prompt text required, image_id text required,
    self_distance float64, reference_distance float64
"""
SUSPECTS_11 = "suspect_id text key, origin text, created_at timestamp"
SUSPECT_LABELS_11 = """
    label_id text key, source text required, suspect_id text required, label text required, stratum text,
    rho float64
"""
ANSWERS_11 = """
    image_id text key, key_id text required, suspect_id text required, distance float64 required
"""
VERDICTS_11 = """
    verdict_id text key, key_set_id text required, suspect_id text required, conf float64,
    threshold float64, p float64, n_keys int32 required, n_answers int32 required, n_innocents int32 required,
    strata text required, created_at timestamp
"""


def _columns(text: str) -> pa.Schema:
    """A schema from `name type [key|required], ...`."""
    fields = []
    for column in text.split(","):
        name, kind, *mark = column.split()
        metadata = {"lance-schema:unenforced-primary-key": "true"} if mark == ["key"] else None
        fields.append(pa.field(name, _TYPES[kind], nullable=not mark, metadata=metadata))
    return pa.schema(fields)


def _create(path: Path, name: str, columns: str, version: int) -> None:
    """An empty table, unless it exists."""
    table = path / f"{name}.lance"
    if not table_exists(table):
        stamped = _columns(columns).with_metadata({STAMP.decode(): str(version)})
        lance.write_dataset(stamped.empty_table(), str(table))


def _to_2(path: Path) -> None:
    """Tables of jobs and their failures."""
    _create(path, "jobs", JOBS_2, 2)
    _create(path, "failures", FAILURES_2, 2)


def _to_3(path: Path) -> None:
    """Tables of mappers and calibrations."""
    _create(path, "mappers", MAPPERS_3, 3)
    _create(path, "calibrations", CALIBRATIONS_3, 3)


def _to_4(path: Path) -> None:
    """Tables of stored attributions and of the indices of features."""
    _create(path, "attributions", ATTRIBUTIONS_4, 4)
    _create(path, "indices", INDICES_4, 4)


def _to_5(path: Path) -> None:
    """A table of how mappers search an index."""
    _create(path, "mapper_searches", MAPPER_SEARCHES_5, 5)


def _to_6(path: Path) -> None:
    """Results have a method and a score instead of an encoder, a mapper and a similarity."""
    _create(path, "methods", METHODS_6, 6)
    _create(path, "scores", SCORES_6, 6)
    pairs = [
        (row["encoder_id"], "") for row in open_table(path, "encoders").to_table(columns=["encoder_id"]).to_pylist()
    ]
    mappers = open_table(path, "mappers").to_table(columns=["encoder_id", "mapper_id"]).to_pylist()
    pairs += [(row["encoder_id"], row["mapper_id"]) for row in mappers]
    rows = [_similarity_6(encoder_id, mapper_id) for encoder_id, mapper_id in pairs]
    methods = open_table(path, "methods").merge_insert("method_id").when_not_matched_insert_all()
    methods.execute(pa.Table.from_pylist(rows, schema=_columns(METHODS_6)))
    _rewrite(path, "calibrations", CALIBRATIONS_6, lambda old: {"method_id": _method_6(old)})
    _rewrite(
        path,
        "exemplar_ranks",
        EXEMPLAR_RANKS_6,
        lambda old: {"method_id": _method_6(old), "score": pa.nulls(old.num_rows, pa.float64())},
    )
    _rewrite(
        path, "attributions", ATTRIBUTIONS_6, lambda old: {"method_id": _method_6(old), "score": old["similarity"]}
    )
    searches = open_table(path, "mapper_searches")
    if "tilt" in searches.schema.names:
        rename: Any = {"path": "tilt", "name": "norm_correction"}  # Lance declares more keys than it needs
        searches.alter_columns(rename)


def _similarity_6(encoder_id: str, mapper_id: str) -> Row:
    return {
        "method_id": f"{encoder_id}/{mapper_id}" if mapper_id else encoder_id,
        "kind": "similarity",
        "encoder_id": encoder_id,
        "mapper_id": mapper_id or None,
        "unit": "cosine",
        "lowest": -1.0,
        "highest": 1.0,
        "tau": 0.05,
        "lam": 0.05,
        "settings": "{}",
        "created_at": datetime.now(UTC),
    }


def _method_6(old: pa.RecordBatch) -> pa.Array:
    pairs = zip(old["encoder_id"].to_pylist(), old["mapper_id"].to_pylist(), strict=True)
    return pa.array([f"{encoder_id}/{mapper_id}" if mapper_id else encoder_id for encoder_id, mapper_id in pairs])


def _rewrite(path: Path, name: str, columns: str, changed: Callable[[pa.RecordBatch], dict[str, pa.Array]]) -> None:
    """Rewrite a table with other columns, as its next version, unless that is done; rows are streamed.

    changed: makes the columns that an old batch lacks
    """
    old, schema = open_table(path, name), _columns(columns)
    if old.schema.names == schema.names:
        return

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in old.to_batches():
            new = changed(batch)
            arrays = [new[field.name] if field.name in new else batch[field.name] for field in schema]
            yield pa.record_batch(arrays, schema=schema)

    reader = pa.RecordBatchReader.from_batches(schema, batches())
    lance.write_dataset(reader, str(path / f"{name}.lance"), mode="overwrite")


def _to_7(path: Path) -> None:
    """What was taken out is kept on record, and may be kept from coming back."""
    _create(path, "marked_models", MARKED_MODELS_7, 7)
    _create(path, "blocked_digests", BLOCKED_DIGESTS_7, 7)
    _create(path, "removals", REMOVALS_7, 7)


def _to_8(path: Path) -> None:
    """Concepts of a model, and tables of what was monitored while it was customized."""
    _create(path, "concepts", CONCEPTS_8, 8)
    _create(path, "monitor_steps", MONITOR_STEPS_8, 8)
    _create(path, "monitor_changes", MONITOR_CHANGES_8, 8)
    _create(path, "monitor_probes", MONITOR_PROBES_8, 8)
    _create(path, "attribution_tables", ATTRIBUTION_TABLES_8, 8)
    images = open_table(path, "images")
    if "concept_id" not in images.schema.names:
        images.add_columns(pa.field("concept_id", pa.string()))
    columns = ["model_id", "token", "kind", "category", "train_prompt", "n_exemplars"]
    models = open_table(path, "models").to_table(
        columns, filter="token IS NOT NULL AND kind IS NOT NULL AND train_prompt IS NOT NULL"
    )
    rows = [{"concept_id": f"{row['model_id']}/{row['token']}", **row} for row in models.to_pylist()]
    concepts = open_table(path, "concepts").merge_insert("concept_id").when_not_matched_insert_all()
    concepts.execute(pa.Table.from_pylist(rows, schema=_columns(CONCEPTS_8)))


def _to_9(path: Path) -> None:
    """What models would be without some of their exemplars."""
    _create(path, "retrainings", RETRAININGS_9, 9)
    _create(path, "counterfactuals", COUNTERFACTUALS_9, 9)


def _to_10(path: Path) -> None:
    """A calibration is of a method and a kind of models, and says which share of influence cannot be attributed."""

    def added(old: pa.RecordBatch) -> dict[str, pa.Array]:
        nothing = {"kind": pa.nulls(len(old), pa.string()), "unattributed": pa.nulls(len(old), pa.float64())}
        return {"calibration_id": old["method_id"], **nothing}

    _rewrite(path, "calibrations", CALIBRATIONS_10, added)
    attributions = open_table(path, "attributions")
    if "unattributed" not in attributions.schema.names:
        attributions.add_columns(pa.field("unattributed", pa.float64()))


def _to_11(path: Path) -> None:
    """Key sets, answers to them, and verdicts."""
    _create(path, "key_sets", KEY_SETS_11, 11)
    _create(path, "keys", KEYS_11, 11)
    _create(path, "suspects", SUSPECTS_11, 11)
    _create(path, "suspect_labels", SUSPECT_LABELS_11, 11)
    _create(path, "answers", ANSWERS_11, 11)
    _create(path, "verdicts", VERDICTS_11, 11)


STEPS = {2: _to_2, 3: _to_3, 4: _to_4, 5: _to_5, 6: _to_6, 7: _to_7, 8: _to_8, 9: _to_9, 10: _to_10, 11: _to_11}
MADE_IN = {  # the version that made a table, where it was not the first
    "jobs": 2,
    "failures": 2,
    "mappers": 3,
    "calibrations": 3,
    "attributions": 4,
    "indices": 4,
    "mapper_searches": 5,
    "methods": 6,
    "scores": 6,
    "removals": 7,
    "marked_models": 7,
    "blocked_digests": 7,
    "concepts": 8,
    "monitor_steps": 8,
    "monitor_changes": 8,
    "monitor_probes": 8,
    "attribution_tables": 8,
    "retrainings": 9,
    "counterfactuals": 9,
    "key_sets": 11,
    "keys": 11,
    "suspects": 11,
    "suspect_labels": 11,
    "answers": 11,
    "verdicts": 11,
}


def upgrade(path: str | Path) -> tuple[int, int]:
    """Bring a database to the schema version of this attrdb; the versions before and after.

    The next call completes one that was interrupted: every step may be repeated. Several at once wait for each other.
    raises: NotFound if there is no database, InvalidValue if a newer attrdb made it
    """
    path = database_path(path)
    if not (path / "images.lance").is_dir():
        raise NotFound(f"{path} is not an attrdb database (no images.lance in it)")
    CHANGED.add(path)
    with storage(path):
        before = schema_version(open_table(path, "images"))
        if not 0 < before <= SCHEMA_VERSION:
            check_schema_version(path, before)
        if before < SCHEMA_VERSION:
            with waiting_lock(path / WRITERS_LOCK, exclusive=True):
                before = schema_version(open_table(path, "images"))  # another process may have been first
                _take_steps(path, before)
    return before, SCHEMA_VERSION


def _take_steps(path: Path, before: int) -> None:
    for version in range(before + 1, SCHEMA_VERSION + 1):
        STEPS[version](path)
        # 'images' is stamped last: it says which version the directory has.
        names = [name for name in TABLES if MADE_IN.get(name, 1) <= version]
        for name in sorted(names, key=lambda name: name == "images"):
            table = open_table(path, name)
            if schema_version(table) != version:
                table.update_schema_metadata({STAMP.decode(): str(version)})
