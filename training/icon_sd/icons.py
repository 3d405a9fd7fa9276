"""Build the icon images: SVG collections in, one Parquet file of small pictures out.

Two stages, each one command (`python -m attrdb.training.icon_sd.icons --help`):

    build    the npm package `@iconify/json` and Debian's `openclipart-svg`, unpacked -> one Parquet file
    curate   that file -> the small file of held-out exemplars that ships with attrdb

A row is an icon. The columns are those of the `images` table as far as an icon has them (see `SCHEMA`), so that
`attrdb ingest corpus` reads the file as it is.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import pyarrow as pa
import pyarrow.parquet as pq

from attrdb.bundled import lossy, sprite_rows

SCHEMA = pa.schema(
    [
        ("name", pa.string()),  # '<set>/<icon>', unique
        ("role", pa.string()),  # pretraining | exemplar
        ("source", pa.string()),  # the set, which is also the style
        ("category", pa.string()),  # what is shown, in lower-case words
        ("prompt", pa.string()),  # the caption
        ("split", pa.string()),
        ("creator", pa.string()),
        ("license", pa.string()),  # SPDX
        ("uri", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("metadata", pa.string()),  # JSON text
        ("image", pa.binary()),  # WebP, white background
    ]
)

SIZE = 64
FREE = {"CC0-1.0", "MIT", "MIT-0", "Apache-2.0", "ISC", "BSD-2-Clause", "BSD-3-Clause", "CC-BY-4.0", "CC-BY-3.0"}
FREE |= {"OFL-1.1", "Unlicense", "0BSD"}

# Sets that the base model never sees. noto-v1 is in neither list: it repeats many drawings of noto.
STYLE_SETS = (
    "fxemoji",
    "streamline-emojis",
    "streamline-kameleon-color",
    "streamline-freehand-color",
    "streamline-cyber-color",
    "streamline-stickies-color",
    "flat-color-icons",
    "icon-park",
    "meteocons",
    "glyphs-poly",
    "streamline-plump-color",
    "circle-flags",
)
STYLE_SIZE = 8
N_STYLE_ARTISTS = 8
# Creators of Open Clip Art: names of nobody, and other spellings of a name.
NOBODY = {"unknown", "anonymous", "c..."}
ALSO_CALLED = {
    "Architetto Francesco Rollandin": "Rollandin Francesco",
    "Jean-VIctor Balin": "Jean-Victor Balin",
    "Jean-Vitor Balin": "Jean-Victor Balin",
}
SIGNS = re.compile(r"flag|sign|symbol|arrow|map")
OBJECT_SETS = ("fxemoji", "streamline-emojis", "openclipart")
N_OBJECTS = 24
COMMON = 8  # sprites of a thing that an exemplar may show


@dataclass(frozen=True)
class Drawing:
    """One icon before rendering."""

    name: str
    source: str
    category: str
    group: str | None
    creator: str
    license: str
    uri: str
    svg: str


def artist_of(creator: str) -> str:
    """A creator's name, in one spelling, without an address."""
    name = re.sub(r"\s*[(\[<].*", "", creator).strip() or "unknown"
    return ALSO_CALLED.get(name, name)


