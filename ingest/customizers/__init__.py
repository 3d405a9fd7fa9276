"""Methods of customization: what each trains, and how a base model takes on what it has trained.

    custom-diffusion     K and V of the cross-attention, and the new token's embedding; Kumari et al. 2023
    dreambooth-lora      a low-rank change of all attention projections; Ruiz et al. 2023 with Hu et al. 2022
    textual-inversion    the new token's embedding alone; Gal et al. 2023
    NAME                 what an installed package adds under the entry point group attrdb.customizers

The training itself is the same for all and lies in `attrdb.ingest.customize`.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Protocol

import torch

from attrdb import plugins
from attrdb.errors import InvalidValue
from attrdb.ingest.customizers.custom_diffusion import CustomDiffusion
from attrdb.ingest.customizers.dreambooth_lora import DreamBoothLora
from attrdb.ingest.customizers.textual_inversion import TextualInversion

__all__ = ["BUILT_IN", "DEFAULT_METHOD", "Customizer", "load_customizer", "names"]

GROUP = "attrdb.customizers"
DEFAULT_METHOD = "custom-diffusion"
BUILT_IN = {one.name: one for one in (CustomDiffusion, DreamBoothLora, TextualInversion)}
ATTRIBUTES = {"name": (str,), "steps": (int,), "lr": (int, float), "trains_token": (bool,)}
METHODS = ("attach", "detach", "changed")


class Customizer(Protocol):
    """What a package has to make. An entry point's name is the method's; its object is called with nothing."""

    name: str
    steps: int  # that suit Stable Diffusion 1.x, as does lr
    lr: float
    trains_token: bool  # whether the new token's embedding is trained; if not, it stays where it starts

    def attach(self, unet: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        """What is trained in the U-Net, by the name it has in the delta: weights of its own, or of layers added here.

        torch's random numbers are seeded before it is called.
        """

    def detach(self, unet: torch.nn.Module) -> None:
        """Take away the layers that `attach` has added."""

    def changed(self, unet: torch.nn.Module, delta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of a fresh U-Net that a trained delta changes, by their name there, as they are to be.

        raises: KeyError, or a RuntimeError of torch, if the delta was made for another architecture
        """


def names() -> list[str]:
    """The methods that there are, attrdb's own first."""
    return [*BUILT_IN, *sorted(set(entry_points(group=GROUP).names) - BUILT_IN.keys())]


def load_customizer(name: str) -> Customizer:
    """The method of this name.

    raises: InvalidValue for no such method, one that attrdb and a package or two packages have, and with the package named
            if its own fails or is not what `Customizer` says
    """
    plugins.check_clash(GROUP, name, BUILT_IN, "a method")
    if name in BUILT_IN:
        return BUILT_IN[name]()
    for point in entry_points(group=GROUP, name=name):
        return plugins.make(point, lambda loaded: loaded(), lambda made: _check(made, name), f"method {name!r}")
    raise InvalidValue(f"no method {name!r}; there are: {', '.join(names())}")


def _check(customizer: Customizer, name: str) -> None:
    """raises: TypeError or ValueError, for `plugins.make` to complete"""
    plugins.check_members(customizer, ATTRIBUTES, METHODS, "attrdb.ingest.customizers.Customizer")
    if customizer.name != name:
        raise ValueError(f"it calls itself {customizer.name!r}; its name has to load it again")
