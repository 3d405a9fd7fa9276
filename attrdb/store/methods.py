"""Rows of the table `methods`: the attribution methods that a database knows, and what their scores mean."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

DEFAULT_TAU = 0.05  # of cosine similarity, until it is calibrated; with DEFAULT_LAM, a candidate has influence when its
DEFAULT_LAM = 0.05  # similarity lies within tau * ln(1 / lam) = 0.15 of the best one


def similarity_id(encoder_id: str, mapper_id: str | None = None) -> str:
    """The method_id of similarity of an encoder's features, with a mapper or without (None or empty)."""
    return f"{encoder_id}/{mapper_id}" if mapper_id else encoder_id


def similarity_row(encoder_id: str, mapper_id: str | None = None) -> dict[str, Any]:
    return {
        "method_id": similarity_id(encoder_id, mapper_id),
        "kind": "similarity",
        "encoder_id": encoder_id,
        "mapper_id": mapper_id or None,
        "unit": "cosine",
        "lowest": -1.0,
        "highest": 1.0,
        "tau": DEFAULT_TAU,
        "lam": DEFAULT_LAM,
        "settings": "{}",
        "created_at": datetime.now(UTC),
    }
