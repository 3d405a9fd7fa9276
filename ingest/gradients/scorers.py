"""Methods that score the exemplars of a sample's own model by gradients, for `attrdb score DB NAME`.

    in-run              each exemplar's gradients over the whole training, times the sample's at its end; after Pruthi et al.
                        2020 (TracIn, every step a checkpoint) and Wang et al. 2024 (In-Run Data Shapley)
    gradient-dot        the exemplar's gradient at the end of training, times the sample's; TracIn with one checkpoint
    gradient-cosine     the same, without their lengths
    trac-in             the mean of gradient-dot over 5 checkpoints; training is done again for them
    influence-function  Koh and Liang 2017, with the empirical Fisher matrix for the Hessian
    d-trak              Zheng et al. 2024, without its random projection
    data-inf            Kwon et al. 2024

NAME:N averages gradients over N timesteps and noises in place of 24.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from attrdb.database import Database
from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.customize.base_model import BaseModel, OneBaseModel
from attrdb.ingest.customize.customize import Delta
from attrdb.ingest.customize.denoising import DRAWS
from attrdb.ingest.gradients import kernels
from attrdb.ingest.gradients.checkpoints import N_CHECKPOINTS, checkpoints
from attrdb.ingest.gradients.model_gradients import LOSS, SQUARE, ModelGradients, model_row, opened, pictures
from attrdb.ingest.monitor.files import read_gradients
from attrdb.store.predicates import among
from attrdb.store.schema import Row

Gradients = list[torch.Tensor]  # by trained weight, flat; of several images (n, size)


@dataclass(frozen=True)
class Kernels:
    """Inner products by layer: of the exemplars (n_layers, n, n), of a sample with them (n_layers, n), and with itself."""

    exemplars: np.ndarray
    sample: np.ndarray
    sample_square: float
    sizes: np.ndarray

    @property
    def whole(self) -> tuple[np.ndarray, np.ndarray]:
        return self.exemplars.sum(axis=0), self.sample.sum(axis=0)


Formula = Callable[[Kernels], np.ndarray]
FORMULAS: dict[str, tuple[str, Formula]] = {
    "in-run": (LOSS, lambda k: k.whole[1]),
    "gradient-dot": (LOSS, lambda k: k.whole[1]),
    "trac-in": (LOSS, lambda k: k.whole[1]),
    "gradient-cosine": (LOSS, lambda k: kernels.cosine(*k.whole, k.sample_square**0.5)),
    "influence-function": (LOSS, lambda k: kernels.inverse(*k.whole)),
    "d-trak": (SQUARE, lambda k: kernels.inverse(*k.whole)),
    "data-inf": (LOSS, lambda k: kernels.data_inf(k.exemplars, k.sample, k.sizes)),
}


class GradientScorer:
    """A `Scorer` of attrdb's own; raises InvalidValue for a number of draws that cannot be used."""

    lowest: float | None = None
    highest: float | None = None
    tau, lam = 1.0, 0.05

    def __init__(self, name: str, argument: str = ""):
        if argument and not (argument.isascii() and argument.isdigit() and 0 < int(argument) <= 1000):
            raise InvalidValue(f"{name}:{argument} must have a number of draws after the colon, from 1 to 1000")
        self.name, self.n_draws = name, int(argument or DRAWS)
        self.measured, self.formula = FORMULAS[name]
        self.unit = "cosine" if name == "gradient-cosine" else "gradient product"
        if name == "gradient-cosine":
            self.lowest, self.highest, self.tau = -1.0, 1.0, 0.05
        self.settings: dict[str, Any] = {"draws": self.n_draws}
        if name == "trac-in":
            self.settings["checkpoints"] = N_CHECKPOINTS
        self.bases = OneBaseModel()
        self.unscored: dict[str, str] = {}
        self.replayed: tuple[str, list[Delta]] | None = None

    def scores(self, db: Database, sample_ids: Sequence[str]) -> Iterable[pa.Table]:
        """The exemplars of each sample's own model. A sample that cannot be scored is in `unscored`, with the reason."""
        rows = db.images(among("image_id", sample_ids), ["image_id", "model_id"]).to_pylist()
        rows.sort(key=lambda row: (row["model_id"] or "", row["image_id"]))
        for model_id, group in groupby(rows, key=lambda row: row["model_id"]):
            ids = [row["image_id"] for row in group]
            try:
                yield from self._of_model(db, model_id, ids)
            except (InvalidValue, NotFound) as error:  # of this model: the others are scored
                self.unscored |= dict.fromkeys(ids, str(error))

    def _of_model(self, db: Database, model_id: str, sample_ids: Sequence[str]) -> Iterable[pa.Table]:
        """raises: InvalidValue or NotFound for a model whose weights, exemplars, base model or gradients are missing"""
        row, delta = model_row(db, model_id)
        exemplars = db.sql(EXEMPLARS, {"id": model_id}).to_pylist()
        stored = pictures(db, [*sample_ids, *(exemplar["image_id"] for exemplar in exemplars)])
        exemplars = [exemplar for exemplar in exemplars if exemplar["image_id"] in stored]
        if not exemplars:
            raise InvalidValue(f"model {model_id!r} has no exemplar whose picture is stored")
        base = self.bases.load(row["base_model"])
        moments = self._checkpoints(db, model_id, base) if self.name == "trac-in" else [delta]
        scores: dict[str, list[np.ndarray]] = {}
        for moment in moments:
            with opened(base, row, moment, self.n_draws) as model:
                of_exemplars = self._of_exemplars(db, row, model, exemplars, stored)
                for sample_id, found in self._kernels(model, of_exemplars, sample_ids, stored):
                    scores.setdefault(sample_id, []).append(self.formula(found))
        for sample_id, of_sample in scores.items():
            yield pa.table(
                {
                    "sample_id": [sample_id] * len(exemplars),
                    "candidate_id": [exemplar["image_id"] for exemplar in exemplars],
                    "score": np.mean(of_sample, axis=0),
                }
            )

    def _checkpoints(self, db: Database, model_id: str, base: BaseModel) -> list[Delta]:
        """Those of the last model are kept: `scores` may be asked for its samples in several parts."""
        if self.replayed is None or self.replayed[0] != model_id:
            self.replayed = model_id, checkpoints(db, model_id, base)
        return self.replayed[1]

    def _kernels(
        self, model: ModelGradients, of_exemplars: Gradients, sample_ids: Sequence[str], stored: dict[str, Any]
    ) -> Iterator[tuple[str, Kernels]]:
        """Of each sample whose picture is stored."""
        squares = _products(of_exemplars, of_exemplars)
        for sample_id in sample_ids:
            if sample_id not in stored:
                self.unscored[sample_id] = "its picture is not stored"
                continue
            image, prompt = stored[sample_id]
            of_sample = [part[None] for part in model.of_image(image, prompt or "", self.measured)]
            yield (
                sample_id,
                Kernels(
                    squares,
                    _products(of_exemplars, of_sample)[:, :, 0],
                    float(sum(part.square().sum() for part in of_sample)),
                    np.array(model.sizes()),
                ),
            )

    def _of_exemplars(
        self, db: Database, row: Row, model: ModelGradients, exemplars: list[Row], stored: dict[str, Any]
    ) -> Gradients:
        """(n, size) by trained weight."""
        if self.name == "in-run":
            kept = read_gradients(db.path, row["weights_path"])
            ids = [exemplar["image_id"] for exemplar in exemplars]
            if kept.sums.keys() != model.parameters.keys() or not set(ids) <= set(kept.exemplars):
                raise InvalidValue(
                    f"the gradients kept of model {row['model_id']!r} are not of its weights and exemplars"
                )
            order = [kept.exemplars.index(image_id) for image_id in ids]
            return [kept.sums[name][order].flatten(1) for name in model.parameters]
        of_each = [
            model.of_image(stored[exemplar["image_id"]][0], exemplar["train_prompt"], self.measured)
            for exemplar in exemplars
        ]
        return [torch.stack(parts) for parts in zip(*of_each, strict=True)]


EXEMPLARS = """\
SELECT exemplars.image_id, coalesce(concepts.train_prompt, models.train_prompt, exemplars.prompt) AS train_prompt
FROM exemplars
JOIN models USING (model_id)
LEFT JOIN concepts ON concepts.concept_id = exemplars.concept_id
WHERE exemplars.model_id = $id
ORDER BY exemplars.image_id
"""


def _products(one: Gradients, other: Gradients) -> np.ndarray:
    """(n_layers, n, m) float64: inner products of n and m images' gradients."""
    return np.stack([(a @ b.T).double().numpy() for a, b in zip(one, other, strict=True)])
