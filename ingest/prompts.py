"""Prompts that a customized model is sampled with.

Two schemes (Wang et al. 2023, section 3): `gpt`, natural sentences that name the concept, and `procedural`, objects in
media or styles on objects. A bank is a folder of text files, `<kind>.<scheme>.<part>.txt`, one prompt a line, in which V*
is the modifier token and {category} the category. No prompt is in two parts: a model of split `train` or `val` draws from
the part of that name, and every other, or one without a split, from `test`, the prompts that nothing is learned from.

`photo` suits Stable Diffusion. `icon` uses words that icon-sd was trained on, but for ten in its part `test`; its
procedural media are the five styles of the corpus, so its parts differ in what else they say: nothing, a colour, a size.
The sentences are ours: the paper's lists are in a supplement that we do not have.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.read.text import read_text

SCHEMES = ("gpt", "procedural")
PARTS = ("train", "val", "test")
BANKS = ("photo", "icon")
TOKEN = "V*"

TRAIN_PROMPTS = {"object": "V* {category}", "style": "A picture in the style of V* art"}

# Wang et al. 2023, Table 1. In the text that we have its rows `Prompts` lack a cell; the counts are those of its rows
# `Samples` divided by models and samples a prompt, such as 284,640 = 4,744 models x 15 prompts x 4 samples.
PAPER_PROMPTS = {
    ("object", "train"): {"gpt": 15, "procedural": 40},
    ("style", "train"): {"gpt": 40, "procedural": 30},
}
PAPER_PROMPTS |= {(kind, "val"): {"gpt": 6, "procedural": 6} for kind in TRAIN_PROMPTS}
PAPER_PROMPTS |= {(kind, "test"): {"gpt": 10, "procedural": 10} for kind in TRAIN_PROMPTS}
PAPER_SAMPLES_PER_PROMPT = 4


@dataclass(frozen=True)
class Prompt:
    number: int  # within its model, from 0
    scheme: str
    text: str


def train_prompt(kind: str, category: str) -> str:
    return TRAIN_PROMPTS[kind].replace("{category}", category)


def part_of(split: str | None) -> str:
    """The part of a bank that a model of this split is sampled with."""
    return split if split in PARTS else "test"


def paper_counts(kind: str, split: str | None) -> tuple[dict[str, int], int]:
    """Prompts per scheme, and samples per prompt, of a model in the paper's data set.

    source: Wang et al. 2023, Table 1, see PAPER_PROMPTS; its unseen classes and its second source of styles count as
            `test`. Section 3.2 says 12-60 prompts and 3-4 samples a prompt, Table 1 has 12-70 and always 4. There the
            styles' validation prompts are some of the training prompts; here they are others.
    raises: InvalidValue for a kind that is not in the paper
    """
    if kind not in TRAIN_PROMPTS:
        raise InvalidValue(f"the paper has no {kind} models, so it gives no counts; say how many prompts and samples")
    return dict(PAPER_PROMPTS[kind, part_of(split)]), PAPER_SAMPLES_PER_PROMPT


def choose_prompts(
    kind: str,
    category: str,
    bank: str,
    per_scheme: int | Mapping[str, int],
    seed: int,
    split: str | None = None,
) -> list[Prompt]:
    """The prompts of one model: so many of each scheme, a fixed random choice by seed.

    bank:       'photo', 'icon', a folder of the same layout, or a text file with one prompt a line, all of which are
                used, whatever the split, as scheme 'user'; for kind `mixed`, which has no modifier token, only such a file
    per_scheme: the same number for each, or a number for each; a scheme left out gets none
    split:      of the model, see `part_of`
    raises:     InvalidValue for a line without the modifier token, an unknown scheme, a bank with too few lines, or one of
                the user's with a prompt in two parts; NotFound for no such bank
    """
    if bank not in BANKS and not Path(bank).is_dir():
        lines = _user_lines(Path(bank), kind)
        return [Prompt(n, "user", line.replace("{category}", category)) for n, line in enumerate(lines)]
    if kind not in TRAIN_PROMPTS:
        raise InvalidValue(f"bank {bank!r} has no prompts for {kind} models; give a text file with one prompt a line")
    counts = per_scheme if isinstance(per_scheme, Mapping) else dict.fromkeys(SCHEMES, per_scheme)
    if unknown := counts.keys() - set(SCHEMES):
        raise InvalidValue(f"no prompt scheme {min(unknown)!r}; there are: {', '.join(SCHEMES)}")
    folder, part = bank_folder(bank), part_of(split)
    if bank not in BANKS:
        _check_disjoint(folder, kind)
    prompts: list[Prompt] = []
    for scheme in SCHEMES:
        if not (wanted := counts.get(scheme, 0)):
            continue
        lines = read_lines(folder / f"{kind}.{scheme}.{part}.txt")
        if wanted > len(lines):
            raise InvalidValue(
                f"{wanted} prompts of scheme {scheme!r} wanted, bank {bank!r} has {len(lines)} in its part {part!r} for "
                f"{kind} models; ask for fewer, or give a bank of your own"
            )
        for line in random.Random(f"{seed}/{kind}/{scheme}").sample(lines, wanted):
            prompts.append(Prompt(len(prompts), scheme, line.replace("{category}", category)))
    if not prompts:
        raise InvalidValue(f"no prompt wanted of bank {bank!r}; ask for one or more of {' or '.join(SCHEMES)}")
    return prompts


def bank_folder(bank: str) -> Path:
    return Path(str(files("attrdb.ingest"))) / "prompts" / bank if bank in BANKS else Path(bank)


def read_lines(file: Path, token: str | None = TOKEN) -> list[str]:
    """The prompts of a file; token: that each must name, None for none.

    raises: NotFound for no such file, InvalidValue for one that is empty or not UTF-8, or a line without the modifier token
    """
    if not file.is_file():
        raise NotFound(f"no file {file}; a bank is a folder of <kind>.<scheme>.<part>.txt, such as object.gpt.test.txt")
    lines = [line.strip() for line in read_text(file).splitlines()]
    for number, line in enumerate(lines, 1):
        if line and token and token not in line:
            raise InvalidValue(f"{file} line {number} lacks the modifier token {token}: {line!r}")
    found = [line for line in lines if line]
    if not found:
        with_token = f", each with the modifier token {token}" if token else ""
        raise InvalidValue(f"{file} has no prompt in it; write one a line{with_token}")
    return found


def _user_lines(path: Path, kind: str) -> list[str]:
    if not path.is_file():
        raise NotFound(
            f"no prompt bank {str(path)!r}; give {' or '.join(BANKS)}, a text file with one prompt a line, or a folder of "
            "<kind>.<scheme>.<part>.txt"
        )
    return read_lines(path, TOKEN if kind in TRAIN_PROMPTS else None)


def _check_disjoint(folder: Path, kind: str) -> None:
    """raises: InvalidValue if a prompt for models of this kind is in two parts of a bank"""
    found: dict[str, str] = {}
    for part in PARTS:
        for file in (folder / f"{kind}.{scheme}.{part}.txt" for scheme in SCHEMES):
            for line in read_lines(file) if file.is_file() else ():
                if found.setdefault(line, part) != part:
                    raise InvalidValue(
                        f"{file} repeats a prompt of part {found[line]!r}: {line!r}; parts must not share a prompt"
                    )
