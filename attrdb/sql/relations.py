"""Views and macros: one SQL file each in queries/views, whose header says what a row is and what a macro takes.

    -- What the rows say, in one or more lines.
    -- grain     one row per candidate
    -- argument  k = 10    how many, >= 1

A file with arguments is a table macro, one without is a view. One with a line `-- returns` in
the place of grain is a scalar macro, whose SQL is an expression. The data dictionary is generated from these headers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import pyarrow as pa

from attrdb.store.schema import feature_columns

ROLE_VIEWS = ("exemplars", "samples", "pretraining_images")
RESULT_VIEWS = ("truth_scores", "loss_increases", "concept_truth", "concept_gate", "concept_scores")
STORED = ("exemplar_ranks", "attributions", "calibrations")  # tables that SQL sees through a view of their name
VALUE_MACROS = ("average_rank", "bootstrap_interval")  # of their arguments alone
# Each after those that it reads.
MACROS = (
    "sample_scores",
    "bootstrap_draws",
    "method_gains",
    "nearest",
    "attribute",
    "influence_shares",
    "key_tests",
    "changes",
)

# Views of what a snapshot holds; they have no file.
FEATURES_GRAIN = "one row per image and encoder that has encoded it; feature is a FLOAT[] of unit length"
UNFINISHED_GRAIN = (
    "one row per model whose images are stored and whose row in models is not: its job runs or was killed"
)


@dataclass(frozen=True)
class Relation:
    """A view, a table macro where it has arguments, or a scalar macro where it returns a value."""

    name: str
    summary: str
    grain: str
    arguments: tuple[tuple[str, str, str], ...]  # name, default (empty: required) and meaning
    sql: str
    returns: str = ""

    @property
    def signature(self) -> str:
        """The arguments as they are declared, such as `sample, k := 10`."""
        return ", ".join(f"{name} := {default}" if default else name for name, default, _ in self.arguments)

    @property
    def create(self) -> str:
        """The statement that makes it."""
        if not self.arguments:
            return f"CREATE VIEW {self.name} AS\n{self.sql}"
        table = "" if self.returns else " TABLE"
        return f"CREATE MACRO {self.name}({self.signature}) AS{table}\n{self.sql}"


@cache
def relations() -> tuple[Relation, ...]:
    """All views and macros, in the order in which they are made."""
    return tuple(_read(name, f"{name}.sql") for name in (*ROLE_VIEWS, *STORED, *VALUE_MACROS, *RESULT_VIEWS, *MACROS))


@cache
def older_view(name: str, before: int) -> Relation:
    """The view that gives a table of before a schema version today's columns."""
    return _read(f"_{name}", f"before_{before}/{name}.sql")


@cache
def exemplars_before_8() -> Relation:
    """The view `exemplars` of a moment at which images had no concept_id."""
    return _read("exemplars", "before_8/exemplars.sql")


def _read(name: str, file: str) -> Relation:
    text = files("attrdb.queries").joinpath("views", file).read_text(encoding="utf-8")
    summary, grain, returns, arguments = [], "", "", []
    for line in text.splitlines():
        if not line.startswith("--"):
            break
        word, _, rest = line[2:].strip().partition(" ")
        if word == "grain":
            grain = rest.strip()
        elif word == "returns":
            returns = rest.strip()
        elif word == "argument":
            argument = re.fullmatch(r"(\w+)(?: = (\S+))?\s+(.+)", rest.strip())
            if argument is None:
                raise ValueError(f"{file} has an argument line that is not understood: {line}")
            arguments.append((argument[1], argument[2] or "", argument[3]))
        else:
            summary.append(line[2:].strip())
    return Relation(name, " ".join(summary), grain, tuple(arguments), text, returns)


def features_view(images: pa.Schema) -> str:
    """The statement that makes the view `features`, a row per image and encoder."""
    # The null test reads the cast column: DuckDB would push one on the column itself down, and Lance's Arrow bridge
    # cannot filter a vector column (pylance 14.0: 'No match for FieldRef').
    nothing = "SELECT image_id, role, model_id, '' AS encoder_id, NULL::FLOAT[] AS feature FROM images WHERE false"
    parts = [
        f"SELECT image_id, role, model_id, '{encoder}' AS encoder_id, \"{encoder}\"::FLOAT[] AS feature FROM images "
        f'WHERE "{encoder}"::FLOAT[] IS NOT NULL'
        for encoder in feature_columns(images)  # lower-case words and digits
    ]
    return f"CREATE VIEW features AS {' UNION ALL '.join(parts or [nothing])}"
