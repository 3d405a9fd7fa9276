"""Sampling a customized model: fixed prompts, fixed seeds, fixed batches, so that a rerun makes the same pictures."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from attrdb.ingest.customize.attention import Projected
from attrdb.ingest.customize.base_model import BaseModel
from attrdb.ingest.customize.customize import encode_prompts
from attrdb.ingest.devices import enough_memory
from attrdb.ingest.options import SynthesizeSettings
from attrdb.ingest.prompts import Prompt
from attrdb.progress import Progress, no_progress

DECODED = 4  # pictures that the autoencoder decodes at a time: its activations are what fills a card


@dataclass(frozen=True)
class SamplePlan:
    """One sample to be made. Its id is `<model_id>/<prompt number>/<seed>`."""

    image_id: str
    prompt: Prompt
    seed: int


def plan_samples(model_id: str, prompts: list[Prompt], settings: SynthesizeSettings) -> list[list[SamplePlan]]:
    """The samples of a model in the batches in which they are made.

    A batch is made as a whole: floating-point results depend on what is computed together.
    """
    draw = random.Random(f"{settings.seed}/{model_id}")
    plans = []
    for prompt in prompts:
        for seed in draw.sample(range(2**31), settings.samples_per_prompt):
            plans.append(SamplePlan(f"{model_id}/{prompt.number}/{seed}", prompt, seed))
    return [plans[start : start + settings.sample_batch] for start in range(0, len(plans), settings.sample_batch)]


def use_fast_solver(base: BaseModel) -> None:
    """DPM-Solver++ with the base model's own noise schedule."""
    base.pipeline.scheduler = DPMSolverMultistepScheduler.from_config(base.pipeline.scheduler.config)


@torch.no_grad()
def synthesize(
    base: BaseModel,
    batch: list[SamplePlan],
    settings: SynthesizeSettings,
    report: Progress = no_progress,
    encoded: dict[str, torch.Tensor] | None = None,
) -> list[Image.Image]:
    """The pictures of one batch, in its order, each from a generator of its own.

    encoded: by prompt, as `encode_prompts`; what the batch needs and is not there is added, so that one dictionary for all
             batches of a model encodes every prompt once, the empty one of the guidance included
    In float32 they are those of the pipeline itself. In bf16 only the U-Net is: guidance, solver and autoencoder are not.
    """
    pipeline, solver = base.pipeline, base.pipeline.scheduler
    encoded = {} if encoded is None else encoded
    guided = settings.guidance > 1
    texts = [plan.prompt.text for plan in batch]
    encoded |= encode_prompts(base, [text for text in ["", *texts] if text not in encoded])
    states = torch.stack([encoded[text] for text in [""] * (len(batch) if guided else 0) + texts])
    shape = (1, pipeline.unet.config.in_channels, *[base.latent_side] * 2)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(plan.seed)) for plan in batch]
    solver.set_timesteps(settings.solver_steps, device=base.device)
    latents = torch.cat(noise).to(base.device) * solver.init_noise_sigma  # (n, channels, height, width)
    doing = f"drawing {len(batch)} pictures of {base.resolution} pixels a side at a time"
    with enough_memory(base.device, doing, "give a smaller sample batch (sample_batch)"):
        with base.lowered():
            projected: Projected = {}
            for step, time in enumerate(solver.timesteps, 1):
                given = solver.scale_model_input(torch.cat([latents] * 2) if guided else latents, time)
                predicted = base.predict(given, time, states, projected)
                if guided:
                    plain, asked = predicted.chunk(2)
                    predicted = plain + settings.guidance * (asked - plain)
                latents = solver.step(predicted, time, latents, return_dict=False)[0]
                report("sample", step, settings.solver_steps)
        pictures = []
        for part in (latents / pipeline.vae.config.scaling_factor).split(DECODED):
            pixels = pipeline.vae.decode(part, return_dict=False)[0]
            pictures += pipeline.image_processor.postprocess(pixels, output_type="pil")
            report("sample", settings.solver_steps, settings.solver_steps)
    return pictures
