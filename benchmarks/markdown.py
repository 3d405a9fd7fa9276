"""Figures as Markdown."""

from __future__ import annotations


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def shown(found: dict, digits: int = 2, scale: float = 1) -> str:
    """median (least to greatest)"""
    low, middle, high = (f"{scale * found[what]:,.{digits}f}" for what in ("min", "median", "max"))
    return f"{middle} ({low} to {high})"


def machine(found: dict) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    where = f"{found['cores']} cores, {found['memory_gib']} GiB"
    return f"{found['processor']}, {where}; Python {found['python']}, {packages}. Load before: {found['load']}.\n"
