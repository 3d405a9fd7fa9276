"""One picture of what icon-sd draws: things by styles, things by media, and scenes of one and two things.

    python -m attrdb.training.icon_sd.grid icon-sd --out docs/icon-sd.png

A seed chooses everything. A red frame marks what training never saw: a thing in a style that has no sprite of it, or a
thing in a medium that is held out for it.
"""

from __future__ import annotations

import random
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import click
from PIL import Image, ImageDraw

from attrdb.bundled import SPRITES
from attrdb.ingest.customize.base_model import load_base_model
from attrdb.ingest.customize.synthesize import plan_samples, synthesize, use_fast_solver
from attrdb.ingest.options import SynthesizeSettings
from attrdb.ingest.prompts import Prompt
from attrdb.training.icon_sd import media
from attrdb.training.icon_sd.scenes import Sprites
from attrdb.training.icon_sd.words import COLOURS, PLACES, RELATIONS, SPOTS, with_article

CELL, LEFT, LINE = 68, 92, 11  # pixels: of a picture with its margin, of the names of things, of a line of text
HEAD, CAPTION = 2, 5  # lines above a column, and below a scene
CHARACTERS = {HEAD: 11, CAPTION: 16}  # of a line
N_THINGS, N_STYLES, N_MEDIA, N_SCENES = 8, 10, 10, 24
KNOWN_STYLES = 12  # a thing of the grid has sprites in at least so many styles


@dataclass(frozen=True)
class Cell:
    """A prompt, and whether it asks for something that training never saw."""

    prompt: str
    unseen: bool = False


def panels(sprites: Sprites, seed: int) -> tuple[list[str], list[str], list[str], list[list[Cell]]]:
    """Things, styles and media, and the cells: things by styles, things by media, scenes."""
    rng = random.Random(seed)
    drawn: dict[str, set[str]] = defaultdict(set)
    for thing, style in zip(sprites.things, sprites.styles, strict=True):
        drawn[thing].add(style)
    known = sorted(thing for thing, styles in drawn.items() if len(styles) >= KNOWN_STYLES)
    things = rng.sample(known, N_THINGS)
    styles = rng.sample(sorted(set(sprites.styles)), N_STYLES)
    chosen = rng.sample(media.NAMES, N_MEDIA)
    by_style = [
        Cell(f"{with_article(thing)} in the style of {style} art", style not in drawn[thing])
        for thing in things
        for style in styles
    ]
    by_medium = [
        Cell(f"{with_article(media.MEDIA[name][0])} of {with_article(thing)}", media.held_out(thing, name))
        for thing in things
        for name in chosen
    ]
    scenes = []
    for number in range(N_SCENES):
        first, second = rng.sample(known, 2)
        colour, ground = rng.sample(list(COLOURS), 2)
        place = rng.choice([f"on {with_article(ground)} ground", rng.choice(list(PLACES))])
        if number % 2:
            words = f"{with_article(first)} {rng.choice(list(RELATIONS))} {with_article(second)}"
        else:
            words = f"a small {colour} {first} {rng.choice(list(SPOTS))}"
        scenes.append(Cell(f"{words}, {place}"))
    return things, styles, chosen, [by_style, by_medium, scenes]


def samples(base_model: str, prompts: list[str], seed: int, guidance: float, steps: int) -> list[Image.Image]:
    base = load_base_model(base_model)
    use_fast_solver(base)
    settings = SynthesizeSettings(
        samples_per_prompt=1, guidance=guidance, solver_steps=steps, seed=seed, sample_batch=40
    )
    plans = plan_samples("grid", [Prompt(number, "grid", text) for number, text in enumerate(prompts)], settings)
    return [image for batch in plans for image in synthesize(base, batch, settings)]


def grid(base_model: str, sprites: Sprites, seed: int = 0, guidance: float = 4.0, steps: int = 25) -> Image.Image:
    things, styles, chosen, cells = panels(sprites, seed)
    images = iter(samples(base_model, [cell.prompt for panel in cells for cell in panel], seed, guidance, steps))
    columns = max(N_STYLES, N_MEDIA)
    per_row = (LEFT + columns * CELL) // (CELL + 32)
    scene_rows = -(-N_SCENES // per_row)
    head, scene = HEAD * LINE + 4, CELL + CAPTION * LINE + 8
    tables = 2 * (head + N_THINGS * CELL + 8)
    canvas = Image.new("RGB", (LEFT + columns * CELL, tables + scene_rows * scene), "white")
    draw = ImageDraw.Draw(canvas)

    def paste(cell: Cell, left: int, top: int) -> None:
        canvas.paste(next(images).resize((CELL - 4, CELL - 4), Image.Resampling.BICUBIC), (left + 2, top + 2))
        if cell.unseen:
            draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), outline="red", width=2)

    def write(text: str, left: int, top: int, n_lines: int) -> None:
        for number, line in enumerate(textwrap.wrap(text, CHARACTERS[n_lines])[:n_lines]):
            draw.text((left, top + number * LINE), line, fill="black")

    top = 0
    for heads, panel in ((styles, cells[0]), (chosen, cells[1])):
        for column, name in enumerate(heads):
            write(name, LEFT + column * CELL + 2, top + 2, HEAD)
        for row, thing in enumerate(things):
            draw.text((4, top + head + row * CELL + CELL // 2 - 6), thing[:15], fill="black")
        for number, cell in enumerate(panel):
            row, column = divmod(number, len(heads))
            paste(cell, LEFT + column * CELL, top + head + row * CELL)
        top += head + N_THINGS * CELL + 8
    for number, cell in enumerate(cells[2]):
        row, column = divmod(number, per_row)
        left, upper = column * (CELL + 32) + 4, top + row * scene
        paste(cell, left, upper)
        write(cell.prompt, left, upper + CELL, CAPTION)
    return canvas


@click.command()
@click.argument("base_model")
@click.option("--sprites", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=SPRITES)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--guidance", default=4.0, show_default=True)
def main(base_model: str, sprites: Path, out: Path, seed: int, guidance: float) -> None:
    """Sample a base model on seen and unseen combinations."""
    grid(base_model, Sprites.read(sprites), seed, guidance).save(out, optimize=True)


if __name__ == "__main__":
    main()
