"""Choose the images and models of IconAbC: python benchmarks/iconabc/plan.py ICONS --out FOLDER

ICONS is the file that `python -m attrdb.training.icon_sd.icons build` wrote. FOLDER gets

    candidates.parquet   the gallery: what icon-sd was trained on and other icons, N_CANDIDATES together
    relatives.parquet    further icons of the sets that styles come from, for a gallery with them
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
from gallery import scene_rows
from PIL import Image

from attrdb.bundled import SPRITES, lossy, sprite_rows
from attrdb.training.icon_sd.icons import NOBODY, SCHEMA, SIGNS, artist_of, inked
from attrdb.training.icon_sd.lookalikes import unlike
from attrdb.training.icon_sd.sprites import thing_of
from attrdb.training.icon_sd.words import with_article

N_CANDIDATES = 100_000
N_SCENES = 40_000  # of them

# Objects: things of IconScenes, as drawn by sets that have no sprite in it.
OBJECT_SOURCES = ("fxemoji", "streamline-emojis", "flat-color-icons", "icon-park")
N_OBJECTS = {"train": 104, "val": 24, "test": 36, "test_unseen": 36}

# Styles: groups of STYLE_SIZE icons, by name: the set, and a pattern of its icons' names. A set is in one split, as are sets
# that redraw each other's icons or show the same marks. None of them has a sprite in IconScenes.
STYLE_SIZE = 8
STYLES = {
    "train": {
        "streamline-plump": ("streamline-plump-color", "(?!.*-flat$)"),
        "streamline-plump-flat": ("streamline-plump-color", ".*-flat$"),
        "streamline-plump-solid": ("streamline-plump", ".*-solid$"),
        "ri": ("ri", ".*-fill$"),
        "glyphs-poly": ("glyphs-poly", ""),
        "glyphs-bold": ("glyphs", ".*-bold$"),
        "vscode-icons": ("vscode-icons", ""),
        "material-icon-theme": ("material-icon-theme", ""),
        "devicon": ("devicon", "(?!.*-wordmark$)"),
        "catppuccin": ("catppuccin", ""),
        "boxicons": ("boxicons", ".*-filled$"),
        "vaadin": ("vaadin", "(?!.*-o$)"),
        "majesticons": ("majesticons", "(?!.*-line$)"),
        "duo-icons": ("duo-icons", ""),
        "lets-icons": ("lets-icons", ".*-duotone$"),
    },
    "val": {
        "streamline-cyber-color": ("streamline-cyber-color", ""),
        "streamline-cyber": ("streamline-cyber", ""),
        "cryptocurrency": ("cryptocurrency-color", ""),
        "lineicons": ("lineicons", ""),
        "uil": ("uil", ""),
        "lucide": ("lucide", ""),
    },
    "test": {
        "streamline-freehand-color": ("streamline-freehand-color", ""),
        "streamline-freehand": ("streamline-freehand", ""),
        "streamline-stickies": ("streamline-stickies-color", "(?!.*-duo$)"),
        "streamline-kameleon": ("streamline-kameleon-color", "(?!.*-duo$)"),
        "streamline-pixel": ("streamline-pixel", ""),
        "meteocons": ("meteocons", ".*-fill$"),
        "circle-flags": ("circle-flags", ""),
        "flat-ui": ("flat-ui", ""),
        "iconamoon": ("iconamoon", ".*-duotone$"),
        "streamline-block": ("streamline-block", ""),
    },
}
MOST_WORDS = 7  # of a caption; titles of Open Clip Art can be longer than a prompt may be
VARIANTS = ("flat", "solid", "bold", "filled", "duotone", "fill")  # last words of icons' names, of the patterns above
MODELS_A_STYLE = {"train": 4, "val": 4, "test": 3}
MODELS_AN_ARTIST = 2  # at most; of Open Clip Art, a source of styles that no mapper learns from
N_RELATIVES = 250  # of a style, at most

# Unrelated captioned images, for general attribution (Wang et al. 2023, Fig. 10).
MIXED_SIZES = (1, 10, 100)
N_MIXED = 8
MIXED_PROMPTS = {1: 1, 10: 8, 100: 16}
MIXED_SAMPLES = {1: 16, 10: 2, 100: 1}
# The gallery besides IconScenes: sets that no model has seen in any redrawing, and Open Clip Art by artists that no model
# has seen.
GALLERY_SETS = (
    "carbon",
    "fluent",
    "gcp",
    "hugeicons",
    "ic",
    "iconoir",
    "k8s",
    "keyline-icons",
    "maki",
    "material-symbols",
    "mdi",
    "mingcute",
    "ph",
    "pixel",
    "pixelarticons",
    "solar",
    "tabler",
    "tdesign",
    "unjs",
)


def icon_sets() -> set[str]:
    """The iconify sets of the benchmark, besides those of IconScenes' sprites."""
    style_sets = {source for styles in STYLES.values() for source, _ in styles.values()}
    return {*GALLERY_SETS, *style_sets, *OBJECT_SOURCES}


