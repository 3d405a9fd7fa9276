"""Results that images were part of: scores, ranks and attributions, which are taken out with them.

A rank counts all candidates of its gallery, and influence is shared among all candidates: what was computed with an image
that is gone is not corrected, but deleted, and computed again by the commands that made it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import duckdb
import pyarrow as pa

from attrdb import sql
from attrdb.store.snapshot import Snapshot
from attrdb.store.writer import Writer
from attrdb.upkeep.removal.choose import Choice

# Stored influence of a sample sums to 1 without what is unattributed, if no candidate beyond those stored has a share.
ROUNDING = 1e-9
MONITORED = ("monitor_steps", "monitor_changes", "attribution_tables")  # what was noted of each training image
TESTS = ("keys", "answers")  # of source-model attribution: a picture is their reference, or the answer
TRUTH = ("retrainings", "counterfactuals")  # of a model whose exemplars are others now


@dataclass(frozen=True)
class Reach:
    """How far the loss of the chosen images goes.

    exemplar, pretraining: methods that have scored one of the images of that role as a candidate
    models:                models whose exemplars are others now
    """

    exemplar: tuple[str, ...]
    pretraining: tuple[str, ...]
    models: tuple[str, ...]


# What is taken out of a table, as SQL over the relations of `_connection`.
ATTRIBUTIONS = f"""\
SELECT method_id, sample_id, count(*) AS n_rows
FROM attributions
GROUP BY method_id, sample_id
HAVING bool_or(sample_id IN (SELECT image_id FROM _chosen))
    OR bool_or(candidate_id IN (SELECT image_id FROM _chosen))
    OR (
        bool_or(method_id IN (SELECT method_id FROM _reached))
        AND sum(influence) < 1 - coalesce(max(unattributed), 0) - {ROUNDING}
    )
"""
RANKS = """\
SELECT DISTINCT method_id, gallery, sample_id, exemplar_id
FROM exemplar_ranks
WHERE sample_id IN (SELECT image_id FROM _chosen)
   OR exemplar_id IN (SELECT image_id FROM _chosen)
   OR sample_id IN (SELECT image_id FROM images WHERE role = 'sample' AND model_id IN (SELECT model_id FROM _changed))
   OR method_id IN (SELECT method_id FROM _reached WHERE role = 'pretraining')
   OR (gallery = 'all' AND method_id IN (SELECT method_id FROM _reached WHERE role = 'exemplar'))
"""
SCORES = """\
SELECT count(*) AS n_rows
FROM scores
WHERE sample_id IN (SELECT image_id FROM _chosen) OR candidate_id IN (SELECT image_id FROM _chosen)
"""
LOSSES = """\
SELECT count(*)
FROM counterfactuals
WHERE sample_id IN (SELECT image_id FROM _chosen) AND model_id NOT IN (SELECT model_id FROM _changed)
"""
VERDICTS = """\
SELECT verdict_id
FROM verdicts
WHERE key_set_id IN (
    SELECT key_set_id
    FROM keys
    LEFT JOIN answers USING (key_id)
    WHERE keys.image_id IN (SELECT image_id FROM _chosen) OR answers.image_id IN (SELECT image_id FROM _chosen)
)
"""
UNASKED = """\
SELECT image_id
FROM answers
WHERE key_id IN (SELECT key_id FROM keys WHERE image_id IN (SELECT image_id FROM _chosen))
"""
SCORED = """\
SELECT DISTINCT scores.method_id, _chosen.role
FROM scores
JOIN _chosen ON _chosen.image_id = scores.candidate_id
"""


def answers_to(snapshot: Snapshot, choice: Choice) -> list[str]:
    """The answers to keys whose reference is chosen; their prompt is that of the key."""
    if not len(choice.of_role("key")):
        return []
    with _connection(snapshot, choice, Reach((), (), ())) as connection:
        return [image_id for (image_id,) in connection.sql(UNASKED).fetchall()]


def scored_roles(snapshot: Snapshot, choice: Choice) -> dict[str, frozenset[str]]:
    """The roles of the chosen images that a stored method has scored, by method_id."""
    with _connection(snapshot, choice, Reach((), (), ())) as connection:
        pairs = connection.sql(SCORED).fetchall()
    return {method_id: frozenset(role for name, role in pairs if name == method_id) for method_id, _ in pairs}


def count(snapshot: Snapshot, choice: Choice, reach: Reach) -> dict[str, int]:
    """How many rows of each table are taken out."""
    with _connection(snapshot, choice, reach) as connection:
        monitored = {
            table: _one(connection, f"SELECT count(*) FROM {table} SEMI JOIN _chosen USING (image_id)")
            for table in (*MONITORED, *TESTS)
        }
        monitored["verdicts"] = _one(connection, f"SELECT count(*) FROM ({VERDICTS})")
        truth = {
            table: _one(connection, f"SELECT count(*) FROM {table} SEMI JOIN _changed USING (model_id)")
            for table in TRUTH
        }
        truth["counterfactuals"] += _one(connection, LOSSES)
        return {
            "attributions": _one(connection, f"SELECT coalesce(sum(n_rows), 0)::BIGINT FROM ({ATTRIBUTIONS})"),
            "exemplar_ranks": _one(connection, f"SELECT count(*) FROM ({RANKS})"),
            "scores": _one(connection, SCORES),
            **{table: n_rows for table, n_rows in (monitored | truth).items() if n_rows},
        }


def delete(writer: Writer, choice: Choice, reach: Reach) -> None:
    """Take them out."""
    with _connection(writer.snapshot, choice, reach) as connection:
        attributions = connection.sql(f"SELECT method_id, sample_id FROM ({ATTRIBUTIONS})").to_arrow_table()
        ranks = connection.sql(RANKS).to_arrow_table()
        verdicts = connection.sql(VERDICTS).to_arrow_table()
    writer.delete_matching("attributions", attributions)
    writer.delete_matching("exemplar_ranks", ranks)
    ids = choice.images.select(["image_id"])
    for column in ("sample_id", "candidate_id"):
        writer.delete_matching("scores", ids.rename_columns([column]))
    writer.delete_matching("verdicts", verdicts)
    for table in (*MONITORED, *TESTS):
        writer.delete_matching(table, ids)
    for table in TRUTH:
        writer.delete_matching(table, pa.table({"model_id": pa.array(reach.models, pa.string())}))
    writer.delete_matching("counterfactuals", ids.rename_columns(["sample_id"]))


@contextmanager
def _connection(snapshot: Snapshot, choice: Choice, reach: Reach) -> Iterator[duckdb.DuckDBPyConnection]:
    """SQL over the snapshot, with what is chosen and how far it reaches."""
    reached = [
        (method_id, role)
        for role, methods in (("exemplar", reach.exemplar), ("pretraining", reach.pretraining))
        for method_id in methods
    ]
    texts = pa.string()
    tables = {
        "_chosen": choice.images.select(["image_id", "role"]),
        "_reached": pa.table(
            {
                "method_id": pa.array([method_id for method_id, _ in reached], texts),
                "role": pa.array([role for _, role in reached], texts),
            }
        ),
        "_changed": pa.table({"model_id": pa.array(reach.models, texts)}),
    }
    with sql.connect(snapshot, tables=tables) as connection:
        yield connection


def _one(connection: duckdb.DuckDBPyConnection, statement: str) -> int:
    [(value,)] = connection.sql(statement).fetchall()
    return int(value)
