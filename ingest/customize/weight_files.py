"""Which weights of a pipeline's folder are loaded: a folder from a hub may have several copies, such as fp16 beside float32.

A variant stands in a file's name, as in `model.fp16.safetensors`. Weights without one are loaded where all parts have them,
else the variant that the others have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from attrdb.errors import InvalidValue

WEIGHTED = ("unet", "vae", "text_encoder")
PREFERRED = ("fp16", "bf16")  # of several variants
# The names that diffusers and transformers load; of sharded weights, also their index.
NAMES = {part: "model" if part == "text_encoder" else "diffusion_pytorch_model" for part in WEIGHTED}
PATTERN = (
    r"{}(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+)?\.safetensors(?:\.index(?:\.(?P<index_variant>[\w-]+))?\.json)?"
)


def variant_in(part: str, name: str) -> str | None:
    """The variant of a file of weights; empty for weights without one, None for any other file."""
    match = re.fullmatch(PATTERN.format(NAMES[part]), name)
    return match and (match["variant"] or match["index_variant"] or "")


def _variants(folder: Path, part: str) -> set[str]:
    names = (file.name for file in (folder / part).glob("*.safetensors"))
    return {variant for name in names if (variant := variant_in(part, name)) is not None}


def missing_weights(folder: Path) -> list[str]:
    """The parts without weights that can be loaded, as a pattern of the files that are needed."""
    return [f"{part}/{NAMES[part]}.safetensors" for part in WEIGHTED if not _variants(folder, part)]


def variant_of(folder: Path) -> str | None:
    """The variant that a pipeline's folder is loaded with; None for weights without one.

    raises: InvalidValue if parts without plain weights have no variant in common
    """
    by_part = {part: _variants(folder, part) for part in WEIGHTED}
    lacking = [variants for variants in by_part.values() if "" not in variants]
    if not lacking:
        return None
    common = set.intersection(*lacking)
    if not common:
        shown = "; ".join(f"{part}: {', '.join(sorted(filter(None, found)))}" for part, found in by_part.items())
        raise InvalidValue(f"base model {folder} has weights in variants that do not go together ({shown})")
    return next((variant for variant in PREFERRED if variant in common), min(common))


def loaded_files(folder: Path, parts: Iterable[str]) -> list[Path]:
    """The files that decide what a pipeline generates: configurations, vocabularies, and the weights that are loaded."""
    variant = variant_of(folder)
    files = []
    for part in parts:
        wanted = variant if part in WEIGHTED and variant in _variants(folder, part) else ""
        for file in sorted((folder / part).glob("*")):
            if file.suffix not in (".safetensors", ".json", ".txt"):
                continue
            file_variant = variant_in(part, file.name) if part in WEIGHTED else None
            if file_variant == wanted or (file_variant is None and file.suffix != ".safetensors"):
                files.append(file)
    return files
