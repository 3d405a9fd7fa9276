"""Prompt banks: parts that share nothing, counts of the paper's Table 1, a fixed choice, files of the user's own."""

import itertools
import json
import random
import re

import pytest

from attrdb.bundled import SPRITES
from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.customize.base_model import BUNDLED, base_model_folder
from attrdb.ingest.prompts import (
    BANKS,
    PARTS,
    SCHEMES,
    TOKEN,
    TRAIN_PROMPTS,
    bank_folder,
    choose_prompts,
    paper_counts,
    part_of,
    read_lines,
)
from attrdb.training.icon_sd.scenes import Composer, Sprites
from attrdb.training.icon_sd.words import plural

KINDS = ("object", "style")
FILES = [
    (bank, kind, scheme, part) for bank in BANKS for kind in KINDS for scheme in SCHEMES for part in PARTS
]  # each a file of the banks that ship


def lines(bank, kind, scheme, part):
    return read_lines(bank_folder(bank) / f"{kind}.{scheme}.{part}.txt")


def words_of(text):
    return re.findall(r"[a-z']+", text.replace("{category}", "").replace(TOKEN, "").lower())


def texts(*args, **kwargs):
    return [prompt.text for prompt in choose_prompts(*args, **kwargs)]


# --- the banks that ship ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bank", "kind", "scheme", "part"), FILES)
def test_every_prompt_names_the_concept_once_and_nothing_else_is_to_be_filled_in(bank, kind, scheme, part):
    found = lines(bank, kind, scheme, part)
    assert len(set(map(str.lower, found))) == len(found)
    for line in found:
        assert line.count(TOKEN) == 1
        assert line.count("V* {category}") == (kind == "object"), line
        assert not re.search(r"[{}]", line.replace("{category}", ""))
        assert line.endswith("in the style of V* art") == (kind == "style"), line


@pytest.mark.parametrize(("bank", "kind"), list(itertools.product(BANKS, KINDS)))
def test_no_prompt_is_in_two_parts_nor_in_both_schemes(bank, kind):
    found = [line.lower() for scheme in SCHEMES for part in PARTS for line in lines(bank, kind, scheme, part)]
    assert len(set(found)) == len(found)
    assert TRAIN_PROMPTS[kind].lower() not in found


@pytest.mark.parametrize(("bank", "kind", "part"), list(itertools.product(BANKS, KINDS, PARTS)))
def test_banks_reach_the_counts_of_the_paper(bank, kind, part):
    per_scheme, _ = paper_counts(kind, part)
    chosen = choose_prompts(kind, "cat", bank, per_scheme, 0, part)
    assert {scheme: [p.scheme for p in chosen].count(scheme) for scheme in SCHEMES} == per_scheme
    assert [prompt.number for prompt in chosen] == list(range(len(chosen)))


def test_no_file_is_left_over():
    there = {(file.parent.name, *file.name.split(".")) for bank in BANKS for file in bank_folder(bank).iterdir()}
    assert there == {(*one, "txt") for one in FILES}


def test_words_of_the_icon_bank_are_those_icon_sd_was_trained_on():
    sprites = Sprites.read(SPRITES)
    composer, rng = Composer(sprites), random.Random(0)
    captions = [composer.draw(rng).caption for _ in range(4000)]
    trained = {word for text in [*captions, *sprites.things, *map(plural, sprites.things)] for word in words_of(text)}
    said = {word for one in FILES if one[0] == "icon" for line in lines(*one) for word in words_of(line)}
    assert {"ground", "left", "drawing", "in"} < said
    assert said <= trained
    assert not {"fishermen", "twelve"} & trained  # words of `photo`


