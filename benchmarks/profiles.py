"""How best to customize icon-sd: python benchmarks/profiles.py WORK PLAN --judge FOLDER --json FILE

Every profile is a set of options of `attrdb ingest models`. Each customizes the same validation models of IconAbC's plan
(benchmarks/iconabc/plan.py). Measured are

    copies      Recall@10 of the exemplars by pixels and by encoders: a sample that pixels recognize is a copy
    adherence   whether samples show the ground, place, spot and medium that their prompts name, and whether the base model's
                own pictures of the same prompts do
    cost        seconds per model

    WORK/profiles.attrdb   the gallery, and the models as PROFILE.MODEL

Rerunning the command resumes it; a profile that is added later is made and measured beside the stored ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
from adherence import ATTRIBUTES, Judge
from comparisons import mean_with_interval
from machine import describe
from quality import base_samples

from attrdb.cli import main as attrdb_command
from attrdb.database import Database, open_or_create
from attrdb.ingest.customize.base_model import load_base_model
from attrdb.ingest.encode import load_encoder
from attrdb.ingest.encode.add_encoder import backfill
from attrdb.ingest.read.pictures import read_picture
from attrdb.store.schema import encoder_id_of
from attrdb.training.evaluate import evaluate

STYLE_WORDS = "twemoji noto fluent flat streamline phosphor"  # their mean is no style that there is
ON_WHITE = {
    "object": "a V* {category}, on a white ground",
    "style": "{caption}, on a white ground in the style of V* art",
}
CAPTIONED = {"object": "a V* {category}", "style": "{caption} in the style of V* art"}
FIRST = {"method": "custom-diffusion", "steps": 150, "lr": 0.005, "batch": 8, "guidance": 3.0}  # the first edition's
# By profile, options; one that differs by kind is a dict with an entry for each.
PROFILES: dict[str, dict[str, Any]] = {
    "first": {},
    "captions": {"train_prompt": CAPTIONED},
    "white": {"train_prompt": ON_WHITE},
    "placed": {"train_prompt": ON_WHITE, "augment": "placed"},
    "prior": {"train_prompt": ON_WHITE, "prior": "image", "prior_images": 64},
    "placed-prior": {"train_prompt": ON_WHITE, "augment": "placed", "prior": "image", "prior_images": 64},
    "generated": {"train_prompt": ON_WHITE, "augment": "placed", "prior": "generated", "prior_images": 64},
    "fewer-steps": {"train_prompt": ON_WHITE, "augment": "placed", "steps": 75},
    "lower-rate": {"train_prompt": ON_WHITE, "augment": "placed", "lr": 0.002},
    "lora": {"train_prompt": CAPTIONED, "method": "dreambooth-lora", "lr": 0.002},
    "token-alone": {"train_prompt": ON_WHITE, "augment": "placed", "method": "textual-inversion", "lr": 0.02},
    "guidance-5": {"train_prompt": ON_WHITE, "augment": "placed", "guidance": 5.0},
}
SAMPLING = {"prompts": "icon", "prompts_per_scheme": 8, "samples_per_prompt": 1, "solver_steps": 20}
N_GALLERY = 10_000
TOP = 10


def specs(plan: Path, profile: str, n_models: int | None) -> list[dict]:
    """The lines of `attrdb ingest models` for the validation models of a plan."""
    lines = [json.loads(line) for line in (plan / "models.jsonl").read_text().splitlines()]
    found = []
    for kind in ("object", "style"):
        models = sorted(
            (line for line in lines if line["split"] == "val" and line["kind"] == kind),
            key=lambda line: line["model_id"],
        )
        options = FIRST | SAMPLING | PROFILES[profile]
        options = {name: value[kind] if isinstance(value, dict) else value for name, value in options.items()}
        if kind == "style":
            options["token_from"] = STYLE_WORDS
        for line in models[:n_models]:
            exemplars = str((plan / line["exemplars"]).absolute())
            found.append(line | options | {"model_id": f"{profile}.{line['model_id']}", "exemplars": exemplars})
    return found


def gallery(plan: Path, out: Path, n: int) -> Path:
    """A Parquet file with n candidates of the plan, the same for all profiles."""
    if not out.exists():
        candidates = pq.read_table(plan / "candidates.parquet")
        picks = np.sort(np.random.default_rng(0).permutation(len(candidates))[:n])
        part = out.with_suffix(".part")
        pq.write_table(candidates.take(picks), part)
        part.replace(out)
    return out


def run(*words: object) -> None:
    """A command of attrdb, in this process."""
    attrdb_command.main([str(word) for word in words], standalone_mode=False)


def answers(db: Database, judge: Judge, model: dict) -> list[dict]:
    """One row per sample and attribute that its prompt names: whether the sample shows it."""
    rows = db.images(f"model_id = '{model['model_id']}' AND role = 'sample'", ["image_id", "prompt", "image"])
    samples = rows.sort_by("image_id").to_pylist()
    pictures = [read_picture(row["image_id"], row["image"]).image for row in samples]
    prompts = [row["prompt"] for row in samples]
    shown = judge.followed(pictures, prompts)
    return [
        {"model_id": model["model_id"], "attribute": attribute, "followed": followed}
        for of_sample in shown
        for attribute, followed in of_sample.items()
    ]


def of_base(judge: Judge, models: Sequence[dict], base_model: str) -> dict[str, dict[str, list[bool]]]:
    """By kind and attribute, whether the base model's pictures of these models' prompts show it, with their guidance."""
    base = load_base_model(base_model)
    found: dict[str, dict[str, list[bool]]] = {}
    for model in models:
        record = json.loads(model["settings"])
        per_prompt = record["synthesize"]["samples_per_prompt"]
        prompts = [prompt for prompt in record["prompts"] for _ in range(per_prompt)]
        for shown in judge.followed(base_samples(base, model), prompts):
            for attribute, followed in shown.items():
                found.setdefault(model["kind"], {}).setdefault(attribute, []).append(followed)
    return found


def over_models(values: Sequence[float]) -> dict[str, Any]:
    """`mean_with_interval`, and the number of models."""
    return mean_with_interval(values) | {"models": len(values)}


RECALLS = """\
SELECT split_part(model_id, '.', 1) AS profile, models.kind, encoder_id, model_id,
    avg((rank <= $top)::INT) AS recall, avg(ln(rank)) AS log_rank
