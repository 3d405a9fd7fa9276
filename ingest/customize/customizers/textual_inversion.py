"""Textual Inversion: train the new token's embedding alone; the U-Net stays as it is.

Source: Gal et al. 2023, section 4. Differs from it in the prompt: the one of the model's kind, not a draw from a list of
templates.
"""

from __future__ import annotations

import torch


class TextualInversion:
    name = "textual-inversion"
    steps = 3000
    lr = 4e-3  # 5e-4 per image of a batch of 8
    trains_token = True

    def attach(self, unet: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        return {}

    def detach(self, unet: torch.nn.Module) -> None:
        """Nothing was added."""

    def changed(self, unet: torch.nn.Module, delta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if delta:
            raise KeyError(min(delta))
        return {}
