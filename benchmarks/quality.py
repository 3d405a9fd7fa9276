"""How often a customized model draws its own exemplar: python benchmarks/quality.py

For the bundled concepts and icon-sd: the share of samples whose nearest exemplar, among those of all bundled concepts, is
one of their own model's, by EfficientNet features. Beside it the same of the base model, without customization, for the same
prompts with the token left out and the same seeds. A model counts as one: the interval is a bootstrap over models.
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
from attrdb.ingest.base_model import BaseModel, base_model_folder, load_base_model, weights_hash
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


def one_model(
    base: BaseModel, encoder: Encoder, concept: str, given: dict, gallery: np.ndarray, owner: np.ndarray
) -> dict:
    """The shares of one customized model, and of the base model in its place."""
    own, kind, category = bundled_exemplars(concept)
    settings = settings_for("icon-sd", kind, category, given)
    base.precision = resolved_precision(settings.precision)
    prompts = prompts_of(settings, own)
    plain = [Prompt(one.number, one.scheme, " ".join(one.text.replace(TOKEN, "").split())) for one in prompts]
    before = drawn(base, concept, plain, settings.synthesize)
    base.restore()
    started = time.perf_counter()
    images = [one.picture.image for one in own]
    prompt = train_prompt(kind, category)
    customize(base, images, prompt, TOKEN, category, settings.customize, method=settings.method)
    seconds = time.perf_counter() - started
    after = drawn(base, concept, prompts, settings.synthesize)
    base.restore()
    return {
        "concept": concept,
        "kind": kind,
        "n_exemplars": len(own),
        "n_samples": len(after),
        "customized": own_share(encoder, after, gallery, owner, concept),
        "base": own_share(encoder, before, gallery, owner, concept),
        "seconds": seconds,
    }


def summary(found: list[dict], n_gallery: int) -> dict:
    """Means over models, and 95 % of what such means are when models are drawn again."""
    picks = np.random.default_rng(0).integers(len(found), size=(10_000, len(found)))
    shares = {what: np.array([one[what] for one in found]) for what in ("customized", "base")}
    shares["difference"] = shares["customized"] - shares["base"]
    means = {
        what: {
            "mean": float(values.mean()),
            "interval": np.quantile(values[picks].mean(axis=1), (0.025, 0.975)).tolist(),
        }
        for what, values in shares.items()
    }
    chance = float(np.mean([one["n_exemplars"] for one in found])) / n_gallery
    n_samples = sum(one["n_samples"] for one in found)
    return {"n_models": len(found), "n_samples": n_samples, "n_gallery": n_gallery, "chance": chance, **means}


@click.command()
@click.option(
    "--models", "n_models", type=click.IntRange(1), help="How many concepts of a kind, by name; all when left out."
)
@click.option("--kind", "kinds", type=click.Choice(["object", "style"]), multiple=True, help="Both when left out.")
@click.option("--method", type=click.Choice(list(BUILT_IN)), default=DEFAULT_METHOD, show_default=True)
@click.option("--steps", type=click.IntRange(1), help="Of training; the profile's when left out.")
@click.option("--lr", type=float)
@click.option("--precision", type=click.Choice(["auto", "float32", "bf16"]), default="auto", show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(n_models: int | None, kinds: tuple[str, ...], out: Path | None, **given: str | float | None) -> None:
    """Customize, draw, compare; the last line of a kind sums up."""
    encoder, known = load_encoder(ENCODER), concepts()
    exemplars = {concept: [one.picture.image for one in bundled_exemplars(concept)[0]] for concept, _ in known}
    gallery = np.concatenate([encode(encoder, images) for images in exemplars.values()])
    owner = np.array([concept for concept, images in exemplars.items() for _ in images])
    base = load_base_model("icon-sd")
    found: dict = {"machine": describe("torch", "diffusers"), "encoder": ENCODER, "given": given, "kinds": {}}
    found["base_model_hash"] = weights_hash(base_model_folder("icon-sd"))
    for wanted in kinds or ("object", "style"):
        models = []
        for concept in [concept for concept, kind in known if kind == wanted][:n_models]:
            models.append(one_model(base, encoder, concept, given, gallery, owner))
            click.echo(json.dumps(models[-1]))
        found["kinds"][wanted] = summary(models, len(owner)) | {"models": models}
        click.echo(f"{wanted}: {json.dumps(summary(models, len(owner)))}")
    if out:
        out.write_text(json.dumps(found | {"precision": base.precision}, indent=1) + "\n")


if __name__ == "__main__":
    main()