FROM exemplar_ranks JOIN samples ON samples.image_id = exemplar_ranks.sample_id JOIN models USING (model_id)
WHERE gallery = 'own'
GROUP BY ALL ORDER BY ALL
"""


def figures(db: Database, judge: Judge, base_model: str) -> list[dict]:
    """One row per profile and kind."""
    models = db.sql("SELECT * FROM models ORDER BY model_id").to_pylist()
    ranked = db.sql(RECALLS, {"top": TOP}).to_pylist()
    made = {model["model_id"].split(".", 1)[0] for model in models}
    first = next(profile for profile in PROFILES if profile in made)
    base = of_base(judge, [model for model in models if model["model_id"].startswith(f"{first}.")], base_model)
    rows = []
    for profile in PROFILES:
        of_profile = [model for model in models if model["model_id"].startswith(f"{profile}.")]
        for kind in ("object", "style"):
            of_kind = [model for model in of_profile if model["kind"] == kind]
            if not of_kind:
                continue
            found = [answer for model in of_kind for answer in answers(db, judge, model)]
            row: dict[str, Any] = {"profile": profile, "kind": kind, "options": PROFILES[profile]}
            row["seconds"] = over_models(
                [model["customize_seconds"] + model["synthesize_seconds"] for model in of_kind]
            )
            row["recall"], row["log_rank"], row["adherence"] = {}, {}, {}
            for encoder_id in sorted({line["encoder_id"] for line in ranked}):
                lines = [
                    line
                    for line in ranked
                    if (line["profile"], line["kind"], line["encoder_id"]) == (profile, kind, encoder_id)
                ]
                for name in ("recall", "log_rank") if lines else ():
                    row[name][encoder_id] = over_models([line[name] for line in lines])
            for attribute in ATTRIBUTES:
                by_model: dict[str, list[bool]] = {}
                for answer in found:
                    if answer["attribute"] == attribute:
                        by_model.setdefault(answer["model_id"], []).append(answer["followed"])
                of_base_model = base.get(kind, {}).get(attribute)
                if by_model and of_base_model:
                    shares = [float(np.mean(values)) for values in by_model.values()]
                    row["adherence"][attribute] = over_models(shares) | {"base": float(np.mean(of_base_model))}
            rows.append(row)
            click.echo(json.dumps(row), err=True)
    return rows


@click.command()
@click.argument("work", type=click.Path(file_okay=False, path_type=Path))
@click.argument("plan", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--judge", "judge_folder", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--base-model", default="icon-sd", show_default=True)
@click.option(
    "--profile", "profiles", multiple=True, type=click.Choice(list(PROFILES)), help="Repeatable; all if none."
)
@click.option("--encoder", "encoders", multiple=True, default=("efficientnet-lite0", "pixels:8"), show_default=True)
@click.option("--models", "n_models", type=click.IntRange(1), help="Of each kind; all of the split if not given.")
@click.option("--gallery", "n_gallery", type=click.IntRange(1), default=N_GALLERY, show_default=True)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(
    work: Path,
    plan: Path,
    judge_folder: Path,
    base_model: str,
    profiles: tuple[str, ...],
    encoders: tuple[str, ...],
    n_models: int | None,
    n_gallery: int,
    workers: int,
    out: Path | None,
) -> None:
    """Make the models of the profiles, and compare them."""
    work.mkdir(parents=True, exist_ok=True)
    judge, path = Judge.read(judge_folder), work / "profiles.attrdb"
    db = open_or_create(path)
    chosen = [word for spec in encoders for word in ("--encoder", spec)]
    run("ingest", "corpus", path, gallery(plan, work / f"gallery-{n_gallery}.parquet", n_gallery), *chosen)
    lines = [line for profile in profiles or PROFILES for line in specs(plan, profile, n_models)]
    (work / "models.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("ingest", "models", path, work / "models.jsonl", "--base-model", base_model, *chosen, "--workers", workers)
    for spec in encoders:
        backfill(db, load_encoder(spec))
        evaluate(db, encoder_id_of(spec), "own")
    db.refresh()
    result = {"machine": describe("torch", "diffusers"), "gallery": n_gallery, "first": FIRST, "sampling": SAMPLING}
    result["profiles"] = figures(db, judge, base_model)
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
