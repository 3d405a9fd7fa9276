"""Choose the images and models of IconAbC: python benchmarks/iconabc/plan.py ICONS --out FOLDER

ICONS is the file that `python -m attrdb.training.icon_sd.icons build` wrote. FOLDER gets

    candidates.parquet   the gallery: the corpus of icon-sd and other icons, N_CANDIDATES together
    exemplars.parquet    one row per exemplar of a model, with its creator and licence
    models.jsonl         one line per model for `attrdb ingest models`, and the files of exemplars that it names

Everything is drawn by seed from sorted lists, so the same icons give the same benchmark.
"""

from __future__ import annotations

import io
import json
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from attrdb.demo import bundled_icons
from attrdb.training.icon_sd.icons import NOBODY, SCHEMA, SIGNS, artist_of, lossy

N_CANDIDATES = 100_000

# Objects: categories of the corpus, as drawn by sets that are not in the corpus.
OBJECT_SOURCES = ("fxemoji", "streamline-emojis", "openclipart")
N_OBJECTS = {"train": 70, "val": 12, "test": 32, "test_unseen": 36}

# Styles: groups of STYLE_SIZE icons of one set. A set is in one split, as are sets that redraw each other's icons or show the
# same marks, and nothing else of them is in the benchmark.
STYLE_SIZE = 8
STYLE_SETS = {
    "train": (
        "streamline-color",
        "streamline-plump-color",
        "streamline-sharp-color",
        "streamline-ultimate-color",
        "streamline-freehand-color",
        "icon-park",
        "fluent-color",
        "vscode-icons",
        "material-icon-theme",
        "devicon",
        "marketeq",
        "game-icons",
        "pepicons-print",
        "solar",
    ),
    "val": ("streamline-cyber-color", "healthicons", "temaki", "boxicons"),
    "test": (
        "streamline-kameleon-color",
        "streamline-stickies-color",
        "streamline-pixel",
        "flat-color-icons",
        "meteocons",
        "glyphs-poly",
        "catppuccin",
        "circle-flags",
        "whh",
        "dinkie-icons",
    ),
}
MODELS_A_SET = {"train": 3, "val": 2, "test": 2}
N_ARTISTS = 22  # of Open Clip Art, a source of styles that no mapper learns from

# Unrelated captioned images, for general attribution (Wang et al. 2023, Fig. 10).
MIXED_SIZES = (1, 10, 100)
N_MIXED = 4
MIXED_PROMPTS = {1: 1, 10: 8, 100: 16}
MIXED_SAMPLES = {1: 16, 10: 2, 100: 1}
# The gallery besides the corpus: sets that no model has seen in any redrawing, and Open Clip Art by artists that no model
# has seen.
GALLERY_SETS = (
    "bi",
    "carbon",
    "cryptocurrency-color",
    "flat-ui",
    "fluent",
    "gcp",
    "glyphs",
    "hugeicons",
    "ic",
    "iconoir",
    "k8s",
    "keyline-icons",
    "logos",
    "lucide",
    "maki",
    "mdi",
    "mingcute",
    "ph",
    "pixel",
    "pixelarticons",
    "ri",
    "selfhst",
    "tabler",
    "tdesign",
    "thesvg-color",
    "token-branded",
    "uil",
    "unjs",
)


def icon_sets() -> set[str]:
    """The iconify sets of the benchmark, besides the corpus that ships with attrdb."""
    style_sets = {name for names in STYLE_SETS.values() for name in names}
    return {*GALLERY_SETS, *style_sets, *OBJECT_SOURCES} - {"openclipart"}


