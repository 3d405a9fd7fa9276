"""The steps of a customization: draw a batch, compute its loss, update the trained weights.

All of it works on latents and prompts that `customize` has encoded before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NoReturn, Protocol

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from attrdb.errors import InvalidValue
from attrdb.ingest.customize.augmentation import Latents
from attrdb.ingest.customize.base_model import BaseModel
from attrdb.ingest.customize.observer import Observer, Step
from attrdb.progress import Progress

if TYPE_CHECKING:
    from attrdb.ingest.options import CustomizeSettings

CHECK_EVERY = 10  # steps between checks of the losses: on a GPU a check waits for all computations so far


class Diverged(InvalidValue):
    """Training whose loss or weights are no longer finite.

    delta:   trained weights after the last step known to be good
    n_steps: number of that step, from 1; 0 before the first
    losses:  one per step up to that one, all finite
    """

    def __init__(self, problem: str, delta: dict[str, torch.Tensor], losses: list[float]):
        super().__init__(problem)
        self.delta, self.losses, self.n_steps = delta, losses, len(losses)


# --- what batches are drawn from --------------------------------------------------------------------------------------


class Prompts(Protocol):
    def states(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, length, width) float32, states of the prompts of n views; (1, length, width) if all views share one.

        rows: (n,) int64, on the CPU: the views, by their rows in `Latents`
        """


@dataclass(frozen=True)
class FixedPrompts:
    """Prompts whose states are the same in every step.

    encoded:   (n_distinct, length, width) float32
    prompt_of: (n_views,) int64, on the CPU: index of each view's prompt
    """

    encoded: torch.Tensor
    prompt_of: torch.Tensor

    def states(self, rows: torch.Tensor) -> torch.Tensor:
        return self.encoded[self.prompt_of[rows]]


@dataclass(frozen=True)
class TrainedPrompts:
    """Prompts with a token that is being trained: they are encoded anew in every step.

    token_ids: (n_distinct, length) int64
    prompt_of: (n_views,) int64, on the CPU: index of each view's prompt
    """

    text_encoder: torch.nn.Module
    token_ids: torch.Tensor
    prompt_of: torch.Tensor

    def states(self, rows: torch.Tensor) -> torch.Tensor:
        if len(self.token_ids) == 1:
            return self.text_encoder(self.token_ids).last_hidden_state
        distinct, row_of = self.prompt_of[rows].unique(return_inverse=True)
        return self.text_encoder(self.token_ids[distinct]).last_hidden_state[row_of]


@dataclass(frozen=True)
class ImageSet:
    """Encoded images with their prompts: the exemplars, or the regularization images."""

    latents: Latents
    prompts: Prompts


# --- one batch --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """Slots of a batch, drawn from one image set: fields as those of `observer.Step`, and of the drawn views `seen`."""

    images: torch.Tensor
    views: torch.Tensor
    timesteps: torch.Tensor
    latents: torch.Tensor
    noise: torch.Tensor
    seen: torch.Tensor | None

    def without(self, left_out: Collection[int]) -> Draw:
        """The slots of the other images."""
        if not left_out:
            return self
        kept = ~torch.isin(self.images, torch.tensor(sorted(left_out)))
        parts = {member.name: getattr(self, member.name) for member in fields(self)}
        return Draw(**{name: part if part is None else part[kept.to(part.device)] for name, part in parts.items()})


def draw_slots(latents: Latents, n_slots: int, n_timesteps: int, generator: torch.Generator) -> Draw:
    """Draw views, latents, noise and timesteps. Chance is drawn on the CPU, so that it is the same on every device."""
    device = latents.mean.device
    rows = torch.randint(len(latents.mean), (n_slots,), generator=generator)
    shape = (n_slots, *latents.mean.shape[1:])
    posterior, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    return Draw(
        images=rows // latents.n_views,
        views=rows % latents.n_views,
        timesteps=torch.randint(n_timesteps, (n_slots,), generator=generator).to(device),
        latents=latents.mean[rows] + latents.deviation[rows] * posterior,
        noise=noise,
        seen=None if latents.seen is None else latents.seen[rows],
    )


@dataclass(frozen=True)
class Prediction:
    """The U-Net's output for the slots of one draw, and what it should be: (n, channels, height, width) float32.

    seen: (n, 1, height, width) float32: 1 for positions that count, 0 for others; None if all count
    """

    predicted: torch.Tensor
    target: torch.Tensor
    seen: torch.Tensor | None

    def loss(self) -> torch.Tensor:
        """() float32: mean of the slot losses."""
        if self.seen is None:
            return F.mse_loss(self.predicted, self.target)
        return self.slot_losses().mean()

    def slot_losses(self) -> torch.Tensor:
        """(n,) float32: mean squared error of each slot over the positions that count."""
        error = ((self.predicted - self.target) ** 2).mean(dim=1, keepdim=True)
        if self.seen is None:
            return error.mean(dim=(1, 2, 3))
        return (error * self.seen).sum(dim=(1, 2, 3)) / self.seen.sum(dim=(1, 2, 3))


