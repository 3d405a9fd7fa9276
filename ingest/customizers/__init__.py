"""Methods of customization: what each trains, and how a base model takes on what it has trained.

    custom-diffusion     K and V of the cross-attention, and the new token's embedding; Kumari et al. 2023
    dreambooth-lora      a low-rank change of all attention projections; Ruiz et al. 2023 with Hu et al. 2022
    textual-inversion    the new token's embedding alone; Gal et al. 2023
    NAME                 what an installed package adds under the entry point group attrdb.customizers

The training itself is the same for all and lies in `attrdb.ingest.customize`.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Protocol

import torch

from attrdb.errors import AttrdbError, InvalidValue
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
    points = list(entry_points(group=GROUP, name=name))
    packages = sorted({_package(point) for point in points})
    if points and name in BUILT_IN:
        raise InvalidValue(f"package {packages[0]} adds a method {name!r}, which attrdb has itself; uninstall it")
    if len(packages) > 1:
        raise InvalidValue(f"the packages {' and '.join(packages)} both add a method {name!r}; uninstall one of them")
    if name in BUILT_IN:
        return BUILT_IN[name]()
    if not points:
        raise InvalidValue(f"no method {name!r}; there are: {', '.join(names())}")
    try:
        customizer = points[0].load()()
        _check(customizer, name)
    except AttrdbError:
        raise
    except Exception as error:  # whatever code of others raises
        raise InvalidValue(
            f"method {name!r} of package {packages[0]} fails with {type(error).__name__}: {error}"
        ) from error
    return customizer


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value


def _check(customizer: Customizer, name: str) -> None:
    """raises: TypeError or ValueError, for `load_customizer` to complete"""
    for attribute, kinds in ATTRIBUTES.items():
        if not isinstance(getattr(customizer, attribute, None), kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise TypeError(
                f"it needs the attribute {attribute}, of type {wanted}; see attrdb.ingest.customizers.Customizer"
            )
    for method in METHODS:
        if not callable(getattr(customizer, method, None)):
            raise TypeError(f"it needs the method {method}; see attrdb.ingest.customizers.Customizer")
    if customizer.name != name:
        raise ValueError(f"it calls itself {customizer.name!r}; its name has to load it again")