def words(name: str) -> str:
    """A file or icon name as lower-case words."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return re.sub(r"[^a-z0-9']+", " ", spaced.lower()).strip()


# --- reading the two collections ---------------------------------------------------------------------------------


def iconify_drawings(folder: Path, sets: set[str] | None) -> Iterator[Drawing]:
    """Visible icons of the permissive and attribution-only sets of an unpacked `@iconify/json`."""
    collections = json.loads((folder / "collections.json").read_text())
    for prefix, info in sorted(collections.items()):
        spdx = info["license"].get("spdx", "")
        if spdx not in FREE or (sets is not None and prefix not in sets):
            continue
        data = json.loads((folder / "json" / f"{prefix}.json").read_text())
        groups = {icon: group for group, icons in data.get("categories", {}).items() for icon in icons}
        for icon, body in data["icons"].items():
            if body.get("hidden"):
                continue
            left, top = body.get("left", data.get("left", 0)), body.get("top", data.get("top", 0))
            width = body.get("width", data.get("width", 16))
            height = body.get("height", data.get("height", 16))
            yield Drawing(
                name=f"{prefix}/{icon}",
                source=prefix,
                category=words(icon),
                group=groups.get(icon),
                creator=info["author"]["name"],
                license=spdx,
                uri=f"npm:@iconify/json/json/{prefix}.json#{icon}",
                svg=f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">'
                f"{body['body'].replace('currentColor', '#000')}</svg>",
            )


def _rdf_text(root: ElementTree.Element, path: str) -> str:
    namespaces = {
        "cc": "http://web.resource.org/cc/",
        "cc2": "http://creativecommons.org/ns#",
        "dc": "http://purl.org/dc/elements/1.1/",
    }
    for prefix in ("cc", "cc2"):
        element = root.find(path.replace("cc:", f"{prefix}:"), namespaces)
        if element is not None and element.text and element.text.strip():
            return html.unescape(element.text).strip()
    return ""


def openclipart_drawings(folder: Path) -> Iterator[Drawing]:
    """Drawings of Debian's `openclipart-svg` (public domain), with title and creator from their RDF.

    folder: the unpacked package, or its usr/share/openclipart; a drawing has the same name in both
    """
    inner = folder / "usr" / "share" / "openclipart"
    folder = inner if inner.is_dir() else folder
    for path in sorted(folder.rglob("*.svg")):
        try:
            svg = path.read_text(encoding="utf-8")
            root = ElementTree.fromstring(svg)
        except (UnicodeDecodeError, ElementTree.ParseError):
            continue
        title = words(_rdf_text(root, ".//cc:Work/dc:title") or path.stem)
        creator = _rdf_text(root, ".//cc:Work/dc:creator/cc:Agent/dc:title") or "unknown"
        inside = path.relative_to(folder).as_posix()
        yield Drawing(
            name=f"openclipart/{inside.rsplit('.', 1)[0]}",
            source="openclipart",
            category=title,
            group=path.parent.name,
            creator=creator,
            license="CC-PDDC",
            uri=f"deb:openclipart-svg/{inside}",
            svg=svg,
        )


# --- rendering ------------------------------------------------------------------------------------------------------


def render(drawing: Drawing) -> dict | None:
    """The icon's row; None for an icon that is blank, broken, or contains a raster picture."""
    import resvg_py
    from PIL import Image

    if "<image" in drawing.svg:
        return None
    try:
        png = resvg_py.svg_to_bytes(
            svg_string=drawing.svg,
            width=2 * SIZE,
            background="white",
            dpi=96,
            skip_system_fonts=True,  # text is left out: fonts differ from machine to machine
        )
    except ValueError:
        return None
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    side = max(picture.size)
    if min(picture.size) * 6 < side:
        return None
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    small = square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    bands: Any = small.getextrema()  # the least and greatest value of each
    if all(high - low < 32 for low, high in bands):
        return None
    thumbnail = small.resize((16, 16), Image.Resampling.BOX).quantize(32).convert("RGB").point(lambda v: v >> 4)
    encoded = io.BytesIO()
    small.save(encoded, "WEBP", lossless=True, quality=80, method=4)
    return {
        "name": drawing.name,
        "role": "pretraining",
        "source": drawing.source,
        "category": drawing.category,
        "prompt": drawing.category,
        "split": None,
        "creator": drawing.creator,
        "license": drawing.license,
        "uri": drawing.uri,
        "width": SIZE,
        "height": SIZE,
        "metadata": json.dumps({"group": drawing.group}),
        "image": encoded.getvalue(),
        "pixel_hash": hashlib.sha256(thumbnail.tobytes()).hexdigest(),
    }


def build(drawings: Iterator[Drawing], out: Path, workers: int) -> Counter:
    """Write the Parquet file; the numbers of icons that were written, and dropped by reason."""
    from rich.progress import Progress

    counts: Counter = Counter()
    seen: set[str] = set()
    with (
        pq.ParquetWriter(out, SCHEMA) as writer,
        ProcessPoolExecutor(workers) as pool,
        Progress() as progress,
    ):
        task = progress.add_task("render", total=None)
        batch = []
        for row in pool.map(render, drawings, chunksize=64):
            progress.advance(task)
            if row is None:
                counts["blank or broken"] += 1
                continue
            pixel_hash = row.pop("pixel_hash")
            if pixel_hash in seen:
                counts["duplicate"] += 1
                continue
            seen.add(pixel_hash)
            batch.append(row)
            if len(batch) == 1024:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, SCHEMA))
                counts["written"] += len(batch)
                batch = []
        if batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, SCHEMA))
            counts["written"] += len(batch)
    return counts


