"""Some of many, at equal distances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def spread(items: Sequence[Item], n: int) -> list[Item]:
    """n of the items at equal distances, or all if there are no more."""
    n = min(n, len(items))
    return [items[number * len(items) // n] for number in range(n)]