def test_icon_sd_reads_every_prompt_of_its_bank_whole():
    """No unknown token, V* one token, and nothing cut off."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(base_model_folder(BUNDLED) / "tokenizer")
    tokenizer.add_tokens(TOKEN)
    settings = json.loads((base_model_folder(BUNDLED) / "training.json").read_text())["settings"]
    for one in FILES:
        if one[0] == "icon":
            for line in lines(*one):
                text = line.replace("{category}", "magnifying glass tilted left")
                ids = tokenizer(text, add_special_tokens=False).input_ids
                assert len(ids) <= settings["max_tokens"] - 2, text
                assert ids.count(tokenizer.convert_tokens_to_ids(TOKEN)) == 1
                assert tokenizer.decode(ids).replace(" ", "") == text.lower().replace(" ", "")


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "part"), [("train", "train"), ("val", "val"), ("test", "test"), (None, "test"), ("test_unseen", "test")]
)
def test_a_split_draws_from_its_part_and_any_other_from_test(split, part):
    assert part_of(split) == part
    for kind, scheme in itertools.product(KINDS, SCHEMES):
        chosen = texts(kind, "cat", "photo", {scheme: 5}, 3, split)
        own = {line.replace("{category}", "cat") for line in lines("photo", kind, scheme, part)}
        assert set(chosen) <= own


def test_the_choice_is_fixed_by_the_seed():
    first, again = (choose_prompts("object", "cat", "photo", 6, 1, "train") for _ in range(2))
    assert first == again
    assert choose_prompts("object", "cat", "photo", 6, 2, "train") != first
    dogs = choose_prompts("object", "dog", "photo", 6, 1, "train")
    assert [prompt.text.replace("dog", "cat") for prompt in dogs] == [prompt.text for prompt in first]


def test_models_without_a_split_have_the_prompts_they_had_before_there_were_parts():
    """Stored models are recognised by their prompts; these are those of `photo`."""
    assert texts("style", "x", "photo", 4, 0) == EARLIER_PHOTO


EARLIER_PHOTO = [
    "A table laid for twelve guests in the style of V* art",
    "The garden behind the summer house in the style of V* art",
    "Two fishermen mending their nets in the style of V* art",
    "A crowded market after the rain in the style of V* art",
    "A picture of a cat in the style of V* art",
    "A picture of a bowl of fruit in the style of V* art",
    "A picture of a bicycle in the style of V* art",
    "A picture of a teapot in the style of V* art",
]


def test_counts_by_scheme():
    only = choose_prompts("style", "x", "icon", {"procedural": 2}, 0, "val")
    assert [(prompt.number, prompt.scheme) for prompt in only] == [(0, "procedural"), (1, "procedural")]
    both = choose_prompts("style", "x", "icon", {"gpt": 1, "procedural": 2}, 0, "val")
    assert both[1:] == [type(one)(one.number + 1, one.scheme, one.text) for one in only]
    with pytest.raises(InvalidValue, match="no prompt scheme 'chatgpt'; there are: gpt, procedural"):
        choose_prompts("style", "x", "icon", {"chatgpt": 2}, 0)
    with pytest.raises(InvalidValue, match="no prompt wanted of bank 'icon'"):
        choose_prompts("style", "x", "icon", {}, 0)
    with pytest.raises(InvalidValue, match="17 prompts of scheme 'gpt' wanted, bank 'icon' has 16 in its part 'val'"):
        choose_prompts("style", "x", "icon", 17, 0, "val")


@pytest.mark.parametrize(
    ("kind", "split", "models", "samples"),
    [
        # Wang et al. 2023, Table 1: models and samples by scheme
        ("object", "train", 4744, {"gpt": 284_640, "procedural": 759_040}),
        ("object", "val", 593, {"gpt": 14_232, "procedural": 14_232}),
        ("object", "test", 593, {"gpt": 23_720, "procedural": 23_720}),
        ("object", "test_unseen", 1000, {"gpt": 40_000, "procedural": 40_000}),
        ("style", "train", 10_607, {"gpt": 1_697_120, "procedural": 1_272_840}),
        ("style", "val", 250, {"gpt": 6_000, "procedural": 6_000}),
        ("style", "test", 250, {"gpt": 10_000, "procedural": 10_000}),
        # of the second source only totals are given: all samples less those of the first
        ("style", "test_artchive", 255, {"gpt": 1_723_320 - 1_713_120, "procedural": 1_299_040 - 1_288_840}),
    ],
)
def test_counts_are_those_that_make_the_samples_of_table_1(kind, split, models, samples):
    per_scheme, samples_per_prompt = paper_counts(kind, split)
    assert {scheme: models * n * samples_per_prompt for scheme, n in per_scheme.items()} == samples


# --- the user's own ---------------------------------------------------------------------------------------------------


def test_a_file_is_used_whole_whatever_the_split(tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("\ufeffA photo of V* {category}\n\n  V* {category} in the rain  \n", encoding="utf-8")
    for split in (None, "train"):
        found = choose_prompts("object", "cat", str(own), 9, 5, split)
        assert [(p.number, p.scheme, p.text) for p in found] == [
            (0, "user", "A photo of V* cat"),
            (1, "user", "V* cat in the rain"),
        ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"A V* cat\n\nA cat\n", r"own\.txt line 3 lacks the modifier token V\*: 'A cat'"),
        (b"\n \n", r"own\.txt has no prompt in it; write one a line, each with the modifier token V\*"),
        (b"", r"own\.txt has no prompt in it"),
        (b"A V* caf\x81\n", r"own\.txt is not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, content, says):
    own = tmp_path / "own.txt"
    own.write_bytes(content)
    with pytest.raises(InvalidValue, match=says):
        choose_prompts("object", "cat", str(own), 1, 0)


def test_no_such_bank(tmp_path):
    with pytest.raises(
        NotFound, match=r"no prompt bank '.*none'; give photo or icon, a text file with one prompt a line"
    ):
        choose_prompts("object", "cat", str(tmp_path / "none"), 1, 0)


@pytest.fixture
def own_bank(tmp_path):
    for part in PARTS:
        (tmp_path / f"object.gpt.{part}.txt").write_text(f"A V* {{category}} in {part}\n")
    return tmp_path


def test_a_folder_is_a_bank_with_parts(own_bank):
    for split, part in (("train", "train"), ("val", "val"), (None, "test")):
        assert texts("object", "cat", str(own_bank), {"gpt": 1}, 0, split) == [f"A V* cat in {part}"]


def test_a_folder_that_cannot_be_used(own_bank):
    with pytest.raises(NotFound, match=r"no file .*object\.procedural\.test\.txt; a bank is a folder of"):
        choose_prompts("object", "cat", str(own_bank), 1, 0)
    (own_bank / "object.gpt.val.txt").write_text("A V* {category} in train\n")
    with pytest.raises(InvalidValue, match=r"val\.txt repeats a prompt of part 'train': .*; parts must not share"):
        choose_prompts("object", "cat", str(own_bank), {"gpt": 1}, 0)
    (own_bank / "object.gpt.val.txt").write_text("A {category} of mine\n")
    with pytest.raises(InvalidValue, match=r"val\.txt line 1 lacks the modifier token"):
        choose_prompts("object", "cat", str(own_bank), {"gpt": 1}, 0)


def test_mixed_models_have_no_token_and_no_bank(tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("a lighthouse at night\n")
    assert texts("mixed", "", str(own), 1, 0) == ["a lighthouse at night"]
    own.write_text("\n")
    with pytest.raises(InvalidValue, match=r"has no prompt in it; write one a line$"):
        choose_prompts("mixed", "", str(own), 1, 0)
    with pytest.raises(InvalidValue, match="bank 'photo' has no prompts for mixed models; give a text file"):
        choose_prompts("mixed", "", "photo", 1, 0)
    with pytest.raises(InvalidValue, match="the paper has no mixed models"):
        paper_counts("mixed", "train")
