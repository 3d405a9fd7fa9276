"""Prompts that a customized model is sampled with.

Two schemes (Wang et al. 2023, section 3): `gpt`, natural sentences that name the concept, and `procedural`, objects in
media or styles on objects. A bank is a folder of text files, `<kind>.<scheme>.txt`, one prompt a line, in which V* is the
modifier token and {category} the category. `photo` suits Stable Diffusion; `icon` uses the words that icon-sd was trained
on. The sentences are ours: the paper's lists are in a supplement that we do not have.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.pictures import read_text

SCHEMES = ("gpt", "procedural")
BANKS = ("photo", "icon")
TOKEN = "V*"

TRAIN_PROMPTS = {"object": "V* {category}", "style": "A picture in the style of V* art"}


@dataclass(frozen=True)
class Prompt:
    number: int  # within its model, from 0
    scheme: str
    text: str


def train_prompt(kind: str, category: str) -> str:
    return TRAIN_PROMPTS[kind].replace("{category}", category)


def choose_prompts(kind: str, category: str, bank: str, per_scheme: int, seed: int) -> list[Prompt]:
    """The prompts of one model: `per_scheme` of each scheme, a fixed random choice by seed.

    bank:   'photo', 'icon', or the path of a text file with one prompt a line, all of which are used, as scheme 'user'
    raises: InvalidValue for a line without the modifier token, or a bank with too few lines; NotFound for no such bank
    """
    if bank not in BANKS:
        lines = _user_lines(Path(bank))
        return [Prompt(n, "user", line.replace("{category}", category)) for n, line in enumerate(lines)]
    prompts: list[Prompt] = []
    for scheme in SCHEMES:
        lines = (files("attrdb.ingest") / "prompts" / bank / f"{kind}.{scheme}.txt").read_text().splitlines()
        if per_scheme > len(lines):
            raise InvalidValue(f"{per_scheme} prompts of scheme {scheme!r} wanted, bank {bank!r} has {len(lines)}")
        for line in random.Random(f"{seed}/{kind}/{scheme}").sample(lines, per_scheme):
            prompts.append(Prompt(len(prompts), scheme, line.replace("{category}", category)))
    return prompts


def _user_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise NotFound(
            f"no prompt bank {str(path)!r}; give {' or '.join(BANKS)}, or a text file with one prompt a line"
        )
    lines = read_text(path).splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip() and TOKEN not in line:
            raise InvalidValue(f"{path} line {number} lacks the modifier token {TOKEN}: {line!r}")
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise InvalidValue(f"{path} has no prompt in it; write one a line, each with the modifier token {TOKEN}")
    return found