class Batches:
    """Draws batches, of exemplars and of regularization images if there are any, and predicts them.

    left_out: exemplars whose slots are taken out of every batch; the others see what they would see beside them
    """

    def __init__(
        self,
        base: BaseModel,
        settings: CustomizeSettings,
        exemplars: ImageSet,
        prior: ImageSet | None,
        left_out: Collection[int] = (),
    ):
        self.base, self.settings, self.left_out = base, settings, left_out
        self.image_sets = [exemplars] if prior is None else [exemplars, prior]
        self.scheduler = DDPMScheduler.from_config(base.pipeline.scheduler.config)
        self.generator = torch.Generator().manual_seed(settings.seed)

    def draw(self) -> list[Draw]:
        """One draw per image set, exemplars first."""
        n_timesteps = self.scheduler.config.num_train_timesteps
        exemplars, *prior = (
            draw_slots(images.latents, self.settings.batch, n_timesteps, self.generator) for images in self.image_sets
        )
        return [exemplars.without(self.left_out), *prior]

    def predict(self, draws: list[Draw]) -> list[Prediction]:
        """One prediction per draw, all of one forward pass."""
        latents, noise, timesteps = (
            torch.cat([getattr(draw, name) for draw in draws]) for name in ("latents", "noise", "timesteps")
        )
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        is_v = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, timesteps) if is_v else noise
        predicted = self.base.predict(noisy, timesteps, self._states(draws))
        n_slots = [len(draw.images) for draw in draws]
        parts = zip(predicted.split(n_slots), target.split(n_slots), draws, strict=True)
        return [Prediction(output, wanted, draw.seen) for output, wanted, draw in parts]

    def _states(self, draws: list[Draw]) -> torch.Tensor:
        """(n_slots or 1, length, width) float32."""
        parts = [
            images.prompts.states(draw.images * images.latents.n_views + draw.views)
            for images, draw in zip(self.image_sets, draws, strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([states.expand(len(draw.images), -1, -1) for states, draw in zip(parts, draws, strict=True)])

    def loss(self, predictions: list[Prediction]) -> torch.Tensor:
        """() float32: the exemplars' loss, plus `prior_weight` times that of the regularization images."""
        exemplars, *prior = (prediction.loss() for prediction in predictions)
        return exemplars + self.settings.prior_weight * prior[0] if prior else exemplars


# --- all steps --------------------------------------------------------------------------------------------------------


def new_optimizer(parameters: Mapping[str, torch.Tensor], lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(list(parameters.values()), lr=lr, weight_decay=0.01, fused=True)


def take_steps(
    batches: Batches,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.AdamW,
    report: Progress,
    observer: Observer | None,
) -> list[float]:
    """Train `parameters` for all steps of the settings; returns the loss of each step.

    A step whose batch has no exemplar, because all that it drew are left out, is skipped.
    raises: InvalidValue if all steps were; Diverged, with the parameters as they were after the last step known to be good
    """
    settings = batches.settings
    check = LossCheck(parameters, settings.lr)
    for number in range(settings.steps):
        draws = batches.draw()
        if not len(draws[0].images):
            continue
        predictions = batches.predict(draws)
        loss = batches.loss(predictions)
        loss.backward()
        check.add(loss.detach())
        if observer is None:
            optimizer.step()
        else:
            step = observed_step(number, loss, draws, predictions)
            with torch.no_grad():
                observer.before_update(step)
            optimizer.step()
            with torch.no_grad():
                observer.after_update(step)
        optimizer.zero_grad()
        report("customize", number + 1, settings.steps)
    if not check.losses and not check.unchecked:
        raise InvalidValue(f"none of {settings.steps} steps drew an exemplar that is kept; train for more steps")
    return check.finish()


@torch.no_grad()
def observed_step(number: int, loss: torch.Tensor, draws: list[Draw], predictions: list[Prediction]) -> Step:
    """A step as its observer sees it; training does not use its tensors again."""
    from_draws = {
        name: torch.cat([getattr(draw, name) for draw in draws])
        for name in ("images", "views", "timesteps", "latents", "noise")
    }
    return Step(
        number=number,
        loss=loss.detach().clone(),
        slot_losses=torch.cat([prediction.slot_losses() for prediction in predictions]),
        is_exemplar=torch.cat([torch.full((len(draw.images),), draw is draws[0]) for draw in draws]),
        **from_draws,
    )


class LossCheck:
    """Checks the losses every CHECK_EVERY steps, and keeps the parameters that the last finite one was computed with."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], lr: float):
        self.parameters, self.lr = parameters, lr
        self.good, self.n_good = copies(parameters), 0
        self.losses: list[float] = []
        self.unchecked: list[torch.Tensor] = []

    def add(self, loss: torch.Tensor) -> None:
        """Add the loss of a step whose update is still to come."""
        self.unchecked.append(loss)
        if len(self.unchecked) == CHECK_EVERY:
            self._check()
            self.good, self.n_good = copies(self.parameters), len(self.losses) - 1

    def finish(self) -> list[float]:
        """The losses of all steps; called after the last update."""
        if self.unchecked:
            self._check()
        if not all(weight.isfinite().all() for weight in self.parameters.values()):
            self._stop("in the last step (weights that are not finite)")
        return self.losses

    def _check(self) -> None:
        for loss in torch.stack(self.unchecked).tolist():
            if not math.isfinite(loss):
                self._stop(f"at step {len(self.losses) + 1} (loss {loss})")
            self.losses.append(loss)
        self.unchecked.clear()

    def _stop(self, where: str) -> NoReturn:
        for name, weight in self.parameters.items():
            weight.data.copy_(self.good[name])
        problem = f"training diverged {where}; lower the learning rate ({self.lr:g} now)"
        delta = {name: weight.cpu() for name, weight in self.good.items()}
        raise Diverged(problem, delta, self.losses[: self.n_good])


def copies(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in parameters.items()}
