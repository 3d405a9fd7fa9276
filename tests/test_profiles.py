"""Which settings customize icon-sd best: what a prompt names, whether pictures show it, and the comparison at tiny sizes."""

import json
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT
from PIL import Image
from transformers import CLIPTokenizer

from attrdb.ingest.customize import augmentation
from attrdb.ingest.prompts import bank_folder
from attrdb.training.icon_sd import checkpoint, encoders, parts, words
from attrdb.training.icon_sd.icons import SCHEMA

sys.path.insert(0, str(ROOT / "benchmarks"))
import adherence
import profiles


@pytest.fixture(scope="module")
def tokenizer():
    """icon-sd's own, which reads prompts of its bank whole."""
    return CLIPTokenizer.from_pretrained(checkpoint.FOLDER / "tokenizer")


@pytest.fixture(scope="module")
def judge_folder(tokenizer, tmp_path_factory):
    """icon-clip with random weights, as its training writes it."""
    torch.manual_seed(0)
    folder, settings = tmp_path_factory.mktemp("judge"), encoders.EncoderSettings("icon-clip")
    model = encoders.ClipModel(settings, len(tokenizer), tokenizer.model_max_length)
    encoders._write(model, tokenizer, {}, "icon-clip", folder)
    return folder


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    """A pipeline of random weights that reads as many tokens as icon-sd."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "tiny"
    settings = replace(parts.TINY, max_tokens=tokenizer.model_max_length)
    text_encoder = parts.new_text_encoder(tokenizer, settings)
    parts.export(parts.new_vae(settings), parts.new_unet(settings), text_encoder, tokenizer, {}, folder)
    return folder


def test_what_a_prompt_names():
    prompt = adherence.plain("a small V* bell in the top left corner, on a sky blue ground")
    assert prompt == "a small bell in the top left corner, on a sky blue ground"
    assert adherence.named(prompt) == {"ground": "on a sky blue ground", "spot": "in the top left corner"}
    styled = adherence.plain("an oil painting of an owl at sunset in the style of V* art")
    assert styled == "an oil painting of an owl at sunset"
    assert adherence.named(styled) == {"medium": "an oil painting of ", "place": "at sunset"}
    assert adherence.plain("a picture of a V* owl at sea") == "a picture of an owl at sea"
    assert adherence.named("a bell to the left of a cat") == {}


def test_every_prompt_of_the_bank_names_what_is_measured():
    """And those of a part are in no other."""
    seen = set()
    for file in sorted(bank_folder("icon").iterdir()):
        lines = file.read_text().splitlines()
        assert all("V*" in line for line in lines)
        assert not seen.intersection(lines)
        seen.update(lines)
        found = [adherence.named(adherence.plain(line.replace("{category}", "bell"))) for line in lines]
        if file.name.startswith("object.procedural"):
            assert all("medium" in one for one in found)
        if file.name.startswith("object.gpt"):
            assert all("ground" in one or "place" in one for one in found)


def test_views_are_placed_in_the_words_of_scenes():
    """The base model was trained on these; the corpus and customization each state them."""
    assert augmentation.SPOTS.keys() == words.SPOTS.keys()
    assert augmentation.SIZES.keys() == words.SIZES.keys()
    for name, (left, top) in augmentation.SPOTS.items():
        assert words.SPOTS[name] == (2 * left - 1, 2 * top - 1)


def test_the_value_most_like_the_picture_wins(judge_folder):
    """Against one comparison at a time, with a picture that is like one text only by its weights."""
    judge = adherence.Judge.read(judge_folder)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(6)]
    prompts = [f"a V* bell on a {colour} ground" for colour in ("red", "blue", "green", "navy", "teal", "pink")]
    found = judge.followed(pictures, prompts)
    for picture, prompt, answers in zip(pictures, prompts, found, strict=True):
        [feature] = judge.images([picture])
        scores = {}
        for phrase in adherence.ATTRIBUTES["ground"]:
            text = f"a bell {phrase}"
            scores[text] = float(judge.texts([text])[0] @ feature)
        assert answers == {"ground": max(scores, key=scores.get) == adherence.plain(prompt)}
    assert np.isclose(judge.texts(["a bell"]).norm(), 1)


@pytest.fixture
def plan(tmp_path):
    """Two validation models, one model of another split, and a gallery."""
    folder, rng, lines, rows = tmp_path / "plan", np.random.default_rng(0), [], []

    def picture():
        return Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))

    for kind, split, n in (("object", "val", 1), ("style", "val", 2), ("object", "train", 1)):
        name = f"{kind}-{split}"
        exemplars = folder / "exemplars" / name
        exemplars.mkdir(parents=True)
        for number in range(n):
            picture().save(exemplars / f"{number}.png")
            (exemplars / f"{number}.txt").write_text("a bell")
        lines.append(
            {"model_id": name, "kind": kind, "split": split, "category": "bell", "exemplars": f"exemplars/{name}"}
        )
    (folder / "models.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture().save(folder / "one.webp")
    for number in range(40):
        picture().save(folder / "one.webp", lossless=True)
        rows.append(
            {
                "name": f"set/{number}",
                "role": "pretraining",
                "prompt": "a bell",
                "image": (folder / "one.webp").read_bytes(),
            }
        )
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "candidates.parquet")
    return folder


def test_profiles_are_compared_and_what_is_stored_is_kept(plan, judge_folder, base, tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "FIRST", {"steps": 1, "lr": 0.001, "batch": 1, "guidance": 1.0})
    monkeypatch.setattr(
        profiles, "SAMPLING", {"prompts": "icon", "prompts_per_scheme": 2, "samples_per_prompt": 1, "solver_steps": 1}
    )
    work, out = tmp_path / "work", tmp_path / "profiles.json"

    def measured(*words):
        arguments = [
            work,
            plan,
            "--judge",
            judge_folder,
            "--base-model",
            base,
            "--encoder",
            "pixels:4",
            "--gallery",
            20,
        ]
        arguments += ["--workers", 1, "--json", out, *words]
        done = CliRunner().invoke(profiles.main, [str(word) for word in arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return {(row["profile"], row["kind"]): row for row in json.loads(out.read_text())["profiles"]}

    first = measured("--profile", "first")
    assert first.keys() == {("first", "object"), ("first", "style")}
    both = measured("--profile", "first", "--profile", "placed")
    assert both.keys() == {(profile, kind) for profile in ("first", "placed") for kind in ("object", "style")}
    assert both["first", "object"]["seconds"] == first["first", "object"]["seconds"]
    row = both["placed", "object"]
    assert 0 <= row["recall"]["pixels_4"]["mean"] <= 1
    assert row["recall"]["pixels_4"]["models"] == 1
    assert row["adherence"]["medium"].keys() == {"mean", "interval", "models", "base"}
    [model] = [
        model for model in map(json.loads, (work / "models.jsonl").read_text().splitlines()) if model["kind"] == "style"
    ][1:]
    assert model["train_prompt"] == profiles.ON_WHITE["style"]
    assert model["token_from"] == profiles.STYLE_WORDS


def test_a_mean_over_models_has_an_interval_around_it():
    found = profiles.mean_with_interval([0.0, 0.5, 1.0, 0.5])
    assert found["mean"] == 0.5
    assert 0 <= found["interval"][0] < 0.5 < found["interval"][1] <= 1
