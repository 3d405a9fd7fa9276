"""Counterfactual truth as a queue: models are trained again without some of their exemplars, one retraining after another.

A model is one task of the workers. Its retrainings are stored one by one, each with the losses of the model's samples, so
that rerunning the command resumes where it was.

    retrainings      what was left out, and how the model was trained without it
    counterfactuals  the loss of every sample then
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pyarrow as pa

from attrdb.database import Database
from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.customize.denoising import DRAWS
from attrdb.ingest.models.executors import Maker, Outcome
from attrdb.ingest.models.queue import Queue, executor_for, work_off
from attrdb.ingest.options import QueueSettings, TruthSettings, check_options
from attrdb.ingest.truth.retrain import Retrained, Truth, exemplar_rows
from attrdb.ingest.truth.subsets import NOTHING, Subset, subsets
from attrdb.progress import Progress, no_progress
from attrdb.store import jobs
from attrdb.store.ids import lock_file, text_digest
from attrdb.store.jobs import JobResult
from attrdb.store.leases import leased
from attrdb.store.predicates import literal
from attrdb.store.schema import TABLES, Row

DEFAULTS = QueueSettings()


@dataclass(frozen=True)
class ModelTask:
    """The retrainings of one model. left: what is not stored yet"""

    model_id: str
    left: tuple[Subset, ...]
    samples: str
    settings: TruthSettings


def retraining_id(model_id: str, subset: Subset, settings: TruthSettings) -> str:
    """The same for the same retraining. Names may be any text, so a hash stands for them."""
    drawn = settings.draws if settings.draws == "fixed" else f"redrawn-{settings.seed}"
    name = subset.name if subset.leave == "half" else text_digest(subset.name)
    return "/".join([model_id, subset.leave, *([name] if subset.name else []), drawn])


def tasks(db: Database, models: str, leave: Sequence[str], samples: str, settings: TruthSettings) -> list[ModelTask]:
    """The retrainings of the models that a predicate keeps; without models of which nothing can be left out.

    raises: InvalidValue for a predicate that cannot be used, or if nothing can be left out of any model; NotFound if no
            model fulfils the predicate
    """
    db.snapshot.check_predicate("samples", samples)
    db.snapshot.check_predicate("models", models, "models")
    known = sorted(row["model_id"] for row in db.snapshot.rows("models", models, ["model_id"]))
    if not known:
        raise NotFound(f"no model of {db.path} fulfils {models!r}; list them with: attrdb models list {db.path}")
    stored = {row["retraining_id"] for row in db.snapshot.rows("retrainings", columns=["retraining_id"])}
    found, reasons = [], []
    for model_id, exemplars in exemplar_rows(db, known).items():
        wanted = [Subset(NOTHING)]
        for each in dict.fromkeys(leave):
            try:
                wanted += subsets(exemplars, each, settings.halves, model_id)
            except InvalidValue as error:
                reasons.append(f"model {model_id!r} cannot be trained without {each}: {error}")
        if len(wanted) > 1:
            left = tuple(each for each in wanted if retraining_id(model_id, each, settings) not in stored)
            found.append(ModelTask(model_id, left, samples, settings))
    if not found:
        raise InvalidValue(reasons[0])
    return found


class TruthMaker(Maker):
    """Trains models again. Another process that is at the same model is waited for."""

    def make(self, task: ModelTask) -> Outcome:
        doing = f"model {task.model_id!r} is being trained again"
        with leased(lock_file(self.db_path, "truth", task.model_id), doing, self.lease_minutes) as lease:
            db = Database(self.db_path)
            stored = db.snapshot.rows("retrainings", f"model_id = {literal(task.model_id)}", ["retraining_id"])
            done = {row["retraining_id"] for row in stored}
            left = [each for each in task.left if retraining_id(task.model_id, each, task.settings) not in done]
            if not left:
                return Outcome("stored")
            model = Retrained(db, task.model_id, task.samples)
            for number, subset in enumerate(left):

                def beat_and_report(
                    stage: str, done: int, total: int | None, note: str = "", number: int = number
                ) -> None:
                    lease.beat(stage, done, total)
                    self.report(f"{task.model_id} {number + 1}/{len(left)} {stage}", done, total, note)

                self._retrain(db, model, subset, task.settings, beat_and_report)
        return Outcome("done")

    def _retrain(
        self, db: Database, model: Retrained, subset: Subset, settings: TruthSettings, report: Progress
    ) -> None:
        seed = None if settings.draws == "fixed" else settings.seed
        base = self.base_model.load(model.row["base_model"])
        truth = model.without(base, subset.left_out, seed, report)
        as_stored = model.is_stored(truth.delta) if seed is None and subset.leave == NOTHING else None
        _store(db, model, subset, settings, truth, as_stored)


def _store(
    db: Database, model: Retrained, subset: Subset, settings: TruthSettings, truth: Truth, as_stored: bool | None
) -> None:
    """Append the losses, then the retraining's row, with which they count."""
    model_id = model.row["model_id"]
    row: Row = {
        "retraining_id": retraining_id(model_id, subset, settings),
        "model_id": model_id,
        "leave": subset.leave,
        "name": subset.name,
        "draws": settings.draws,
        "seed": model.seed if settings.draws == "fixed" else settings.seed,
        "left_out": list(subset.left_out),
        "n_draws": DRAWS,
        "train_loss": truth.train_loss,
        "same_weights": as_stored,
        "seconds": truth.seconds,
        "created_at": datetime.now(UTC),
    }
    shared = {"retraining_id": row["retraining_id"], "model_id": model_id}
    losses = [shared | {"sample_id": sample_id, "loss": loss} for sample_id, loss in truth.losses.items()]
    rows = pa.Table.from_pylist(losses, TABLES["counterfactuals"])
    db.writer.append_rows(
        "counterfactuals", rows, db.snapshot, stale=f"retraining_id = {literal(row['retraining_id'])}"
    )
    db.writer.upsert("retrainings", [row])


def find_truth(
    db_path: Path,
    models: str,
    leave: Sequence[str],
    samples: str = "true",
    settings: TruthSettings | None = None,
    queue_settings: QueueSettings = DEFAULTS,
    report: Progress = no_progress,
) -> JobResult:
    """Train models again without some of their exemplars; a model that fails is recorded and stops no other.

    models:  predicate on the columns of `models`
    leave:   of image, concept, creator and half: what is left out, each in turn
    samples: predicate on the columns of images; which of a model's samples are measured
    returns: counts of models
    raises:  as `tasks`, and InvalidValue for settings out of bounds
    """
    settings = settings or TruthSettings()
    check_options(settings)
    check_options(queue_settings)
    db = Database(db_path)
    waiting = tasks(db, models, leave, samples, settings)
    job_settings = {"models": models, "leave": list(leave), "samples": samples, "draws": settings.draws}
    with jobs.running(db.writer, "truth", models, job_settings) as job:
        queue = Queue(waiting, job, report, queue_settings.retries)
        for task in queue.take_all({task.model_id for task in waiting if not task.left}):
            queue.settle(task, Outcome("stored"))
        new_maker = partial(TruthMaker, db_path, lease_minutes=queue_settings.lease_minutes)
        work_off(queue, executor_for(new_maker(report), new_maker, queue_settings))
    return queue.result
