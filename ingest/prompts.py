"""Prompts that a customized model is sampled with.

Two schemes (Wang et al. 2023, section 3): `gpt`, natural sentences that name the concept, and `procedural`, objects in
media or styles on objects. A bank is a folder of text files, `<kind>.<scheme>.<part>.txt`, one prompt a line, in which V*
is the modifier token and {category} the category. No prompt is in two parts: a model of split `train` or `val` draws from
the part of that name, and every other, or one without a split, from `test`, the prompts that nothing is learned from.

A model of several concepts is sampled with the prompts of each, and with prompts of two further schemes: `pair`, which names
two of them, and `blend`, between a prompt of one and a prompt of another, see `choose_concept_prompts`.

`photo` suits Stable Diffusion. `icon` speaks as the captions of icon-sd's training scenes do: grounds, places, sizes, spots,
second things and media. The sentences are ours: the paper's lists are in a supplement that we do not have.
"""

from __future__ import annotations

import json
import random
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.blends import blend, check_blend, is_blend
from attrdb.ingest.options import Concept, one_of
from attrdb.ingest.read.text import read_text

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

SCHEMES = ("gpt", "procedural")
PAIR = "pair"
BLEND = "blend"
BLEND_WEIGHTS = (0.25, 0.5, 0.75)  # of the first concept of a pair
PARTS = ("train", "val", "test")
BANKS = ("photo", "icon")
TOKEN = "V*"
CAPTION = "{caption}"  # in a training prompt: the exemplar's own
CAPTION_OR_WORDS = re.compile(r"\{caption\|([^{}]*)\}")  # or these words, if an exemplar has none

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


def train_prompt(kind: str, category: str, token: str = TOKEN, template: str | None = None) -> str:
    """The prompt that exemplars are trained with; CAPTION remains in it. template: None: the kind's"""
    return (template or TRAIN_PROMPTS[kind]).replace(TOKEN, token).replace("{category}", category)


def with_caption(template: str, caption: str, tokenizer: CLIPTokenizer) -> str:
    """A training prompt with an exemplar's caption in it.

    A caption that is too long for the text encoder loses its last words if the modifier token comes after it, so that the
    token is read. Any other stays as it is: the text encoder reads the beginning of the prompt.
    """
    whole, words = template.replace(CAPTION, caption), caption.split()

    def n_tokens(prompt: str) -> int:
        """TOKEN counts as one: whether the tokenizer knows it already makes no difference."""
        return len(tokenizer(prompt.replace(TOKEN, "")).input_ids) + prompt.count(TOKEN)

    def cut(n_words: int) -> str:
        return template.replace(CAPTION, " ".join(words[:n_words]))

    longest = tokenizer.model_max_length
    if TOKEN in template.partition(CAPTION)[0] or TOKEN not in template or n_tokens(whole) <= longest:
        return whole
    n_fitting = bisect_right(range(len(words)), longest, key=lambda n_words: n_tokens(cut(n_words)))
    return cut(max(n_fitting - 1, 0))


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
    if not _is_bank(bank):
        lines = _user_lines(Path(bank), (TOKEN,) if kind in TRAIN_PROMPTS else ())
        return _numbered([("user", _with_category(line, category)) for line in lines])
    if kind not in TRAIN_PROMPTS:
        raise InvalidValue(f"bank {bank!r} has no prompts for {kind} models; give a text file with one prompt a line")
    counts = _counts(per_scheme, SCHEMES)
    if bank not in BANKS:
        _check_disjoint(bank_folder(bank), kind)
    chosen = []
    for scheme in SCHEMES:
        lines = _draw(bank, kind, scheme, part_of(split), counts[scheme], f"{seed}/{kind}/{scheme}")
        chosen += [(scheme, _with_category(line, category)) for line in lines]
    if not chosen:
        raise InvalidValue(f"no prompt wanted of bank {bank!r}; ask for one or more of {' or '.join(SCHEMES)}")
    return _numbered(chosen)


def choose_concept_prompts(
    concepts: Sequence[Concept],
    bank: str,
    per_scheme: int | Mapping[str, int],
    seed: int,
    split: str | None = None,
) -> list[Prompt]:
    """The prompts of a model of several concepts: those of each concept by itself, then those of each pair of them.

    A concept has the prompts of a model of its kind, with its own token. The prompts of a pair, scheme `pair`, are sentences
    of the bank's scheme `gpt`, drawn by seed, with both tokens in them:

        two objects        in the place of "V* cat": "V1* cat and V2* dog"
        object and style   a sentence about the object, with "in the style of V2* art" at its end
        two styles         in the place of "V* art": "V1* art and V2* art"

    Those of scheme `blend` lie between a sentence for each of the two, at each of BLEND_WEIGHTS.

    bank:       as in `choose_prompts`; in a text file every line names one or more of the tokens
    per_scheme: the same number for each concept and scheme, and for each pair, without blends; or a number for each scheme,
                `pair` and `blend` included
    raises:     as `choose_prompts`
    """
    if not _is_bank(bank):
        lines = _user_lines(Path(bank), [concept.token for concept in concepts])
        if strange := [line for line in lines if "{category}" in line]:
            raise InvalidValue(
                f"{bank} has {{category}} in {strange[0]!r}, and this model has several categories; write the word instead"
            )
        return _numbered([("user", line) for line in lines])
    counts = _counts(per_scheme, (*SCHEMES, PAIR), optional=(BLEND,))
    chosen: list[tuple[str, str]] = []
    single = {scheme: counts[scheme] for scheme in SCHEMES}
    if any(single.values()):
        for concept in concepts:
            prompts = choose_prompts(concept.kind, concept.category, bank, single, seed, split)
            chosen += [(prompt.scheme, prompt.text.replace(TOKEN, concept.token)) for prompt in prompts]
    for pair in combinations(concepts, 2):
        first, second = sorted(pair, key=lambda concept: concept.kind)  # an object before a style
        key = f"{seed}/{first.kind}+{second.kind}/{PAIR}"
        lines = _draw(bank, first.kind, "gpt", part_of(split), counts[PAIR], key)
        chosen += [(PAIR, _name_both(line, first, second)) for line in lines]
    for pair in combinations(concepts, 2):
        chosen += [(BLEND, text) for text in _blends(pair, bank, counts[BLEND], seed, split)]
    if not chosen:
        raise InvalidValue(
            f"no prompt wanted of bank {bank!r}; ask for one or more of {one_of((*SCHEMES, PAIR, BLEND))}"
        )
    return _numbered(chosen)


