"""Figures as Markdown."""

from __future__ import annotations


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def shown(spread: dict, digits: int = 2, scale: float = 1) -> str:
    """median (least to greatest)"""
    low, middle, high = (f"{scale * spread[name]:,.{digits}f}" for name in ("min", "median", "max"))
    return f"{middle} ({low} to {high})"


def machine(described: dict) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in described["packages"].items())
    size = f"{described['cores']} cores, {described['memory_gib']} GiB"
    return f"{described['processor']}, {size}; Python {described['python']}, {packages}. Load before: {described['load']}.\n"
