"""SQL predicates on the columns of images: to write values in them, and to check a text from outside."""

from __future__ import annotations

from collections.abc import Iterable

# Candidates are exemplars and pretraining images. Lance tests rows against this in three quarters of the time of a list of
# the two roles.
CANDIDATES = "role <> 'sample'"


def literal(text: str) -> str:
    """The text as an SQL string."""
    return "'" + text.replace("'", "''") + "'"


def among(column: str, values: Iterable[str]) -> str:
    """The SQL predicate that a column holds one of the values."""
    listed = ", ".join(map(literal, values))
    return f"{column} IN ({listed})" if listed else "false"


def is_closed(predicate: str) -> bool:
    """Whether an SQL text closes its brackets and quotes, and has no comment: Lance ignores all after a surplus bracket."""
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
