"""Gradients of every slot of a batch, by trained weight, from the one backward pass that training makes anyway."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from attrdb.ingest.customize.customize import token_ids
from attrdb.ingest.customize.observer import Run, Step, Tensors
from attrdb.ingest.monitor.flat import Flat
from attrdb.ingest.monitor.projections import Projection, prompt_projections, trained_projections, trained_tokens


class SlotGradients:
    """Hooks on the layers that are trained; `take` gives the gradients of the last backward pass.

    watched: the trained weights whose gradients it gives: those of the U-Net, or of tokens where these alone are trained

    A layer of weight W has, for slot b, the gradient G_b^T x_b: G_b is the gradient of the loss with respect to the slot's
    output, x_b its input. Where one prompt is shown to all slots, the layer's output is copied for each of them behind the
    layer, so that each copy has a gradient of its own. Values and weights stay the same, bit for bit.

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
        self.slots = torch.empty(self.n_slots, self.flat.size, device=run.base.device)
        self.views, self.written = self.flat.views(self.slots), set[str]()
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

    def take(self, step: Step) -> torch.Tensor:
        """(n_slots, size of `flat`) float32, until the next step; they add up to the gradients of the step's loss."""
        if self.of_states is not None:
            self._write(self._of_tokens(step, self.of_states))
            self.of_states = None
        for name in self.views.keys() - self.written:  # the loss does not depend on it
            self.views[name].zero_()
        self.written.clear()
        return self.slots

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
        inputs, copied = self._of_each(inputs.detach()), self._of_each(output)

        def add(gradients: torch.Tensor) -> None:
            gradients = _positions(gradients)
            self._write(projection.slot_gradients(_positions(inputs), gradients))
            if self.watches_tokens:
                of_states = projection.back(gradients)
                self.of_states = of_states if self.of_states is None else self.of_states + of_states

        copied.register_hook(add)
        return copied

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
