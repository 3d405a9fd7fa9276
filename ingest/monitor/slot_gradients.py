"""Gradients of every slot of a batch, by trained weight, from the one backward pass that training makes anyway."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from attrdb.ingest.customize.customize import token_ids
from attrdb.ingest.customize.observer import Run, Step, Tensors
from attrdb.ingest.monitor.flat import Flat
from attrdb.ingest.monitor.projections import (
    Plain,
    Projection,
    all_read_prompt,
    prompt_projections,
    trained_projections,
    trained_tokens,
)

Target = tuple[torch.Tensor, float]  # a vector of all weights, and a factor of what is added to it


class Slots(Protocol):
    """The gradients of a step's slots."""

    def norms(self) -> torch.Tensor:
        """(n_slots,) float32"""
        ...

    def add(self, slots: Sequence[int], targets: Sequence[Target]) -> None:
        """Add the gradients of some slots to each vector, times its factor."""
        ...


@dataclass(frozen=True)
class Dense:
    """gradients: (n_slots, size) float32"""

    gradients: torch.Tensor

    def norms(self) -> torch.Tensor:
        return self.gradients.norm(dim=1)

    def add(self, slots: Sequence[int], targets: Sequence[Target]) -> None:
        _add(self.gradients[slots].sum(dim=0), targets)


@dataclass(frozen=True)
class Factored:
    """Gradients as products that are made only where they are added: of K and V they have five to ten times as many numbers.

    outputs: G (n_slots, positions, out), of all layers side by side, in the order of `Flat`
    inputs:  x (n_slots, positions, in), the same of all layers; the gradient of slot b is G_b^T x_b
    """

    outputs: torch.Tensor
    inputs: torch.Tensor

    def norms(self) -> torch.Tensor:
        """|G^T x|^2 is the sum over all pairs of positions p and q of <G_p, G_q> <x_p, x_q>."""
        g, x = self.outputs, self.inputs
        return ((g @ g.mT) * (x @ x.mT)).sum(dim=(1, 2)).clamp_min(0).sqrt()

    def add(self, slots: Sequence[int], targets: Sequence[Target]) -> None:
        g, x = (tensor[slots].flatten(0, 1) for tensor in (self.outputs, self.inputs))
        _add((g.T @ x).flatten(), targets)


def _add(total: torch.Tensor, targets: Sequence[Target]) -> None:
    for vector, factor in targets:
        vector.add_(total, alpha=factor)


@dataclass
class Pass:
    """The factors of one pass over the layers. given: their input as it was; written: weights that have their G"""

    given: torch.Tensor
    factored: Factored
    written: set[str]

    def takes(self, name: str, given: torch.Tensor) -> bool:
        """Whether a layer that was given this input belongs to it."""
        same = given.data_ptr() == self.given.data_ptr() and given.shape == self.given.shape
        return same and name not in self.written


