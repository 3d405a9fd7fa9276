"""Named queries: one SQL file each, whose header is its contract.

    -- What the rows say, in one or more lines.
    -- source Wang et al. 2023, section 5
    -- grain  one row per model
    -- param  $k           INTEGER = 10 cut-off, >= 1
    -- reads  exemplar_ranks, models
    -- column recall_at_k  DOUBLE in [0, 1]

`= 10` is a default, `= NULL` says that the parameter may be left out altogether; one without is required, but for encoder_id,
which the database fills in. Comparisons with numbers (`>= 1`, `< 1`) are checked. The file's name is the query's name.
"""

from __future__ import annotations

import difflib
import operator
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import duckdb

from attrdb.errors import InvalidValue, NotFound

_HOLDS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
NOTHING = "NULL"  # the default of a parameter that may be left out altogether


def _boolean(value: Any) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    return value if isinstance(value, bool) else known[str(value).lower()]


_CASTS: dict[str, Callable[[Any], Any]] = {
    "INTEGER": int,
    "BIGINT": int,
    "DOUBLE": float,
    "VARCHAR": str,
    "BOOLEAN": _boolean,
}


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    default: str | None
    meaning: str

    def value(self, given: Any) -> Any:
        """The given value in the parameter's type.

        raises: InvalidValue if it is of another type, or outside what the header says
        """
        if self.default == NOTHING and given in (None, NOTHING):
            return None
        refused = InvalidValue(f"parameter {self.name} is {given!r}; it must be {self.type} ({self.meaning})")
        if given is None:
            raise refused
        try:
            value = _CASTS[self.type](given)
        except (TypeError, ValueError, KeyError) as error:
            raise refused from error
        if isinstance(given, float) and value != given:  # 2.5 for an INTEGER, or NaN
            raise refused
        bounds = () if isinstance(value, (str, bool)) else re.findall(r"(>=|<=|>|<)\s*(-?[\d.]+)", self.meaning)
        for sign, bound in bounds:
            if not _HOLDS[sign](value, float(bound)):
                raise refused
        return value


@dataclass(frozen=True)
class Column:
    name: str
    type: str
    meaning: str


