"""What hangs on images that are to be taken out: models, results, jobs. Kept in a folder until all of it is done.

<database>/jobs/.remove/   images.parquet (the chosen images), plan.json (all else), which appears last
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from attrdb.attribution.methods import method_rows
from attrdb.errors import InvalidValue
from attrdb.progress import Progress
from attrdb.store.blocklist import blocklist
from attrdb.store.files import write_whole
from attrdb.store.job_folders import model_jobs
from attrdb.store.predicates import among
from attrdb.store.schema import Row
from attrdb.store.snapshot import Snapshot
from attrdb.upkeep.removal import results
from attrdb.upkeep.removal.choose import (
    Choice,
    Encoded,
    RemovalRequest,
    choose,
    digests,
    encoded,
    images_of,
)
from attrdb.upkeep.removal.results import Reach

FOLDER = Path("jobs") / ".remove"


@dataclass(frozen=True)
class AffectedModel:
    """A model of which images are taken out.

    n_exemplars, n_regularization: those taken out that it was customized on
    n_samples:    its samples that are taken out
    left:         its exemplars and samples afterwards
    action:       `list`, `mark` or `remove`; None if it was customized on none of the images: some of its samples go
    weights_path: as its row has it
    """

    model_id: str
    kind: str | None
    n_exemplars: int
    n_regularization: int
    n_samples: int
    left: tuple[int, int]
    action: str | None
    weights_path: str | None

    @property
    def is_customized(self) -> bool:
        return self.n_exemplars + self.n_regularization > 0


@dataclass(frozen=True)
class Plan:
    """All that one removal does.

    unfinished: models without a row in `models`, and half-done jobs, that use one of the images: they are given up
    results:    rows of `attributions`, `exemplar_ranks` and `scores` that are taken out, by table
    fitted:     mappers, and methods whose calibration is kept: they were fitted with images that are taken out
    drop_index: encoders whose index is dropped, since a feature that is taken out is one of its centroids
    copies:     other images with the same encoded bytes as those that were named, which stay: how many, and some ids
    blocked:    digest -> kind, of those that were named
    """

    removal_id: str
    request: RemovalRequest
    choice: Choice
    n_features: int
    models: tuple[AffectedModel, ...]
    unfinished: tuple[str, ...]
    reach: Reach
    results: dict[str, int]
    fitted: dict[str, list[str]]
    drop_index: tuple[str, ...]
    n_copies: int
    copies: tuple[str, ...]
    blocked: dict[str, str] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        return not len(self.choice.images) and not self.blocked

    @property
    def removed_models(self) -> list[AffectedModel]:
        return [model for model in self.models if model.action == "remove"]

    @property
    def row(self) -> Row:
        """The removal's row in `removals`, at its beginning."""
        return {
            "removal_id": self.removal_id,
            "state": "begun",
            "chosen_by": self.request.chosen_by,
            "digest": self.request.digest,
            "reason": self.request.reason,
            "n_images": len(self.choice.images),
            "n_features": self.n_features,
            "n_models": sum(model.is_customized for model in self.models),
            "models": self.request.models,
            "n_results": sum(self.results.values()),
            "n_blocked": len(self.blocked),
            "purged": False,
        }


def make_plan(snapshot: Snapshot, request: RemovalRequest, report: Progress) -> Plan:
    """What a request takes out of the database as it is.

    raises: InvalidValue as `RemovalRequest.check`, or if models that stay have captions of the images in their prompts
    """
    request.check(snapshot)
    named = choice = choose(snapshot, request, report)
    rows = snapshot.rows("models")
    models = _affected(choice, rows, request.models)
    whole = [model.model_id for model in models if model.action == "remove"]
    # Of a model without a row nothing can be kept: its job would find images missing.
    owners = set(choice.images["model_id"].to_pylist()) - {None}
    half = sorted((owners - {row["model_id"] for row in rows}) | set(whole))
    if half:
        choice = choice.also(images_of(snapshot, among("model_id", half)))
    models = _affected(choice, rows, request.models)
    if request.purge:
        _check_captions(choice, models, rows)
    unfinished = sorted((set(half) - set(whole)) | set(_half_done(snapshot.path, choice)))
    choice = choice.also(images_of(snapshot, among("image_id", results.answers_to(snapshot, choice))))
    features = encoded(snapshot, choice, report)
    reach = _reach(snapshot, choice, features, models)
    n_copies, copies = _copies(snapshot, named, choice)
    return Plan(
        f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{request.digest[:8]}",
        request,
        choice,
        sum(one.n for one in features.values()),
        tuple(models),
        tuple(unfinished),
        reach,
        results.count(snapshot, choice, reach),
        _fitted(snapshot, features),
        tuple(encoder_id for encoder_id, one in features.items() if one.in_index),
        n_copies,
        copies,
        _new_digests(snapshot, named) if request.block else {},
    )


