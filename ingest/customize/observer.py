"""Observers of a customization: what `customize` reports while it trains.

An observer sees every step and changes nothing: the trained weights are the same, bit for bit, with one and without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from attrdb.ingest.customize.base_model import BaseModel
    from attrdb.ingest.options import CustomizeSettings

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """One customization. `weights`, `gradients` and `moments` may be called at any time and return copies.

    base:          the model in training. Hooks on `base.pipeline.unet` see every forward and backward pass. The text encoder
                   knows the new tokens as they are now, so that `encode_prompts` returns the prompt states of this step.
    method:        name of the customization method
    tokens:        the new tokens, one per concept; empty if there are none
    prompts:       the prompt of each exemplar
    prior_prompts: the prompt of each regularization image, empty if there are none
    n_views:       number of augmented views of each exemplar, see `augmentation.VIEWS`; a regularization image has one
    view_prompts:  the prompt of each view; view v of exemplar e has that of number e * n_views + v
    parameters:    the trained tensors themselves, by their names in the delta; not to be changed
    """

    base: BaseModel
    settings: CustomizeSettings
    method: str
    tokens: tuple[str, ...]
    prompts: tuple[str, ...]
    prior_prompts: tuple[str, ...]
    n_views: int
    view_prompts: tuple[str, ...]
    parameters: Mapping[str, torch.Tensor] = field(repr=False)
    _optimizer: torch.optim.AdamW = field(repr=False)

    @property
    def n_exemplars(self) -> int:
        return len(self.prompts)

    @property
    def optimizer_settings(self) -> dict[str, Any]:
        """AdamW's `lr`, `betas`, `eps` and `weight_decay`, among others; the same in every step."""
        return dict(self._optimizer.defaults)

    def weights(self) -> Tensors:
        """All trained parameters, float32, by their names in the delta."""
        return {name: weight.detach().clone() for name, weight in self.parameters.items()}

    def gradients(self) -> Tensors:
        """Gradients of this step's loss, float32, by parameter; without those that the loss does not depend on.

        Available in `before_update` and `after_update`, empty at other times.
        """
        return {name: weight.grad.clone() for name, weight in self.parameters.items() if weight.grad is not None}

    def moments(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Adam's running means of the gradient and of its square, float32, without bias correction, by parameter.

        Empty before the first update.
        """
        return {name: (state["exp_avg"].clone(), state["exp_avg_sq"].clone()) for name, state in self._states().items()}

    def squares(self) -> Tensors:
        """The second of `moments`, the tensors themselves; not to be changed."""
        return {name: state["exp_avg_sq"] for name, state in self._states().items()}

    def _states(self) -> dict[str, Tensors]:
        """The optimizer's, by parameter; without those that have no gradient yet."""
        states = {name: self._optimizer.state.get(weight) for name, weight in self.parameters.items()}
        return {name: state for name, state in states.items() if state}


@dataclass(frozen=True)
class Step:
    """One step. Its n slots are `settings.batch` exemplars, then as many regularization images if there are any.

    The loss is the mean of the exemplars' slot losses, plus `settings.prior_weight` times the mean of the others'.

    number:      of the step, from 0
    loss:        () float32: the loss that was differentiated; may be not finite, up to ten steps before training stops
    slot_losses: (n,) float32: mean squared error per slot, over the positions that count (see `Latents.seen`)
    is_exemplar: (n,) bool, on the CPU
    images:      (n,) int64, on the CPU: index of the exemplar, or of the regularization image
    views:       (n,) int64, on the CPU: index of the image's view
    timesteps:   (n,) int64: from 0 to the scheduler's num_train_timesteps - 1
    latents:     (n, channels, height, width) float32: the view, as drawn from the autoencoder's posterior, scaled as the
                 U-Net reads it, without noise
    noise:       (n, channels, height, width) float32, standard normal

    The noise scheduler's `add_noise(latents, noise, timesteps)` is what the U-Net saw. Tensors are on the model's device
    unless stated otherwise.
    """

    number: int
    loss: torch.Tensor
    slot_losses: torch.Tensor
    is_exemplar: torch.Tensor
    images: torch.Tensor
    views: torch.Tensor
    timesteps: torch.Tensor
    latents: torch.Tensor
    noise: torch.Tensor


class Observer(Protocol):
    """All functions are called under `torch.no_grad()`. An error that one of them raises ends the training.

    Per step: backward pass, `before_update`, optimizer, `after_update`. Both get the same `Step`.
    """

    def start(self, run: Run) -> None:
        """Before the first step; weights are those that training starts from. The place to register hooks."""

    def before_update(self, step: Step) -> None:
        """After the backward pass: gradients are those of this step, weights and moments those before its update."""

    def after_update(self, step: Step) -> None:
        """After the optimizer: gradients are still those of this step, weights and moments those after its update."""

    def end(self, error: BaseException | None) -> None:
        """Always called last, once, even if `start` raised. The place to remove hooks.

        error: what training raised; None if it succeeded, and the weights are then the final ones
        """


@contextmanager
def observing(observer: Observer | None, run: Run) -> Iterator[None]:
    """Call the observer's `start`, and its `end` whatever happens in between."""
    if observer is None:
        yield
        return
    error = None
    try:
        with torch.no_grad():
            observer.start(run)
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        with torch.no_grad():
            observer.end(error)
