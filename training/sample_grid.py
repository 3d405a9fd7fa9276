"""The base model's sample grid: things by drawing styles, seen combinations above, unseen ones below.

python -m attrdb.training.sample_grid icon-sd --corpus icons.parquet --out docs/icon-sd.png
"""

from __future__ import annotations

import random
from pathlib import Path

import click
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from attrdb.ingest.base_model import load_base_model
from attrdb.ingest.prompts import Prompt
from attrdb.ingest.synthesize import SynthesizeSettings, plan_samples, synthesize, use_fast_solver

CELL, LABEL, LEFT = 64, 18, 150  # pixels


def combinations(corpus: Path, n_things: int, seed: int) -> tuple[list[str], list[str], list[str]]:
    """Things that every style of the corpus draws, things that one of them lacks, and the styles, the lacking one last."""
    rows = pq.read_table(corpus, columns=["role", "category", "prompt"]).to_pylist()
    drawn: dict[str, set[str]] = {}
    for row in rows:
        if row["role"] == "pretraining":
            style = row["prompt"].removeprefix(row["category"] + " in the style of ").removesuffix(" art")
            drawn.setdefault(style, set()).add(row["category"])
    styles = sorted(drawn, key=lambda style: -len(drawn[style]))
    everywhere = sorted(set.intersection(*drawn.values()))
    lacking = sorted(set.intersection(*(drawn[style] for style in styles[:-1])) - drawn[styles[-1]])
    rng = random.Random(seed)
    return rng.sample(everywhere, n_things), rng.sample(lacking, n_things), styles


def grid(base_model: str, corpus: Path, n_things: int = 10, seed: int = 0, guidance: float = 4.0) -> Image.Image:
    """The picture: a row a thing, a column a style; a red frame marks a combination that the corpus lacks."""
    seen, unseen, styles = combinations(corpus, n_things, seed)
    things = seen + unseen
    texts = [f"a picture of {thing} in the style of {style} art" for thing in things for style in styles]
    base = load_base_model(base_model)
    use_fast_solver(base)
    settings = SynthesizeSettings(samples_per_prompt=1, guidance=guidance, seed=seed, sample_batch=50)
    prompts = [Prompt(number, "grid", text) for number, text in enumerate(texts)]
    images = [image for batch in plan_samples("grid", prompts, settings) for image in synthesize(base, batch, settings)]
    half = LEFT + len(styles) * CELL
    canvas = Image.new("RGB", (2 * half, LABEL + n_things * CELL), "white")
    draw = ImageDraw.Draw(canvas)
    for number, image in enumerate(images):
        row, column = divmod(number, len(styles))
        left, row = (half, row - n_things) if row >= n_things else (0, row)
        at = left + LEFT + column * CELL, LABEL + row * CELL
        canvas.paste(image.resize((CELL - 4, CELL - 4), Image.BICUBIC), (at[0] + 2, at[1] + 2))
        if left and column == len(styles) - 1:
            draw.rectangle((*at, at[0] + CELL - 1, at[1] + CELL - 1), outline="red")
        if column == 0:
            draw.text((left + 6, at[1] + CELL // 2 - 6), things[number // len(styles)][:24], fill="black")
        if row == 0:
            draw.text((at[0] + 4, 4), styles[column], fill="black")
    return canvas


@click.command()
@click.argument("base_model")
@click.option("--corpus", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--seed", default=0, show_default=True)
def main(base_model: str, corpus: Path, out: Path, seed: int) -> None:
    """Sample a base model on seen and unseen combinations of things and styles."""
    grid(base_model, corpus, seed=seed).save(out, optimize=True)


if __name__ == "__main__":
    main()
