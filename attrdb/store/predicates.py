"""SQL predicates on the columns of images: how values are written in them, and when a text from outside is one."""

from __future__ import annotations

from collections.abc import Iterable

# Candidates are exemplars and pretraining images. Lance tests rows against this in three quarters of the time that a list
# of the two roles takes.
CANDIDATES = "role <> 'sample'"


def literal(text: str) -> str:
    """The text as an SQL string."""
    return "'" + text.replace("'", "''") + "'"


def among(column: str, values: Iterable[str]) -> str:
    """The SQL predicate that a column holds one of the values."""
    listed = ", ".join(map(literal, values))
    return f"{column} IN ({listed})" if listed else "false"


def is_closed(predicate: str) -> bool:
    """Whether brackets and quotes of an SQL text are closed in it: Lance ignores what comes after a bracket too many."""
    depth, quote = 0, ""
    for at, character in enumerate(predicate):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"`":
            quote = character
        elif predicate[at : at + 2] in ("--", "/*"):
            return False
        depth += 0 if quote else {"(": 1, ")": -1}.get(character, 0)
        if depth < 0:
            return False
    return depth == 0 and not quote
