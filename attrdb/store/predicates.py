"""SQL predicates on the columns of images: to write values in them, and to check a text from outside."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from attrdb.text import check_text

CANDIDATES = "role IN ('exemplar', 'pretraining')"


def literal(text: str) -> str:
    """The text as an SQL string.

    raises: InvalidValue for a text that is not UTF-8
    """
    check_text("text", text)
    return "'" + text.replace("'", "''") + "'"


def among(column: str, values: Iterable[str]) -> str:
    """The SQL predicate that a column holds one of the values."""
    listed = ", ".join(map(literal, values))
    return f"{column} IN ({listed})" if listed else "false"


def among_parts(column: str, values: Sequence[str], size: int) -> Iterator[str]:
    """The predicate of `among` in parts of at most `size` values each; together they keep what it keeps."""
    for start in range(0, len(values), size):
        yield among(column, values[start : start + size])


# Functions that a predicate may call: none makes long texts of short ones, and none gives another answer on the next call.
_FUNCTIONS = """
abs array_contains array_element array_has array_has_all array_has_any array_length array_position arrow_cast ascii bit_length
btrim cardinality cast char_length character_length coalesce concat concat_ws contains date_part date_trunc ends_with exp
find_in_set greatest ifnull initcap instr isnan iszero least left length levenshtein list_contains ln log10 lower ltrim md5
nullif nvl octet_length power regexp_count regexp_instr regexp_like regexp_match reverse right round rtrim sha256 signum
split_part sqrt starts_with strpos to_date to_timestamp translate trunc try_cast upper
"""
FUNCTIONS = frozenset(_FUNCTIONS.split())
_BEFORE_BRACKET = frozenset(("and", "or", "not", "in", "like", "ilike", "between", "is"))  # words that are no function
_TYPED = frozenset(("date", "timestamp"))  # that may stand before a text
MAX_WORDS = 200  # between two AND or OR, values not counted: chains of some 500 end Lance's process (pylance 14.0)
MAX_CONDITIONS = 2_000  # as above: some 100,000
SHOWN = 200  # characters of a predicate, in an error

_TOKEN = re.compile(
    r"""
    (?P<space>\s+)
    | (?P<value>'(?:[^']|'')*' | (?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?!\w))
    | (?P<word>[A-Za-z_]\w*)
    | (?P<column>`[^`]+`)
    | (?P<separator>,)
    | (?P<operator>--|/\*|::|<=|>=|<>|!=|==|\|\||[-=<>+*/%()\[\].])
    """,
    re.VERBOSE | re.ASCII,
)


def shortened(text: str) -> str:
    """A text for an error: its beginning and its length if it is long."""
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r} ... ({len(text):,} characters)"


def fault_of(predicate: str) -> str | None:
    """What keeps an SQL text from being a predicate on its own, before Lance sees it; None if there is nothing.

    Lance takes double quotes as text, ignores what follows a surplus bracket, panics at parameters and prefixed texts, and
    overflows its stack at long chains of operators.
    """
    brackets: list[str] = []
    words = conditions = 0
    last_kind = last = ""
    after_space, at = False, 0
    while at < len(predicate):
        token = _TOKEN.match(predicate, at)
        if token is None:
            return _unreadable(predicate, at)
        kind, text, at = token.lastgroup or "", token[0].lower(), token.end()
        if text in ("--", "/*"):
            return "it has a comment; leave it out"
        if text[0] == "'" and last_kind == "word" and not after_space and last not in _BEFORE_BRACKET | _TYPED:
            return f"it has {last}{token[0][:20]}; write a text in single quotes, without a prefix"
        if text == "(" and last_kind == "column":
            return f"it calls {last}; write the name of a function without quotes"
        if text == "(" and last_kind == "word" and last not in FUNCTIONS | _BEFORE_BRACKET:
            return (
                f"it calls {last}(), which a predicate may not; it may call: {', '.join(sorted(FUNCTIONS))} "
                "(attrdb sql knows more)"
            )
        if text in ("(", "["):
            brackets.append(")" if text == "(" else "]")
        elif text in (")", "]") and (not brackets or brackets.pop() != text):
            return f"it has a {text} that nothing opens"
        if text in ("and", "or"):
            words, conditions = 0, conditions + 1
        elif kind in ("word", "column", "operator") and not (
            text in "+-" and last in ("(", ",")
        ):  # no sign of a number
            words += 1
        if words > MAX_WORDS or conditions > MAX_CONDITIONS:
            return "it is too long for one condition or has too many; write column IN ('a', 'b', ...)"
        after_space = kind == "space"
        if not after_space:
            last_kind, last = kind, text
    return f"it lacks a {brackets[-1]}" if brackets else None


def _unreadable(predicate: str, at: int) -> str:
    """Why no token begins at a place."""
    character = predicate[at]
    if character == '"':
        return "it has a double quote; write a column as it is, such as role, and a text in single quotes, such as 'sample'"
    if character in "'`":
        return f"it has a {character} that is not closed"
    if character in "$?:@":
        return f"it has a parameter ({predicate[at : at + 10]}); write the value"
    if character.isdigit():
        return f"it has {predicate[at : at + 20]}, which is no number"
    return f"it has {character!r}, which is no SQL"
