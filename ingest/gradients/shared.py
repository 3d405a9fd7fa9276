"""Several gradient methods at once: what they share is computed once.

A sample's gradient takes as long as a step of training; a formula on inner products of gradients takes next to nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from attrdb.database import Database
from attrdb.errors import AttrdbError, InvalidValue, NotFound
from attrdb.ingest.customize.base_model import BaseModel, OneBaseModel
from attrdb.ingest.customize.customize import Delta
from attrdb.ingest.gradients.checkpoints import checkpoints
from attrdb.ingest.gradients.formulas import FORMULAS, Kernels, shares_with
from attrdb.ingest.gradients.model_gradients import (
    ModelGradients,
    differentiated,
    model_row,
    opened,
    pictures,
)
from attrdb.ingest.models.stages import record_tokens
from attrdb.ingest.monitor.files import read_gradients
from attrdb.ingest.prompts import with_caption
from attrdb.store.schema import Row

Gradients = list[torch.Tensor]  # by trained weight, flat; of several images (n, size)
Picture = tuple[Image.Image, str | None]  # with its prompt
MODELS_KEPT = 256  # whose scores wait to be asked for: a commit has samples of no more


@dataclass
class ModelScores:
    """Scores of a model's samples by several methods, until they are asked for.

    scores:    (n_exemplars,) by method and sample_id
    exemplars: image_ids, in the order of the scores
    failures:  by method, why it scores no sample of this model
    unscored:  by sample_id, why no method scores it
    """

    scores: dict[str, dict[str, np.ndarray]]
    exemplars: list[str] = field(default_factory=list)
    failures: dict[str, AttrdbError] = field(default_factory=dict)
    unscored: dict[str, str] = field(default_factory=dict)

    def holds(self, name: str, sample_ids: Sequence[str]) -> bool:
        return name in self.failures or set(sample_ids) <= self.scores[name].keys() | self.unscored.keys()


class SharedGradients:
    """Gradients over the same draws of noise, for methods that have them in common, see `shares_with`.

    names: of FORMULAS; whichever is asked first has the samples scored by all of them
    bases: the base model that others use too; None: its own
    """

    def __init__(self, n_draws: int, names: Sequence[str], bases: OneBaseModel | None = None):
        self.n_draws, self.names = n_draws, list(names)
        [(self.measured, self.at_checkpoints)] = {shares_with(name) for name in names}
        self._bases = bases or OneBaseModel()
        self._waiting: dict[tuple[str, str], ModelScores] = {}
        self._replayed: tuple[tuple[str, str], list[Delta]] | None = None

    def of_model(self, db: Database, model_id: str, sample_ids: Sequence[str], name: str) -> ModelScores:
        """The scores of a model's samples, among them those by one method: its caller takes them out."""
        key = str(db.path), model_id
        if key not in self._waiting or not self._waiting[key].holds(name, sample_ids):
            found = ModelScores({each: {} for each in self.names})
            try:
                self._score(db, model_id, sample_ids, found)
            except (InvalidValue, NotFound) as error:  # of this model: the others are scored
                found.failures |= dict.fromkeys(self.names, error)
            self._waiting.pop(key, None)
            self._waiting[key] = found
            while len(self._waiting) > MODELS_KEPT:
                del self._waiting[next(iter(self._waiting))]
        return self._waiting[key]

    def _score(self, db: Database, model_id: str, sample_ids: Sequence[str], found: ModelScores) -> None:
        """raises: InvalidValue or NotFound for a model whose weights, exemplars or base model are missing"""
        row, delta = model_row(db, model_id)
        exemplars = db.sql(EXEMPLARS, {"id": model_id}).to_pylist()
        base = self._bases.load(row["base_model"])
        stored = pictures(db, [*sample_ids, *(exemplar["image_id"] for exemplar in exemplars)])
        trained_on: dict[str, Picture] = {
            each["image_id"]: (
                stored[each["image_id"]][0],
                with_caption(each["train_prompt"], each["caption"], base.pipeline.tokenizer),
            )
            for each in exemplars
            if each["image_id"] in stored
        }
        if not trained_on:
            raise InvalidValue(f"model {model_id!r} has no exemplar whose picture is stored")
        found.exemplars = list(trained_on)
        found.unscored = {each: "its picture is not stored" for each in sample_ids if each not in stored}
        samples = {each: stored[each] for each in sample_ids if each in stored}
        moments = self._checkpoints(db, model_id, base) if self.at_checkpoints else [delta]
        of_run = self._of_run(db, row, delta, found)
        names = [name for name in self.names if name not in found.failures]
        if not names:
            return
        added: dict[tuple[str, str], list[np.ndarray]] = {}
        for moment in moments:
            with opened(base, row, moment, self.n_draws) as model:
                for pair, scores in self._at_moment(model, names, trained_on, of_run, samples).items():
                    added.setdefault(pair, []).append(scores)
        for (name, sample_id), of_moments in added.items():
            found.scores[name][sample_id] = np.mean(of_moments, axis=0)

    def _checkpoints(self, db: Database, model_id: str, base: BaseModel) -> list[Delta]:
        """Those of the last model are kept: it may be asked for in several parts."""
        key = str(db.path), model_id
        if self._replayed is None or self._replayed[0] != key:
            self._replayed = key, checkpoints(db, model_id, base)
        return self._replayed[1]

    def _of_run(self, db: Database, row: Row, delta: Delta, found: ModelScores) -> dict[str, torch.Tensor]:
        """(n, size) by trained weight: the exemplars' gradients, summed over all steps; empty where they are not needed."""
        if "in-run" not in self.names:
            return {}
        try:
            kept = read_gradients(db.path, row["weights_path"])
            weights = differentiated(delta, record_tokens(json.loads(row["settings"])))
            if kept.sums.keys() != weights.keys() or not set(found.exemplars) <= set(kept.exemplars):
                raise InvalidValue(
                    f"the gradients kept of model {row['model_id']!r} are not of its weights and exemplars"
                )
        except (InvalidValue, NotFound) as error:
            found.failures["in-run"] = error
            return {}
        order = [kept.exemplars.index(image_id) for image_id in found.exemplars]
        return {name: sums[order].flatten(1) for name, sums in kept.sums.items()}

    def _at_moment(
        self,
        model: ModelGradients,
        names: Sequence[str],
        exemplars: Mapping[str, Picture],
        of_run: Mapping[str, torch.Tensor],
        samples: Mapping[str, Picture],
    ) -> dict[tuple[str, str], np.ndarray]:
        """(n_exemplars,) by method and sample_id, with the weights of one moment."""
        sides = {FORMULAS[name].exemplars for name in names}
        multiplied = {"run": [of_run[name] for name in model.parameters]} if "run" in sides else {}
        if "moment" in sides:
            multiplied["moment"] = _of_images(model, exemplars, self.measured)
        squares = {side: _products(gradients, gradients) for side, gradients in multiplied.items()}
        sizes = np.array(model.sizes())
        found = {}
        for sample_id, (image, prompt) in samples.items():
            of_sample = [part[None] for part in model.of_image(image, prompt or "", self.measured)]
            square = float(sum(part.square().sum() for part in of_sample))
            kernels_of = {
                side: Kernels(squares[side], _products(gradients, of_sample)[:, :, 0], square, sizes)
                for side, gradients in multiplied.items()
            }
            for name in names:
                found[name, sample_id] = FORMULAS[name].scores(kernels_of[FORMULAS[name].exemplars])
        return found


def _of_images(model: ModelGradients, images: Mapping[str, Picture], measured: str) -> Gradients:
    """(n, size) by trained weight."""
    of_each = [model.of_image(image, prompt or "", measured) for image, prompt in images.values()]
    return [torch.stack(parts) for parts in zip(*of_each, strict=True)]


def _products(one: Gradients, other: Gradients) -> np.ndarray:
    """(n_layers, n, m) float64: inner products of n and m images' gradients."""
    return np.stack([(a @ b.T).double().numpy() for a, b in zip(one, other, strict=True)])


EXEMPLARS = """\
SELECT exemplars.image_id,
    coalesce(concepts.train_prompt, models.train_prompt, '{caption}') AS train_prompt,
    coalesce(exemplars.prompt, '') AS caption
FROM exemplars
JOIN models USING (model_id)
LEFT JOIN concepts ON concepts.concept_id = exemplars.concept_id
WHERE exemplars.model_id = $id
ORDER BY exemplars.image_id
"""
