"""Training a stored model again without some of its exemplars, and measuring how well it denoises its samples then."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from attrdb.database import Database
from attrdb.errors import InvalidValue
from attrdb.ingest.customize.base_model import BaseModel
from attrdb.ingest.customize.customize import Delta, Regularization, customize, encode_prompts
from attrdb.ingest.customize.denoising import DRAWS, Draws, denoised, latents_of
from attrdb.ingest.customize.observer import Observer
from attrdb.ingest.devices import enough_memory
from attrdb.ingest.models.exemplars import Exemplar
from attrdb.ingest.models.ingest_one import regularization_images
from attrdb.ingest.models.stages import exemplar_prompts, record_tokens
from attrdb.ingest.models.stored import check_base_model, stored_delta, stored_model, stored_settings
from attrdb.ingest.read.pictures import read_picture
from attrdb.progress import Progress, no_progress
from attrdb.store.predicates import among, literal
from attrdb.store.schema import Row


@dataclass(frozen=True)
class Truth:
    """A model without some of its exemplars.

    losses: by sample_id, the mean squared error of denoising over DRAWS noises; lower means that the model knows the sample
            better
    """

    losses: dict[str, float]
    train_loss: float
    delta: Delta
    seconds: float


class Retrained:
    """A stored model that is trained again, on a fresh base model that is left fresh. Its pictures are encoded once.

    row:       of the model
    exemplars: rows of its exemplars with image_id, concept_id, creator and picture, in the order of its training
    """

    def __init__(self, db: Database, model_id: str, samples: str = "true"):
        """samples: predicate that keeps the samples to be measured

        raises: NotFound for an unknown model, InvalidValue for one that cannot be trained again, or that has no sample
        """
        self.db = db
        self.row = stored_model(db, model_id, "it cannot be trained again")
        self.record: dict[str, Any] = json.loads(self.row["settings"])
        check_base_model(self.row)
        self.settings = stored_settings(self.record)
        self.exemplars = self._read_exemplars()
        where = f"model_id = {literal(model_id)} AND role = 'sample' AND image IS NOT NULL AND ({samples})"
        self.samples = sorted(
            db.images(where, ["image_id", "image", "prompt"]).to_pylist(), key=lambda sample: sample["image_id"]
        )
        if not self.samples:
            raise InvalidValue(f"model {model_id!r} has no sample to measure whose picture is stored")
        self._latents: dict[str, torch.Tensor] = {}
        self._regularization: Regularization | None = None

    @property
    def seed(self) -> int:
        return self.settings.customize.seed

    def _read_exemplars(self) -> list[Row]:
        """raises: InvalidValue if one was taken out, or its picture is not stored"""
        model_id = self.row["model_id"]
        where = f"model_id = {literal(model_id)} AND role = 'exemplar'"
        columns = ["image_id", "sha256", "concept_id", "creator", "image"]
        rows = {row["sha256"]: row for row in self.db.images(where, columns).to_pylist()}
        wanted = self.record["exemplars"]
        if gone := [sha256 for sha256 in wanted if rows.get(sha256, {}).get("image") is None]:
            raise InvalidValue(
                f"{len(gone)} of the {len(wanted)} exemplars of model {model_id!r} have no picture in {self.db.path}; to "
                "train it again, all of them are needed"
            )
        ordered = [rows[sha256] for sha256 in wanted]
        return [row | {"picture": read_picture(row["image_id"], row["image"])} for row in ordered]

    def without(self, base: BaseModel, left_out: Sequence[str], seed: int | None, report: Progress) -> Truth:
        """Train without some exemplars, given by image_id.

        seed: None: the draws of the model's own training, without those of the exemplars that are left out; else new draws
              for the other exemplars
        """
        started = time.monotonic()
        base.precision = self.record.get("computed_in", "float32")
        try:
            self._prepare(base, report)
            delta, figures = self._train(base, left_out, seed, report)
            losses = self._measure(base, report)
        finally:
            base.restore()
        return Truth(losses, figures["loss"], delta, time.monotonic() - started)

    def replay(self, base: BaseModel, observer: Observer) -> None:
        """Train as the model was trained, with its own draws and all exemplars; an observer is told of every step."""
        base.precision = self.record.get("computed_in", "float32")
        try:
            self._prepare_regularization(base, no_progress)
            self._train(base, [], None, no_progress, observer)
        finally:
            base.restore()

    def is_stored(self, delta: Delta) -> bool:
        """Whether weights are those of the stored model, bit for bit."""
        stored = stored_delta(self.db, self.row)
        return stored.keys() == delta.keys() and all(torch.equal(stored[name], delta[name]) for name in delta)

    def _prepare(self, base: BaseModel, report: Progress) -> None:
        """Encode samples, and prepare regularization images, with the fresh base model."""
        for number, sample in enumerate(self.samples):
            if sample["image_id"] not in self._latents:
                image = read_picture(sample["image_id"], sample["image"]).image
                self._latents[sample["image_id"]] = latents_of(base, image)
                report("encode", number + 1, len(self.samples))
        self._prepare_regularization(base, report)

    def _prepare_regularization(self, base: BaseModel, report: Progress) -> None:
        """Read or generate regularization images, with the fresh base model."""
        if self.settings.customize.prior_images and self._regularization is None:
            tokens = self.record.get("exemplar_tokens", [None] * len(self.exemplars))
            exemplars = [
                Exemplar(row["picture"], token=token) for row, token in zip(self.exemplars, tokens, strict=True)
            ]
            self._regularization = regularization_images(
                self.db, base, exemplars, self.settings, [], self.record, report
            )

    def _train(
        self,
        base: BaseModel,
        left_out: Sequence[str],
        seed: int | None,
        report: Progress,
        observer: Observer | None = None,
    ) -> tuple[Delta, dict[str, Any]]:
        prompts, tokens = exemplar_prompts(self.record, base.pipeline.tokenizer), record_tokens(self.record)
        each = [prompts] * len(self.exemplars) if isinstance(prompts, str) else prompts
        gone = {number for number, row in enumerate(self.exemplars) if row["image_id"] in left_out}
        settings = self.settings.customize
        kept = list(range(len(self.exemplars)))
        if seed is not None:
            kept, gone = [number for number in kept if number not in gone], set()
            settings = replace(settings, seed=seed)
        return customize(
            base,
            [self.exemplars[number]["picture"].image for number in kept],
            [each[number] for number in kept],
            list(tokens),
            list(tokens.values()),
            settings,
            report,
            method=self.row["method"],
            regularization=self._regularization,
            gradient_checkpointing=self.record.get("gradient_checkpointing", False),
            observer=observer,
            left_out=gone,
        )

    @torch.no_grad()
    def _measure(self, base: BaseModel, report: Progress) -> dict[str, float]:
        draws = Draws.of(base, DRAWS)
        states = encode_prompts(base, [sample["prompt"] or "" for sample in self.samples])
        losses = {}
        for number, sample in enumerate(self.samples):
            with enough_memory(base.device, f"denoising {DRAWS} pictures at a time", "measure on a larger device"):
                latents = self._latents[sample["image_id"]]
                predicted, target = denoised(base, draws, latents, states[sample["prompt"] or ""].unsqueeze(0))
            losses[sample["image_id"]] = float((predicted - target).square().mean())
            report("measure", number + 1, len(self.samples))
        return losses


def exemplar_rows(db: Database, model_ids: Sequence[str]) -> Mapping[str, list[Row]]:
    """The exemplars of models: image_id, concept_id and creator, by model_id."""
    columns = ["model_id", "image_id", "concept_id", "creator"]
    found: dict[str, list[Row]] = {model_id: [] for model_id in model_ids}
    for row in db.images(f"{among('model_id', model_ids)} AND role = 'exemplar'", columns).to_pylist():
        found[row["model_id"]].append(row)
    return found
