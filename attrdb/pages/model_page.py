"""The page of a customized model: exemplars, settings, loss, samples. It is one file that needs no other."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import jinja2

import attrdb
from attrdb.database import Database
from attrdb.models import describe, kind_in_words, settings_by_group
from attrdb.pages import plots
from attrdb.pages.html import data_uri
from attrdb.pages.monitored import monitored
from attrdb.text import shown

SIDE = 256  # pixels; larger pictures are scaled down to it
SCHEMES = {
    "gpt": "natural sentences",
    "procedural": "media and objects",
    "pair": "sentences that name two concepts",
    "blend": "between a prompt of one concept and a prompt of another",
    "user": "prompts of one's own",
    "caption": "captions of the exemplars",
}


@dataclass(frozen=True)
class LossCurve:
    """The plot of a loss curve, and its figures.

    svg:         of the losses by step and their running mean
    window:      steps that the mean is taken over
    first, last: the mean of the first and last window
    """

    svg: str
    n_steps: int
    window: int
    first: float
    last: float


def render(db: Database, model_id: str) -> str:
    """The page as one HTML text with its pictures inside.

    raises: NotFound for an unknown model
    """
    model = describe(db, model_id)
    pictures = _pictures(db, model_id)
    reduced = max((max(size) for _, size in pictures.values()), default=0) > SIDE
    schemes = []
    for scheme, of_scheme in itertools.groupby(model["samples"], key=lambda row: row["prompt_scheme"]):
        prompts = [
            {"text": prompt, "samples": [{**row, "picture": pictures.get(row["image_id"], (None,))[0]} for row in rows]}
            for prompt, rows in itertools.groupby(of_scheme, key=lambda row: row["prompt"])
        ]
        schemes.append({"name": scheme, "meaning": SCHEMES.get(scheme, ""), "prompts": prompts})
    exemplars = [{**row, "picture": pictures.get(row["image_id"], (None,))[0]} for row in model["exemplars"]]
    groups = _by_concept(model, exemplars)
    credits = sorted({_credit(row) for row in exemplars})
    settings = {
        group: [(name.replace("_", " "), _value(value)) for name, value in values.items()]
        for group, values in settings_by_group(model).items()
    }
    training = model["training"]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("attrdb.pages"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("model.html").render(
        model=model,
        kind=kind_in_words(model),
        facts=_facts(model),
        groups=groups,
        credits=credits,
        settings=settings,
        curve=loss_curve(training.get("losses", [])),
        problem=training.get("problem"),
        monitored=monitored(db, model),
        schemes=schemes,
        reduced=reduced,
        side=SIDE,
        database=db.path.name,
        images_version=db.version,
        version=attrdb.__version__,
    )


def _by_concept(model: dict[str, Any], exemplars: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A title, a note and the exemplars of each concept of a model of several; of another all exemplars together."""
    if model["kind"] != "concepts":
        return [{"title": "Exemplar" + "s" * (len(exemplars) != 1), "note": None, "exemplars": exemplars}]
    return [
        {
            "title": f"{concept['token']}: {concept['kind']}, {concept['category']}",
            "note": f"trained with “{concept['train_prompt']}”",
            "exemplars": [row for row in exemplars if row["concept_id"] == concept["concept_id"]],
        }
        for concept in model["concepts"]
    ]


def loss_curve(losses: list[float]) -> LossCurve | None:
    """The curve of the losses, one per step; None for fewer than two."""
    if len(losses) < 2:
        return None
    window = max(1, len(losses) // 20)
    sums = [0.0, *itertools.accumulate(losses)]
    spans = [(max(0, step + 1 - window), step + 1) for step in range(len(losses))]
    means = [(sums[end] - sums[start]) / (end - start) for start, end in spans]
    return LossCurve(plots.losses(losses, means), len(losses), window, means[window - 1], means[-1])


def _pictures(db: Database, model_id: str) -> dict[str, tuple[str, tuple[int, int]]]:
    """Data URI and stored size of the model's pictures, by image_id; without those whose bytes are not stored."""
    rows = db.sql("SELECT image_id, image FROM images WHERE model_id = $id AND image IS NOT NULL", {"id": model_id})
    stored = zip(rows["image_id"].to_pylist(), rows["image"].to_pylist(), strict=True)
    return {image_id: data_uri(encoded, SIDE) for image_id, encoded in stored}


def _facts(model: dict[str, Any]) -> list[tuple[str, str]]:
    training = model["training"]
    n_prompts = len({(row["prompt_scheme"], row["prompt"]) for row in model["samples"]})
    named = [
        ("category", model["category"]),
        ("split", model["split"]),
        ("method", model["method"]),
        ("base model", model["base_model"]),
        ("trained with", model["train_prompt"]),
        ("exemplars", model["n_exemplars"]),
        ("samples", model["n_samples"] and f"{model['n_samples']:,} from {n_prompts} prompts"),
        ("customized in", _seconds(model["customize_seconds"])),
        ("sampled in", _seconds(model["synthesize_seconds"])),
        ("peak memory", training.get("peak_bytes") and f"{training['peak_bytes'] / 2**20:,.0f} MiB"),
        ("made", model["created_at"] and model["created_at"][:16].replace("T", " ") + " UTC"),
    ]
    return [(name, str(value)) for name, value in named if value not in (None, "")]


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(item)}" for name, item in value.items())
    return shown(value)


def _seconds(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return f"{seconds:,.1f} s" if seconds < 120 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _credit(row: dict[str, Any]) -> str:
    return ", ".join(row[name] for name in ("creator", "license", "source") if row[name]) or "origin not known"
