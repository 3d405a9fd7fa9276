"""The layers that a customization trains, seen as projections: their gradients by slot, and K and V of a prompt.

Plain   out = x W^T
Lora    out = x (W + s B A)^T, of which A and B are trained
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers.models.attention_processor import Attention

from attrdb.errors import InvalidValue
from attrdb.ingest.customize.customize import token_keys
from attrdb.ingest.customize.observer import Run, Tensors

ADAPTER = "default"  # the name that diffusers gives the one adapter of a LoRA


class Projection(Protocol):
    """A linear layer of the U-Net of which some weights are trained."""

    @property
    def layer(self) -> torch.nn.Module: ...

    def slot_gradients(self, inputs: torch.Tensor, gradients: torch.Tensor) -> Tensors:
        """(n_slots, *shape of the weight) by parameter.

        inputs:    (n_slots, positions, in) of each slot
        gradients: (n_slots, positions, out) of the loss, with respect to each slot's output
        """
        ...

    def back(self, gradients: torch.Tensor) -> torch.Tensor:
        """(n_slots, positions, in): the gradients with respect to the input, of those with respect to the output."""
        ...

    def project(self, states: torch.Tensor) -> torch.Tensor:
        """(length, out): the layer's output for prompt states (length, in), without a bias."""
        ...

    def change(self, states: torch.Tensor, updates: Mapping[str, torch.Tensor], before: Tensors) -> torch.Tensor:
        """(n, length, out): how n updates of the weights change the output; linear in them, together exactly.

        updates: (n, *shape) by parameter
        before:  the trained weights before all of the updates; the layer has those after them
        """
        ...


@dataclass(frozen=True)
class Plain:
    layer: torch.nn.Linear
    name: str

    def slot_gradients(self, inputs: torch.Tensor, gradients: torch.Tensor) -> Tensors:
        return {self.name: gradients.transpose(1, 2) @ inputs}

    def back(self, gradients: torch.Tensor) -> torch.Tensor:
        return gradients @ self.layer.weight

    def project(self, states: torch.Tensor) -> torch.Tensor:
        return states @ self.layer.weight.T

    def change(self, states: torch.Tensor, updates: Mapping[str, torch.Tensor], before: Tensors) -> torch.Tensor:
        return states @ updates[self.name].transpose(1, 2)


@dataclass(frozen=True)
class Frozen:
    """A projection that is not trained: its output changes with the states alone."""

    layer: torch.nn.Linear

    def slot_gradients(self, inputs: torch.Tensor, gradients: torch.Tensor) -> Tensors:
        return {}

    def back(self, gradients: torch.Tensor) -> torch.Tensor:
        return gradients @ self.layer.weight.to(gradients.dtype)

    def project(self, states: torch.Tensor) -> torch.Tensor:
        return states @ self.layer.weight.to(states.dtype).T

    def change(self, states: torch.Tensor, updates: Mapping[str, torch.Tensor], before: Tensors) -> torch.Tensor:
        n_updates = len(next(iter(updates.values())))
        return states.new_zeros(n_updates, len(states), self.layer.out_features)


@dataclass(frozen=True)
class Lora:
    layer: torch.nn.Module
    down: str  # parameter of A, (rank, in)
    up: str  # parameter of B, (out, rank)
    scale: float

    @property
    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B."""
        return self.layer.lora_A[ADAPTER].weight, self.layer.lora_B[ADAPTER].weight

    def slot_gradients(self, inputs: torch.Tensor, gradients: torch.Tensor) -> Tensors:
        down, up = self.weights
        return {
            self.down: self.scale * (gradients @ up).transpose(1, 2) @ inputs,
            self.up: self.scale * gradients.transpose(1, 2) @ (inputs @ down.T),
        }

    def back(self, gradients: torch.Tensor) -> torch.Tensor:
        down, up = self.weights
        return gradients @ self.layer.base_layer.weight.to(gradients.dtype) + self.scale * (gradients @ up) @ down

    def project(self, states: torch.Tensor) -> torch.Tensor:
        down, up = self.weights
        return states @ self.layer.base_layer.weight.to(states.dtype).T + self.scale * (states @ down.T) @ up.T

    def change(self, states: torch.Tensor, updates: Mapping[str, torch.Tensor], before: Tensors) -> torch.Tensor:
        """B' A' - B A = (B' - B) A' + B (A' - A)."""
        down, _ = self.weights
        by_up = (states @ down.T) @ updates[self.up].transpose(1, 2)
        by_down = (states @ updates[self.down].transpose(1, 2)) @ before[self.up].T
        return self.scale * (by_up + by_down)


def trained_tokens(run: Run) -> dict[str, str]:
    """The tokens whose embeddings are trained, with their names among the parameters."""
    return {token: key for token, key in token_keys(run.tokens).items() if key in run.parameters}


def trained_projections(run: Run) -> list[Projection]:
    """The layers that hold the trained weights of the U-Net.

    raises: InvalidValue if a weight is not one of such a layer
    """
    names = {id(weight): name for name, weight in run.parameters.items()}
    found: list[Projection] = []
    for module in run.base.pipeline.unet.modules():
        if hasattr(module, "lora_A") and ADAPTER in module.lora_A and isinstance(module.base_layer, torch.nn.Linear):
            down, up = (names.pop(id(part[ADAPTER].weight), None) for part in (module.lora_A, module.lora_B))
            if down and up:
                found.append(Lora(module, down, up, module.scaling[ADAPTER]))
        elif isinstance(module, torch.nn.Linear) and id(module.weight) in names:
            found.append(Plain(module, names.pop(id(module.weight))))
    strange = sorted(set(names.values()) - set(trained_tokens(run).values()))
    if strange:
        raise InvalidValue(
            f"method {run.method!r} trains {strange[0]}, which is no weight of a linear layer, so what images change in it "
            "cannot be monitored; give --monitor steps"
        )
    return found


def all_read_prompt(run: Run, trained: list[Projection]) -> bool:
    """Whether these layers are K and V of cross-attentions, plain ones, whose input is the prompt's states as they are."""
    readers = {
        id(layer)
        for attention in _cross_attentions(run)
        if attention.norm_cross is None and attention.added_kv_proj_dim is None
        for layer in (attention.to_k, attention.to_v)
    }
    return bool(trained) and all(isinstance(one, Plain) and id(one.layer) in readers for one in trained)


def prompt_projections(run: Run, trained: list[Projection]) -> list[Projection]:
    """K and V of every cross-attention, which say what the U-Net reads in a prompt."""
    by_layer = {id(projection.layer): projection for projection in trained}
    layers = [layer for attention in _cross_attentions(run) for layer in (attention.to_k, attention.to_v)]
    return [by_layer.get(id(layer)) or Frozen(layer) for layer in layers]


def _cross_attentions(run: Run) -> list[Attention]:
    modules = run.base.pipeline.unet.modules()
    return [module for module in modules if isinstance(module, Attention) and module.is_cross_attention]
