"""Sampling a customized model: fixed prompts, fixed seeds, fixed batches, so that a rerun makes the same pictures."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from attrdb.ingest.base_model import BaseModel
from attrdb.ingest.prompts import Prompt


@dataclass(frozen=True)
class SynthesizeSettings:
    samples_per_prompt: int = 4
    solver_steps: int = 25
    guidance: float = 6.0
    sample_batch: int = 16
    seed: int = 0


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


def synthesize(
    base: BaseModel,
    batch: list[SamplePlan],
    settings: SynthesizeSettings,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Image.Image]:
    """The pictures of one batch, in its order, each from a generator of its own."""

    def step_done(_pipeline: object, step: int, _time: int, kept: dict) -> dict:
        report(step + 1, settings.solver_steps)
        return kept

    return base.pipeline(
        prompt=[plan.prompt.text for plan in batch],
        generator=[torch.Generator().manual_seed(plan.seed) for plan in batch],
        num_inference_steps=settings.solver_steps,
        guidance_scale=settings.guidance,
        callback_on_step_end=step_done,
        output_type="pil",
    ).images
