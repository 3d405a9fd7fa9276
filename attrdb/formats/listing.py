"""Names with what they mean, in sections, for reading: narrow enough for any terminal."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import click

from attrdb.queries import NamedQuery

WIDTH = 80  # where there is no terminal
MAX_WIDTH = 100


def page_width() -> int:
    return min(shutil.get_terminal_size((WIDTH, 24)).columns, MAX_WIDTH)


def listing(sections: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """Each section with its names in one column and their meanings, wrapped, in another."""
    formatter = click.HelpFormatter(width=page_width())
    for title, lines in sections.items():
        with formatter.section(title):
            formatter.write_dl(lines)
    return formatter.getvalue().lstrip("\n")


def query_listing(queries: Iterable[NamedQuery]) -> str:
    """The queries by group: of each the first sentence of its summary, and its parameters."""
    ordered = sorted(queries, key=lambda query: (query.group, query.name))
    sections: dict[str, list[tuple[str, str]]] = {}
    for group, members in groupby(ordered, key=lambda query: query.group):
        sections[group] = []
        for query in members:
            sections[group].append((query.name, first_sentence(query.summary)))
            if query.usage:
                sections[group].append(("", query.usage))
    return listing(sections)


def first_sentence(text: str) -> str:
    return text[:1].upper() + text[1:].partition(". ")[0].removesuffix(".") + "."
