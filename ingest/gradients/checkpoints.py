"""A stored model at several moments of its training, which is done again for that: attrdb keeps the last weights alone."""

from __future__ import annotations

from attrdb.database import Database
from attrdb.errors import InvalidValue
from attrdb.ingest.customize.base_model import BaseModel
from attrdb.ingest.customize.customize import Delta
from attrdb.ingest.customize.observer import Run, Step
from attrdb.ingest.truth.retrain import Retrained

N_CHECKPOINTS = 5


class _Kept:
    """An observer that keeps the weights after some steps, at equal distances; the last are those at the end."""

    def __init__(self, n: int):
        self.n, self.deltas = n, list[Delta]()

    def start(self, run: Run) -> None:
        steps = run.settings.steps
        self.run, self.after = run, {steps * number // self.n for number in range(1, self.n + 1)}

    def before_update(self, step: Step) -> None:
        pass

    def after_update(self, step: Step) -> None:
        if step.number + 1 in self.after:
            self.deltas.append({name: weight.cpu() for name, weight in self.run.weights().items()})

    def end(self, error: BaseException | None) -> None:
        pass


def checkpoints(db: Database, model_id: str, base: BaseModel, n: int = N_CHECKPOINTS) -> list[Delta]:
    """The weights of a model after each n-th part of its training, the end included; fewer than n for fewer steps.

    base:   fresh, and left fresh
    raises: as `Retrained`, and InvalidValue if this machine does not make the stored weights again
    """
    kept, model = _Kept(n), Retrained(db, model_id)
    model.replay(base, kept)
    if not model.is_stored(kept.deltas[-1]):
        raise InvalidValue(
            f"trained again, model {model_id!r} gets other weights here; score it on the machine that made it, with the same "
            "number of threads"
        )
    return kept.deltas
