"""The observer that monitors a customization, and the rows that it makes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import torch

from attrdb.ingest.customize.observer import Run, Step, Tensors
from attrdb.ingest.monitor.changes import Change, Changes
from attrdb.ingest.monitor.probes import Probe, Probes
from attrdb.ingest.spread import spread
from attrdb.store.schema import TABLES, Row

MIXED_PROMPTS = 16  # captions of a model of unrelated images whose K and V are looked at

PROGRESS, PER_VISIT, CHANGE_NORM = ("progress", "progress per visit", "change norm")


@dataclass(frozen=True)
class Names:
    """What the rows of a monitored model are about.

    exemplars:      image_id of each
    regularization: name of each regularization image
    concepts:       concept_id of each; None for the one of a model without a token
    """

    model_id: str
    exemplars: Sequence[str]
    regularization: Sequence[str]
    concepts: Sequence[str | None]


@dataclass
class Monitor:
    """Observes a run at one of the MONITOR_LEVELS but the first; `tables` and `gradient_sums` after it ended.

    prompts: of each concept; None: those of the run, as one concept
    """

    level: str
    prompts: Sequence[Sequence[str]] | None = None
    steps: list[Row] = field(default_factory=list)
    changes: Changes | None = None
    probes: Probes | None = None
    rows: list[Change] = field(default_factory=list)

    def start(self, run: Run) -> None:
        prompts = self.prompts or [spread(list(dict.fromkeys(run.prompts)), MIXED_PROMPTS)]
        if self.level != "steps":
            self.changes = Changes(run, prompts)
        if self.level == "probes":
            self.probes = Probes(run, [of_concept[0] for of_concept in prompts])
            self.probes.take(0)

    def before_update(self, step: Step) -> None:
        norms = None if self.changes is None else self.changes.before_update(step).tolist()
        columns = (
            getattr(step, name).tolist() for name in ("is_exemplar", "images", "views", "timesteps", "slot_losses")
        )
        names = ("slot", "is_exemplar", "image", "view", "timestep", "loss", "gradient_norm")
        for slot, values in enumerate(zip(*columns, norms or [None] * len(step.images), strict=True)):
            self.steps.append({"step": step.number} | dict(zip(names, (slot, *values), strict=True)))

    def after_update(self, step: Step) -> None:
        if self.changes is not None:
            self.changes.after_update(step)
        if self.probes is not None:
            self.probes.take(step.number + 1)

    def end(self, error: BaseException | None) -> None:
        if self.changes is not None:
            try:
                if error is None:
                    self.changes.finish()
                    self.rows = list(self.changes.rows())
            finally:
                self.changes.close()

    @property
    def gradient_sums(self) -> Tensors | None:
        """(n_exemplars, *shape) float32 by trained weight: each exemplar's gradients, over all steps; None if not kept."""
        return None if self.changes is None else self.changes.gradient_sums

    def tables(self, names: Names) -> dict[str, pa.Table]:
        """The rows of the run, by table."""
        probes = [] if self.probes is None else self.probes.probes
        rows = {
            "monitor_steps": [_step(row, names) for row in self.steps],
            "monitor_changes": [_change(row, names) for row in self.rows],
            "monitor_probes": [_probe(row, names) for row in probes],
            "attribution_tables": list(attribution_rows(self.rows, names)),
        }
        return {name: pa.Table.from_pylist(made, schema=TABLES[name]) for name, made in rows.items()}


Monitored = tuple[Monitor, Names]


def _step(row: Row, names: Names) -> Row:
    image = row["image"]
    image_id = names.exemplars[image] if row["is_exemplar"] else names.regularization[image]
    return {"model_id": names.model_id, "image_id": image_id} | {k: v for k, v in row.items() if k != "image"}


def _change(row: Change, names: Names) -> Row:
    return {
        "model_id": names.model_id,
        "concept_id": names.concepts[row.concept],
        "quarter": row.quarter,
        "cause": row.cause,
        "image_id": None if row.image is None else names.exemplars[row.image],
        "n_visits": row.n_visits,
        "change_norm": row.norm,
        "progress": row.progress,
    }


def _probe(row: Probe, names: Names) -> Row:
    named = {"model_id": names.model_id, "concept_id": names.concepts[row.concept]}
    return named | {name: value for name, value in asdict(row).items() if name != "concept"}


def attribution_rows(changes: Sequence[Change], names: Names) -> list[Row]:
    """The measures of each exemplar and concept, from what the exemplars changed.

    progress:           its share of the change of K and V of the concept's prompt, along that change; may be negative
    progress per visit: the same, times the mean number of visits over its own: for how often chance drew it
    change norm:        how far it moved K and V, in whatever direction; not known where tokens alone are trained
    """
    sums: dict[tuple[int, int], dict[str, Any]] = defaultdict(lambda: {"progress": 0.0, "norm": 0.0, "n_visits": 0})
    for change in changes:
        if change.image is not None:
            booked = sums[change.concept, change.image]
            booked["progress"] += change.progress
            booked["norm"] += change.norm or 0.0
            booked["n_visits"] += change.n_visits
    rows: list[Row] = []
    for concept in sorted({concept for concept, _ in sums}):
        of_concept = {image: booked for (number, image), booked in sorted(sums.items()) if number == concept}
        visits = torch.tensor([float(booked["n_visits"]) for booked in of_concept.values()])
        progress = torch.tensor([booked["progress"] for booked in of_concept.values()], dtype=torch.float64)
        norm = torch.tensor([booked["norm"] for booked in of_concept.values()], dtype=torch.float64)
        per_visit = torch.where(visits > 0, progress / visits.clamp_min(1) * visits.mean(), 0.0)
        measures = {PROGRESS: progress, PER_VISIT: per_visit} | ({CHANGE_NORM: norm} if norm.any() else {})
        for measure, values in measures.items():
            positive = values.clamp_min(0)
            shares = positive / positive.sum().clamp_min(torch.finfo(values.dtype).tiny)
            for image, value, share, n_visits in zip(of_concept, values.tolist(), shares.tolist(), visits, strict=True):
                rows.append(
                    {
                        "model_id": names.model_id,
                        "measure": measure,
                        "concept_id": names.concepts[concept],
                        "image_id": names.exemplars[image],
                        "value": value,
                        "share": share,
                        "n_visits": int(n_visits),
                    }
                )
    return rows