@dataclass
class Model:
    model_id: str
    kind: str
    split: str
    category: str
    exemplars: list[dict]
    prompts: list[str] = field(default_factory=list)  # of kind mixed
    samples_per_prompt: int | None = None

    def spec(self, number: int) -> dict:
        """The model's line for `attrdb ingest models`. number: its place in the plan, so that each has prompts of its own"""
        line = {
            "model_id": self.model_id,
            "exemplars": f"exemplars/{self.model_id}",
            "category": self.category,
            "kind": self.kind,
            "split": self.split,
            "seed": number,
        }
        if self.prompts:
            line |= {"prompts": f"prompts/{self.model_id}.txt", "samples_per_prompt": self.samples_per_prompt}
        return line


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def caption(row: dict) -> str:
    """What an icon shows, in words, without those that name its style."""
    name = re.sub(rf" ({'|'.join(VARIANTS)})$", "", row["category"])
    return with_article(thing_of(name) or " ".join(name.split()[:MOST_WORDS]))


@dataclass
class Plan:
    """candidates: the gallery; relatives: further icons of the sets that styles come from; all are rows of SCHEMA"""

    candidates: list[dict]
    relatives: list[dict]
    models: list[Model]


def plan(icons: list[dict], sprites: list[dict], scenes: list[dict], seed: int = 0) -> Plan:
    """Choose models and gallery.

    icons:   rows of SCHEMA
    sprites: what the base model was trained on, alone; all are candidates, and an exemplar that looks like one is not used
    scenes:  what it was trained on, composed; all are candidates
    """
    icons = sorted(({**row, "creator": artist_of(row["creator"])} for row in icons), key=lambda row: row["name"])
    of_models = [row for row in icons if row["source"] not in GALLERY_SETS]
    by_source = defaultdict(list)
    for row in unlike(of_models, sprites):
        by_source[row["source"]].append(row)
    styles = _styles(by_source, seed) + _artists(by_source["openclipart"], random.Random(f"{seed}/artists"))
    objects, spare = _objects(by_source, {row["category"] for row in sprites}, random.Random(f"{seed}/objects"))
    models = objects + styles + _mixed(spare, random.Random(f"{seed}/mixed"))
    random.Random(f"{seed}/order").shuffle(models)  # so that the first models are a fair sample of all
    candidates = _candidates(icons, [*sprites, *scenes], models, random.Random(f"{seed}/candidates"))
    return Plan(candidates, _relatives(by_source, models, random.Random(f"{seed}/relatives")), models)


def _objects(by_source: dict, known: set[str], rng: random.Random) -> tuple[list[Model], list[dict]]:
    """The object models, and the drawings that no model has."""
    drawings: dict[str, list[dict]] = defaultdict(list)  # by category, one per source
    for source in OBJECT_SOURCES:
        of_source: dict[str, dict] = {}
        for row in by_source[source]:
            category = thing_of(re.sub(r" \d+$", "", row["category"]))
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


def _of_style(by_source: dict, source: str, icons: str) -> list[dict]:
    return [row for row in by_source[source] if re.match(icons, row["name"].split("/", 1)[1]) and inked(row)]


def _styles(by_source: dict, seed: int) -> list[Model]:
    models = []
    for split, styles in STYLES.items():
        for name, (source, icons) in styles.items():
            works, n_models = _of_style(by_source, source, icons), MODELS_A_STYLE[split]
            if len(works) < STYLE_SIZE * n_models:
                raise click.ClickException(f"style {name} has {len(works)} icons; {STYLE_SIZE * n_models} are needed")
            drawn = random.Random(f"{seed}/styles/{name}").sample(works, STYLE_SIZE * n_models)
            for number in range(n_models):
                rows = drawn[number * STYLE_SIZE : (number + 1) * STYLE_SIZE]
                models.append(Model(f"style-{name}-{number}", "style", split, name, rows))
    return models


def _works(rows: list[dict]) -> dict[str, list[dict]]:
    """The works of each artist, in the order of their names."""
    works = defaultdict(list)
    for row in rows:
        if row["creator"] not in NOBODY and not SIGNS.search(row["name"]) and inked(row):
            works[row["creator"]].append(row)
    return dict(sorted(works.items()))


