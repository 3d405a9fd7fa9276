"""Bytes as text; single values as JSON can hold them, and as a person reads them."""

from __future__ import annotations

import codecs
import difflib
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from attrdb.errors import InvalidValue

# What a terminal would obey instead of showing it: control characters but tab and newline, and those that turn the
# direction of writing round.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# With the longer marks first: that of UTF-32 begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
MAX_FOREIGN = 0.4  # share of letters beyond ASCII above which text is not Western European


def decode(encoded: bytes, where: str) -> str:
    """The text in some bytes: by its byte-order mark, else UTF-8, UTF-16 without a mark, or Windows-1252.

    Windows-1252 can hold any bytes, so it is only taken where the result is mostly ASCII.
    where:  what the bytes are, for the error
    raises: InvalidValue if none of them fits
    """
    for mark, encoding in MARKS:
        if encoded.startswith(mark):
            return _decoded(encoded[len(mark) :], encoding, where)
    n_nul = encoded.count(0)
    if n_nul and len(encoded) % 2 == 0 and n_nul >= len(encoded) // 4:
        odd = encoded[1::2].count(0)
        return _decoded(encoded, "utf-16-le" if odd > n_nul / 2 else "utf-16-be", where)
    try:
        return encoded.decode("utf-8")
    except UnicodeDecodeError:
        n_foreign = sum(byte >= 0x80 for byte in encoded)
        if n_foreign <= MAX_FOREIGN * len(encoded):
            with suppress(UnicodeDecodeError):
                return encoded.decode("cp1252")
        raise InvalidValue(f"{where} is not UTF-8 text; save it as UTF-8") from None


def _decoded(encoded: bytes, encoding: str, where: str) -> str:
    try:
        return encoded.decode(encoding)
    except UnicodeDecodeError as error:
        raise InvalidValue(f"{where} is not {encoding.upper()} text: {error.reason}; save it as UTF-8") from error


MAX_WHOLE = 1e15  # numbers from here on are shown with a power of ten


def first_line(error: BaseException) -> str:
    """What an error of a library says, without its explanations."""
    return str(error).partition("\n")[0]


def size_text(n_bytes: int) -> str:
    """Bytes for reading, such as 1.5 GiB; never 0 where there are some."""
    size, units = float(n_bytes), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:,.0f} {units[0]}" if units[0] == "bytes" else f"{size:,.2f} {units[0]}"


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


def nearest(name: str, known: Iterable[str]) -> str:
    """The three names that are most like a given one, for an error message; empty if there is none."""
    return ", ".join(map(repr, difflib.get_close_matches(name, list(known), 3, 0)))


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


def fixed(value: float, digits: int) -> str:
    """A number with so many digits after the point; halves are rounded up, the same on every page."""
    return str(Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def shown(value: Any) -> str:
    """A value as a person reads it in a table, without what a terminal would obey."""
    if value is None:
        return "-"
    if isinstance(value, float):
        rounded = f"{value:.4g}"
        return f"{value:.0f}" if "e+" in rounded and abs(value) < MAX_WHOLE else rounded
    if isinstance(value, list) and len(value) > 8:
        return f"[{', '.join(shown(item) for item in value[:3])}, ... {len(value)}]"
    return visible(str(plain(value)))
