"""Checks of what a training is given, before anything is read."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from attrdb.errors import InvalidValue

EVALUATED_ONLY = "test"  # prefix of the splits that nothing is learned from


def check_learned(split: str, option: str = "--split") -> None:
    """raises: InvalidValue for a split that is kept for tests"""
    if split.startswith(EVALUATED_ONLY):
        raise InvalidValue(f"{option} is {split!r}: test models are for evaluation only; name another split")


def check_splits(split: str, val_split: str) -> None:
    """raises: InvalidValue for splits of training and validation that are kept for tests, or the same"""
    check_learned(split)
    check_learned(val_split, "--val-split")
    if split == val_split:
        raise InvalidValue(f"--split and --val-split are both {split!r}; training and validation need different models")


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """raises: InvalidValue for a value that is not among those allowed"""
    if value not in allowed:
        raise InvalidValue(f"{name} is {value!r}; it must be {', '.join(allowed)}")


def check_numbers(settings: Any, least: Mapping[str, float]) -> None:
    """raises: InvalidValue for a temperature or learning rate that is not above 0 and finite, or a setting below its least"""
    for name in ("temperature", "lr"):
        if not (getattr(settings, name) > 0 and math.isfinite(getattr(settings, name))):
            raise InvalidValue(f"{name} is {getattr(settings, name)}; it must be above 0")
    for name, smallest in least.items():
        if not getattr(settings, name) >= smallest:
            raise InvalidValue(f"{name} is {getattr(settings, name)}; it must be at least {smallest}")
