"""A picture of IconScenes, with captions: python -m attrdb.training.icon_sd.sheet --out docs/icon-scenes.png"""

from __future__ import annotations

import textwrap
from pathlib import Path

import click
from PIL import Image, ImageDraw

from attrdb.bundled import SPRITES
from attrdb.training.icon_sd.scenes import Composer, Sprites, compose, pack
from attrdb.training.icon_sd.stream import draw_batch

SIDE, LETTERS, LINES, LINE = 112, 20, 5, 11  # of a scene in pixels, of a caption's lines


def sheet(sprites: Sprites, columns: int, rows: int, seed: int) -> Image.Image:
    """The first scenes of a seed, as training draws them, each above its caption."""
    scenes = draw_batch(Composer(sprites), columns * rows, seed, 0)
    height = SIDE + LINES * LINE + 8
    canvas = Image.new("RGB", (columns * (SIDE + 8), rows * height), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (scene, picture) in enumerate(zip(scenes, compose(pack(scenes), sprites.pixels), strict=True)):
        left, top = number % columns * (SIDE + 8) + 4, number // columns * height
        pixels = (picture.permute(1, 2, 0) * 255).round().byte().numpy()
        canvas.paste(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left, top))
        lines = textwrap.wrap(scene.caption or "(no caption)", LETTERS)[:LINES]
        for line, text in enumerate(lines):
            draw.text((left, top + SIDE + 1 + line * LINE), text, fill="black")
    return canvas


@click.command()
@click.option("--sprites", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=SPRITES)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--columns", default=9, show_default=True)
@click.option("--rows", default=5, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(sprites: Path, out: Path, columns: int, rows: int, seed: int) -> None:
    """Draw some scenes with their captions."""
    sheet(Sprites.read(sprites), columns, rows, seed).save(out, optimize=True)


if __name__ == "__main__":
    main()
