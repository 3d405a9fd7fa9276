"""What the report says of the truth beside the methods: retraining without exemplars, and the concepts of a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from attrdb.database import Database
from attrdb.store.schema import Row

LEAVES = {"half": "random halves", "image": "one exemplar", "concept": "one concept", "creator": "one creator"}
TRUTHS = {
    "prompt": "what the prompt names",
    "fixed": "what samples lose without each concept, training with the same draws",
    "redrawn": "what samples lose without each concept, training with new draws",
}

# What the queries are about; without any, they would look through all ranks for nothing.
ASKED = """\
SELECT
    (SELECT count(*) FROM retrainings) AS n_retrainings,
    (SELECT count(*) FROM (SELECT model_id FROM concepts GROUP BY model_id HAVING count(*) > 1)) AS n_of_several
"""


def truth_figures(db: Database, is_shown: Callable[[Row], bool]) -> dict[str, list[Row]]:
    """Answers of the queries on truth, by name, of the methods that are shown; empty where there is none."""
    [counts] = db.sql(ASKED).to_pylist()
    asked = {
        "removal_intervals": counts["n_retrainings"],
        "between_concepts": counts["n_of_several"],
        "within_concept": counts["n_retrainings"],
    }
    return {
        name: [row for row in db.query(name).to_pylist() if is_shown(row)] if n else [] for name, n in asked.items()
    }


def removal_tables(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of removal_intervals or within_concept by what was left out and how, best first."""
    tables: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        without = LEAVES[row.get("leave", "image")]
        tables[f"Without {without}, {row['draws']} draws"].append(row | {"three": _three(row)})
    return tables


def concept_tables(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """By truth: its meaning, the prompt schemes, and for each method the correlation by scheme; best first."""
    by_truth: dict[str, dict[str, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        by_truth[row["truth"]][row["method_id"]][row["prompt_scheme"]] = row | {"three": _three(row)}
    tables = []
    for truth, methods in by_truth.items():
        schemes = sorted(
            {scheme for of_method in methods.values() for scheme in of_method}, key=lambda name: name or ""
        )
        ordered = sorted(methods.items(), key=lambda item: -sum(row["correlation"] or 0 for row in item[1].values()))
        tables.append({"meaning": TRUTHS[truth], "schemes": schemes, "methods": ordered})
    return tables


def _three(row: Row) -> tuple[float, float, float]:
    return row["correlation"], row["correlation_low"], row["correlation_high"]
