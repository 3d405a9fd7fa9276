"""Draws docs/architecture-*.svg from the code: rooms and data. Run by `make docs`; a test fails if a picture is stale.

Imports are read with `ast`. Those inside functions count, those for type checkers do not. A job writes the tables of the
`Writer` methods that it calls. A named query reads the tables in its header.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path

from attrdb import queries
from attrdb.sql.relations import relations
from attrdb.store.dictionary import DICTIONARY

ROOT = Path(__file__).resolve().parent.parent
TREES = {"attrdb": "attrdb", "ingest": "attrdb.ingest", "training": "attrdb.training", "queries": "attrdb.queries"}

# From the bottom to the top. A room imports rooms on lower lines only; rooms on one line do not import each other.
ORDER = (
    ("base",),
    ("queries",),
    ("store", "formats"),
    ("search",),
    ("attribution",),
    ("sql",),
    ("upkeep",),
    ("database",),
    ("models", "provenance"),
    ("pages", "shell"),
    ("ingest",),
    ("training",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
JOBS = ("ingest", "training")  # only the command line imports them

TAKES_TABLE = {
    "upsert",
    "append_rows",
    "update",
    "delete",
    "commit",
}  # methods of Writer that are told the table, or the whole write

# Modules that stand in a room without being in its package.
ROOM_OF = {
    "attrdb": "database",  # attrdb.open and attrdb.create
    "attrdb.bundled": "base",
    "attrdb.errors": "base",
    "attrdb.plugins": "base",
    "attrdb.progress": "base",
    "attrdb.text": "base",
    "attrdb.demo": "cli",
    "attrdb.__main__": "cli",
}


# --- imports ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """`module` imports `target`; both are full names."""

    module: str
    target: str
    line: int

    @property
    def rooms(self) -> tuple[str, str]:
        return room_of(self.module), room_of(self.target)


@cache
def modules() -> dict[str, Path]:
    """Import name of each module of the package -> its file."""
    found = {}
    for tree, package in TREES.items():
        for path in sorted((ROOT / tree).rglob("*.py")):
            parts = path.relative_to(ROOT / tree).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def room_of(module: str) -> str:
    """raises: KeyError for a module outside the rooms of ORDER"""
    room = ROOM_OF.get(module) or module.split(".")[1]
    if room not in LEVEL:
        raise KeyError(f"{module} stands in no room; name its room in docs/architecture.py")
    return room


def imports_of(module: str, tree: ast.AST, known: Iterable[str]) -> Iterator[Import]:
    """All imports of modules in `known`, except those under `if TYPE_CHECKING`."""
    for node in _run(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [member if member in known else node.module for member in members]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("ml", "import_module"):
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            names = [name if name in known else f"attrdb.{name}" for name in names]  # ml("training.train")
        yield from (Import(module, name, node.lineno) for name in dict.fromkeys(names) if name in known)


def _run(node: ast.AST) -> Iterator[ast.AST]:
    """All descendants of the node that a running program may reach."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).split(".")[-1] == "TYPE_CHECKING":
            for branch in child.orelse:
                yield branch
                yield from _run(branch)
        else:
            yield child
            yield from _run(child)


@cache
def imports() -> list[Import]:
    known = modules()
    return [
        one
        for module, path in known.items()
        for one in imports_of(module, ast.parse(path.read_text(encoding="utf-8")), known)
    ]


def upward(found: Iterable[Import]) -> list[Import]:
    """Imports between rooms that do not lead to a lower line of ORDER."""
    crossing = [(one, *one.rooms) for one in found if one.rooms[0] != one.rooms[1]]
    return [one for one, room, target in crossing if LEVEL[target] >= LEVEL[room]]


# --- the data's way ---------------------------------------------------------------------------------------------------


def written_by_writer() -> dict[str, set[str]]:
    """Method of `Writer` -> the tables that it writes. Methods that take the name of a table are left out."""
    tree = ast.parse((ROOT / "attrdb/store/writer.py").read_text(encoding="utf-8"))
    [writer] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Writer"]
    bodies = {node.name: node for node in writer.body if isinstance(node, ast.FunctionDef)}
    calls = {
        name: {
            node.func.attr
            for node in ast.walk(body)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and ast.unparse(node.func.value) == "self"
        }
        & bodies.keys()
        for name, body in bodies.items()
    }

    def reached(name: str, seen: frozenset[str] = frozenset()) -> set[str]:
        return {name}.union(*(reached(called, seen | {name}) for called in calls[name] - seen - {name}))

    return {
        name: {table for called in reached(name) - TAKES_TABLE for table in _named_tables(bodies[called])}
        for name in bodies
        if "commit" in reached(name) and name not in TAKES_TABLE
    }


