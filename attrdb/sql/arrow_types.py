"""Columns of a result that Arrow has no type for."""

from __future__ import annotations

from typing import Any

import duckdb

# Types that Arrow lacks: DuckDB would hand over other values, such as -1 for the largest UHUGEINT, or bare bytes.
_NOT_IN_ARROW = frozenset(("uhugeint", "time with time zone", "bit", "bignum", "varint"))


def exact(relation: duckdb.DuckDBPyRelation) -> duckdb.DuckDBPyRelation:
    """The relation with values of such types as text."""
    columns, changed = [], False
    for number, (name, kind) in enumerate(zip(relation.columns, relation.types, strict=True), 1):
        cast = _cast_for_arrow(kind)
        changed |= cast != str(kind)
        columns.append(f"{f'CAST(#{number} AS {cast})' if cast != str(kind) else f'#{number}'} AS {_quoted(name)}")
    return relation.project(", ".join(columns)) if changed else relation


def _cast_for_arrow(kind: Any) -> str:
    """The type, or the one nearest to it that Arrow has."""
    if kind.id in _NOT_IN_ARROW:
        return "VARCHAR"
    if kind.id not in ("list", "array", "struct", "map") or any(not name for name, _ in kind.children):
        return str(kind)  # of a struct without names the text is no type
    parts = {name: (part if isinstance(part, int) else _cast_for_arrow(part)) for name, part in kind.children}
    if all(isinstance(part, int) or parts[name] == str(part) for name, part in kind.children):
        return str(kind)
    if kind.id == "struct":
        return f"STRUCT({', '.join(f'{_quoted(name)} {part}' for name, part in parts.items())})"
    if kind.id == "map":
        return f"MAP({parts['key']}, {parts['value']})"
    return f"{parts['child']}[{parts.get('size', '')}]"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