@dataclass
class Model:
    model_id: str
    kind: str
    split: str
    category: str
    exemplars: list[dict]
    prompts: list[str] = field(default_factory=list)  # of kind mixed
    samples_per_prompt: int | None = None

    def spec(self) -> dict:
        """The model's line for `attrdb ingest models`."""
        line = {
            "model_id": self.model_id,
            "exemplars": f"exemplars/{self.model_id}",
            "category": self.category,
            "kind": self.kind,
            "split": self.split,
        }
        if self.prompts:
            line |= {"prompts": f"prompts/{self.model_id}.txt", "samples_per_prompt": self.samples_per_prompt}
        return line


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def inked(row: dict) -> bool:
    """Whether an icon has enough ink to be seen at 32 x 32 pixels."""
    picture = Image.open(io.BytesIO(row["image"])).convert("L")
    return sum(picture.histogram()[:250]) > 0.15 * picture.width * picture.height


def plan(icons: list[dict], corpus: list[dict], seed: int = 0) -> tuple[list[dict], list[Model]]:
    """The candidates and the models.

    icons:  rows of SCHEMA
    corpus: those that the base model was trained on; all are candidates
    """
    by_source = defaultdict(list)
    icons = sorted(({**row, "creator": artist_of(row["creator"])} for row in icons), key=lambda row: row["name"])
    for row in icons:
        by_source[row["source"]].append(row)
    objects, spare = _objects(by_source, {row["category"] for row in corpus}, random.Random(f"{seed}/objects"))
    styles = _styles(by_source, seed)
    used = {row["name"] for model in objects for row in model.exemplars}
    artists = _artists(by_source["openclipart"], used, random.Random(f"{seed}/artists"))
    mixed = _mixed(spare, random.Random(f"{seed}/mixed"))
    models = objects + styles + artists + mixed
    random.Random(f"{seed}/order").shuffle(models)  # so that the first models are a fair sample of all
    return _candidates(icons, corpus, models, random.Random(f"{seed}/candidates")), models


def _objects(by_source: dict, known: set[str], rng: random.Random) -> tuple[list[Model], list[dict]]:
    """The object models, and the drawings that no model has."""
    drawings: dict[str, list[dict]] = defaultdict(list)  # by category, one per source
    for source in OBJECT_SOURCES:
        of_source: dict[str, dict] = {}
        for row in by_source[source]:
            category = re.sub(r" \d+$", "", row["category"])
            if category in known and inked(row):
                of_source.setdefault(category, {**row, "category": category})
        for category, row in of_source.items():
            drawings[category].append(row)
    repeated = sorted(category for category, rows in drawings.items() if len(rows) > 1)
    single = sorted(category for category, rows in drawings.items() if len(rows) == 1)
    rng.shuffle(repeated)
    rng.shuffle(single)
    n_seen = N_OBJECTS["val"] + N_OBJECTS["test"]  # seen: in training as another source draws it
    chosen: list[tuple[str, dict]] = []
    for number, category in enumerate(repeated[:n_seen]):
        in_training, held_out = rng.sample(drawings[category], 2)
        chosen += [("train", in_training), ("val" if number < N_OBJECTS["val"] else "test", held_out)]
    rest = repeated[n_seen:] + single
    rng.shuffle(rest)
    unseen, more = rest[: N_OBJECTS["test_unseen"]], rest[N_OBJECTS["test_unseen"] :]
    chosen += [("test_unseen", rng.choice(drawings[category])) for category in unseen]
    chosen += [("train", rng.choice(drawings[category])) for category in more[: N_OBJECTS["train"] - n_seen]]
    models = [
        Model(f"object-{slug(row['category'])}-{slug(row['source'])}", "object", split, row["category"], [row])
        for split, row in chosen
    ]
    taken = {row["name"] for _, row in chosen}
    return models, [row for rows in drawings.values() for row in rows if row["name"] not in taken]


def _styles(by_source: dict, seed: int) -> list[Model]:
    models = []
    for split, sources in STYLE_SETS.items():
        for source in sources:
            works = [row for row in by_source[source] if inked(row)]
            drawn = random.Random(f"{seed}/styles/{source}").sample(works, STYLE_SIZE * MODELS_A_SET[split])
            for number in range(MODELS_A_SET[split]):
                rows = drawn[number * STYLE_SIZE : (number + 1) * STYLE_SIZE]
                models.append(Model(f"style-{source}-{number}", "style", split, source, rows))
    return models


