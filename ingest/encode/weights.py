"""Weights from checkpoints: read without unpickling, matched to a network name by name, and fingerprinted."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import torch

from attrdb.errors import InvalidValue

# Where training scripts put the weights, and what they write before their names. The first prefix that occurs counts, and
# only names that have it are kept: a MoCo v3 checkpoint has its momentum encoder and predictor beside its base encoder.
HOLDERS = ("state_dict", "model", "teacher")
PREFIXES = ("module.base_encoder.", "module.backbone.", "backbone.", "module.")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """name -> tensor, of a `.safetensors` file or of what `torch.load(weights_only=True)` reads; PREFIXES are taken off.

    raises: InvalidValue if it is no such file, or needs unpickling
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded = load_file(path)
        else:
            with warnings.catch_warnings(category=UserWarning, action="ignore"):  # of TorchScript: an error follows
                loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise many kinds for broken files
        if "TorchScript" in str(error):
            raise InvalidValue(f"{path} is a TorchScript archive; name it as torchscript:{path}") from error
        raise InvalidValue(
            f"checkpoint {path} cannot be read as weights alone ({type(error).__name__}); nothing else in it is loaded: "
            "save its state dict as .safetensors"
        ) from error
    for holder in HOLDERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(holder), dict):
            loaded = loaded[holder]
            break
    weights = {k: v for k, v in loaded.items() if torch.is_tensor(v)} if isinstance(loaded, dict) else {}
    if not weights:
        raise InvalidValue(f"checkpoint {path} has no state dict; save the weights as .safetensors")
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in weights):
            return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return weights


def fill(network: torch.nn.Module, weights: dict[str, torch.Tensor], what: str) -> None:
    """Load weights that match the network's name by name and shape by shape.

    what: the beginning of the error message
    raises: InvalidValue, with the first few names that are missing, not known or of another shape
    """
    expected = network.state_dict()
    odd = [
        ("lacks", [name for name in expected if name not in weights]),
        ("has besides", [name for name in weights if name not in expected]),
        (
            "has in other shapes",
            [_shapes(n, weights[n], v) for n, v in expected.items() if _differs(weights.get(n), v)],
        ),
    ]
    differences = [f"{verb} {', '.join(names[:3])}{_more(names[3:])}" for verb, names in odd if names]
    if differences:
        raise InvalidValue(
            f"{what} does not fit: it {'; it '.join(differences)}; name the architecture that it was made for"
        )
    network.load_state_dict(weights)


def _differs(value: torch.Tensor | None, expected: torch.Tensor) -> bool:
    return value is not None and value.shape != expected.shape


def _shapes(name: str, value: torch.Tensor, expected: torch.Tensor) -> str:
    return f"{name} ({_shape(value)} for {_shape(expected)})"


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _more(rest: list[str]) -> str:
    return f" and {len(rest)} more" if rest else ""


def fingerprint(weights: dict[str, torch.Tensor]) -> str:
    """16 hex digits that change with any name, type, shape or value; the same on every device."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
