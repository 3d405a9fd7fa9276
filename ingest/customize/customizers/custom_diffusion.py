"""Custom Diffusion: train K and V of the cross-attention, and the new token.

Source: Kumari et al. 2023, section 3, as used by Wang et al. 2023, section 3. Differs from them in that the new token starts
at the mean of the category's tokens, not at a rare token, and that regularization images are a choice, by default none.
"""

from __future__ import annotations

import torch

from attrdb.errors import InvalidValue

TRAINED = ("attn2.to_k.weight", "attn2.to_v.weight")


class CustomDiffusion:
    name = "custom-diffusion"
    steps = 250
    lr = 8e-5  # 1e-5 per image of a batch of 8
    trains_token = True

    def attach(self, unet: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        trained = {name: weight for name, weight in unet.named_parameters() if name.endswith(TRAINED)}
        if not trained:
            raise InvalidValue(
                "the U-Net has no K and V of a cross-attention (attn2.to_k, attn2.to_v), which this trains"
            )
        return trained

    def detach(self, unet: torch.nn.Module) -> None:
        """Nothing was added."""

    def changed(self, unet: torch.nn.Module, delta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if strange := delta.keys() ^ self.attach(unet).keys():
            raise KeyError(min(strange))
        return delta