class SlotGradients:
    """Hooks on the layers that are trained; `take` gives the gradients of the last backward pass.

    watched: the trained weights whose gradients it gives: those of the U-Net, or of tokens where these alone are trained

    A layer of weight W has, for slot b, the gradient G_b^T x_b: G_b is the gradient of the loss with respect to the slot's
    output, x_b its input. Where one prompt is shown to all slots, the layer's output is copied for each of them behind the
    layer, so that each copy has a gradient of its own. Values and weights stay the same, bit for bit.

    Of K and V, which all read the prompt, G and x are kept as they are. Other layers are many and small; their gradients are
    made at once.

    raises: InvalidValue, as `trained_projections`
    """

    def __init__(self, run: Run):
        self.run = run
        self.n_slots = run.settings.batch * (2 if run.prior_prompts else 1)
        trained = trained_projections(run)
        self.of_prompts = prompt_projections(run, trained)
        self.watches_tokens = not trained
        self.tokens = trained_tokens(run)
        keys = set(self.tokens.values())
        self.watched = {
            name: weight for name, weight in run.parameters.items() if self.watches_tokens or name not in keys
        }
        self.flat = Flat(self.watched)
        self.is_factored = all_read_prompt(run, trained)
        self.passes: list[Pass] = []  # of a step
        self.dense = torch.empty(0 if self.is_factored else self.n_slots, self.flat.size, device=run.base.device)
        self.views, self.written = self.flat.views(self.dense), set[str]()
        self.of_states: torch.Tensor | None = None  # (n_slots, length, width)
        self.hooks = [
            projection.layer.register_forward_hook(
                lambda _, inputs, output, projection=projection: self._watch(projection, inputs[0], output)
            )
            for projection in trained or self.of_prompts
        ]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def take(self, step: Step) -> Slots:
        """The gradients of the step's slots, until the next step; they add up to those of the step's loss."""
        if self.is_factored:
            passes = [one.factored for one in self.passes]
            self.passes.clear()
            if len(passes) == 1:
                return passes[0]
            if not passes:  # the loss depends on no layer
                return Dense(self.dense.new_zeros(self.n_slots, self.flat.size))
            outputs = torch.cat([one.outputs for one in passes], dim=1)
            return Factored(outputs, torch.cat([one.inputs for one in passes], dim=1))
        if self.of_states is not None:
            self._write(self._of_tokens(step, self.of_states))
            self.of_states = None
        for name in self.views.keys() - self.written:  # the loss does not depend on it
            self.views[name].zero_()
        self.written.clear()
        return Dense(self.dense)

    def _write(self, of_slots: Tensors) -> None:
        for name, gradients in of_slots.items():
            if name in self.written:
                self.views[name].add_(gradients)
            else:
                self.views[name].copy_(gradients)
        self.written |= of_slots.keys()

    def _watch(self, projection: Projection, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
        if not (torch.is_grad_enabled() and output.requires_grad):
            return None  # somebody's own prediction
        inputs, copied = inputs.detach(), self._of_each(output)

        def add(gradients: torch.Tensor) -> None:
            gradients = _positions(gradients)
            if self.is_factored and isinstance(projection, Plain):
                return self._keep(projection.name, gradients, inputs)
            self._write(projection.slot_gradients(_positions(self._of_each(inputs)), gradients))
            if self.watches_tokens:
                of_states = projection.back(gradients)
                self.of_states = of_states if self.of_states is None else self.of_states + of_states

        copied.register_hook(add)
        return copied

    def _keep(self, name: str, gradients: torch.Tensor, given: torch.Tensor) -> None:
        """Keep G and x of a layer; a new pass begins where a layer was called once more, or for another prompt."""
        width = given.shape[-1]
        if not self.passes or not self.passes[-1].takes(name, given):
            outputs = gradients.new_zeros(*gradients.shape[:2], self.flat.size // width)
            self.passes.append(Pass(given, Factored(outputs, _positions(self._of_each(given))), set()))
        part, last = self.flat.slices[name], self.passes[-1]
        last.factored.outputs[..., part.start // width : part.stop // width] = gradients
        last.written.add(name)

    def _of_each(self, tensor: torch.Tensor) -> torch.Tensor:
        """(n_slots, ...) of a tensor (n_slots or 1, ...)."""
        return tensor.expand(self.n_slots, *tensor.shape[1:]) if len(tensor) != self.n_slots else tensor

    def _of_tokens(self, step: Step, of_states: torch.Tensor) -> Tensors:
        """(n_slots, width) by token: gradients with respect to its embedding, from those with respect to the states."""
        run = self.run
        exemplars = step.is_exemplar.nonzero().flatten()
        rows = step.images[exemplars] * run.n_views + step.views[exemplars]
        prompts = [run.view_prompts[row] for row in rows]
        with torch.enable_grad(), _embeddings_of_each(run, self.tokens, len(prompts)) as embeddings:
            states = run.base.pipeline.text_encoder(token_ids(run.base, prompts)).last_hidden_state
            gradients = torch.autograd.grad(states, list(embeddings.values()), of_states[exemplars])
        of_tokens = {}
        for key, gradient in zip(embeddings, gradients, strict=True):
            of_tokens[key] = gradient.new_zeros(self.n_slots, gradient.shape[1])
            of_tokens[key][exemplars] = gradient
        return of_tokens


def _positions(tensor: torch.Tensor) -> torch.Tensor:
    """(n, positions, width) float32, of what a layer takes or gives: any number of positions, or none."""
    return tensor.float().reshape(len(tensor), -1, tensor.shape[-1])


@contextmanager
def _embeddings_of_each(run: Run, tokens: Mapping[str, str], n: int) -> Iterator[Tensors]:
    """(n, width) by parameter: copies of a token's embedding, one for each of the n prompts that are read inside."""
    table = run.base.pipeline.text_encoder.get_input_embeddings()
    ids = {key: run.base.pipeline.tokenizer.convert_tokens_to_ids(token) for token, key in tokens.items()}
    embeddings = {key: run.parameters[key].detach().expand(n, -1).clone().requires_grad_(True) for key in ids}

    def insert(_module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        output = output.detach()
        for key, token_id in ids.items():
            is_token = (inputs[0] == token_id).unsqueeze(-1)
            output = torch.where(is_token, embeddings[key].unsqueeze(1).to(output.dtype), output)
        return output

    hook = table.register_forward_hook(insert)
    try:
        yield embeddings
    finally:
        hook.remove()
