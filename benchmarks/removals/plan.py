"""Choose the models of the experiment on removals from the frozen exemplars of IconAbC.

Each model is customized on four concepts: two objects and two styles, with four pictures each. A style's are four icons of
one set or artist. An object's are one drawing in four views (place, size, tilt, mirror image, ground), as photographs of one
thing would be. Models of split `test` have their truth measured; those of `train` and `val` are for the attribution model.
"""

from __future__ import annotations

import io
import json
import random
from collections import defaultdict
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image, ImageOps

FROZEN = Path(__file__).parents[1] / "iconabc"
N_MODELS = {"test": 16, "val": 4, "train": 20}
SPLITS = {"test": "test", "test_unseen": "test", "test_artists": "test", "val": "val", "train": "train"}
N_IMAGES = 4
SIDE = 64
GROUNDS = ("#ffffff", "#ffffff", "#dbe9f6", "#f6ecd2")
METHOD = "custom-diffusion"
# The prompts of a model that is measured: 16 of one concept, 6 of two, 18 between two.
MEASURED = {"gpt": 2, "procedural": 2, "pair": 1, "blend": 1}
LEARNED = {"gpt": 2, "procedural": 2, "pair": 1}


def views(drawing: Image.Image, rng: random.Random) -> list[Image.Image]:
    """Four pictures of a drawing, as it is first."""
    pictures = [drawing]
    for ground in GROUNDS[1:]:
        side = int(SIDE * rng.uniform(0.55, 0.85))
        small = drawing.resize((side, side), Image.Resampling.LANCZOS)
        small = ImageOps.mirror(small) if rng.random() < 0.5 else small
        # Drawings are on white: what is darker than the ground stays, by multiplying.
        page = Image.new("RGB", (SIDE, SIDE), "white")
        page.paste(small, (rng.randrange(SIDE - side), rng.randrange(SIDE - side)))
        page = page.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC, fillcolor="white")
        pictures.append(Image.composite(page, Image.new("RGB", (SIDE, SIDE), ground), _ink(page)))
    return pictures


def _ink(page: Image.Image) -> Image.Image:
    """A mask of what is not white."""
    return page.convert("L").point(lambda value: 255 if value < 250 else 0)


def concepts_by_split(seed: int) -> dict[tuple[str, str], list[dict]]:
    """By split and kind, in a random order: category and pictures of each concept."""
    kinds = {
        row["model_id"]: row["kind"]
        for row in pq.read_table(FROZEN / "models.parquet", columns=["model_id", "kind"]).to_pylist()
    }
    rows = pq.read_table(FROZEN / "images.parquet", filters=[("role", "=", "exemplar")]).to_pylist()
    by_model: dict[str, list[dict]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["image_id"]):
        by_model[row["model_id"]].append(row)
    concepts = defaultdict(list)
    for model_id, of_model in sorted(by_model.items()):
        if (kind := kinds[model_id]) == "mixed":
            continue
        rng = random.Random(f"{seed}/{model_id}")
        pictures = [Image.open(io.BytesIO(row["image"])).convert("RGB").resize((SIDE, SIDE)) for row in of_model]
        pictures = views(pictures[0], rng) if kind == "object" else rng.sample(pictures, N_IMAGES)
        category = of_model[0]["category"] if kind == "object" else of_model[0]["source"]
        concepts[SPLITS[of_model[0]["split"]], kind].append({"category": category, "pictures": pictures})
    for (split, kind), of_split in concepts.items():
        random.Random(f"{seed}/{split}/{kind}").shuffle(of_split)
    return concepts


def write_plan(folder: Path, seed: int = 0) -> Path:
    """The specs of all models and their exemplars, in a folder; the path of the specs."""
    concepts = concepts_by_split(seed)
    lines = []
    for split, n_models in N_MODELS.items():
        for number in range(n_models):
            model_id = f"{split}-{number:02d}"
            chosen = [(kind, concepts[split, kind].pop()) for kind in ("object", "style") for _ in range(2)]
            listed = []
            for place, (kind, concept) in enumerate(chosen, 1):
                exemplars = f"exemplars/{model_id}/{place}"
                (folder / exemplars).mkdir(parents=True, exist_ok=True)
                for at, picture in enumerate(concept["pictures"]):
                    picture.save(folder / exemplars / f"{at}.png")
                listed.append({"kind": kind, "category": concept["category"], "exemplars": exemplars})
            per_scheme = MEASURED if split == "test" else LEARNED
            lines.append(
                {"model_id": model_id, "concepts": listed, "split": split, "method": METHOD, "monitor": "changes"}
                | {"prompts_per_scheme": per_scheme, "samples_per_prompt": 1}
            )
    specs = folder / "models.jsonl"
    specs.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return specs
