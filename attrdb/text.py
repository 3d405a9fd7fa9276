"""Single values as JSON can hold them, and as a person reads them."""

from __future__ import annotations

import math
import re
from typing import Any

from attrdb.errors import InvalidValue

# What a terminal would obey instead of showing it: control characters but tab and newline, and those that turn the
# direction of writing round.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def check_text(name: str, text: str) -> None:
    """Check that a text from outside is one that can be stored and sent: UTF-8, without half characters.

    name:   of the value, for the error
    raises: InvalidValue
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.end + 20].encode("utf-8", "backslashreplace").decode()
        raise InvalidValue(f"{name} is not UTF-8 text: '{around}'; write it in UTF-8") from error


def visible(text: str) -> str:
    """Text for a terminal: control characters are shown, such as \\x1b, and not sent."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def plain(value: Any) -> Any:
    """A value as JSON can hold it: bytes only by their length, NaN and infinity as texts."""
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, float):
        return (
            value if math.isfinite(value) else "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        )
    if isinstance(value, list) or type(value) is tuple:  # a tuple: an entry of a map
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return value if isinstance(value, (str, int, type(None))) else str(value)


def shown(value: Any) -> str:
    """A value as a person reads it in a table, without what a terminal would obey."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and len(value) > 8:
        return f"[{', '.join(shown(item) for item in value[:3])}, ... {len(value)}]"
    return visible(str(plain(value)))
