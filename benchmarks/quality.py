"""How often a customized model draws its own exemplar: python benchmarks/quality.py --models 6

For bundled object concepts and icon-sd: the share of samples whose nearest exemplar, among those of all bundled concepts, is
one of their own model's, by EfficientNet features. Beside it the same of the base model, without customization, for the same
prompts with the token left out and the same seeds.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq
from machine import describe
from PIL import Image

from attrdb.demo import bundled_exemplars, bundled_icons
from attrdb.ingest.base_model import BaseModel, load_base_model
from attrdb.ingest.customize import customize
from attrdb.ingest.customizers import BUILT_IN, DEFAULT_METHOD
from attrdb.ingest.devices import resolved_precision
from attrdb.ingest.encoders import Encoder, encode, load_encoder
from attrdb.ingest.model import prompts_of, settings_for
from attrdb.ingest.prompts import TOKEN, Prompt, train_prompt
from attrdb.ingest.synthesize import SynthesizeSettings, plan_samples, synthesize, use_fast_solver

ENCODER = "efficientnet-lite0"


def concepts() -> list[tuple[str, str]]:
    """(concept, kind) of all that are bundled, by name."""
    rows = pq.read_table(bundled_icons(), columns=["metadata"], filters=[("role", "=", "exemplar")])["metadata"]
    said = [json.loads(text) for text in rows.to_pylist()]
    return sorted({(one["concept"], one["kind"]) for one in said})


def drawn(base: BaseModel, model_id: str, prompts: list[Prompt], settings: SynthesizeSettings) -> list[Image.Image]:
    use_fast_solver(base)
    return [image for batch in plan_samples(model_id, prompts, settings) for image in synthesize(base, batch, settings)]


def own_share(
    encoder: Encoder, images: list[Image.Image], gallery: np.ndarray, owner: np.ndarray, concept: str
) -> float:
    """The share of pictures whose nearest exemplar is the concept's; the first of equal ones counts."""
    return float((owner[(encode(encoder, images) @ gallery.T).argmax(axis=1)] == concept).mean())


@click.command()
@click.option(
    "--models", "n_models", type=click.IntRange(1), help="How many object concepts, by name; all when left out."
)
@click.option("--method", type=click.Choice(list(BUILT_IN)), default=DEFAULT_METHOD, show_default=True)
@click.option("--steps", type=click.IntRange(1), help="Of training; the profile's when left out.")
@click.option("--lr", type=float)
@click.option("--precision", type=click.Choice(["auto", "float32", "bf16"]), default="auto", show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(n_models: int | None, out: Path | None, **given: str | float | None) -> None:
    """Customize, draw, compare; the last line sums up."""
    encoder, known = load_encoder(ENCODER), concepts()
    exemplars = {concept: [one.picture.image for one in bundled_exemplars(concept)[0]] for concept, _ in known}
    gallery = np.concatenate([encode(encoder, images) for images in exemplars.values()])
    owner = np.array([concept for concept, images in exemplars.items() for _ in images])
    base, found = load_base_model("icon-sd"), []
    for concept in [concept for concept, kind in known if kind == "object"][:n_models]:
        own, kind, category = bundled_exemplars(concept)
        settings = settings_for("icon-sd", kind, category, given)
        base.precision = resolved_precision(settings.precision)
        prompts = prompts_of(settings, own)
        plain = [Prompt(one.number, one.scheme, " ".join(one.text.replace(TOKEN, "").split())) for one in prompts]
        before = drawn(base, concept, plain, settings.synthesize)
        base.restore()
        started = time.perf_counter()
        customize(
            base,
            exemplars[concept],
            train_prompt(kind, category),
            TOKEN,
            category,
            settings.customize,
            method=settings.method,
        )
        seconds = time.perf_counter() - started
        after = drawn(base, concept, prompts, settings.synthesize)
        base.restore()
        shares = [own_share(encoder, images, gallery, owner, concept) for images in (after, before)]
        found.append(
            {
                "concept": concept,
                "n_samples": len(after),
                "customized": shares[0],
                "base": shares[1],
                "seconds": seconds,
            }
        )
        click.echo(json.dumps(found[-1]))
    summary = {
        "n_models": len(found),
        "n_exemplars": len(owner),
        "chance": 1 / len(owner),
        "customized": float(np.mean([one["customized"] for one in found])),
        "base": float(np.mean([one["base"] for one in found])),
    }
    click.echo(json.dumps(summary))
    if out:
        about = {"machine": describe("torch", "diffusers"), "given": given, "precision": base.precision}
        out.write_text(json.dumps(about | summary | {"models": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
