"""Whether pictures show what their prompts ask for: ground, place, spot and medium, as a language-image encoder sees them.

For each attribute that a prompt names, the encoder chooses among prompts that name it or another value in its place; the one
that is most like the picture wins. So it is a classifier without training of its own, and its own errors count against the
picture: compare shares with those of the base model's pictures, or of scenes that are right by construction.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from attrdb.ingest.prompts import TOKEN
from attrdb.training.icon_sd import media
from attrdb.training.icon_sd.stream import tokens_of
from attrdb.training.icon_sd.words import COLOURS, PLACES, SPOTS, with_article

# By attribute, the phrases of captions that name its values.
ATTRIBUTES = {
    "ground": tuple(f"on {with_article(colour)} ground" for colour in COLOURS),
    "place": tuple(PLACES),
    "spot": tuple(SPOTS),
    "medium": tuple(f"{with_article(words)} of " for words, _ in media.MEDIA.values()),
}
NAME = "icon-clip"  # of the encoder's files, see `attrdb.training.icon_sd.encoders`
STYLE = f" in the style of {TOKEN} art"
BATCH = 64


def plain(prompt: str) -> str:
    """The prompt without the modifier token, as a caption of the corpus would say it."""
    without = " ".join(prompt.replace(STYLE, "").replace(TOKEN, "").split())
    return re.sub(r"\ba ([aeiou])", r"an \1", without)


def named(prompt: str) -> dict[str, str]:
    """The phrase of each attribute that a prompt names."""
    found = {}
    for attribute, phrases in ATTRIBUTES.items():
        fitting = [phrase for phrase in phrases if phrase in prompt]
        if fitting:
            found[attribute] = max(fitting, key=len)
    return found


@dataclass(frozen=True)
class Judge:
    """A language-image encoder from a folder that `attrdb.training.icon_sd.encoders` wrote."""

    clip: open_clip.CLIP
    tokenizer: CLIPTokenizer

    @classmethod
    def read(cls, folder: Path) -> Judge:
        clip = open_clip.CLIP(**json.loads((folder / f"{NAME}.json").read_text()))
        clip.load_state_dict(
            {
                name: value.float() if value.is_floating_point() else value
                for name, value in load_file(folder / f"{NAME}.safetensors").items()
            }
        )
        return cls(clip.eval(), CLIPTokenizer.from_pretrained(folder / f"{NAME}-tokenizer"))

    @torch.inference_mode()
    def images(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """(n, width) float32 of unit length."""
        side = self.clip.visual.image_size[0]
        shown = [picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC) for picture in pictures]
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in shown])).permute(0, 3, 1, 2) / 255
        mean, std = (
            torch.tensor(values).view(1, 3, 1, 1)
            for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        )
        return torch.cat([F.normalize(self.clip.encode_image(x)) for x in ((pixels - mean) / std).split(BATCH)])

    @torch.inference_mode()
    def texts(self, captions: Sequence[str]) -> torch.Tensor:
        """(n, width) float32 of unit length."""
        tokens = tokens_of(self.tokenizer, list(captions))
        return torch.cat([F.normalize(self.clip.encode_text(part)) for part in tokens.split(BATCH)])

    def followed(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[dict[str, bool]]:
        """By picture, for each attribute that its prompt names, whether the picture shows the value."""
        features = self.images(pictures)
        known: dict[str, torch.Tensor] = {}
        found = []
        for feature, prompt in zip(features, map(plain, prompts), strict=True):
            answers = {}
            for attribute, phrase in named(prompt).items():
                others = [prompt.replace(phrase, other) for other in ATTRIBUTES[attribute]]
                key = f"{attribute}/{prompt}"
                if key not in known:
                    known[key] = self.texts(others)
                answers[attribute] = others[int((known[key] @ feature).argmax())] == prompt
            found.append(answers)
        return found
