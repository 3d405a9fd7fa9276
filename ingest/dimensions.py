"""The dimension of an encoder by its spec alone: known without weights, and mostly without the package that makes it."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

BUNDLED = {"efficientnet-lite0": 1280, "vgg-gram": 900, "icon-clip": 128, "icon-moco": 256}
# Of the architectures that published embeddings are made with, for where open_clip is not installed.
OPEN_CLIP = {
    "RN50": 1024,
    "RN101": 512,
    "ViT-B-32": 512,
    "ViT-B-16": 512,
    "ViT-L-14": 768,
    "ViT-L-14-336": 768,
    "ViT-H-14": 1024,
    "ViT-g-14": 1024,
    "ViT-bigG-14": 1280,
}


def known_dimension(spec: str) -> int | None:
    """The length of an encoder's features; None for one that only its package or its file can tell."""
    prefix, _, argument = spec.partition(":")
    if match := re.fullmatch(r"pixels:(\d+)", spec):
        return int(match[1]) ** 2 * 3
    if prefix == "open_clip":
        return _open_clip(argument.partition("?")[0].partition("/")[0])
    if prefix == "timm":
        return _timm(argument)
    return BUNDLED.get(spec)


def _open_clip(arch: str) -> int | None:
    package = importlib.util.find_spec("open_clip")
    for folder in (package.submodule_search_locations or []) if package else []:
        try:
            configuration = json.loads((Path(folder) / "model_configs" / f"{arch}.json").read_text(encoding="utf-8"))
            return int(configuration["embed_dim"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return OPEN_CLIP.get(arch.removesuffix("-quickgelu"))


def _timm(argument: str) -> int | None:
    """By the architecture, without its weights; None where timm is not installed, or does not know it."""
    if importlib.util.find_spec("timm") is None:
        return None
    import timm
    import torch

    name = argument.partition("?")[0].partition("/")[0]
    if not timm.is_model(name):
        return None
    with torch.device("meta"):
        return int(timm.create_model(name, pretrained=False, num_classes=0).num_features)