def _artists(works: list[dict], used: set[str], rng: random.Random) -> list[Model]:
    by_artist = defaultdict(list)
    for row in works:
        if row["creator"] not in NOBODY and row["name"] not in used and not SIGNS.search(row["name"]) and inked(row):
            by_artist[row["creator"]].append(row)
    prolific = sorted(artist for artist, rows in by_artist.items() if len(rows) >= STYLE_SIZE)
    return [
        Model(f"artist-{slug(artist)}", "style", "test_artists", artist, rng.sample(by_artist[artist], STYLE_SIZE))
        for artist in sorted(rng.sample(prolific, min(N_ARTISTS, len(prolific))))
    ]


def _mixed(spare: list[dict], rng: random.Random) -> list[Model]:
    models = []
    for size in MIXED_SIZES:
        for number in range(N_MIXED):
            # One drawing per category, so that a caption names one exemplar.
            one_each = list({row["category"]: row for row in rng.sample(spare, len(spare))}.values())
            rows = sorted(rng.sample(one_each, size), key=lambda row: row["name"])
            prompts = [row["category"] for row in rng.sample(rows, MIXED_PROMPTS[size])]
            model_id = f"mixed-{size}-{number}"
            models.append(Model(model_id, "mixed", "test", "picture", rows, prompts, MIXED_SAMPLES[size]))
    return models


def _candidates(icons: list[dict], corpus: list[dict], models: list[Model], rng: random.Random) -> list[dict]:
    """The corpus, and icons of sets and artists that no model has seen."""
    artists = {row["creator"] for model in models for row in model.exemplars if row["source"] == "openclipart"}
    free = [
        row
        for row in icons
        if row["source"] in GALLERY_SETS or (row["source"] == "openclipart" and row["creator"] not in artists)
    ]
    if len(corpus) + len(free) < N_CANDIDATES:
        raise click.ClickException(
            f"{len(corpus)} icons of the corpus and {len(free)} others, {N_CANDIDATES} candidates needed; render more sets"
        )
    chosen = sorted(rng.sample(free, N_CANDIDATES - len(corpus)), key=lambda row: row["name"])
    return [*corpus, *({**row, "role": "pretraining"} for row in chosen)]


def write(folder: Path, candidates: list[dict], models: list[Model]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(candidates, SCHEMA), folder / "candidates.parquet", compression="zstd")
    rows = []
    for model in models:
        at = folder / "exemplars" / model.model_id
        at.mkdir(parents=True, exist_ok=True)
        for number, row in enumerate(model.exemplars):
            image = lossy(row["image"])
            (at / f"{number:03d}.webp").write_bytes(image)
            if model.kind == "mixed":
                (at / f"{number:03d}.txt").write_text(row["category"])
            metadata = json.dumps({"model_id": model.model_id})
            rows.append({**row, "role": "exemplar", "split": model.split, "image": image, "metadata": metadata})
        if model.prompts:
            prompts = folder / "prompts" / f"{model.model_id}.txt"
            prompts.parent.mkdir(exist_ok=True)
            prompts.write_text("\n".join(model.prompts) + "\n")
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "exemplars.parquet", compression="zstd")
    (folder / "models.jsonl").write_text("".join(json.dumps(model.spec()) + "\n" for model in models))


@click.command()
@click.argument("icons", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
def main(icons: Path, out: Path) -> None:
    """Choose candidates, exemplars and models, and write the files of the next steps."""
    corpus = pq.read_table(bundled_icons(), filters=[("role", "=", "pretraining")]).to_pylist()
    candidates, models = plan(pq.read_table(icons).to_pylist(), corpus)
    write(out, candidates, models)
    click.echo(f"candidates: {len(candidates)}")
    for (kind, split), count in sorted(Counter((model.kind, model.split) for model in models).items()):
        click.echo(f"{kind} {split}: {count} models")


if __name__ == "__main__":
    main()