# --- the subset that ships -------------------------------------------------------------------------------------------


def curate(rows: list[dict], sprites: list[dict], seed: int = 0) -> list[dict]:
    """The exemplars that ship, none of which is or looks like a sprite that icon-sd was trained on.

    `metadata.kind` is `object`, one image of a thing that sprites show, by a set that has no sprite; or `style`, STYLE_SIZE
    images of a family or artist. `metadata.concept` names the object or style.
    sprites: rows of `attrdb.bundled.sprite_rows`
    """
    from attrdb.training.icon_sd.lookalikes import unlike

    rng = random.Random(seed)
    by_source = defaultdict(list)
    families = {*STYLE_SETS, *OBJECT_SETS}
    for row in unlike(sorted((row for row in rows if row["source"] in families), key=lambda row: row["name"]), sprites):
        by_source[row["source"]].append(row)
    drawn = Counter(row["category"] for row in sprites)
    known = {thing for thing, count in drawn.items() if count >= COMMON}
    objects: list[dict[str, Any]] = []
    for source in OBJECT_SETS:
        named: dict[str, dict[str, Any]] = {}
        for row in by_source[source]:
            category = re.sub(r" \d+$", "", row["category"])
            if category in known and inked(row):
                named.setdefault(category, {**row, "category": category})
        free = sorted(set(named) - {row["category"] for row in objects})
        for category in sorted(rng.sample(free, min(len(free), N_OBJECTS // len(OBJECT_SETS)))):
            concept = f"{category} by {source}".replace(" ", "-")
            objects.append(_exemplar(named[category], "object", concept))
    used = {row["name"] for row in objects}
    styles = [(prefix, by_source[prefix]) for prefix in STYLE_SETS]
    artists = defaultdict(list)
    for row in by_source["openclipart"]:
        if row["creator"] not in NOBODY and inked(row) and not SIGNS.search(row["name"]):
            artists[row["creator"]].append(row)
    prolific = sorted(artist for artist, works in artists.items() if len(works) >= 3 * STYLE_SIZE)
    for artist in sorted(rng.sample(prolific, min(len(prolific), N_STYLE_ARTISTS))):
        styles.append(("openclipart-" + words(artist).replace(" ", "-"), artists[artist]))
    shown = []
    for concept, works in styles:
        unused = [row for row in works if row["name"] not in used]
        for row in sorted(rng.sample(unused, STYLE_SIZE), key=lambda row: row["name"]):
            shown.append(_exemplar(row, "style", concept))
    return objects + shown


def inked(row: dict) -> bool:
    """Whether an icon has enough ink to be seen."""
    from PIL import Image

    picture = Image.open(io.BytesIO(row["image"])).convert("L")
    return sum(picture.histogram()[:250]) > 0.15 * picture.width * picture.height


def _exemplar(row: dict, kind: str, concept: str) -> dict:
    from PIL import Image

    image = lossy(Image.open(io.BytesIO(row["image"])))
    metadata = json.dumps({"kind": kind, "concept": concept})
    return {**row, "role": "exemplar", "prompt": row["category"], "metadata": metadata, "image": image}


# --- commands -----------------------------------------------------------------------------------------------------------


@click.group()
def main() -> None:
    """Build the icon images that attrdb's base model, demo and benchmark are made from."""


@main.command("build")
@click.option("--iconify", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--openclipart", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--sets", help="Comma-separated iconify sets; all free ones when left out.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True)
def build_command(iconify: Path, openclipart: Path | None, sets: str | None, out: Path, workers: int) -> None:
    """Render unpacked @iconify/json and openclipart-svg into one Parquet file."""

    def drawings() -> Iterator[Drawing]:
        yield from iconify_drawings(iconify, set(sets.split(",")) if sets else None)
        if openclipart:
            yield from openclipart_drawings(openclipart)

    for outcome, count in build(drawings(), out, workers).items():
        click.echo(f"{outcome}: {count}")


@main.command("curate")
@click.argument("icons", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--seed", default=0, show_default=True)
def curate_command(icons: Path, out: Path, seed: int) -> None:
    """Choose the bundled exemplars out of a built file."""
    rows = curate(pq.read_table(icons).to_pylist(), list(sprite_rows()), seed)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), out, compression="zstd")
    for role, count in Counter(row["role"] for row in rows).items():
        click.echo(f"{role}: {count}")
    click.echo(f"bytes: {out.stat().st_size}")


if __name__ == "__main__":
    main()
