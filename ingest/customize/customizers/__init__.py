"""Methods of customization: what each trains, and how its delta changes a base model.

    custom-diffusion     K and V of the cross-attention, and the new token's embedding; Kumari et al. 2023
    dreambooth-lora      a low-rank change of all attention projections; Ruiz et al. 2023 with Hu et al. 2022
    textual-inversion    the new token's embedding alone; Gal et al. 2023
    NAME                 a method of an installed package, an entry point of the group attrdb.customizers

The training itself is the same for all, see `attrdb.ingest.customize.customize`.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Protocol

import torch

from attrdb import plugins
from attrdb.errors import InvalidValue
from attrdb.ingest.customize.customizers.custom_diffusion import CustomDiffusion
from attrdb.ingest.customize.customizers.dreambooth_lora import DreamBoothLora
from attrdb.ingest.customize.customizers.textual_inversion import TextualInversion

__all__ = ["BUILT_IN", "DEFAULT_METHOD", "Customizer", "load_customizer", "names"]

GROUP = "attrdb.customizers"
DEFAULT_METHOD = "custom-diffusion"
BUILT_IN = {method.name: method for method in (CustomDiffusion, DreamBoothLora, TextualInversion)}
ATTRIBUTES = {"name": (str,), "steps": (int,), "lr": (int, float), "trains_token": (bool,)}
METHODS = ("attach", "detach", "changed")


class Customizer(Protocol):
    """A method of customization. An entry point's name is the method's name; its object is called without arguments."""

    name: str
    steps: int  # default for Stable Diffusion 1.x
    lr: float  # default for Stable Diffusion 1.x
    trains_token: bool  # whether the new token's embedding is trained; if not, it stays where it starts

    def attach(self, unet: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        """What is trained in the U-Net, by name in the delta: weights of the U-Net, or of layers that are added here.

        torch's random numbers are seeded before it is called.
        """

    def detach(self, unet: torch.nn.Module) -> None:
        """Remove the layers that `attach` added."""

    def changed(self, unet: torch.nn.Module, delta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """New values of the weights of a fresh U-Net that a trained delta changes, by name in the U-Net.

        raises: KeyError, or a RuntimeError of torch, if the delta was made for another architecture
        """


def names() -> list[str]:
    """Names of the available methods, attrdb's own first."""
    return [*BUILT_IN, *sorted(set(entry_points(group=GROUP).names) - BUILT_IN.keys())]


def load_customizer(name: str) -> Customizer:
    """The method of this name.

    raises: InvalidValue for an unknown method, for a name that two packages (or a package and attrdb) share, and for a
            package's method that fails or is not a `Customizer`; the error names the package
    """
    plugins.check_clash(GROUP, name, BUILT_IN, "a method")
    if name in BUILT_IN:
        return BUILT_IN[name]()
    added = plugins.load(GROUP, name, lambda loaded: loaded(), lambda made: _check(made, name), f"method {name!r}")
    if added is not None:
        return added
    raise InvalidValue(f"no method {name!r}; there are: {', '.join(names())}")


def _check(customizer: Customizer, name: str) -> None:
    """raises: TypeError or ValueError, for `plugins.make` to complete"""
    plugins.check_members(customizer, ATTRIBUTES, METHODS, "attrdb.ingest.customize.customizers.Customizer")
    if customizer.name != name:
        raise ValueError(f"it calls itself {customizer.name!r}; its name has to load it again")