def _named_tables(node: ast.AST) -> set[str]:
    texts = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    return {text.removesuffix(".lance") for text in texts} & DICTIONARY.keys()


@cache
def writes() -> dict[str, set[str]]:
    """Job -> the tables that it writes, without `jobs` and `failures`, which every job writes."""
    by_method, found = written_by_writer(), {}
    for module, path in modules().items():
        if room_of(module) not in (*JOBS, "search", "attribution") or "icon_sd" in module:
            continue
        tables: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                to_writer = ast.unparse(node.func.value).split(".")[-1] == "writer"
                tables |= by_method.get(node.func.attr, set()) if to_writer else set()
                if to_writer and node.func.attr in ("upsert", "append_rows") and isinstance(node.args[0], ast.Constant):
                    tables.add(node.args[0].value)
            if isinstance(node, ast.Attribute) and node.attr == "LanceOperation":
                tables.add("images")  # a column of features, filled fragment by fragment
        if tables:
            found.setdefault(_job(module), set()).update(tables)
    return found


def _job(module: str) -> str:
    """The first two parts of a module's name below attrdb, such as `ingest.read`."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2])


def reads() -> dict[str, set[str]]:
    """Reader -> the tables that it reads: attribution by its Python code, groups of named queries by their headers.

    The macro `attribute` in a header counts as no table.
    """
    found: dict[str, set[str]] = {"attribute, nearest": set()}
    jobs = writes()
    for module, path in modules().items():
        if room_of(module) in ("search", "attribution") and _job(module) not in jobs:
            found["attribute, nearest"] |= set(_read_tables(ast.parse(path.read_text(encoding="utf-8"))))
    sql = {relation.name: relation.sql for relation in relations()} | {
        "features": "FROM images",
        "unfinished_models": "FROM images JOIN models",
    }

    def tables(name: str) -> set[str]:
        name = name.removeprefix("_")
        inside = re.findall(r"\b(?:FROM|JOIN)\s+(\w+)", sql[name]) if name in sql else []
        below = set[str]().union(*(tables(one) for one in inside if one.removeprefix("_") != name))
        return below | ({name} & DICTIONARY.keys())

    for query in queries.own_queries().values():
        group = found.setdefault(f"queries/{query.group}", set())
        group.update(*(tables(relation) for relation in query.reads if relation != "attribute"))
    return {reader: tables for reader, tables in found.items() if tables}


def _read_tables(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        name = None
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).split(".")[-1] == "tables":
            name = node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "rows":
            name = node.args[0] if node.args else None
        if isinstance(name, ast.Constant) and name.value in DICTIONARY:
            yield name.value


# --- pictures ---------------------------------------------------------------------------------------------------------

STYLE = """<style>
  svg { --paper: #ffffff; --ink: #1d2733; --soft: #5b6875; --line: #c3ccd6; --room: #eef2f7; --job: #fdf1e2; --mark: #2f6fb3;
        --table: #e4f1ea; --warn: #b4462c; }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #171b21; --ink: #e6eaef; --soft: #9aa7b4; --line: #3d4854; --room: #232a33; --job: #37291a;
          --mark: #6fb0f0; --table: #1d3228; --warn: #f0876b; }
  }
  text { font: 13px system-ui, sans-serif; fill: var(--ink); }
  .name { font-weight: 600; }
  .soft { fill: var(--soft); font-size: 12px; }
  .paper { fill: var(--paper); }
  .room { fill: var(--room); stroke: var(--line); }
  .job { fill: var(--job); stroke: var(--line); }
  .table { fill: var(--table); stroke: var(--line); }
  .grid { stroke: var(--line); }
  .mark { fill: var(--mark); }
  .warn { fill: var(--warn); }
  .way { fill: none; stroke: var(--mark); stroke-opacity: 0.55; stroke-width: 1.4; }
