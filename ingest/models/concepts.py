"""The concepts of a model that is customized on several: reading and checking their list, and their exemplars."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.models.exemplars import Exemplar, ExemplarSource, read_source
from attrdb.ingest.options import CONCEPT_OPTIONS, MODEL_OPTIONS, Concept, Option
from attrdb.ingest.prompts import TOKEN
from attrdb.ingest.read.text import read_text
from attrdb.ingest.read.walk import Skipped

KEYS = {option.name: option for option in CONCEPT_OPTIONS}
# The tokenizer finds a token anywhere in a prompt, whatever its case: an ending that no word has keeps it out of words.
TOKEN_FORM = re.compile(r"[A-Za-z][A-Za-z0-9]*\*")
MAX_FILE = 2**20  # bytes

ConceptSources = dict[str, ExemplarSource]  # where the exemplars of each concept are, by token


def read_concepts(path: Path) -> tuple[tuple[Concept, ...], ConceptSources]:
    """The concepts of a JSON file; paths are relative to its folder.

    raises: NotFound if there is no file, InvalidValue as `parse_concepts` or for another file
    """
    if not path.is_file():
        raise NotFound(f"no file {path}; write a JSON list of concepts, each with {', '.join(KEYS)}")
    try:
        values = json.loads(read_text(path, MAX_FILE))
    except (ValueError, RecursionError) as error:
        raise InvalidValue(f"{path} is not JSON: {error}") from error
    try:
        return parse_concepts(values, path.parent)
    except InvalidValue as error:
        raise InvalidValue(f"{path}: {error}") from error


def parse_concepts(values: Any, folder: Path) -> tuple[tuple[Concept, ...], ConceptSources]:
    """The concepts of a JSON list, and where their exemplars are. A token that is left out is V1*, V2*, ... by order.

    folder: that paths are relative to
    raises: InvalidValue, with the number of the concept, for one that cannot be used; as `check_concepts`
    """
    if not isinstance(values, list):
        raise InvalidValue(f"concepts must be a list of objects, each with {', '.join(KEYS)}; found {values!r}")
    concepts, sources = [], []
    for number, value in enumerate(values, 1):
        try:
            if not isinstance(value, dict):
                raise InvalidValue(f"must be a JSON object, found {type(value).__name__}")
            check_keys(value, KEYS)
        except InvalidValue as error:
            raise InvalidValue(f"concept {number}: {error}") from error
        concepts.append(Concept(value.get("token", f"V{number}*"), value["kind"], value["category"]))
        sources.append(source_in(value["exemplars"], folder))
    check_concepts(concepts)
    return tuple(concepts), dict(zip((concept.token for concept in concepts), sources, strict=True))


def check_keys(values: Mapping[str, Any], options: Mapping[str, Option], given_elsewhere: Sequence[str] = ()) -> None:
    """Check the keys and values of a JSON object; given_elsewhere: keys that may be missing

    raises: InvalidValue for an unknown key, a missing one, or a value that its option refuses
    """
    for name in values.keys() - options.keys():
        [nearest] = difflib.get_close_matches(name, options, n=1, cutoff=0)
        raise InvalidValue(f"unknown key {name!r}; nearest is {nearest!r}")
    for name, option in options.items():
        if name not in values:
            if option.required and name not in given_elsewhere:
                raise InvalidValue(f"key {name!r} is missing")
        elif name == "exemplars":
            _check_source(values[name])
        elif name != "concepts":  # `parse_concepts` checks them
            option.check(values[name], json.dumps(values[name]))


def check_required(values: Mapping[str, Any], shown: Callable[[str], str]) -> None:
    """Check that a model has either concepts, or what they stand in for; shown: how its source writes a name

    raises: InvalidValue
    """
    if values.get("concepts") is not None:
        if values.get("exemplars") is not None:
            raise InvalidValue(
                f"{shown('exemplars')} and {shown('concepts')} are both given; each concept names its own"
            )
        return
    for option in MODEL_OPTIONS:
        if option.unless and values.get(option.name) is None:
            raise InvalidValue(f"{shown(option.name)} is missing; it is needed unless there is {shown(option.unless)}")


def _check_source(value: Any) -> None:
    if not isinstance(value, str):
        distinct_names = isinstance(value, list) and all(isinstance(file, str) for file in value)
        if not distinct_names or not value or len(set(value)) < len(value):
            raise InvalidValue(f"exemplars must be a folder, or a list of image files, each once; found {value}")


def source_in(value: str | list[str], folder: Path) -> ExemplarSource:
    """Where exemplars are, of the value of a key `exemplars`."""
    return folder / value if isinstance(value, str) else tuple(folder / name for name in value)


def check_concepts(concepts: Sequence[Concept]) -> None:
    """raises: InvalidValue for fewer than two concepts, and for kinds, categories and tokens that cannot be used"""
    if len(concepts) < 2:
        raise InvalidValue(
            f"concepts has {len(concepts)} of them; it must have two or more. For one, give kind, category and exemplars"
        )
    for number, concept in enumerate(concepts, 1):
        for name in ("token", "kind", "category"):
            KEYS[name].check(getattr(concept, name))
        if not TOKEN_FORM.fullmatch(concept.token):
            raise InvalidValue(
                f"token of concept {number} is {concept.token!r}; it must be letters and digits with a * at the end, such as "
                f"V{number}*, so that it is in no word"
            )
        for other in concepts[: number - 1]:
            _check_apart(other.token, concept.token)
    tokens = [*dict.fromkeys([*(concept.token for concept in concepts), TOKEN])]  # TOKEN is what banks of prompts have
    for number, concept in enumerate(concepts, 1):
        check_category(concept.category, tokens, f"category of concept {number}")


def _check_apart(first: str, second: str) -> None:
    """raises: InvalidValue for two tokens that a prompt cannot tell apart"""
    short, long = sorted((first, second), key=len)
    if short == long:
        raise InvalidValue(f"token {short} is that of two concepts; give each a token of its own")
    if short.lower() in long.lower():
        raise InvalidValue(
            f"token {short} is in token {long}, whatever their capitals; choose tokens that do not contain each other"
        )


def check_category(category: str, tokens: Sequence[str], name: str = "category") -> None:
    """raises: InvalidValue for a category that is empty, or has a modifier token in it"""
    if not category.strip() or any(token.lower() in category.lower() for token in tokens):
        which = f"the modifier token {tokens[0]}" if len(tokens) == 1 else f"a modifier token ({', '.join(tokens)})"
        raise InvalidValue(f"{name} is {category!r}; it must say what is shown, without {which}")


def joined_categories(concepts: Sequence[Concept]) -> str:
    """The category of a model of these concepts, if it is given none: theirs, each once."""
    return " and ".join(dict.fromkeys(concept.category for concept in concepts))


def read_exemplars_of(sources: ConceptSources, skipped: Skipped | None = None) -> list[Exemplar]:
    """The exemplars of all concepts, one concept after the other, each with its concept's token.

    skipped: what of folders is not read is added
    raises:  NotFound or InvalidValue for a folder or file that cannot be used
    """
    return [
        replace(exemplar, token=token) for token, source in sources.items() for exemplar in read_source(source, skipped)
    ]
