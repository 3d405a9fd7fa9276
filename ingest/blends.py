"""Blends: prompts that lie between others, such as ("a V1* cat", "a V2* dog").blend(0.75, 0.25).

The text encoder reads each part by itself, and the U-Net gets the weighted mean of the parts' states. The form is that of
the package compel, from which users of diffusers know it. Brokman et al. 2024 evaluate on images of interpolated concepts;
how they interpolate is not public.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence

from attrdb.errors import InvalidValue

MEANT = re.compile(r"\)\s*\.blend\(")
# The view concept_truth follows the same rule in SQL.
FORM = re.compile(r'\s*\((\s*".*"\s*)\)\s*\.blend\(([^()]*)\)\s*', re.ASCII | re.DOTALL)


def blend(prompts: Sequence[str], weights: Sequence[float]) -> str:
    """The prompt that is between these; weights: one for each, above 0"""
    parts = ", ".join(json.dumps(prompt, ensure_ascii=False) for prompt in prompts)
    return f"({parts}).blend({', '.join(f'{weight:g}' for weight in weights)})"


def parts_of(prompt: str) -> list[tuple[str, float]]:
    """The parts of a blend with their weights, which sum to 1; of any other text, the text itself with weight 1."""
    return _parsed(prompt) or [(prompt, 1.0)]


def is_blend(prompt: str) -> bool:
    return _parsed(prompt) is not None


def check_blend(prompt: str) -> None:
    """raises: InvalidValue for a prompt that is meant to be a blend and cannot be read as one"""
    if MEANT.search(prompt) and not _parsed(prompt):
        raise InvalidValue(
            f"{prompt} is not a blend; write two or more prompts in double quotes, and a weight above 0 for each, as in "
            f"{blend(['a V1* cat', 'a V2* dog'], [0.75, 0.25])}"
        )


def _parsed(prompt: str) -> list[tuple[str, float]] | None:
    """The parts of a blend with their weights; None for a text that is none."""
    if not (match := FORM.fullmatch(prompt)):
        return None
    try:
        texts, weights = (json.loads(f"[{part}]") for part in match.groups())
        "".join(texts).encode()  # raises for what is no text, half a surrogate pair too
        total = sum(weights)
        positive = all(weight > 0 and not isinstance(weight, bool) for weight in weights)
        if not len(texts) == len(weights) >= 2 or not positive or not math.isfinite(total):
            return None
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
    return [(text, weight / total) for text, weight in zip(texts, weights, strict=True)]