def _artists(rows: list[dict], rng: random.Random) -> list[Model]:
    """Styles of the artists who have enough works."""
    models = []
    for artist, works in _works(rows).items():
        n_models = min(MODELS_AN_ARTIST, len(works) // STYLE_SIZE)
        drawn = rng.sample(works, STYLE_SIZE * n_models)
        for number in range(n_models):
            exemplars = drawn[number * STYLE_SIZE : (number + 1) * STYLE_SIZE]
            models.append(Model(f"artist-{slug(artist)}-{number}", "style", "test_artists", artist, exemplars))
    return models


def _mixed(spare: list[dict], rng: random.Random) -> list[Model]:
    models = []
    for size in MIXED_SIZES:
        for number in range(N_MIXED):
            # One drawing per category, so that a caption names one exemplar.
            one_each = list({row["category"]: row for row in rng.sample(spare, len(spare))}.values())
            rows = sorted(rng.sample(one_each, size), key=lambda row: row["name"])
            prompts = [caption(row) for row in rng.sample(rows, MIXED_PROMPTS[size])]
            model_id = f"mixed-{size}-{number}"
            models.append(Model(model_id, "mixed", "test", "picture", rows, prompts, MIXED_SAMPLES[size]))
    return models


def _relatives(by_source: dict, models: list[Model], rng: random.Random) -> list[dict]:
    """Works of every style, of a set or an artist, that no model has seen."""
    used = {row["name"] for model in models for row in model.exemplars}
    artists = {model.category for model in models if model.split == "test_artists"}
    works = {
        name: _of_style(by_source, source, icons)
        for styles in STYLES.values()
        for name, (source, icons) in styles.items()
    }
    works |= {artist: of_artist for artist, of_artist in _works(by_source["openclipart"]).items() if artist in artists}
    rows = []
    for name, of_style in works.items():
        free = [row for row in of_style if row["name"] not in used]
        chosen = rng.sample(free, min(N_RELATIVES, len(free)))
        metadata = json.dumps({"style": name})
        rows += [{**row, "role": "pretraining", "metadata": metadata} for row in chosen]
    return sorted(rows, key=lambda row: row["name"])


def _candidates(icons: list[dict], corpus: list[dict], models: list[Model], rng: random.Random) -> list[dict]:
    """The corpus, and icons of sets and artists that no model has seen."""
    artists = {row["creator"] for model in models for row in model.exemplars if row["source"] == "openclipart"}
    known = {row["name"] for row in corpus}
    free = [
        row
        for row in icons
        if row["name"] not in known
        and (row["source"] in GALLERY_SETS or (row["source"] == "openclipart" and row["creator"] not in artists))
    ]
    if len(corpus) + len(free) < N_CANDIDATES:
        raise click.ClickException(
            f"{len(corpus)} images of the corpus and {len(free)} others, {N_CANDIDATES} candidates needed; render more sets"
        )
    chosen = sorted(rng.sample(free, N_CANDIDATES - len(corpus)), key=lambda row: row["name"])
    return [*corpus, *({**row, "role": "pretraining"} for row in chosen)]


def write(folder: Path, planned: Plan) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, of_gallery in (("candidates", planned.candidates), ("relatives", planned.relatives)):
        pq.write_table(pa.Table.from_pylist(of_gallery, SCHEMA), folder / f"{name}.parquet", compression="zstd")
    rows = []
    for model in planned.models:
        at = folder / "exemplars" / model.model_id
        at.mkdir(parents=True, exist_ok=True)
        for number, row in enumerate(model.exemplars):
            image = lossy(Image.open(io.BytesIO(row["image"])))
            (at / f"{number:03d}.webp").write_bytes(image)
            (at / f"{number:03d}.txt").write_text(caption(row))
            metadata = json.dumps({"model_id": model.model_id})
            rows.append({**row, "role": "exemplar", "split": model.split, "image": image, "metadata": metadata})
        if model.prompts:
            prompts = folder / "prompts" / f"{model.model_id}.txt"
            prompts.parent.mkdir(exist_ok=True)
            prompts.write_text("\n".join(model.prompts) + "\n")
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "exemplars.parquet", compression="zstd")
    (folder / "models.jsonl").write_text(
        "".join(json.dumps(model.spec(number)) + "\n" for number, model in enumerate(planned.models))
    )


@click.command()
@click.argument("icons", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
def main(icons: Path, out: Path) -> None:
    """Choose candidates, exemplars and models, and write the files of the next steps."""
    sprites, scenes = list(sprite_rows()), list(scene_rows(SPRITES, N_SCENES))
    planned = plan(pq.read_table(icons).to_pylist(), sprites, scenes)
    write(out, planned)
    click.echo(f"candidates: {len(planned.candidates)}, relatives: {len(planned.relatives)}")
    for (kind, split), count in sorted(Counter((model.kind, model.split) for model in planned.models).items()):
        click.echo(f"{kind} {split}: {count} models")


if __name__ == "__main__":
    main()
