"""Splits of models: which may be learned from."""

from __future__ import annotations

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
