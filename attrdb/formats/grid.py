"""A table for reading: columns as wide as they need to be, and no number that is broken over two lines.

Where a terminal is too narrow, text breaks after a blank or after / _ - . and the like. Where that is not enough, rows are
shown one below the other, a line per column.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Sequence

import pyarrow as pa

from attrdb.formats.text import cells, is_number
from attrdb.text import visible

PIPE_WIDTH = 10_000  # a pipe or a file gets whole lines, not lines folded at 80 columns
GAP = 2  # blanks between columns
MAX_PIECE = 24  # characters that text without a place to break is kept whole for
_PIECES = re.compile(r"[^\s/_\-.,;:=|]*[\s/_\-.,;:=|]*")  # each ends where a line may end


def grid_parts(table: pa.Table, *, terminal: bool = False) -> Iterator[str]:
    """The table; terminal: as wide as the terminal, and in its colours."""
    from rich.console import Console

    console = Console(
        width=None if terminal else PIPE_WIDTH,
        file=sys.stdout if terminal else io.StringIO(),
        markup=False,
        highlight=False,
    )
    names = [visible(name) for name in table.column_names]
    numeric = [is_number(field.type) for field in table.schema]
    rows = list(cells(table))
    columns = [[name, *(row[position] for row in rows)] for position, name in enumerate(names)]
    widths = column_widths(columns, numeric, console.width - 2)
    with console.capture() as written:
        if widths is None:
            _print_records(console, names, rows)
        else:
            _print_grid(console, names, rows, numeric, widths)
    yield written.get()


def column_widths(columns: Sequence[Sequence[str]], numeric: Sequence[bool], width: int) -> list[int] | None:
    """The width of each column, so that all fit; None if they cannot without breaking a number.

    columns: of each its cells, the name first
    """
    from rich.cells import cell_len

    natural = [max(cell_len(line) for cell in column for line in cell.split("\n")) for column in columns]
    least = []
    for column, is_numeric, whole in zip(columns, numeric, natural, strict=True):
        kept = column[1:] if is_numeric else []
        pieces = [column[0]] if is_numeric else column
        longest = max((cell_len(piece.rstrip()) for cell in pieces for piece in _PIECES.findall(cell)), default=1)
        least.append(min(whole, max([min(longest, MAX_PIECE), *map(cell_len, kept)])))
    room = width - GAP * (len(columns) - 1)
    if sum(least) > room:
        return None
    # The widest columns give way first: all get at most the highest level at which the table fits.
    level = min(max(natural, default=0), room)
    while sum(widths := [max(low, min(high, level)) for low, high in zip(least, natural, strict=True)]) > room:
        level -= 1
    return widths


def broken(text: str, width: int) -> str:
    """The text in lines of at most some width, which end at blanks or after punctuation wherever they can."""
    from rich.cells import cell_len, chop_cells

    lines: list[str] = []
    for line in text.split("\n"):
        current = ""
        for piece in _PIECES.findall(line):
            if current and cell_len(current) + cell_len(piece.rstrip()) > width:
                lines.append(current.rstrip())
                current = ""
            current += piece
            while cell_len(current.rstrip()) > width:
                head = chop_cells(current, width)[0]
                lines.append(head)
                current = current[len(head) :]
        lines.append(current.rstrip())
    return "\n".join(lines)


def _print_grid(console, names, rows, numeric, widths) -> None:  # type: ignore[no-untyped-def]  # of rich, imported late
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    grid = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name, is_numeric, width in zip(names, numeric, widths, strict=True):
        grid.add_column(broken(name, width), justify="right" if is_numeric else "left", min_width=width, no_wrap=True)
    for row in rows:
        grid.add_row(*(broken(cell, width) for cell, width in zip(row, widths, strict=True)))
    console.print(grid)


def _print_records(console, names, rows) -> None:  # type: ignore[no-untyped-def]
    from rich.cells import cell_len, set_cell_size

    longest = max(map(cell_len, names))
    for number, row in enumerate(rows, 1):
        console.print(f"row {number:,}", soft_wrap=True)
        for name, cell in zip(names, row, strict=True):
            room = max(console.width - longest - 2 * GAP, MAX_PIECE)
            for position, line in enumerate(broken(cell, room).split("\n")):
                label = "" if position else name
                console.print(f"  {set_cell_size(label, longest)}  {line}", soft_wrap=True)
    if not rows:
        console.print(", ".join(names), soft_wrap=True)
