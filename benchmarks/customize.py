"""Customizing and sampling a model, beside a plain training loop that does the same work: python benchmarks/customize.py

One concept, 100 steps of batch 8, 16 samples, features, one append. The ways run in turn, each in a process of its own, and
the base model is loaded before the clock starts. The peer resembles public training scripts and uses diffusers with its
defaults: every step resizes pictures, tokenizes prompts, and runs the autoencoder and the text encoder on the whole batch.
The pipeline draws samples one prompt at a time. Both ways train K and V and one new token, and draw with the same solver,
steps, guidance and sizes.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
)
from machine import describe, icon_sd, spread
from shapes import measured, peak

import attrdb
from attrdb.demo import bundled_exemplars
from attrdb.ingest.customize.base_model import BaseModel, base_model_folder, load_base_model, quiet_libraries
from attrdb.ingest.customize.customizers import BUILT_IN
from attrdb.ingest.customize.synthesize import plan_samples
from attrdb.ingest.devices import default_device, is_cpu
from attrdb.ingest.encode import load_encoder
from attrdb.ingest.models.ingest_one import ingest_model
from attrdb.ingest.models.settings import prompts_of, settings_for
from attrdb.ingest.options import ModelSettings
from attrdb.ingest.prompts import TOKEN, train_prompt
from attrdb.ingest.read.corpus import image_rows, register
from attrdb.ingest.read.pictures import read_picture, square, webp

CONCEPT = "clock-by-openclipart"
METHOD = "custom-diffusion"  # which the peer trains too
ENCODER = "efficientnet-lite0"
WAYS = ("attrdb", "attrdb, float32", "peer")


# --- the two sides ----------------------------------------------------------------------------------------------------


def settings_of(steps: int, batch: int, precision: str) -> ModelSettings:
    _, kind, category = bundled_exemplars(CONCEPT)
    options = {"method": METHOD, "steps": steps, "batch": batch, "precision": precision}
    return settings_for("icon-sd", kind, category, options)


def ours(base: BaseModel, settings: ModelSettings, path: Path) -> dict:
    exemplars, _, _ = bundled_exemplars(CONCEPT)
    db, encoder = attrdb.create(path), load_encoder(ENCODER)
    started = time.perf_counter()
    result = ingest_model(db, exemplars, settings, [encoder], "m", load=lambda name: base)
    seconds = time.perf_counter() - started
    row = db.sql("SELECT customize_seconds, synthesize_seconds FROM models").to_pylist()[0]
    return {"seconds": seconds, "n_samples": result.n_samples, **row}


def plain_pipeline() -> StableDiffusionPipeline:
    """icon-sd as any script loads it: diffusers' own attention and memory layout."""
    quiet_libraries()
    pipeline = StableDiffusionPipeline.from_pretrained(base_model_folder("icon-sd"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
    return pipeline.to(default_device())


def peer(pipeline: StableDiffusionPipeline, settings: ModelSettings, path: Path) -> dict:
    """The plain way, in float32, with attrdb's data set, encoder and append only.

    Every item resizes its picture and tokenizes its prompt. Every step runs autoencoder, text encoder and U-Net, clips the
    gradients, and restores all other tokens.
    """
    exemplars, _, category = bundled_exemplars(CONCEPT)
    db, encoder = attrdb.create(path), load_encoder(ENCODER)
    options, device = settings.customize, pipeline.device
    started = time.perf_counter()
    register(db, [encoder])
    tokenizer, text = pipeline.tokenizer, pipeline.text_encoder
    tokenizer.add_tokens(TOKEN)
    token_id = tokenizer.convert_tokens_to_ids(TOKEN)
    text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = text.get_input_embeddings().weight
    like = tokenizer(category, add_special_tokens=False).input_ids
    table.data[token_id] = table.data[like].mean(dim=0)
    table.requires_grad_(True)
    before = table.detach().clone()
    trained = [
        p for name, p in pipeline.unet.named_parameters() if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    ]
    for weight in trained:
        weight.requires_grad_(True)
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    prompt = train_prompt(settings.kind, category)

    def item(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = np.array(square(exemplars[number].picture.image, side))
        padding = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
        ids = tokenizer(prompt, return_tensors="pt", **padding).input_ids[0]
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1, ids

    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    optimizer = torch.optim.AdamW([table, *trained], lr=options.lr, weight_decay=0.01)
    torch.manual_seed(options.seed)
    for _ in range(options.steps):
        items = [item(number) for number in torch.randint(len(exemplars), (options.batch,)).tolist()]
        batch, ids = (torch.stack(part).to(device) for part in zip(*items, strict=True))
        with torch.no_grad():
            latents = pipeline.vae.encode(batch).latent_dist.sample() * pipeline.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        times = torch.randint(noise_scheduler.config.num_train_timesteps, (options.batch,), device=device)
        noisy = noise_scheduler.add_noise(latents, noise, times)
        is_v = noise_scheduler.config.prediction_type == "v_prediction"
        target = noise_scheduler.get_velocity(latents, noise, times) if is_v else noise
        loss = F.mse_loss(pipeline.unet(noisy, times, text(ids)[0]).sample, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([table, *trained], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # restore all other tokens
            others = torch.arange(len(table), device=device) != token_id
            table[others] = before[others]
        loss.item()
    trained_at = time.perf_counter()
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    sampling, pictures, rows = settings.synthesize, [], []
    plans = [plan for batch in plan_samples("m", prompts_of(settings, exemplars), sampling) for plan in batch]
    for sample_prompt in dict.fromkeys(plan.prompt for plan in plans):
        of_prompt = [plan for plan in plans if plan.prompt == sample_prompt]
        images = pipeline(
            sample_prompt.text,
            num_images_per_prompt=len(of_prompt),
            generator=[torch.Generator().manual_seed(plan.seed) for plan in of_prompt],
            num_inference_steps=sampling.solver_steps,
            guidance_scale=sampling.guidance,
        ).images
        rows += [
            {"image_id": plan.image_id, "role": "sample", "model_id": "m", "seed": plan.seed} for plan in of_prompt
        ]
        pictures += [read_picture(plan.image_id, webp(image)) for plan, image in zip(of_prompt, images, strict=True)]
    sampled_at = time.perf_counter()
    rows += [{"image_id": f"m/{n}", "role": "exemplar", "model_id": "m"} for n, _ in enumerate(exemplars)]
    db.writer.append_model(
        image_rows(rows, pictures + [exemplar.picture for exemplar in exemplars], [encoder]), {"model_id": "m"}
    )
    return {
        "seconds": time.perf_counter() - started,
        "n_samples": len(plans),
        "customize_seconds": trained_at - started,
        "synthesize_seconds": sampled_at - trained_at,
    }


def one_run(way: str, steps: int, batch: int) -> dict:
    """A run of one side, with its peak memory in GiB: of the device, or of the process on a CPU."""
    settings = settings_of(steps, batch, "float32" if way == "attrdb, float32" else "auto")
    loaded, run = (plain_pipeline(), peer) if way == "peer" else (load_base_model("icon-sd"), ours)
    before = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        figures = run(loaded, settings, Path(folder) / "some.attrdb")
    # Of all threads. It varies less than the clock if other work shares the machine.
    used = time.process_time() - before
    return figures | {"processor_seconds": used, "peak_gib": peak(default_device())}


@click.command()
@click.option("--rounds", type=click.IntRange(0), default=3, show_default=True, help="Of the comparison.")
@click.option("--steps", type=click.IntRange(1), default=100, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True)
@click.option("--sample-batch", type=click.IntRange(1), default=16, show_default=True)
@click.option("--solver-steps", type=click.IntRange(1), default=20, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(rounds: int, steps: int, batch: int, sample_batch: int, solver_steps: int, out: Path | None) -> None:
    """Compare, then measure every method in detail (see shapes.py)."""
    result: dict = {
        "machine": describe("torch", "diffusers", "peft"),
        "base_model": icon_sd(),
        "device": default_device(),
    }
    if not is_cpu(result["device"]):
        result["device"] = torch.cuda.get_device_name(result["device"])
    result |= {"steps": steps, "batch": batch, "threads": torch.get_num_threads()}
    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    context = multiprocessing.get_context("spawn")
    for number in range(rounds):
        for way in WAYS[number % 3 :] + WAYS[: number % 3]:
            with context.Pool(1) as pool:
                runs[way].append(pool.apply(one_run, (way, steps, batch)))
            click.echo(f"round {number + 1}  {way:16} " + json.dumps(runs[way][-1]))
    if runs["peer"]:
        for way in WAYS:
            result[way] = {name: spread([run[name] for run in runs[way]]) for name in runs[way][0]}
        for way in WAYS[:2]:
            pairs = list(zip(runs["peer"], runs[way], strict=True))
            for measure in ("seconds", "processor_seconds"):
                ratio = spread([theirs[measure] / ours[measure] for theirs, ours in pairs])
                result[f"{measure}, peer / {way}"] = ratio
                click.echo(f"{measure}, peer / {way}: {ratio}")
    sizes = (steps, batch, sample_batch, solver_steps, BUILT_IN)
    result["methods"], result["kept_gib_a_picture"] = measured("icon-sd", *sizes)
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
