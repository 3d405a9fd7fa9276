"""DreamBooth with LoRA: train a low-rank change of every attention projection, the token stays fixed.

Source: Ruiz et al. 2023 (a token that stands before the category, prior preservation) and Hu et al. 2022, section 4.1
(W + B A). Differs from the first in what is trained, there the whole U-Net, and in the token: no rare token of the
vocabulary but a new one, at the mean of the category's tokens; its embedding is not trained.
"""

from __future__ import annotations

import torch

from attrdb.errors import MissingExtra

RANK = 4
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


class DreamBoothLora:
    name = "dreambooth-lora"
    steps = 500
    lr = 1e-4
    trains_token = False

    def attach(self, unet: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        """A and B of every projection: A (rank, in) random, B (out, rank) zero, so that training starts at the base model."""
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise MissingExtra(
                f"the method {self.name} needs peft; install it with: pip install 'attrdb[ml]'"
            ) from error
        # alpha = rank: the change is B A, without a factor.
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS)))
        added = {name: weight for name, weight in unet.named_parameters() if ".lora_" in name}
        return {name.replace(".default.", "."): weight for name, weight in added.items()}

    def detach(self, unet: torch.nn.Module) -> None:
        unet.unload_lora()

    def changed(self, unet: torch.nn.Module, delta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """W + B A for every projection: (out, in) + (out, rank) (rank, in), in float32."""
        weights = {name: weight for name, weight in unet.named_parameters() if _projection(name)}
        layers = {name.removesuffix(".weight") for name in weights}
        wanted = {layer + end for layer in layers for end in (DOWN, UP)}
        if strange := delta.keys() ^ wanted:
            raise KeyError(min(strange))
        return {
            f"{layer}.weight": torch.addmm(
                weights[f"{layer}.weight"].data, *(delta[layer + end].to(unet.device) for end in (UP, DOWN))
            )
            for layer in sorted(layers)
        }


def _projection(name: str) -> bool:
    return any(name.endswith(f".{target}.weight") for target in TARGETS)