# --- models ----------------------------------------------------------------------------------------------------------


def _affected(choice: Choice, rows: list[Row], action: str) -> list[AffectedModel]:
    """The models in `models` of which the chosen images take something away."""
    counts: dict[tuple[str, str], int] = {}
    for model_id, role in zip(choice.images["model_id"].to_pylist(), choice.images["role"].to_pylist(), strict=True):
        counts[model_id, role] = counts.get((model_id, role), 0) + 1
    corpus = set(choice.of_role("pretraining")["image_id"].to_pylist())
    found = []
    for row in sorted(rows, key=lambda row: str(row["model_id"])):
        model_id = row["model_id"]
        n_exemplars, n_samples = counts.get((model_id, "exemplar"), 0), counts.get((model_id, "sample"), 0)
        n_regularization = len(corpus.intersection(regularization_of(row))) if corpus else 0
        if n_exemplars + n_regularization + n_samples == 0:
            continue
        found.append(
            AffectedModel(
                model_id,
                row["kind"],
                n_exemplars,
                n_regularization,
                n_samples,
                ((row["n_exemplars"] or 0) - n_exemplars, (row["n_samples"] or 0) - n_samples),
                action if n_exemplars + n_regularization else None,
                row["weights_path"],
            )
        )
    return found


def settings_of(model: Row) -> dict[str, Any]:
    """The settings of a model's row; empty where they are not an object."""
    try:
        settings = json.loads(model["settings"] or "{}")
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def regularization_of(model: Row) -> list[str]:
    """The ids of the pretraining images that a model was regularized with."""
    names = settings_of(model).get("regularization") if '"regularization"' in (model["settings"] or "") else None
    return [name for name in names if name] if isinstance(names, list) else []


def is_named(exemplar: object, images: list[Row]) -> bool:
    """Whether an exemplar in the settings of a model, a sha256 or the path in a release, is one of some images."""
    if not isinstance(exemplar, str):
        return False
    return any(exemplar == image["sha256"] or unquote(image["uri"] or "").endswith(f"/{exemplar}") for image in images)


def _check_captions(choice: Choice, models: list[AffectedModel], rows: list[Row]) -> None:
    """A model of kind `mixed` is sampled with the captions of its exemplars.

    raises: InvalidValue if such a model stays, and its prompts have a caption that is to be purged
    """
    staying = {model.model_id for model in models if model.n_exemplars and model.action != "remove"}
    for row in rows:
        if row["model_id"] in staying and row["kind"] == "mixed":
            own = pc.equal(choice.images["model_id"], row["model_id"])
            captions = set(choice.images.filter(own)["prompt"].to_pylist()) - {None}
            if captions.intersection(settings_of(row).get("prompts") or []):
                raise InvalidValue(
                    f"model {row['model_id']!r} of kind 'mixed' was sampled with captions of the images as its prompts, "
                    "which a purge must not leave; take it out too (--models remove), or leave --purge out"
                )


def _half_done(path: Path, choice: Choice) -> list[str]:
    """The half-done jobs of models that use one of the images, by model_id."""
    hashes = set(choice.images["sha256"].to_pylist()) - {None}
    ids = set(choice.ids.to_pylist())
    found = []
    for model_id, job in model_jobs(path).items():
        try:
            record = job.read_settings() or {}
        except InvalidValue:
            continue  # nothing can be made of a job whose settings are damaged
        used = {name for key in ("exemplars", "regularization") for name in record.get(key) or ()}
        if used & hashes or used & ids:
            found.append(model_id)
    return found


# --- results ---------------------------------------------------------------------------------------------------------