@dataclass(frozen=True)
class NamedQuery:
    name: str
    group: str  # the folder it stands in
    summary: str
    source: str
    grain: str
    parameters: tuple[Parameter, ...]
    reads: tuple[str, ...]
    columns: tuple[Column, ...]
    sql: str

    @property
    def usage(self) -> str:
        """Its parameters with their defaults, `?` where there is none."""
        return " ".join(f"{parameter.name}={parameter.default or '?'}" for parameter in self.parameters)

    def bind(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters with their values, defaults filled in.

        raises: InvalidValue for an unknown or missing parameter, or one of another type
        """
        known = {parameter.name: parameter for parameter in self.parameters}
        for name in given:
            if name not in known:
                raise InvalidValue(f"query {self.name} has no parameter {name!r}; it has: {', '.join(known) or 'none'}")
        for parameter in self.parameters:
            if parameter.name not in given and parameter.default is None:
                raise InvalidValue(
                    f"query {self.name} needs {parameter.name} ({parameter.type}, {parameter.meaning}); "
                    f"give it with -p {parameter.name}=..."
                )
        return {name: known[name].value(given.get(name, known[name].default)) for name in known}


def parse(name: str, group: str, text: str) -> NamedQuery:
    """The query of one file.

    raises: InvalidValue for a header line that is not understood
    """
    summary, parameters, columns = [], [], []
    single = {"source": "", "grain": "", "reads": ""}
    lines = text.splitlines()
    for line in lines:
        if not line.startswith("--"):
            break
        body = line[2:].strip()
        word, _, rest = body.partition(" ")
        rest = rest.strip()
        if word in single:
            single[word] = f"{single[word]} {rest}".strip()
        elif word == "param":
            found = re.fullmatch(r"\$(\w+)\s+(\w+)(?:\s+=\s*(\S+))?\s*(.*)", rest)
            if not found or found[2] not in _CASTS:
                raise InvalidValue(f"query {name}: not a parameter line: {line}")
            default = found[3].strip("'") if found[3] is not None else None
            parameters.append(Parameter(found[1], found[2], default, found[4]))
        elif word == "column":
            found = re.fullmatch(r"(\w+)\s+(\S+)\s*(.*)", rest)
            if not found:
                raise InvalidValue(f"query {name}: not a column line: {line}")
            columns.append(Column(found[1], found[2], found[3]))
        else:
            summary.append(body)
    return NamedQuery(
        name=name,
        group=group,
        summary=" ".join(summary),
        source=single["source"],
        grain=single["grain"],
        parameters=tuple(parameters),
        reads=tuple(re.split(r",\s*", single["reads"])) if single["reads"] else (),
        columns=tuple(columns),
        sql=text,
    )


def parameters_of(words: Iterable[str]) -> dict[str, str]:
    """Parameters from texts of the form name=value.

    raises: InvalidValue
    """
    words = list(words)
    for word in words:
        if "=" not in word:
            raise InvalidValue(f"parameter {word!r} is not of the form name=value")
    return dict(word.split("=", 1) for word in words)


def all_queries(folders: Sequence[str | Path] = ()) -> dict[str, NamedQuery]:
    """Every query by name: attrdb's own, those of installed packages, and those of the folders.

    An installed package offers queries by an entry point of the group `attrdb.queries` that names a package with .sql files
    in it. The folder that a file stands in is its group.

    raises: NotFound for a folder that is not there, InvalidValue for a name that stands twice or a wrong header
    """
    found = dict(own_queries())
    places: dict[str, Traversable] = {str(folder): Path(folder) for folder in folders}
    for point in _entry_points(tuple(sys.path)):
        try:
            places[f"of entry point {point.name!r}"] = files(point.value)
        except ImportError as error:
            raise NotFound(
                f"entry point {point.name!r} offers queries in {point.value}, which cannot be imported: {error}; mend or "
                "uninstall its package"
            ) from error
    for place, folder in places.items():
        if not folder.is_dir():
            raise NotFound(f"no folder of queries {place}")
        for name, query in _in_folder(folder).items():
            if name in found:
                raise InvalidValue(f"query {name!r} of {place} has the name of another query; rename its file")
            _check(query)
            found[name] = query
    return dict(sorted(found.items()))


@cache
def _entry_points(_path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Those of the packages on Python's path. To look for them takes 20 ms, more than most queries do."""
    return tuple(entry_points(group="attrdb.queries"))


@cache
def own_queries() -> dict[str, NamedQuery]:
    """attrdb's own, by name."""
    groups = [
        folder for folder in _folders(files(__name__)) if folder.name != "views"
    ]  # attrdb.sql.relations reads those
    return {name: query for group in groups for name, query in _in_folder(group).items()}


def _folders(folder: Traversable) -> list[Traversable]:
    return [one for one in folder.iterdir() if one.is_dir() and not one.name.startswith("_")]


def _in_folder(folder: Traversable) -> dict[str, NamedQuery]:
    """The queries of a folder and of the folders in it."""
    found: dict[str, NamedQuery] = {}
    for place in (folder, *_folders(folder)):
        for file in place.iterdir():
            if file.name.endswith(".sql"):
                name = file.name.removesuffix(".sql")
                if name in found:
                    raise InvalidValue(f"query {name!r} stands twice in {folder}; rename one of its files")
                try:
                    text = file.read_text(encoding="utf-8")
                except UnicodeDecodeError as error:
                    raise InvalidValue(f"query {name}: {file} is not UTF-8 text: {error.reason}") from error
                found[name] = parse(name, place.name, text)
    return found


def _check(query: NamedQuery) -> None:
    """raises: InvalidValue unless the file is one SELECT whose parameters are those of its header"""
    try:
        statements = duckdb.connect().extract_statements(query.sql)
    except duckdb.Error as error:
        raise InvalidValue(f"query {query.name}: {error}") from error
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        raise InvalidValue(f"query {query.name}: a file holds one SELECT, and nothing else")
    declared, used = {one.name for one in query.parameters}, set(statements[0].named_parameters)
    if len(declared) < len(query.parameters):
        raise InvalidValue(f"query {query.name}: its header declares a parameter twice")
    for parameter in query.parameters:
        if parameter.default is not None:
            try:
                parameter.value(parameter.default)
            except InvalidValue as error:
                raise InvalidValue(f"query {query.name}: by default {error}") from error
    if declared != used:
        raise InvalidValue(
            f"query {query.name}: its header declares the parameters {sorted(declared)}, its SQL uses {sorted(used)}; "
            "declare them with lines such as: -- param $k INTEGER = 10 cut-off, >= 1"
        )


def load(name: str, folders: Sequence[str | Path] = ()) -> NamedQuery:
    """raises: NotFound, with the nearest names, and as `all_queries`"""
    queries = all_queries(folders)
    if name not in queries:
        near = difflib.get_close_matches(name, queries) or list(queries)
        raise NotFound(
            f"no query {name!r}; nearest are {', '.join(map(repr, near))} (list them with: attrdb queries list)"
        )
    return queries[name]
