"""SQL text taken apart into statements, by DuckDB's own tokenizer: it knows quotes, comments and dollar signs."""

from __future__ import annotations

from dataclasses import dataclass

import duckdb

COMMENT = duckdb.token_type.comment
OPERATOR = duckdb.token_type.operator


@dataclass(frozen=True)
class Statement:
    """The text of a statement without its semicolon, and the lines of the whole text before its first word."""

    text: str
    lines_before: int


def split(text: str) -> tuple[list[Statement], str]:
    """The statements that end with a semicolon, and the text after the last of them; empty statements are left out."""
    data = text.encode()  # the tokenizer counts bytes
    statements: list[Statement] = []
    start, first = 0, None
    for offset, kind in duckdb.tokenize(text):
        if kind == OPERATOR and data[offset : offset + 1] == b";":
            if first is not None:
                statements.append(Statement(data[start:offset].decode().strip(), data[:first].count(b"\n")))
            start, first = offset + 1, None
        elif kind != COMMENT and first is None:
            first = offset
    return statements, data[start:].decode()


def is_blank(text: str) -> bool:
    """Whether a text holds nothing but blanks and comments, none of them still open."""
    tokens = duckdb.tokenize(text + "\n;")
    return [kind for _, kind in tokens if kind != COMMENT] == [OPERATOR]
