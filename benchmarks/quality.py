"""How often a customized model draws its own exemplar: python benchmarks/quality.py DB

For the customized models of a database: the share of samples whose nearest exemplar, among those of all its models, is one
of their own model's, by EfficientNet features. Beside it the same of the base model, without customization, for the same
prompts with the token left out and the same seeds. A model counts as one: the interval is a bootstrap over models. What
--json has of the same database is kept, so a run that was stopped goes on.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
from machine import describe
from PIL import Image

import attrdb
from attrdb.database import Database
from attrdb.ingest.customize.base_model import BaseModel, load_base_model
from attrdb.ingest.customize.synthesize import SynthesizeSettings, plan_samples, synthesize, use_fast_solver
from attrdb.ingest.encode import encode, load_encoder
from attrdb.ingest.prompts import TOKEN, Prompt
from attrdb.ingest.read.pictures import read_picture

ENCODER = "efficientnet-lite0"


def pictures(db: Database, where: str) -> tuple[list[Image.Image], np.ndarray]:
    """The images that a predicate keeps, by id, and their models."""
    rows = db.images(f"model_id IS NOT NULL AND ({where})", ["image_id", "model_id", "image"]).sort_by("image_id")
    found = [read_picture(row["image_id"], row["image"]).image for row in rows.to_pylist()]
    return found, rows["model_id"].to_numpy()


def drawn_by_base(base: BaseModel, model: dict) -> list[Image.Image]:
    """What the base model draws in a customized model's place."""
    record = json.loads(model["settings"])
    base.precision = record["computed_in"]
    settings = SynthesizeSettings(**record["synthesize"])
    prompts = [Prompt(n, "", " ".join(text.replace(TOKEN, "").split())) for n, text in enumerate(record["prompts"])]
    use_fast_solver(base)
    batches = plan_samples(model["model_id"], prompts, settings)
    return [image for batch in batches for image in synthesize(base, batch, settings)]


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


def kept(out: Path | None, same: dict) -> dict[str, float]:
    """By model, the base model's shares of an earlier run on the same exemplars."""
    if out is None or not out.exists():
        return {}
    earlier = json.loads(out.read_text())
    if any(earlier.get(what) != value for what, value in same.items()):
        return {}
    return {one["model_id"]: one["base"] for kind in earlier["kinds"].values() for one in kind["models"]}


@click.command()
@click.argument("db", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--models", "n_models", type=click.IntRange(1), help="How many of a kind, by id; all when left out.")
@click.option("--base-model", default="icon-sd", show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(db: Path, n_models: int | None, base_model: str, out: Path | None) -> None:
    """Compare; the last line of a kind sums up."""
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
    found: dict = {"machine": describe("torch", "diffusers"), **same, "kinds": {}}
    earlier = kept(out, same)

    def own_share(of_model: str, drawn: list[Image.Image]) -> float:
        """The share of pictures whose nearest exemplar is the model's; the first of equal ones counts."""
        return float((owner[(encode(encoder, drawn) @ gallery.T).argmax(axis=1)] == of_model).mean())

    for kind in ("object", "style"):
        done = []
        for model in [model for model in models if model["kind"] == kind][:n_models]:
            model_id = model["model_id"]
            samples, _ = pictures(database, f"role = 'sample' AND model_id = '{model_id}'")
            one = {"model_id": model_id, "n_exemplars": int((owner == model_id).sum()), "n_samples": len(samples)}
            one["customized"] = own_share(model_id, samples)
            one["base"] = earlier[model_id] if model_id in earlier else own_share(model_id, drawn_by_base(base, model))
            click.echo(json.dumps(one))
            done.append(one)
            found["kinds"][kind] = summary(done, len(owner)) | {"models": done}
            if out:
                out.write_text(json.dumps(found, indent=1) + "\n")
        click.echo(f"{kind}: {json.dumps(summary(done, len(owner)))}")


if __name__ == "__main__":
    main()
