"""Gradients of every slot of a batch, by trained weight, from the one backward pass that training makes anyway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from attrdb.ingest.customize.customize import TOKEN_KEY, token_ids
from attrdb.ingest.customize.observer import Run, Step, Tensors
from attrdb.ingest.monitor.projections import Projection, prompt_projections, trained_projections


class SlotGradients:
    """Hooks on the layers that are trained; `take` gives the gradients of the last backward pass.

    watched: the trained weights whose gradients it gives: those of the U-Net, or of the token where it alone is trained

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
        self.watches_token = not trained
        token = {name: weight for name, weight in run.parameters.items() if name == TOKEN_KEY}
        self.watched = (
            token
            if self.watches_token
            else {name: weight for name, weight in run.parameters.items() if name != TOKEN_KEY}
        )
        self.slots: Tensors = {}
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

    def take(self, step: Step) -> Tensors:
        """(n_slots, *shape of the weight) float32 by parameter; they add up to the gradients of the step's loss."""
        slots, self.slots = self.slots, {}
        if self.of_states is not None:
            slots[TOKEN_KEY] = self._of_token(step, self.of_states)
            self.of_states = None
        return slots

    def _watch(self, projection: Projection, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
        if not (torch.is_grad_enabled() and output.requires_grad):
            return None  # somebody's own prediction
        inputs, copied = self._of_each(inputs.detach()), self._of_each(output)

        def add(gradients: torch.Tensor) -> None:
            gradients = gradients.float()
            for name, of_slots in projection.slot_gradients(inputs.float(), gradients).items():
                self.slots[name] = self.slots[name] + of_slots if name in self.slots else of_slots
            if self.watches_token:
                of_states = projection.back(gradients)
                self.of_states = of_states if self.of_states is None else self.of_states + of_states

        copied.register_hook(add)
        return copied

    def _of_each(self, tensor: torch.Tensor) -> torch.Tensor:
        """(n_slots, ...) of a tensor (n_slots or 1, ...)."""
        return tensor.expand(self.n_slots, *tensor.shape[1:]) if len(tensor) != self.n_slots else tensor

    def _of_token(self, step: Step, of_states: torch.Tensor) -> torch.Tensor:
        """(n_slots, width): gradients with respect to the token's embedding, from those with respect to the states."""
        run = self.run
        of_token = torch.zeros(self.n_slots, *run.parameters[TOKEN_KEY].shape, device=of_states.device)
        exemplars = step.is_exemplar.nonzero().flatten()
        prompts = [run.prompts[image] for image in step.images[exemplars]]
        with torch.enable_grad(), _embedding_of_each(run, len(prompts)) as embeddings:
            states = run.base.pipeline.text_encoder(token_ids(run.base, prompts)).last_hidden_state
            (gradients,) = torch.autograd.grad(states, embeddings, of_states[exemplars])
        of_token[exemplars] = gradients
        return of_token


@contextmanager
def _embedding_of_each(run: Run, n: int) -> Iterator[torch.Tensor]:
    """(n, width): copies of the token's embedding, one for each of the n prompts that the text encoder reads inside."""
    table = run.base.pipeline.text_encoder.get_input_embeddings()
    token_id = run.base.pipeline.tokenizer.convert_tokens_to_ids(run.token)
    embeddings = run.parameters[TOKEN_KEY].detach().expand(n, -1).clone().requires_grad_(True)

    def insert(_module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        is_token = (inputs[0] == token_id).unsqueeze(-1)
        return torch.where(is_token, embeddings.unsqueeze(1).to(output.dtype), output.detach())

    hook = table.register_forward_hook(insert)
    try:
        yield embeddings
    finally:
        hook.remove()
