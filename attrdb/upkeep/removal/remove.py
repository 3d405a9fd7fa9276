"""Takes images out, with all that hangs on them.

Killed at any moment, it leaves a database in which no result is about an image that is gone, and the next `remove` finishes
it: the plan is kept on disk first, and every step may be run again. The order of the steps:

    1. the plan; the row in `removals`, from which on nobody stores what was computed with these images
    2. results: ranks, attributions, scores, failures
    3. rows of models, so that a model that goes is hidden at once, and one that stays never counts images that are gone
    4. images, in one commit
    5. files of jobs, weights
    6. with purge, older versions (see `purge`)
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from attrdb.errors import InvalidValue
from attrdb.progress import Progress, no_progress
from attrdb.store.ids import files_beside, stored_file
from attrdb.store.job_folders import JobFolder, encode_jobs, model_jobs, train_jobs
from attrdb.store.leases import leased
from attrdb.store.locks import exclusive_lock
from attrdb.store.predicates import among, literal
from attrdb.store.schema import SHOWN_WITH_MODEL, Row
from attrdb.store.writer import Writer
from attrdb.upkeep.removal import plan as plans
from attrdb.upkeep.removal import purge, results
from attrdb.upkeep.removal.choose import RemovalRequest
from attrdb.upkeep.removal.plan import AffectedModel, Plan, is_named, settings_of

LOCK = ".maintenance.lock"
SHOWN = 5  # ids that are named of those without an image


@dataclass(frozen=True)
class Removal:
    """What a removal took out, or would take out (dry_run).

    removal_id: None where nothing was to be done
    resumed:    an interrupted removal of the same images was finished
    images:     how many, by role
    results:    rows of `attributions`, `exemplar_ranks` and `scores`, which are to be computed again
    fitted:     mappers and calibrations that were fitted with the images, and are kept
    dropped_indices: encoders whose index was dropped; build them again
    copies:     ids of other images with the same bytes, which stay (n_copies), the first few
    not_found:  given ids that name no image (n_not_found), the first few
    """

    removal_id: str | None
    dry_run: bool
    resumed: bool
    images: dict[str, int]
    n_features: int
    models: list[AffectedModel]
    unfinished_models: list[str]
    results: dict[str, int]
    fitted: dict[str, list[str]]
    dropped_indices: list[str]
    n_copies: int
    copies: list[str]
    n_not_found: int
    not_found: list[str]
    n_blocked: int
    purged: bool

    @property
    def n_images(self) -> int:
        return sum(self.images.values())


def remove(
    writer: Writer, request: RemovalRequest, *, dry_run: bool = False, report: Progress = no_progress
) -> Removal:
    """Take images out of a database, with their features, results, jobs and models, see `RemovalRequest`.

    A removal that was interrupted is finished first, with the options that it was begun with.
    dry_run: only say what would be taken out
    raises:  InvalidValue for a wrong request, a read-only database, or tags that keep older versions; Busy if maintenance
             runs, or a job works on the images; AttrdbError if a file of an older version cannot be deleted

    Readers go on, on what they have opened. Writers wait until the rows are deleted, and results that others computed with
    the images before that are refused.
    """
    report("find images", 0, None)
    request.check(writer.snapshot)
    if request.purge:
        purge.check_purgeable(writer.path, request.drop_tags)
    if dry_run:
        writer.refresh()
        return _told(plans.make_plan(writer.snapshot, request, report), dry_run=True)
    with writer.writing():  # refuses a database that is read-only
        pass
    with exclusive_lock(writer.path / LOCK, f"{writer.path} is being maintained"):
        if interrupted := plans.stored(writer.path):
            _finish(writer, interrupted, report)
            if interrupted.request == request:
                return _told(interrupted, resumed=True)
        writer.refresh()
        _settle(writer)
        with writer.exclusive(), ExitStack() as held:
            writer.refresh()
            plan = plans.make_plan(writer.snapshot, request, report)
            if not plan.is_empty:
                for lock in _locks(writer.path, plan):
                    held.enter_context(lock)
                plans.store(plan, writer.path)
                _delete(writer, plan, report)
        if plan.is_empty:
            return _purge_only(writer, plan, report)
        _complete(writer, plan, report)
        return _told(plan)


def _finish(writer: Writer, plan: Plan, report: Progress) -> None:
    """Finish a removal that was interrupted: every step is run again."""
    if plan.request.purge:
        purge.check_purgeable(writer.path, plan.request.drop_tags)
    with writer.exclusive(), ExitStack() as held:
        for lock in _locks(writer.path, plan):
            held.enter_context(lock)
        _delete(writer, plan, report)
    _complete(writer, plan, report)


def _settle(writer: Writer) -> None:
    """Removals without a plan have done everything, but were killed before their rows said so."""
    plans.forget(writer.path)
    for row in writer.snapshot.rows("removals", "state <> 'done'"):
        _record(writer, row | {"state": "done", "ended_at": datetime.now(UTC)})


def _purge_only(writer: Writer, plan: Plan, report: Progress) -> Removal:
    """Nothing is to be taken out. If the same choice took images out before, without a purge, they are purged now."""
    same = f"digest = {literal(plan.request.digest)} AND NOT purged"
    rows = writer.snapshot.rows("removals", same) if plan.request.purge else []
    if rows:
        purge.purge(writer, report)
        writer.upsert("removals", [row | {"purged": True} for row in rows])
    return replace(_told(plan), removal_id=rows[-1]["removal_id"] if rows else None, purged=bool(rows))


# --- locks -----------------------------------------------------------------------------------------------------------


def _locks(path: Path, plan: Plan) -> Iterator[Any]:
    """Locks of the jobs whose folders may hold the images; raises Busy, when it is entered, if a job runs."""
    for model_id, folder in _model_jobs(path, plan).items():
        yield leased(folder.lock, f"model {model_id!r}, which uses one of the images, is being made")
    for folder in encode_jobs(path):
        yield exclusive_lock(folder.lock, f"images are encoded ({folder.path.name})")
    for mapper_id, folder in _train_jobs(path, plan).items():
        yield exclusive_lock(folder.lock, f"mapper {mapper_id!r} is trained on the images")


def _model_jobs(path: Path, plan: Plan) -> dict[str, JobFolder]:
    """The folders of half-done models that are given up."""
    listed = model_jobs(path)
    return {model_id: listed[model_id] for model_id in plan.unfinished if model_id in listed}


def _train_jobs(path: Path, plan: Plan) -> dict[str, JobFolder]:
    """The half-trained mappers whose folder may hold features of the images: pairs are made of exemplars and samples."""
    return train_jobs(path) if len(plan.choice.of_role("exemplar", "sample")) else {}


# --- deleting --------------------------------------------------------------------------------------------------------


def _delete(writer: Writer, plan: Plan, report: Progress) -> None:
    """Delete all rows and files; nobody else is writing."""
    ids = plan.choice.images.select(["image_id"])
    began = datetime.now(UTC)
    row = plan.row | {"attrdb_version": version("attrdb"), "started_at": began}
    steps: list[tuple[str, Callable[[], Any]]] = [
        ("begin", lambda: _record(writer, row)),
        ("block", lambda: _block(writer, plan)),
        ("results", lambda: results.delete(writer, plan.choice, plan.reach)),
        ("jobs", lambda: _clean_job_rows(writer, plan)),
        ("models", lambda: _change_models(writer, plan)),
        # Written to between models and images, see `open_snapshot`.
        ("images", lambda: _record(writer, row | {"state": "deleting"})),
        ("images", lambda: writer.delete_matching("images", ids)),
        ("indices", lambda: _drop_indices(writer, plan)),
        ("files", lambda: _delete_files(writer, plan)),
        ("files", lambda: _record(writer, row | {"state": "purging", "images_version": writer.snapshot.version})),
    ]
    for number, (stage, step) in enumerate(steps):
        report("take out", number, len(steps), stage)
        step()
    report("take out", len(steps), len(steps))


def _complete(writer: Writer, plan: Plan, report: Progress) -> None:
    [row] = writer.snapshot.rows("removals", f"removal_id = {literal(plan.removal_id)}")
    if plan.request.purge:
        purge.purge(writer, report)
        row["purged"] = True
        _record(writer, row)
    plans.forget(writer.path)
    _record(writer, row | {"state": "done", "ended_at": datetime.now(UTC)})


def _record(writer: Writer, row: Row) -> None:
    writer.upsert("removals", [row])


def _block(writer: Writer, plan: Plan) -> None:
    shared = {"removal_id": plan.removal_id, "blocked_at": datetime.now(UTC)}
    rows = [{"digest": digest, "kind": kind, **shared} for digest, kind in plan.blocked.items()]
    if rows:
        writer.upsert("blocked_digests", rows, update=False)


def _clean_job_rows(writer: Writer, plan: Plan) -> None:
    """Delete failures of the images, and blank their ids in what jobs say of themselves."""
    ids = set(plan.choice.ids.to_pylist())
    failures = writer.snapshot.rows("failures", columns=["failure_id", "item"])
    gone = [row["failure_id"] for row in failures if row["item"] in ids]
    writer.delete_matching("failures", pa.table({"failure_id": pa.array(gone, pa.string())}))
    changed = []
    for row in writer.snapshot.rows("jobs"):
        blanked = {name: _blanked(row[name], ids) for name in ("settings", "message")}
        if any(row[name] != text for name, text in blanked.items()):
            changed.append(row | blanked)
    if changed:
        writer.upsert("jobs", changed)


def _blanked(text: str | None, ids: set[str]) -> str | None:
    """A text in which ids of the images that stand in quotes are replaced."""
    return text and re.sub(r"'([^']*)'", lambda match: "'(taken out)'" if match[1] in ids else match[0], text)


def _change_models(writer: Writer, plan: Plan) -> None:
    """Delete the rows of models that go; let those that stay count and name only what is left."""
    going = [model.model_id for model in plan.removed_models]
    for table in ("models", "marked_models"):
        writer.delete_matching(table, pa.table({"model_id": pa.array(going, pa.string())}))
    _change_concepts(writer, plan)
    staying = {model.model_id: model for model in plan.models if model.action != "remove"}
    if not staying:
        return
    rows = writer.snapshot.rows("models", among("model_id", staying))
    writer.upsert("models", [_changed_model(row, staying[row["model_id"]], plan) for row in rows])
    marked = [model for model in staying.values() if model.action == "mark"]
    if marked:
        _mark(writer, plan, marked)


def _change_concepts(writer: Writer, plan: Plan) -> None:
    """Delete the rows of models that are gone, and concepts without an exemplar; let the others count what is left."""
    stored = {row["model_id"] for row in writer.snapshot.rows("models", columns=["model_id"])}
    gone = {*plan.unfinished, *(model.model_id for model in plan.removed_models)} - stored
    for table in SHOWN_WITH_MODEL:
        if table != "images":
            writer.delete_matching(table, pa.table({"model_id": pa.array(sorted(gone), pa.string())}))
    staying = {model.model_id: model for model in plan.models if model.n_exemplars and model.action != "remove"}
    if not staying:
        return
    where = f"{among('model_id', staying)} AND role = 'exemplar' AND concept_id IS NOT NULL"
    exemplars = writer.snapshot.tables["images"].to_table(["image_id", "concept_id"], filter=where)
    left = exemplars.filter(pc.invert(pc.is_in(exemplars["image_id"], plan.choice.ids.combine_chunks())))
    counts = Counter(left["concept_id"].to_pylist())
    emptied, changed = [], []
    for row in writer.snapshot.rows("concepts", among("model_id", staying)):
        model = staying[row["model_id"]]
        n_exemplars = counts[row["concept_id"]] if model.kind == "concepts" else model.left[0]
        if n_exemplars:
            changed.append(row | {"n_exemplars": n_exemplars})
        else:
            emptied.append(row["concept_id"])
    writer.delete_matching("concepts", pa.table({"concept_id": pa.array(emptied, pa.string())}))
    if changed:
        writer.upsert("concepts", changed)


def _changed_model(row: Row, model: AffectedModel, plan: Plan) -> Row:
    """The row of a model that stays: the images that it was customized on are null in its settings."""
    settings = settings_of(row)
    chosen = plan.choice.images
    own = chosen.filter(
        pc.and_(pc.equal(chosen["model_id"], model.model_id), pc.equal(chosen["role"], "exemplar"))
    ).to_pylist()
    exemplars = settings.get("exemplars")
    if own and isinstance(exemplars, list):
        gone = [is_named(exemplar, own) for exemplar in exemplars]
        for name in ("exemplars", "captions"):
            values = settings.get(name)
            if isinstance(values, list) and len(values) == len(gone):
                settings[name] = [None if out else value for value, out in zip(values, gone, strict=True)]
    if model.n_regularization:
        corpus = set(plan.choice.of_role("pretraining")["image_id"].to_pylist())
        settings["regularization"] = [None if name in corpus else name for name in settings["regularization"]]
    n_exemplars, n_samples = model.left
    return row | {
        "settings": json.dumps(settings, sort_keys=True) if row["settings"] else row["settings"],
        "n_exemplars": n_exemplars,
        "n_samples": n_samples,
    }


def _mark(writer: Writer, plan: Plan, models: list[AffectedModel]) -> None:
    before = {row["model_id"]: row for row in writer.snapshot.rows("marked_models")}
    rows = []
    for model in models:
        row = before.get(model.model_id)
        if row and row["removal_id"] == plan.removal_id:
            continue  # by a run that was interrupted
        counts = ("n_exemplars", "n_regularization")
        rows.append(
            {"model_id": model.model_id, "removal_id": plan.removal_id, "marked_at": datetime.now(UTC)}
            | {name: getattr(model, name) + (row[name] if row else 0) for name in counts}
        )
    if rows:
        writer.upsert("marked_models", rows)


def _drop_indices(writer: Writer, plan: Plan) -> None:
    """Drop the indices of which a feature that is taken out is a centroid."""
    for encoder_id in plan.drop_index:
        for table in ("indices", "mapper_searches"):
            writer.delete(table, f"encoder_id = {literal(encoder_id)}")
        images = writer.snapshot.tables["images"]
        for index in images.describe_indices():
            if index.field_names == [encoder_id]:
                writer.commit(partial(purge.drop_index, writer.path, index.name))


# --- files -----------------------------------------------------------------------------------------------------------


def _delete_files(writer: Writer, plan: Plan) -> None:
    """Delete the folders of half-done jobs and the weights that hold the images, or what was learned from them."""
    path = writer.path
    stored = {row["model_id"] for row in writer.snapshot.rows("models", columns=["model_id"])}
    for folder in _model_jobs(path, plan).values():
        folder.remove()
    for model_id in plan.unfinished:
        if model_id not in stored:  # else the job was killed when all but its folder was done
            _delete_weights(path, f"weights/{model_id}.safetensors")
    for model in plan.models:
        if model.weights_path and (model.action == "remove" or model.n_exemplars):
            _delete_weights(path, model.weights_path, gradients_only=model.action != "remove")
    for folder in _train_jobs(path, plan).values():
        folder.remove()
    ids = plan.choice.ids.combine_chunks()
    for folder in encode_jobs(path):
        for file in folder.path.glob("*.parquet"):
            if pc.any(pc.is_in(pq.read_table(file, columns=["image_id"])["image_id"], ids)).as_py():
                file.unlink()


def _delete_weights(path: Path, relative: str, gradients_only: bool = False) -> None:
    """Delete weights, and the files beside them, if they lie among the database's weights: rows may name any file.

    gradients_only: keep the weights, but not the sums of each image's gradients, of which one is now gone
    """
    weights = (path / "weights").resolve()
    try:
        file = stored_file(path, relative)
    except InvalidValue:
        return
    if file.resolve().is_relative_to(weights):
        record, gradients = files_beside(file)
        for kept in [gradients] if gradients_only else [file, record, gradients]:
            kept.unlink(missing_ok=True)


# --- telling ---------------------------------------------------------------------------------------------------------


def _told(plan: Plan, *, dry_run: bool = False, resumed: bool = False) -> Removal:
    roles = plan.choice.images["role"].to_pylist()
    return Removal(
        None if dry_run else plan.removal_id,
        dry_run,
        resumed,
        {role: roles.count(role) for role in sorted(set(roles))},
        plan.n_features,
        list(plan.models),
        list(plan.unfinished),
        plan.results,
        plan.fitted,
        list(plan.drop_index),
        plan.n_copies,
        list(plan.copies),
        len(plan.choice.not_found),
        list(plan.choice.not_found[:SHOWN]),
        len(plan.blocked),
        plan.request.purge and not dry_run,
    )
