"""Answers as files: a folder with a folder per prompt, or a Parquet file. Whoever collects them by hand writes these, too.

FOLDER/1/a.png  FOLDER/1/b.png  FOLDER/2/...     a folder per number of a prompt
FOLDER/1-a.png  FOLDER/1_b.png  FOLDER/2.png     or all in one
FILE.parquet                                     columns `number` and `image`: bytes, or a struct of `bytes`
"""

from __future__ import annotations

import csv
import io
import re
from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.read.pictures import Picture, read_picture, read_picture_file
from attrdb.ingest.read.tables import Table
from attrdb.ingest.read.text import clean, read_text
from attrdb.ingest.read.walk import Skipped, picture_files
from attrdb.progress import Progress, no_progress

IN_NAME = re.compile(r"0*(\d{1,9})(?=[-_ ./]|$)")  # the number that a name begins with
WHOLE = re.compile(r"\s*0*(\d{1,9})(?:\.0*)?\s*")  # in a column; programs write whole numbers as 3.0, too
SHEET = ("number", "prompt")  # columns of a prompt sheet
MAX_SHEET = 16 * 2**20  # bytes

Item = tuple[str, int | str, Callable[[], Picture]]  # name, number of the prompt or why there is none, what reads it


@dataclass(frozen=True, order=True)
class Answer:
    """A picture of a file that has been read once. It is read again where it is needed, to keep few in memory."""

    sha256: str
    read: Callable[[], Picture] = field(compare=False)


@dataclass
class Answers:
    """Answers by the number of their prompt, each in the order of its digest: an order that no file name decides.

    failures:   what could not be read, and why; names: what was read
    n_others:   pictures of prompts that nobody asks for
    skipped:    files that are no pictures, and links that lead out of the folder
    """

    of_prompt: dict[int, list[Answer]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    n_others: int = 0
    skipped: Skipped = field(default_factory=Skipped)

    def __len__(self) -> int:
        return sum(map(len, self.of_prompt.values()))

    def take(self, name: str, number: int, read: Callable[[], Picture]) -> None:
        """Read a picture once, and keep it, or why it cannot be read."""
        try:
            answer = Answer(read().sha256, read)
        except InvalidValue as error:
            self.failures[name] = _storable(str(error))
            return
        self.names.add(name)
        insort(self.of_prompt.setdefault(number, []), answer)


def read_answers(path: Path, numbers: set[int], report: Progress = no_progress) -> Answers:
    """The answers in a folder or a Parquet file. One that cannot be read ends nothing.

    numbers: of the prompts that are asked for
    raises:  NotFound if there is neither; InvalidValue for another file, or if there is no answer
    """
    answers = Answers()
    for done, (name, number, read) in enumerate(_items(path, answers.skipped), 1):
        report("read answers", done, None)
        if isinstance(number, str):
            answers.failures[name] = f"{name}: {number}"
        elif number in numbers:
            answers.take(name, number, read)
        else:
            answers.n_others += 1
    if not answers.of_prompt:
        first = next(iter(answers.failures.values()), None)
        why = f" (of {len(answers.failures):,} that cannot be read the first: {first})" if first else ""
        raise InvalidValue(
            f"{path} has no answer to prompts {min(numbers)} to {max(numbers)}{why}; needed are pictures such as 12/a.png, "
            "where 12 is the number of the prompt"
        )
    return answers


def _items(path: Path, skipped: Skipped) -> Iterator[Item]:
    if path.is_dir():
        for file in picture_files(path, skipped):
            name = _storable(file.inside)
            begins = IN_NAME.match(name)
            number = (
                int(begins[1]) if begins else "its name does not begin with a prompt's number; name it such as 12/a.png"
            )
            yield name, number, partial(read_picture_file, file.path)
    elif path.suffix.lower() == ".parquet" and path.is_file():
        yield from _rows(path)
    elif path.exists():
        raise InvalidValue(
            f"{path} is neither a folder nor a Parquet file; needed is a folder with pictures such as 12/a.png"
        )
    else:
        raise NotFound(f"no folder and no file {path}")


def _storable(text: str) -> str:
    """With question marks for what is not UTF-8, as names of files may be."""
    return text.encode("utf-8", "replace").decode()


def _rows(path: Path) -> Iterator[Item]:
    table = Table(path)
    if missing := [name for name in ("number", "image") if name not in table.schema.names]:
        raise InvalidValue(
            f"{path} has no column {missing[0]!r}; it has: {', '.join(table.schema.names) or 'none'}; needed are number, of "
            "the prompt, and image"
        )
    row = 0
    for batch in table.batches(["number", "image"]):
        for values in batch.to_pylist():
            row += 1
            name, image = f"{path.name} row {row}", values["image"]
            whole = WHOLE.fullmatch(str(values["number"]))
            number = int(whole[1]) if whole else f"its number is {values['number']!r}; needed is a whole number"
            yield name, number, partial(_picture, name, image.get("bytes") if isinstance(image, dict) else image)


def _picture(name: str, encoded: Any) -> Picture:
    if not isinstance(encoded, bytes):
        raise InvalidValue(f"image {name} has no bytes")
    return read_picture(name, encoded)


@dataclass(frozen=True)
class Prompts:
    """Prompts by number. n_answers: per prompt, where a sheet says so"""

    texts: dict[int, str]
    n_answers: int | None = None


def read_prompts(path: Path) -> Prompts:
    """The prompts of a sheet (CSV with columns `number` and `prompt`), or the lines of a text file, numbered from 1.

    raises: NotFound if there is no such file; InvalidValue if it holds no prompt, or a number twice
    """
    if not path.is_file():
        raise NotFound(
            f"no file {path}; needed is a text file with a prompt per line, or a sheet that attrdb keys sheet wrote"
        )
    text, n_answers = read_text(path, MAX_SHEET), set[int]()
    rows = _sheet(path, text, n_answers) if path.suffix.lower() == ".csv" else enumerate(text.split("\n"), 1)
    prompts: dict[int, str] = {}
    for number, prompt in rows:
        if number in prompts:
            raise InvalidValue(f"{path} has number {number} twice; give every prompt a number of its own")
        if prompt := clean(prompt):
            prompts[number] = prompt
    if not prompts:
        raise InvalidValue(f"{path} has no prompt in it; write one per line")
    return Prompts(prompts, max(n_answers, default=None))


def _sheet(path: Path, text: str, n_answers: set[int]) -> Iterator[tuple[int, str]]:
    """raises: InvalidValue"""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if missing := [name for name in SHEET if name not in (reader.fieldnames or ())]:
            raise InvalidValue(f"{path} has no column {missing[0]!r}; a sheet has the columns number and prompt")
        for row in reader:
            whole = WHOLE.fullmatch(row["number"] or "")
            if whole is None:
                raise InvalidValue(f"{path}: line {reader.line_num} has no whole number")
            if asked := WHOLE.fullmatch(row.get("n_answers") or ""):
                n_answers.add(int(asked[1]))
            yield int(whole[1]), row["prompt"] or ""
    except csv.Error as error:
        raise InvalidValue(f"{path}: line {reader.line_num} is no CSV: {error}") from error
