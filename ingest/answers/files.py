"""Answers as files: a folder with a folder per prompt, or a Parquet file. Whoever collects them by hand writes these, too.

FOLDER/1/a.png  FOLDER/1/b.png  FOLDER/2/...     the name begins with the prompt's number
FOLDER/1-a.png  FOLDER/1-b.png  FOLDER/2-...     the same in one folder
FILE.parquet                                     columns `number` and `image`: bytes, or a struct of `bytes`
"""

from __future__ import annotations

import csv
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.read.pictures import Picture, read_picture, read_picture_file
from attrdb.ingest.read.tables import Table
from attrdb.ingest.read.text import clean, read_text
from attrdb.ingest.read.walk import Skipped, picture_files
from attrdb.progress import Progress, no_progress

NUMBER = re.compile(r"0*(\d+)(?!\d)")  # that a name begins with
MOST_NUMBER = 10**9
SHEET = ("number", "prompt")  # columns of a prompt sheet
MAX_SHEET = 16 * 2**20  # bytes


Item = tuple[str, int | None, Callable[[], Picture]]  # name, number of the prompt, and what reads the picture


@dataclass(frozen=True)
class Answer:
    """A picture that has been read once. It is read again where it is needed: thousands of them need not fit into memory."""

    sha256: str
    read: Callable[[], Picture]


@dataclass
class Answers:
    """Answers by the number of their prompt, each in the order of its digest: an order that no file name decides.

    failures:   what could not be read, and why
    n_repeated: pictures that were there already, byte for byte
    n_others:   pictures of prompts that nobody asks for
    """

    of_prompt: dict[int, list[Answer]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    n_repeated: int = 0
    n_others: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.of_prompt.values()))

    def take(self, name: str, number: int, read: Callable[[], Picture]) -> None:
        """Read a picture, and keep it unless it is there already."""
        try:
            answer = Answer(read().sha256, read)
        except InvalidValue as error:
            self.failures[name] = str(error)
            return
        known = self.of_prompt.setdefault(number, [])
        place = bisect_left(known, answer.sha256, key=lambda other: other.sha256)
        if place < len(known) and known[place].sha256 == answer.sha256:
            self.n_repeated += 1
        else:
            known.insert(place, answer)


def read_answers(path: Path, numbers: set[int], report: Progress = no_progress) -> Answers:
    """The answers in a folder or a Parquet file. One that cannot be read ends nothing.

    numbers: of the prompts that are asked for
    raises:  NotFound if there is neither, InvalidValue for a file that is no such table, or if there is no answer
    """
    answers = Answers()
    for done, (name, number, read) in enumerate(_items(path), 1):
        report("read answers", done, None)
        if number is None:
            answers.failures[name] = (
                f"{name}: its name does not begin with the number of a prompt; name it such as 12/a.png"
            )
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


def _items(path: Path) -> Iterator[Item]:
    if path.is_dir():
        for file in picture_files(path, Skipped()):
            yield file.inside, _number(file.inside), partial(read_picture_file, file.path)
    elif path.is_file():
        yield from _rows(path)
    else:
        raise NotFound(f"no folder and no file {path}")


def _number(text: str) -> int | None:
    begins = NUMBER.match(text)
    return int(begins[1]) if begins and len(begins[1]) < len(str(MOST_NUMBER)) else None


def _rows(path: Path) -> Iterator[Item]:
    table = Table(path)
    if missing := [name for name in ("number", "image") if name not in table.schema.names]:
        raise InvalidValue(
            f"{path} has no column {missing[0]!r}; it has: {', '.join(table.schema.names) or 'none'}; needed are number, of "
            "the prompt, and image"
        )
    for start, batch in enumerate(table.batches(["number", "image"])):
        for row, values in enumerate(batch.to_pylist()):
            name, image = f"{path} batch {start + 1} row {row + 1}", values["image"]
            encoded = image.get("bytes") if isinstance(image, dict) else image
            yield name, _number(str(values["number"])), partial(_picture, name, encoded)


def _picture(name: str, encoded: object) -> Picture:
    if not isinstance(encoded, bytes):
        raise InvalidValue(f"image {name} has no bytes")
    return read_picture(name, encoded)


def read_prompts(path: Path) -> dict[int, str]:
    """Prompts by number: of a sheet (CSV with columns `number` and `prompt`), or the lines of a text file, from 1.

    raises: NotFound if there is no such file; InvalidValue if it holds no prompt, or a number twice
    """
    if not path.is_file():
        raise NotFound(
            f"no file {path}; needed is a text file with a prompt per line, or a sheet that attrdb keys sheet wrote"
        )
    text = read_text(path, MAX_SHEET)
    rows = _sheet(path, text) if path.suffix.lower() == ".csv" else enumerate(text.splitlines(), 1)
    prompts: dict[int, str] = {}
    for number, prompt in rows:
        if number in prompts:
            raise InvalidValue(f"{path} has number {number} twice; give every prompt a number of its own")
        if prompt := clean(prompt):
            prompts[number] = prompt
    if not prompts:
        raise InvalidValue(f"{path} has no prompt in it; write one per line")
    return prompts


def _sheet(path: Path, text: str) -> Iterator[tuple[int, str]]:
    reader = csv.DictReader(text.splitlines())
    if missing := [name for name in SHEET if name not in (reader.fieldnames or ())]:
        raise InvalidValue(f"{path} has no column {missing[0]!r}; a sheet has the columns number and prompt")
    for line, row in enumerate(reader, 2):
        number = _number(row["number"] or "")
        if number is None:
            raise InvalidValue(f"{path}: line {line} has no number")
        yield number, row["prompt"] or ""
