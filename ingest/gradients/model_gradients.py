"""Gradients of a stored model's loss on single images, at the end of its training."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from PIL import Image

from attrdb.database import Database
from attrdb.ingest.customize.base_model import BaseModel
from attrdb.ingest.customize.customize import Delta, encode_prompts, prompt_states, token_keys, trained_model
from attrdb.ingest.customize.denoising import DRAWS, Draws, denoised, latents_of
from attrdb.ingest.devices import enough_memory
from attrdb.ingest.models.stages import record_tokens
from attrdb.ingest.models.stored import check_base_model, stored_delta, stored_model
from attrdb.store.predicates import among
from attrdb.store.schema import Row

LOSS, SQUARE = MEASURED = ("loss", "square")


class ModelGradients:
    """A customized model whose trained weights can be differentiated; made by `opened`."""

    def __init__(self, base: BaseModel, parameters: dict[str, torch.Tensor], tokens: Sequence[str], draws: Draws):
        self.base, self.draws = base, draws
        self.parameters = differentiated(parameters, tokens)
        self.trains_tokens = self.parameters.keys() <= set(token_keys(tokens).values())

    def sizes(self) -> list[int]:
        return [weight.numel() for weight in self.parameters.values()]

    def of_image(self, image: Image.Image, prompt: str, measured: str) -> list[torch.Tensor]:
        """By trained weight, flat, float32 on the CPU: the gradient of a picture's mean over the draws.

        measured: 'loss' of the prediction, or 'square', the mean square of what the U-Net predicts
        """
        latents = latents_of(self.base, image)
        n_draws = len(self.draws.timesteps)
        with enough_memory(self.base.device, f"differentiating {n_draws} noisy pictures at a time", "give fewer draws"):
            predicted, target = denoised(self.base, self.draws, latents, self._states(prompt))
            value = predicted.square().mean() if measured == SQUARE else F.mse_loss(predicted, target)
            gradients = torch.autograd.grad(
                value, list(self.parameters.values()), allow_unused=True, materialize_grads=True
            )
        return [gradient.float().flatten().cpu() for gradient in gradients]

    def _states(self, prompt: str) -> torch.Tensor:
        """(1, length, width), with a gradient where the token alone is trained."""
        if not self.trains_tokens:
            return encode_prompts(self.base, [prompt])[prompt].unsqueeze(0)
        return prompt_states(self.base, prompt).unsqueeze(0)


def differentiated(weights: dict[str, torch.Tensor], tokens: Iterable[str]) -> dict[str, torch.Tensor]:
    """The trained weights without the tokens' embeddings; these alone, where nothing else is trained."""
    keys = token_keys(list(tokens)).values()
    return {name: weight for name, weight in weights.items() if name not in keys} or weights


def model_row(db: Database, model_id: str) -> tuple[Row, Delta]:
    """The row of a stored model, and its trained weights.

    raises: NotFound for an unknown model or a base model that is not where the row says, InvalidValue if the weights are
            missing or have changed, or the base model is another one now
    """
    row = stored_model(db, model_id, "it has no gradients")
    check_base_model(row)
    return row, stored_delta(db, row)


@contextmanager
def opened(base: BaseModel, row: Row, delta: Delta, n_draws: int = DRAWS) -> Iterator[ModelGradients]:
    """A stored model on a fresh base model, which is left fresh."""
    record = json.loads(row["settings"])
    base.precision = record.get("computed_in", "float32")
    tokens = record_tokens(record)
    with trained_model(base, delta, tokens, row["method"]) as parameters:
        yield ModelGradients(base, parameters, list(tokens), Draws.of(base, n_draws))


def pictures(db: Database, image_ids: Sequence[str]) -> dict[str, tuple[Image.Image, str | None]]:
    """The picture and the prompt column of stored images, by id; without those whose picture is not stored."""
    rows = db.images(f"{among('image_id', image_ids)} AND image IS NOT NULL", ["image_id", "image", "prompt"])
    return {
        row["image_id"]: (Image.open(io.BytesIO(row["image"])).convert("RGB"), row["prompt"])
        for row in rows.to_pylist()
    }
