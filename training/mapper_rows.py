"""The row of a trained mapper in `mappers`."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

from attrdb.database import Database
from attrdb.search.mapper import Mapper


def default_mapper_id(encoder_id: str, learned: str, record: dict) -> str:
    """learned: what it learns from, in a word; record: its settings"""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return f"{encoder_id[:80]}-{learned}-{digest[:8]}"


def store_mapper(
    db: Database, mapper: Mapper, trained_on: str, record: dict, curves: list[dict], metrics: dict
) -> None:
    db.writer.add_mapper(
        {
            **mapper.row(),
            "trained_on": trained_on,
            "settings": json.dumps(record, sort_keys=True),
            "images_version": db.version,
            "curves": json.dumps(curves),
            "metrics": json.dumps(metrics),
            "created_at": datetime.now(UTC),
        }
    )


def stored_texts(db: Database, mapper_id: str) -> tuple[Any, Any, Any] | None:
    """Settings, metrics and curves of a mapper as it is stored now; None if it is not."""
    db.refresh()
    rows = db.sql("SELECT settings, metrics, curves FROM mappers WHERE mapper_id = $id", {"id": mapper_id}).to_pylist()
    if not rows:
        return None
    settings, metrics, curves = (json.loads(rows[0][name]) for name in ("settings", "metrics", "curves"))
    return settings, metrics, curves
