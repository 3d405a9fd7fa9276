"""Sprites: the things of IconScenes, one small picture with transparency per thing and style.

    python -m attrdb.training.icon_sd.sprites --iconify package/ --openclipart usr/share/openclipart/ --out sprites.parquet

reads the npm package `@iconify/json` and Debian's `openclipart-svg`, both unpacked, and chooses, renders and packs the
sprites that ship with attrdb. The same input and seed give the same sprites.

A sprite is cut to the square that its ink fills, and scaled to SIZE pixels per side. Sprites of a colour style keep their
colours. Sprites of a mono style store only their coverage; a scene gives them a named colour.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from attrdb.training.icon_sd.icons import NOBODY, Drawing, artist_of, iconify_drawings, openclipart_drawings

SIZE = 64  # pixels
SCHEMA = pa.schema(
    [
        ("name", pa.string()),  # '<set>/<icon>', unique
        ("thing", pa.string()),  # what is shown, in lower-case words
        ("style", pa.string()),  # words that captions name the style by
        ("source", pa.string()),  # the set
        ("mono", pa.bool_()),  # the image is only coverage
        ("creator", pa.string()),
        ("license", pa.string()),  # SPDX
        ("image", pa.binary()),  # WebP: RGBA, or grey coverage where mono
    ]
)


@dataclass(frozen=True)
class Style:
    """A drawing style: icons of one set whose names match a pattern.

    name:  its name in captions
    icons: pattern that the end of an icon's name must match; the match is cut from the name
    most:  number of sprites that are kept
    """

    name: str
    source: str
    icons: str = ""
    most: int = 260


COLOUR_STYLES = (
    Style("twemoji", "twemoji", most=760),
    Style("noto", "noto", most=760),
    Style("blob", "noto-v1", most=420),
    Style("fluent", "fluent-emoji", most=600),
    Style("fluent flat", "fluent-emoji-flat", most=600),
    Style("emojione", "emojione", most=600),
    Style("streamline duo", "streamline-color", most=300),
    Style("streamline flat", "streamline-color", icons="-flat", most=240),
    Style("streamline sharp", "streamline-sharp-color", icons="-flat", most=240),
    Style("streamline flex", "streamline-flex-color", most=240),
    Style("streamline ultimate", "streamline-ultimate-color", most=300),
    Style("office", "fluent-color", icons="-(48|32|28|24)", most=120),
    Style("marketeq", "marketeq", most=240),
    Style("open clip", "openclipart", most=520),
)
MONO_STYLES = (
    Style("game icons", "game-icons", most=700),
    Style("high contrast", "fluent-emoji-high-contrast", most=320),
    Style("emojione mono", "emojione-monotone", most=320),
    Style("phosphor thin", "ph", icons="-thin", most=240),
    Style("phosphor fill", "ph", icons="-fill", most=240),
    Style("phosphor duotone", "ph", icons="-duotone", most=240),
    Style("solar broken", "solar", icons="-broken", most=180),
    Style("solar duotone", "solar", icons="-bold-duotone", most=180),
    Style("solar outline", "solar", icons="-line-duotone", most=160),
    Style("material light", "material-symbols-light", icons="-outline-sharp|-sharp", most=220),
    Style("material round", "material-symbols", icons="-rounded", most=220),
    Style("material design", "mdi", most=280),
    Style("tabler", "tabler", most=280),
    Style("tabler fill", "tabler", icons="-filled", most=160),
    Style("carbon", "carbon", most=200),
    Style("iconoir", "iconoir", most=220),
    Style("hugeicons", "hugeicons", most=280),
    Style("mingcute", "mingcute", icons="-fill", most=260),
    Style("streamline sharp line", "streamline-sharp", most=200),
    Style("streamline thin", "streamline-ultimate", most=220),
    Style("pixel grid", "pixelarticons", most=160),
    Style("pixel memory", "memory", most=140),
    Style("pixel dinkie", "dinkie-icons", most=160),
    Style("pepicons", "pepicons-pencil", most=160),
    Style("pop", "pepicons-pop", most=140),
    Style("offset print", "pepicons-print", most=160),
    Style("health", "healthicons", icons="-24px", most=180),
    Style("health outline", "healthicons", icons="-outline", most=180),
    Style("pinhead", "pinhead", most=240),
    Style("temaki", "temaki", most=200),
    Style("guidance", "guidance", most=120),
    Style("teeny", "teenyicons", icons="-outline", most=140),
    Style("awesome", "fa7-solid", most=280),
    Style("line awesome", "la", most=200),
    Style("keyline two tone", "keyline-icons", icons="-two-tone", most=200),
    Style("mind duotone", "iconmind", icons="-duotone-bold", most=200),
    Style("stash", "stash", icons="-duotone", most=120),
    Style("whh", "whh", most=200),
)
STYLES = (*COLOUR_STYLES, *MONO_STYLES)

# Sets that no sprite comes from. The exemplars of the benchmark come from them, by whole families.
HELD_OUT = re.compile(
    r"fxemoji|streamline-(emojis|kameleon|freehand|cyber|stickies|plump).*|flat-color-icons|icon-park.*|meteocons|glyphs.*"
    r"|circle-flags|flat-ui|duo-icons|ri|bi|uil|uis|vaadin|majesticons|lets-icons|iconamoon|lucide|lineicons"
)

DRAWABLE = {
    "Objects",
    "Activities",
    "Nature",
    "Travel",
    "Food",
    "Animals & Nature",
    "Smileys & Emotion",
    "Food & Drink",
    "Travel & Places",
}
EMOJI = ("noto", "twemoji", "fluent-emoji-flat", "emojione")
# Sets of trademarks and flags, whose names are left out.
MARKS = (
    "simple-icons",
    "logos",
    "thesvg",
    "devicon",
    "skill-icons",
    "cib",
    "fa7-brands",
    "fa6-brands",
    "bxl",
    "selfhst",
    "streamline-logos",
    "token",
    "cryptocurrency",
    "flagpack",
    "flag",
    "file-icons",
    "vscode-icons",
    "catppuccin",
)
NOT_THINGS = re.compile(
    r"\b(o'?clock|thirty|skin|tone|button|arrows?|chevrons?|carets?|align|italic|underline|strikethrough|zoom|sort|filter|menu"
    r"|layout|columns?|rows?|border|checkbox|toggle|circle|square|triangle|plus|minus|add|remove|delete|close|cancel|edit|off"
    r"|slash|cross|check|checked|alt|info|help|upload|download|share|undo|redo|refresh|sync|search|settings?|user|users|account"
    r"|people|person|man|woman|male|female|boy|girl|men|women|family|text|font|type|letter|number|abc|alphabet|logo|brand|html"
    r"|css|js|code|api|ai|data|sql|app|apps|format|indent|paragraph|heading|quote|cursor|select|selection|crop|rotate|flip|move"
    r"|resize|expand|collapse|fullscreen|maximize|minimize|play|pause|stop|forward|rewind|skip|next|previous|eject|repeat"
    r"|shuffle|volume|mute|unmute|list|grid|table|view|up|down|left|right|top|bottom|center|middle|horizontal|vertical|half"
    r"|outline|outlined|filled|fill|bold|thin|light|line|lines|solid|sharp|round|rounded|regular|duotone|small|large|medium|two"
    r"|one|three|four|five|flag|sign|symbol|sexy|hand|ok|no|not|new|open|closed|by|to|for|dash|dots?|blank|empty|full|login"
    r"|logout|signal|bluetooth|wifi|loading|loader|error|warning|alert|question|status|state|input|output|terminal|git|branch"
    r"|merge|pull|commit|network|server|database|api|url|http|www|link|unlink|x|or|dissolve|version|kink|sex|nude|condom|penis"
    r"|gun|swastika|nazi|hiv|rdt|middle finger|icon|icons|ui|ux|cc|copyright)\b"
)
SUFFIX = re.compile(r"( (v?\d+|o|variant|alternate|b|f|a|st|1f|color|flat|duo|minimalistic))+$")
MOST_WORDS = 4
COLOUR_WORDS = re.compile(r"\b(black|white|gr[ae]y|red|orange|yellow|green|teal|blue|navy|purple|pink|brown|cream)\b")
# Folders of Open Clip Art without things.
NOT_CLIPART = ("geography", "signs_and_symbols", "logos", "shapes", "buttons", "special", "decorations")


def thing_of(icon: str) -> str | None:
    """The thing that an icon shows, by the words of its name; None if the name is not of a thing."""
    name = SUFFIX.sub("", icon)
    words = name.split()
    if not 1 <= len(words) <= MOST_WORDS or any(len(word) < 2 for word in words) or not name.replace(" ", "").isalpha():
        return None
    return None if NOT_THINGS.search(name) else name


def vocabulary(icons_of: dict[str, set[str]], emoji_groups: dict[str, str | None], least: int = 3) -> set[str]:
    """Names of things: drawable emoji, and names that at least `least` sets have, without trademarks and flags.

    icons_of: by set, the names of its icons in words
    """
    emoji = {name for name, group in emoji_groups.items() if group in DRAWABLE}
    marks = set().union(*(icons_of.get(source, set()) for source in MARKS))
    n_sets = Counter(name for names in icons_of.values() for name in {thing_of(icon) for icon in names} if name)
    shared = {name for name, count in n_sets.items() if count >= least and len(name.split()) <= 2}
    return {name for name in emoji if thing_of(name)} | (shared - marks)


def render(drawing: Drawing, mono: bool) -> tuple[bytes, str] | None:
    """A sprite as WebP and the hash of its pixels; None for a drawing that is blank, thin, broken, or contains a picture."""
    import resvg_py

    if "<image" in drawing.svg:
        return None
    try:
        png = resvg_py.svg_to_bytes(svg_string=drawing.svg, width=4 * SIZE, dpi=96, skip_system_fonts=True)
    except ValueError:
        return None
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    box = picture.getchannel("A").point(lambda alpha: 255 if alpha > 16 else 0).getbbox()
    if box is None or min(box[2] - box[0], box[3] - box[1]) * 6 < max(box[2] - box[0], box[3] - box[1]):
        return None
    cut = picture.crop(box)
    side = max(cut.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    small = square.resize((SIZE, SIZE), Image.Resampling.BOX if side >= 2 * SIZE else Image.Resampling.LANCZOS)
    coverage = np.asarray(small.getchannel("A"), dtype=np.float32) / 255
    if not 0.05 < coverage.mean() < 0.97:
        return None
    encoded = io.BytesIO()
    if mono:
        grey = small.getchannel("A").quantize(16).convert("L")
        grey.save(encoded, "WEBP", lossless=True, quality=80, method=4)
        pixels = grey.resize((16, 16), Image.Resampling.BOX).point(lambda value: value >> 4)
    else:
        small.save(encoded, "WEBP", quality=70, alpha_quality=80, method=5)
        white = Image.new("RGB", small.size, "white")
        white.paste(small, mask=small.getchannel("A"))
        pixels = white.resize((16, 16), Image.Resampling.BOX).point(lambda value: value >> 4)
    return encoded.getvalue(), hashlib.sha256(pixels.tobytes()).hexdigest()


def chosen(drawings: Iterable[Drawing], things: set[str], marks: set[str], seed: int) -> dict[Style, list[Drawing]]:
    """Drawings by style, best first: names that many styles have come first.

    things: names that any style may show. Game icons may show any of at most two words; names of clip art may end in one
    marks:  words that no name of clip art may have
    """
    by_source = defaultdict(list)
    for drawing in drawings:
        by_source[drawing.source].append(drawing)
    fits: dict[Style, list[Drawing]] = {}
    for style in STYLES:
        end = re.compile(f"({style.icons})$")
        others = [other.icons for other in STYLES if other.source == style.source and other.icons and not style.icons]
        named: dict[str, Drawing] = {}
        for drawing in sorted(by_source[style.source], key=lambda icon: (len(icon.name), icon.name)):
            if not end.search(drawing.name) or any(re.search(f"({other})$", drawing.name) for other in others):
                continue
            if style.source == "openclipart":
                thing = thing_of(drawing.category)
                words = (thing or "").split()
                known = thing in things or (words and words[-1] in things)
                if not known or marks.intersection(words) or set(drawing.name.split("/")).intersection(NOT_CLIPART):
                    continue
            else:
                icon = end.sub("", drawing.name).split("/", 1)[1].replace("-", " ").replace("_", " ")
                thing = thing_of(icon)
                rare = style.source == "game-icons" and thing and len(thing.split()) <= 2
                if thing not in things and not rare:
                    continue
            if style in MONO_STYLES and COLOUR_WORDS.search(thing or ""):
                continue  # a scene would give it another colour than it names
            if thing and thing not in named:
                named[thing] = replace(drawing, category=thing)
        fits[style] = list(named.values())
    n_styles = Counter(drawing.category for of_style in fits.values() for drawing in of_style)
    rng = random.Random(seed)
    for of_style in fits.values():
        keys = {drawing.name: (-min(n_styles[drawing.category], 6) + 3 * rng.random()) for drawing in of_style}
        of_style.sort(key=lambda drawing: (keys[drawing.name], drawing.name))
    return fits


def _icon_names(iconify: Path) -> tuple[dict[str, set[str]], dict[str, str | None]]:
    icons_of: dict[str, set[str]] = {}
    groups: dict[str, str | None] = {}
    for file in sorted((iconify / "json").glob("*.json")):
        data = json.loads(file.read_text())
        visible = [icon for icon, body in data["icons"].items() if not body.get("hidden")]
        icons_of[file.stem] = {icon.replace("-", " ") for icon in visible}
        if file.stem in EMOJI:
            group_of = {icon: group for group, icons in data.get("categories", {}).items() for icon in icons}
            groups |= {icon.replace("-", " "): group_of.get(icon) for icon in visible}
    return icons_of, groups


def prolific(drawings: list[Drawing], least: int = 8) -> set[str]:
    """Artists with enough works for a style of the benchmark, which no sprite may come from."""
    works = Counter(artist_of(drawing.creator) for drawing in drawings)
    return {artist for artist, count in works.items() if count >= least and artist not in NOBODY}


def build(iconify: Path, openclipart: Path, seed: int, workers: int) -> list[dict]:
    """The rows of the Parquet file."""
    icons_of, groups = _icon_names(iconify)
    things = vocabulary(icons_of, groups)
    sources = {style.source for style in STYLES}
    marks = {word for source in MARKS for name in icons_of.get(source, ()) for word in name.split() if len(word) > 3}
    marks -= things
    clipart = list(openclipart_drawings(openclipart))
    held_out = prolific(clipart)
    allowed = [drawing for drawing in clipart if artist_of(drawing.creator) not in held_out]
    drawings = [*iconify_drawings(iconify, sources), *allowed]
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    with ProcessPoolExecutor(workers) as pool:
        for style, fitting in chosen(drawings, things, marks, seed).items():
            mono = style in MONO_STYLES
            tried = fitting[: int(style.most * 1.4)]  # more than are kept: some cannot be rendered
            n_rows = len(rows)
            for drawing, sprite in zip(tried, pool.map(render, tried, [mono] * len(tried), chunksize=16), strict=True):
                if sprite is None or sprite[1] in seen or len(rows) - n_rows >= style.most:
                    continue
                seen.add(sprite[1])
                row: dict[str, Any] = {"name": drawing.name, "thing": drawing.category}
                row |= {"style": style.name, "source": style.source}
                row |= {"mono": mono, "creator": drawing.creator, "license": drawing.license, "image": sprite[0]}
                rows.append(row)
            size = sum(len(row["image"]) for row in rows[n_rows:])
            click.echo(
                f"{style.name}: {len(rows) - n_rows} sprites of {len(fitting)} things, {size / 1e6:.2f} MB", err=True
            )
    return rows


@click.command()
@click.option("--iconify", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--openclipart", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True)
def main(iconify: Path, openclipart: Path, out: Path, seed: int, workers: int) -> None:
    """Choose, render and pack the sprites of IconScenes."""
    rows = build(iconify, openclipart, seed, workers)
    repeated = ["thing", "style", "source", "creator", "license"]
    pq.write_table(
        pa.Table.from_pylist(rows, SCHEMA),
        out,
        compression="zstd",
        compression_level=15,
        use_dictionary=repeated,
        write_statistics=False,
    )
    things = {row["thing"] for row in rows}
    click.echo(f"{len(rows)} sprites, {len(things)} things, {len({row['style'] for row in rows})} styles")


if __name__ == "__main__":
    main()
