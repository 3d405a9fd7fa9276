"""Text from outside, made clean in one place: its encoding, byte-order marks, NUL and other control characters."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from attrdb.errors import InvalidValue
from attrdb.text import decode

MAX_TEXT = 2**20  # bytes of a caption, or of the fields beside an image
# Sequences that a terminal obeys, control characters but tab and newline, byte-order marks within the text.
CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]"
)
UNCLEAN = re.compile(rf"{CONTROL.pattern}|\r|[\ud800-\udfff]")


def clean(text: str) -> str:
    """Text without control characters, with newlines for line ends and without blanks around it.

    Half a character, which JSON can spell and no column can hold, becomes a question mark.
    """
    if UNCLEAN.search(text):
        text = CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
        text = text.encode("utf-8", "replace").decode("utf-8")
    return text.strip()


def read_text(path: Path, limit: int | None = None) -> str:
    """limit: bytes that the file may have

    raises: InvalidValue for a file that is no text, cannot be read, or is longer
    """
    try:
        size = path.stat().st_size
        encoded = path.read_bytes() if limit is None or size <= limit else b""
    except OSError as error:
        raise InvalidValue(f"{path} cannot be read: {error.strerror}") from error
    if limit is not None and size > limit:
        raise InvalidValue(f"{path} has {size:,} bytes, more than {limit:,}; shorten it")
    return clean(decode(encoded, str(path)))


def as_text(value: Any) -> str | None:
    """A single value as clean text; None for a value that is none, and for one of several parts."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)):
        return clean(str(value)) or None
    return None


def first_text(value: Any) -> str | None:
    """`as_text`, of a list its first text: data sets list several captions of an image."""
    if isinstance(value, list):
        return next((text for part in value if (text := as_text(part))), None)
    return as_text(value)


def plain_json(value: Any) -> Any:
    """A value as strict JSON can hold it: clean text, null for NaN and infinity, and no bytes."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {clean(str(name)): plain_json(part) for name, part in value.items() if not isinstance(part, bytes)}
    if isinstance(value, (list, tuple)):
        return [plain_json(part) for part in value if not isinstance(part, bytes)]
    return value if isinstance(value, (int, type(None))) else clean(str(value))


def json_text(fields: dict[str, Any]) -> str | None:
    """Fields as JSON text; None where there are none."""
    return json.dumps(plain_json(fields), sort_keys=True) if fields else None
