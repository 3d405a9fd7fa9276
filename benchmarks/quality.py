"""How often a customized model draws its own exemplar: python benchmarks/quality.py DB

For the customized models of a database: the share of samples whose nearest exemplar, among those of all models, belongs to
their own model, by EfficientNet features. Beside it the same figure of the base model, for the same prompts without the token
and the same seeds. Intervals are a bootstrap over models. Figures of the base model that the file of --json has of the same
database are kept, so rerunning the command resumes it.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
from adherence import plain
from comparisons import mean_with_interval
from machine import describe, icon_sd
from PIL import Image

import attrdb
from attrdb.database import Database
from attrdb.ingest.customize.base_model import BaseModel, load_base_model
from attrdb.ingest.customize.synthesize import SynthesizeSettings, plan_samples, synthesize, use_fast_solver
from attrdb.ingest.encode import encode, load_encoder
from attrdb.ingest.prompts import Prompt
from attrdb.ingest.read.pictures import read_picture

ENCODER = "efficientnet-lite0"


def pictures(db: Database, where: str) -> tuple[list[Image.Image], np.ndarray]:
    """The images that a predicate keeps, by id, and their models."""
    rows = db.images(f"model_id IS NOT NULL AND ({where})", ["image_id", "model_id", "image"]).sort_by("image_id")
    images = [read_picture(row["image_id"], row["image"]).image for row in rows.to_pylist()]
    return images, rows["model_id"].to_numpy()


def base_samples(base: BaseModel, model: dict) -> list[Image.Image]:
    """Images of the base model for the prompts and seeds of a customized model."""
    record = json.loads(model["settings"])
    base.precision = record["computed_in"]
    settings = SynthesizeSettings(**record["synthesize"])
    prompts = [Prompt(n, "", plain(text)) for n, text in enumerate(record["prompts"])]
    use_fast_solver(base)
    batches = plan_samples(model["model_id"], prompts, settings)
    return [image for batch in batches for image in synthesize(base, batch, settings)]


def summary(models: list[dict], n_gallery: int) -> dict:
    """Means over models, with 95 % intervals of a bootstrap over models."""
    shares = {of: np.array([model[of] for model in models]) for of in ("customized", "base")}
    shares["difference"] = shares["customized"] - shares["base"]
    means = {name: mean_with_interval(values) for name, values in shares.items()}
    chance = float(np.mean([model["n_exemplars"] for model in models])) / n_gallery
    n_samples = sum(model["n_samples"] for model in models)
    return {"n_models": len(models), "n_samples": n_samples, "n_gallery": n_gallery, "chance": chance, **means}


def stored_shares(out: Path | None, same: dict) -> dict[str, float]:
    """By model, the base model's shares of an earlier run on the same exemplars."""
    if out is None or not out.exists():
        return {}
    earlier = json.loads(out.read_text())
    if any(earlier.get(name) != value for name, value in same.items()):
        return {}
    return {model["model_id"]: model["base"] for kind in earlier["kinds"].values() for model in kind["models"]}


@click.command()
@click.argument("db", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--models", "n_models", type=click.IntRange(1), help="Of each kind, by id; default: all.")
@click.option("--base-model", default="icon-sd", show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(db: Path, n_models: int | None, base_model: str, out: Path | None) -> None:
    """Compare; the last line of a kind is its summary."""
    database, encoder, base = attrdb.open(db, read_only=True), load_encoder(ENCODER), load_base_model(base_model)
    images, owner = pictures(database, "role = 'exemplar'")
    gallery = encode(encoder, images)
    models = database.sql("SELECT * FROM models WHERE kind <> 'mixed' ORDER BY kind, model_id").to_pylist()
    same = {
        "encoder": ENCODER,
        "base_model_hash": models[0]["base_model_hash"],
        "settings": json.loads(models[0]["settings"])["customize"],
        "n_gallery": len(owner),
    }
    result: dict = {"machine": describe("torch", "diffusers"), "base_model": icon_sd(), **same, "kinds": {}}
    earlier = stored_shares(out, same)

    def own_share(model_id: str, images: list[Image.Image]) -> float:
        """The share of images whose nearest exemplar is the model's; the first of equally near ones counts."""
        return float((owner[(encode(encoder, images) @ gallery.T).argmax(axis=1)] == model_id).mean())

    for kind in ("object", "style"):
        done = []
        for model in [model for model in models if model["kind"] == kind][:n_models]:
            model_id = model["model_id"]
            samples, _ = pictures(database, f"role = 'sample' AND model_id = '{model_id}'")
            shares = {"model_id": model_id, "n_exemplars": int((owner == model_id).sum()), "n_samples": len(samples)}
            shares["customized"] = own_share(model_id, samples)
            shares["base"] = (
                earlier[model_id] if model_id in earlier else own_share(model_id, base_samples(base, model))
            )
            click.echo(json.dumps(shares))
            done.append(shares)
            result["kinds"][kind] = summary(done, len(owner)) | {"models": done}
            if out:
                out.write_text(json.dumps(result, indent=1) + "\n")
        click.echo(f"{kind}: {json.dumps(summary(done, len(owner)))}")


if __name__ == "__main__":
    main()
