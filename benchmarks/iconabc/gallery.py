"""Scenes that icon-sd was trained on, as rows of a gallery."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import torch
from PIL import Image

from attrdb.bundled import lossy
from attrdb.training.icon_sd.parts import IconSdSettings
from attrdb.training.icon_sd.scenes import Composer, Sprites, compose, pack
from attrdb.training.icon_sd.stream import draw_batch
from attrdb.training.icon_sd.unet import RENEWED

SCENES = "icon-scenes"  # the source of scenes
FIRST_STEP = 6_000  # of the training whose scenes these are; those of earlier steps were drawn otherwise


def scene_rows(sprites_file: Path, n: int) -> Iterator[dict]:
    """n scenes of the steps in which a CPU trains icon-sd, from FIRST_STEP on; rows of `icons.SCHEMA`."""
    settings = IconSdSettings()
    sprites, credits_of = Sprites.read(sprites_file), _credits(sprites_file)
    composer, size = Composer(sprites), settings.unet_batch // RENEWED
    for number in range(-(-n // size)):
        step = FIRST_STEP + number
        scenes = draw_batch(composer, size, settings.seed + 1, step)[: n - number * size]
        with torch.no_grad():
            pictures = (compose(pack(scenes), sprites.pixels, settings.size) * 255).round().byte()
        for place, (scene, pixels) in enumerate(zip(scenes, pictures.permute(0, 2, 3, 1).numpy(), strict=True)):
            used = [thing.sprite for thing in scene.things]
            names, creators, licenses = zip(*(credits_of[sprite] for sprite in used), strict=True)
            yield {
                "name": f"{SCENES}/{number * size + place:06d}",
                "role": "pretraining",
                "source": SCENES,
                "category": " and ".join(sprites.things[sprite] for sprite in used),
                "prompt": scene.caption,
                "creator": "; ".join(dict.fromkeys(creators)),
                "license": " AND ".join(sorted(set(licenses))),
                "uri": f"python:attrdb.training.icon_sd.scenes#{settings.seed + 1}/{step}/{place}",
                "metadata": json.dumps({"sprites": names}),
                "split": None,
                "width": settings.size,
                "height": settings.size,
                "image": lossy(Image.fromarray(pixels)),
            }


def _credits(sprites_file: Path) -> list[tuple[str, str, str]]:
    """Name, creator and licence of every sprite."""
    rows = pq.read_table(sprites_file, columns=["name", "creator", "license"]).to_pylist()
    return [(row["name"], row["creator"], row["license"]) for row in rows]
