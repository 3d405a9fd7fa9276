"""Attention of the U-Net as diffusers computes it, without doing again for a prompt what has been done.

Customization shows one prompt to a whole batch, and sampling shows the same prompts at every solver step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

Projected = dict[Attention, tuple[torch.Tensor, torch.Tensor]]  # K and V of the prompts, by layer


class PromptAttention:
    """Takes the states of one prompt for all pictures, and keeps K and V of prompts where it is given a place for them.

    fused: scaled_dot_product_attention, or the plain matrix products, which are as fast over few positions on a CPU
    """

    def __init__(self, fused: bool):
        self.fused = fused

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        projected: Projected | None = None,
    ) -> torch.Tensor:
        """(batch, positions, width), of hidden_states of that shape and states (batch or 1, tokens, width of the text)."""
        query = _heads(attn, attn.to_q(hidden_states))  # (batch, heads, positions, width of a head)
        if encoder_hidden_states is None:
            key, value = (_heads(attn, layer(hidden_states)) for layer in (attn.to_k, attn.to_v))
        elif projected is not None and attn in projected:
            key, value = projected[attn]
        else:
            key, value = (_heads(attn, layer(encoder_hidden_states)) for layer in (attn.to_k, attn.to_v))
            if projected is not None:
                projected[attn] = key, value
        key, value = (one.expand(len(query), -1, -1, -1) for one in (key, value))
        if self.fused:
            found = F.scaled_dot_product_attention(query, key, value)
        else:
            found = (query * attn.scale @ key.transpose(-1, -2)).softmax(dim=-1) @ value
        found = found.transpose(1, 2).flatten(2).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](found))


def _heads(attn: Attention, states: torch.Tensor) -> torch.Tensor:
    return states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def use_prompt_attention(unet: UNet2DConditionModel, fused: bool) -> bool:
    """Give the U-Net this attention; false, and nothing is done, if one of its layers is of another make."""
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    others = (
        "group_norm",
        "spatial_norm",
        "norm_cross",
        "norm_q",
        "norm_k",
        "added_kv_proj_dim",
        "residual_connection",
    )
    if any(getattr(one, name, None) for one in layers for name in others):
        return False
    if any(one.rescale_output_factor != 1 for one in layers):
        return False
    unet.set_attn_processor(PromptAttention(fused))
    return True