def _reach(snapshot: Snapshot, choice: Choice, features: dict[str, Encoded], models: list[AffectedModel]) -> Reach:
    """Which methods had one of the images among their candidates."""
    by_role: dict[str, list[str]] = {"exemplar": [], "pretraining": []}
    scored = results.scored_roles(snapshot, choice)
    for method_id, row in method_rows(snapshot).items():
        if row["kind"] == "similarity":
            roles = features[row["encoder_id"]].roles if row["encoder_id"] in features else frozenset(by_role)
        else:
            roles = scored.get(method_id, frozenset())
        for role, methods in by_role.items():
            if role in roles:
                methods.append(method_id)
    changed = [model.model_id for model in models if model.n_exemplars]
    return Reach(tuple(by_role["exemplar"]), tuple(by_role["pretraining"]), tuple(changed))


def _fitted(snapshot: Snapshot, features: dict[str, Encoded]) -> dict[str, list[str]]:
    encoders = {encoder_id for encoder_id, one in features.items() if one.n}
    methods = method_rows(snapshot)
    calibrated = {row["method_id"] for row in snapshot.rows("calibrations", columns=["method_id"])}
    mappers = snapshot.rows("mappers", columns=["mapper_id", "encoder_id"])
    return {
        "mappers": sorted(row["mapper_id"] for row in mappers if row["encoder_id"] in encoders),
        "calibrations": sorted(
            method_id for method_id in calibrated if methods.get(method_id, {}).get("encoder_id") in {*encoders, None}
        ),
    }


def _new_digests(snapshot: Snapshot, choice: Choice) -> dict[str, str]:
    blocked = blocklist(snapshot).removals
    return {digest: kind for digest, kind in digests(choice).items() if digest not in blocked}


def _copies(snapshot: Snapshot, named: Choice, choice: Choice) -> tuple[int, tuple[str, ...]]:
    """Images with the same encoded bytes as those that were named, which stay: how many, and some ids."""
    hashes = pc.unique(named.images["sha256"].drop_null().combine_chunks())
    if not len(hashes):
        return 0, ()
    mine, n = choice.ids.combine_chunks(), 0
    shown: list[str] = []
    for batch in snapshot.tables["images"].to_batches(columns=["image_id", "sha256"], filter="sha256 IS NOT NULL"):
        same = pc.and_(pc.is_in(batch["sha256"], hashes), pc.invert(pc.is_in(batch["image_id"], mine)))
        others = batch.filter(same)["image_id"].to_pylist()
        n += len(others)
        shown += others[: 5 - len(shown)]
    return n, tuple(shown)


# --- kept until it is done -------------------------------------------------------------------------------------------


def store(plan: Plan, path: Path) -> None:
    """Keep a plan in the database's folder of it: what is begun can be finished, whatever happens."""
    folder = path / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "images.parquet", lambda part: pq.write_table(plan.choice.images, part))
    record = asdict(replace(plan, choice=Choice(plan.choice.images.slice(0, 0), plan.choice.not_found)))
    record["choice"] = list(plan.choice.not_found)
    write_whole(folder / "plan.json", lambda part: part.write_text(json.dumps(record), encoding="utf-8"))


def stored(path: Path) -> Plan | None:
    """The plan of a removal that was begun and is not done; None if there is none.

    raises: InvalidValue if it is damaged
    """
    folder = path / FOLDER
    if not (folder / "plan.json").exists():
        return None
    try:
        record = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        return _read(record, pq.read_table(folder / "images.parquet"))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InvalidValue(
            f"{folder} is damaged ({type(error).__name__}): an interrupted removal cannot be finished from it; "
            f"delete the folder, and run the removal again"
        ) from error


def _read(record: dict[str, Any], images: pa.Table) -> Plan:
    request = record["request"] | {"ids": record["request"]["ids"] and tuple(record["request"]["ids"])}
    models = [AffectedModel(**row | {"left": tuple(row["left"])}) for row in record["models"]]
    reach = {name: tuple(values) for name, values in record["reach"].items()}
    return Plan(
        **record
        | {
            "request": RemovalRequest(**request),
            "choice": Choice(images, tuple(record["choice"])),
            "models": tuple(models),
            "reach": Reach(**reach),
            **{name: tuple(record[name]) for name in ("unfinished", "drop_index", "copies")},
        }
    )


def forget(path: Path) -> None:
    """Delete a plan's folder, plan.json first: what is left of the folder without it counts for nothing."""
    folder = path / FOLDER
    (folder / "plan.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