def _blends(pair: Sequence[Concept], bank: str, wanted: int, seed: int, split: str | None) -> list[str]:
    """Prompts between the first concept and the second: so many pairs of sentences, each at BLEND_WEIGHTS."""
    sentences = []
    for number, concept in enumerate(pair):
        key = f"{seed}/{concept.kind}/{number}/{BLEND}"
        lines = _draw(bank, concept.kind, "gpt", part_of(split), wanted, key)
        sentences.append([line.replace(TOKEN, concept.token).replace("{category}", concept.category) for line in lines])
    return [blend(texts, [weight, 1 - weight]) for texts in zip(*sentences, strict=True) for weight in BLEND_WEIGHTS]


def _name_both(line: str, first: Concept, second: Concept) -> str:
    """A line of a bank for the first concept's kind, with the tokens of both concepts."""
    words = f"{TOKEN} {{category}}" if first.kind == "object" else f"{TOKEN} art"
    replaced = words if words in line else TOKEN  # in banks of one's own a token may stand by itself
    names = [
        replaced.replace(TOKEN, concept.token).replace("{category}", concept.category) for concept in (first, second)
    ]
    if first.kind != second.kind:
        style = f" in the style of {second.token} art"
        return line.removesuffix(".").replace(replaced, names[0]).replace("{category}", first.category) + style
    return line.replace(replaced, " and ".join(names)).replace("{category}", first.category)


def _with_category(line: str, category: str) -> str:
    """A line with the category in its place, within the quotes of a blend as well."""
    return line.replace("{category}", json.dumps(category, ensure_ascii=False)[1:-1] if is_blend(line) else category)


def _numbered(chosen: Sequence[tuple[str, str]]) -> list[Prompt]:
    return [Prompt(number, scheme, text) for number, (scheme, text) in enumerate(chosen)]


def _counts(
    per_scheme: int | Mapping[str, int], schemes: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, int]:
    """The number of prompts of each scheme; optional: schemes that have none unless a number is given for them

    raises: InvalidValue for an unknown scheme
    """
    if not isinstance(per_scheme, Mapping):
        return dict.fromkeys(schemes, per_scheme) | dict.fromkeys(optional, 0)
    known = (*schemes, *optional)
    if unknown := per_scheme.keys() - set(known):
        raise InvalidValue(f"no prompt scheme {min(unknown)!r}; there are: {', '.join(known)}")
    return {scheme: per_scheme.get(scheme, 0) for scheme in known}


def _draw(bank: str, kind: str, scheme: str, part: str, wanted: int, key: str) -> list[str]:
    """Lines of a bank, a random choice by key. raises: InvalidValue if there are too few"""
    if not wanted:
        return []
    lines = read_lines(bank_folder(bank) / f"{kind}.{scheme}.{part}.txt")
    if wanted > len(lines):
        raise InvalidValue(
            f"{wanted} prompts of scheme {scheme!r} wanted, bank {bank!r} has {len(lines)} in its part {part!r} for "
            f"{kind} models; ask for fewer, or give a bank of your own"
        )
    return random.Random(key).sample(lines, wanted)


def _is_bank(bank: str) -> bool:
    return bank in BANKS or Path(bank).is_dir()


def bank_folder(bank: str) -> Path:
    return Path(str(files("attrdb.ingest"))) / "prompts" / bank if bank in BANKS else Path(bank)


def read_lines(file: Path, tokens: Sequence[str] = (TOKEN,)) -> list[str]:
    """The prompts of a file; tokens: one or more of them must be in each, unless there are none.

    raises: NotFound for no such file, InvalidValue for one that is empty or not UTF-8, or a line without a modifier token
    """
    if not file.is_file():
        raise NotFound(f"no file {file}; a bank is a folder of <kind>.<scheme>.<part>.txt, such as object.gpt.test.txt")
    named = f"the modifier token {tokens[0]}" if len(tokens) == 1 else f"a modifier token ({', '.join(tokens)})"
    lines = [line.strip() for line in read_text(file).splitlines()]
    for number, line in enumerate(lines, 1):
        if line and tokens and not any(token in line for token in tokens):
            raise InvalidValue(f"{file} line {number} lacks {named}: {line!r}")
    prompts = [line for line in lines if line]
    if not prompts:
        raise InvalidValue(f"{file} has no prompt in it; write one a line{f', each with {named}' if tokens else ''}")
    return prompts


def _user_lines(path: Path, tokens: Sequence[str]) -> list[str]:
    if not path.is_file():
        raise NotFound(
            f"no prompt bank {str(path)!r}; give {' or '.join(BANKS)}, a text file with one prompt a line, or a folder of "
            "<kind>.<scheme>.<part>.txt"
        )
    lines = read_lines(path, tokens)
    for line in lines:
        check_blend(line)
    return lines


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
