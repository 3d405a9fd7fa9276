"""Methods that score the exemplars of a sample's own model by gradients, for `attrdb score DB NAME`.

    in-run              each exemplar's gradients over the whole training, times the sample's at its end; after Pruthi et al.
                        2020 (TracIn, every step a checkpoint) and Wang et al. 2024 (In-Run Data Shapley)
    gradient-dot        the exemplar's gradient at the end of training, times the sample's; TracIn with one checkpoint
    gradient-cosine     the same, without their lengths
    trac-in             the mean of gradient-dot over 5 checkpoints; training is done again for them
    influence-function  Koh and Liang 2017, with the empirical Fisher matrix for the Hessian
    d-trak              Zheng et al. 2024, without its random projection
    d-trak-layers       the same, layer by layer; ours
    data-inf            Kwon et al. 2024

NAME:N averages gradients over N timesteps and noises in place of 24. Their formulas are in `formulas`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import pyarrow as pa

from attrdb.database import Database
from attrdb.errors import InvalidValue
from attrdb.ingest.customize.base_model import OneBaseModel
from attrdb.ingest.customize.denoising import DRAWS
from attrdb.ingest.gradients.checkpoints import N_CHECKPOINTS
from attrdb.ingest.gradients.formulas import shares_with
from attrdb.ingest.gradients.shared import SharedGradients
from attrdb.store.predicates import among


class GradientScorer:
    """A `Scorer` of attrdb's own; raises InvalidValue for a number of draws that cannot be used.

    shared: gradients that other methods also need; None: it computes its own
    """

    lowest: float | None = None
    highest: float | None = None
    tau, lam = 1.0, 0.05

    def __init__(self, name: str, argument: str = "", shared: SharedGradients | None = None):
        self.name = name
        self.shared = shared or SharedGradients(n_draws(name, argument), [name])
        self.unit = "cosine" if name == "gradient-cosine" else "gradient product"
        if name == "gradient-cosine":
            self.lowest, self.highest, self.tau = -1.0, 1.0, 0.05
        self.settings: dict[str, Any] = {"draws": self.shared.n_draws}
        if name == "trac-in":
            self.settings["checkpoints"] = N_CHECKPOINTS
        self.unscored: dict[str, str] = {}

    def scores(self, db: Database, sample_ids: Sequence[str]) -> Iterable[pa.Table]:
        """The exemplars of each sample's own model. A sample that cannot be scored is in `unscored`, with the reason."""
        rows = db.images(among("image_id", sample_ids), ["image_id", "model_id"]).to_pylist()
        rows.sort(key=lambda row: (row["model_id"] or "", row["image_id"]))
        for model_id, group in groupby(rows, key=lambda row: row["model_id"]):
            ids = [row["image_id"] for row in group]
            found = self.shared.of_model(db, model_id, ids, self.name)
            if failure := found.failures.get(self.name):
                self.unscored |= dict.fromkeys(ids, str(failure))
                continue
            self.unscored |= found.unscored
            for sample_id in ids:
                if (scores := found.scores[self.name].pop(sample_id, None)) is not None:
                    yield pa.table(
                        {
                            "sample_id": [sample_id] * len(scores),
                            "candidate_id": found.exemplars,
                            "score": scores,
                        }
                    )


def gradient_scorers(specs: Sequence[str]) -> dict[str, GradientScorer]:
    """By spec, NAME or NAME:DRAWS; those that have gradients in common share them, and all share the base model."""
    bases, groups = OneBaseModel(), dict[Any, list[str]]()
    words = {spec: spec.partition(":") for spec in specs}
    key_of = {spec: (n_draws(name, argument), *shares_with(name)) for spec, (name, _, argument) in words.items()}
    for spec, (name, _, _) in words.items():
        groups.setdefault(key_of[spec], []).append(name)
    shared = {key: SharedGradients(key[0], names, bases) for key, names in groups.items()}
    return {spec: GradientScorer(name, argument, shared[key_of[spec]]) for spec, (name, _, argument) in words.items()}


def n_draws(name: str, argument: str) -> int:
    """raises: InvalidValue for a number that cannot be used"""
    if argument and not (argument.isascii() and argument.isdigit() and 0 < int(argument) <= 1000):
        raise InvalidValue(f"{name}:{argument} must have a number of draws after the colon, from 1 to 1000")
    return int(argument or DRAWS)
