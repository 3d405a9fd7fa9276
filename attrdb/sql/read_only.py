"""Which statements only read: one SELECT in any of its forms, PIVOT, DESCRIBE, SUMMARIZE, and EXPLAIN of one of them."""

from __future__ import annotations

import re

import duckdb

from attrdb.errors import QueryRefused

# DuckDB takes a PIVOT without a list of values apart into several statements, and calls it MULTI, whatever it is part of.
WRITES = {
    b"INSERT",
    b"UPDATE",
    b"DELETE",
    b"MERGE",
    b"COPY",
    b"CREATE",
    b"DROP",
    b"ALTER",
    b"ATTACH",
    b"INSTALL",
    b"LOAD",
}
READS = {"SELECT", "WITH", "FROM", "PIVOT", "UNPIVOT", "("}
_EXPLAIN = re.compile(r"EXPLAIN\s+(?:ANALYZE\s+)?(?:\(\s*(?:FORMAT|ANALYZE)\b[^)]*\)\s*)?", re.IGNORECASE)


def check_read_only(connection: duckdb.DuckDBPyConnection, statement: str) -> None:
    """raises: QueryRefused unless the text is one statement that only reads; duckdb.Error if it is no SQL"""
    parsed = connection.extract_statements(statement)
    kinds = [one.type.name for one in parsed]
    if len(parsed) == 1:
        text = _without_comments(parsed[0].query)
        if kinds == ["SELECT"] or (kinds == ["MULTI"] and _is_query(connection, text)):
            return
        if (explained := _EXPLAIN.match(text)) and kinds[0] in ("EXPLAIN", "MULTI"):
            check_read_only(connection, text[explained.end() :])
            return
    hint = "; several go through: attrdb shell DB < FILE" if len(parsed) > 1 else ""
    raise QueryRefused(
        f"one SELECT is needed, found: {', '.join(kinds) or 'nothing'}{hint}; attrdb's tables change through attrdb ingest"
    )


def _is_query(connection: duckdb.DuckDBPyConnection, text: str) -> bool:
    """Whether it can stand in the place of a table."""
    first = re.match(r"\w+|\(", text)
    if first is None or first[0].upper() not in READS:
        return False
    try:
        wrapped = connection.extract_statements(f"SELECT * FROM (\n{text.rstrip().rstrip(';')}\n)")
    except duckdb.Error:
        return False
    return len(wrapped) == 1 and not _writes(text)


def _writes(text: str) -> bool:
    """Whether a word of the statement, outside of quotes and comments, is one of those that change something."""
    data = text.encode()
    keywords = [start for start, kind in duckdb.tokenize(text) if kind == duckdb.token_type.keyword]
    return any(re.split(rb"\W", data[start:], maxsplit=1)[0].upper() in WRITES for start in keywords)


def _without_comments(text: str) -> str:
    """The statement from its first word on."""
    for start, kind in duckdb.tokenize(text):
        if kind != duckdb.token_type.comment:
            return text.encode()[start:].decode()
    return ""
