"""What a spec says: a name, perhaps a file, and settings; and names that are near to a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import parse_qsl

from attrdb.errors import InvalidValue


def split_settings(argument: str) -> tuple[str, dict[str, str]]:
    """`sscd.pt?size=288&mean=clip` as its name and its settings.

    raises: InvalidValue for settings that are not NAME=VALUE joined by &, or for one given twice
    """
    name, mark, query = argument.partition("?")
    try:
        pairs = parse_qsl(query, strict_parsing=True, keep_blank_values=True) if mark else []
    except ValueError as error:
        raise InvalidValue(f"settings {query!r} are not NAME=VALUE joined by &") from error
    if len(dict(pairs)) < len(pairs):
        raise InvalidValue(f"settings {query!r} give one of them twice")
    return name, dict(pairs)


def file_spec(start: str, path: Path, settings: dict[str, str]) -> str:
    """The spec that finds the file again from any working directory."""
    query = "&".join(f"{name}={value}" for name, value in settings.items())
    return f"{start}{path.expanduser().absolute()}" + (f"?{query}" if query else "")


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of an error message that offers the names most like the given one; empty if none is."""
    close = difflib.get_close_matches(name, list(names), 3, 0.6)
    return f"; nearest are {', '.join(map(repr, close))}" if close else ""