</style>"""

PURPOSE = {  # what a package's docstring says too long, or nowhere
    "base": "errors, plug-ins, values as text",
    "queries": "named queries and views, as SQL files",
    "store": "tables on disk, snapshots, checked writes, upgrades",
    "formats": "rows as text, CSV, JSON, Parquet, xlsx",
    "search": "the most similar candidates, exactly or by an index",
    "attribution": "from scores to influence; methods",
    "sql": "DuckDB over one snapshot; export",
    "upkeep": "status, checks, maintenance",
    "database": "attrdb.open, attrdb.create: the Python API",
    "models": "what is known of a customized model",
    "provenance": "tests of models by their answers",
    "pages": "reports and model pages in HTML",
    "shell": "the SQL prompt",
    "ingest": "jobs that write: read, encode, customize, score",
    "training": "jobs that learn: mappers, calibration, evaluation",
    "cli": "commands, and the demo",
}


def svg(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" aria-label="{escape(title)}">',
            f"<title>{escape(title)}</title>",
            STYLE,
            f'<rect class="paper" width="{width}" height="{height}" rx="8"/>',
            *parts,
            "</svg>\n",
        ]
    )


def text(x: float, y: float, value: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(value)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" class="{kind}"/>'


def rooms_picture() -> str:
    """One line per room, the highest first. A dot: the room of the line imports the room of the column."""
    rooms = [room for line in reversed(ORDER) for room in line]
    found = imports()
    between = {one.rooms for one in found}
    wrong = {one.rooms for one in upward(found)}
    left, top, wide, pitch, step = 12, 96, 440, 34, 30
    columns = {room: left + wide + 24 + step * number for number, room in enumerate(rooms)}
    bottom = top + pitch * len(rooms)
    parts = []
    for room, x in columns.items():
        parts += [
            f'<line class="grid" x1="{x}" y1="{top}" x2="{x}" y2="{bottom - 6}"/>',
            f'<text class="soft" transform="translate({x + 4} {top - 8}) rotate(-55)">{room}</text>',
        ]
    for number, room in enumerate(rooms):
        y = top + pitch * number
        middle = y + pitch / 2 - 3
        parts += [
            box(left, y, wide, pitch - 6, "job" if room in JOBS else "room"),
            text(left + 12, middle + 4, "database.py" if room == "database" else room, "name"),
            text(left + 118, middle + 4, PURPOSE[room], "soft"),
            f'<line class="grid" x1="{left + wide}" y1="{middle:g}" x2="{columns[rooms[-1]]}" y2="{middle:g}"/>',
        ]
        for target, x in columns.items():
            if (room, target) in between and room != target:
                kind = "warn" if (room, target) in wrong else "mark"
                parts.append(f'<circle class="{kind}" cx="{x}" cy="{middle:g}" r="6"/>')
    note = "A dot: the room of the line imports the room of the column. Red: an exception that the test lists."
    parts.append(text(left, bottom + 14, note, "soft"))
    return svg(max(columns.values()) + 56, bottom + 28, "The rooms of attrdb and their imports", parts)


def data_picture() -> str:
    """Jobs, the tables that they write, and the readers of these tables."""
    written, read = writes(), reads()
    used = set().union(*written.values(), *read.values()) - {"jobs", "failures"}
    tables = [name for name in DICTIONARY if name in used]

    def by_place(who: dict[str, set[str]]) -> list[str]:
        """Names sorted by the middle of their tables, so that few lines cross."""
        return sorted(who, key=lambda name: (_middle([tables.index(one) for one in who[name] & used]), name))

    jobs, readers = by_place(written), by_place({name: of for name, of in read.items() if of & used})
    top, pitch, high = 60, 40, 28
    total = max(len(jobs), len(tables), len(readers))
    columns = ((jobs, 12, 190, "job"), (tables, 340, 160, "table"), (readers, 650, 180, "room"))
    place: dict[str, tuple[float, float, float]] = {}
    parts = []
    for (names, x, wide, kind), head in zip(columns, ("jobs write", "tables", "questions read"), strict=True):
        parts.append(text(x + wide / 2, top - 22, head, "soft", "middle"))
        start = top + (total - len(names)) * pitch / 2
        for number, name in enumerate(names):
            y = start + pitch * number
            place[f"{kind} {name}"] = (x, x + wide, y + high / 2)
            parts += [box(x, y, wide, high, kind), text(x + wide / 2, y + high / 2 + 4.5, name, "name", "middle")]
    ways = [_way(place[f"job {job}"], place[f"table {one}"]) for job in jobs for one in tables if one in written[job]]
    ways += [
        _way(place[f"table {one}"], place[f"room {name}"]) for name in readers for one in tables if one in read[name]
    ]
    return svg(842, top + pitch * total, "The way of the data through attrdb", [*ways, *parts])


def _middle(numbers: list[int]) -> float:
    return sum(numbers) / len(numbers)


def _way(start: tuple[float, float, float], end: tuple[float, float, float]) -> str:
    x, y, far, down = start[1], start[2], end[0], end[2]
    bend = (far - x) / 2
    return f'<path class="way" d="M{x:g} {y:g} C{x + bend:g} {y:g} {far - bend:g} {down:g} {far:g} {down:g}"/>'


PICTURES = {
    Path(__file__).with_name("architecture-rooms.svg"): rooms_picture,
    Path(__file__).with_name("architecture-data.svg"): data_picture,
}

if __name__ == "__main__":
    for file, picture in PICTURES.items():
        file.write_text(picture(), encoding="utf-8")
