"""One shape of base model in detail: python benchmarks/shapes.py --shape sd15 --json sd15.json

The time of a training step and of a sample for each method, their share of the device's rate of matrix products, and memory.
It needs only torch, diffusers and peft, and no database, so that it runs on a machine that is at hand for a few minutes.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path

import click
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from machine import describe, peak_gib
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from attrdb.bundled import EXEMPLARS
from attrdb.ingest.customize.base_model import (
    BaseModel,
    base_model_folder,
    load_base_model,
    quiet_libraries,
    read_profile,
)
from attrdb.ingest.customize.customize import CustomizeSettings, customize
from attrdb.ingest.customize.customizers import BUILT_IN, DEFAULT_METHOD
from attrdb.ingest.customize.synthesize import SynthesizeSettings, plan_samples, synthesize, use_fast_solver
from attrdb.ingest.devices import default_device, is_cpu, resolved_precision
from attrdb.ingest.prompts import TOKEN, choose_prompts, train_prompt

EXEMPLAR, KIND, CATEGORY = "clock-by-openclipart", "object", "clock"


def exemplar() -> Image.Image:
    rows = pq.read_table(EXEMPLARS, columns=["metadata", "image"]).to_pylist()
    [row] = [row for row in rows if json.loads(row["metadata"])["concept"] == EXEMPLAR]
    return Image.open(io.BytesIO(row["image"])).convert("RGB")


def peak(device: str) -> float:
    """Peak memory in GiB: of the device, or of this process on a CPU."""
    return peak_gib() if is_cpu(device) else torch.cuda.max_memory_allocated(device) / 2**30


def sd15() -> BaseModel:
    """Stable Diffusion 1.5's shape with random weights, for timing alone; the tokenizer is icon-sd's."""
    quiet_libraries()
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(base_model_folder("icon-sd") / "tokenizer", model_max_length=77)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    parts = {"vae": vae, "text_encoder": text, "unet": unet}
    for part in parts.values():
        part.requires_grad_(False).eval()
    pipeline = StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    device = default_device()
    unet.to(memory_format=torch.channels_last)  # as load_base_model does
    return BaseModel("sd15", pipeline.to(device), device)


def closely(
    shape: str, method: str, steps: int, batch: int, sample_batch: int, solver_steps: int, checkpointing: bool
) -> dict:
    """One method at one shape: the time of a step and of a sample, their share of the rate of matrix products, and memory.

    Rates are operations as torch counts them, per second. Memory is that of training, which is first.
    """
    base = sd15() if shape == "sd15" else load_base_model("icon-sd")
    profile = read_profile(base_model_folder("icon-sd"))
    images, prompt = [exemplar()], train_prompt(KIND, CATEGORY)
    base.precision = resolved_precision("auto", base.device)
    before = peak(base.device)

    def customized(n: int) -> tuple[float, float, dict]:
        """Seconds of n steps, of the whole customization, and the delta."""
        marks: list[float] = []

        def mark(*_: object) -> None:
            if not is_cpu(base.device):
                torch.cuda.synchronize(base.device)
            marks.append(time.perf_counter())

        fresh = CustomizeSettings(steps=n + 1, batch=batch, lr=profile["lr"])  # the first step warms up
        started = time.perf_counter()
        delta, _ = customize(
            base, images, prompt, TOKEN, CATEGORY, fresh, mark, method=method, gradient_checkpointing=checkpointing
        )
        base.restore()
        return marks[-1] - marks[0], time.perf_counter() - started, delta

    counts = []
    for n in (0, 1):
        with FlopCounterMode(display=False) as counter:
            customized(n)
        counts.append(counter.get_total_flops())
    seconds, seconds_in_all, delta = customized(steps)
    memory = peak(base.device)
    use_fast_solver(base)
    settings = SynthesizeSettings(
        samples_per_prompt=profile["samples_per_prompt"],
        solver_steps=solver_steps,
        guidance=profile["guidance"],
        sample_batch=sample_batch,
    )
    prompts = choose_prompts(KIND, CATEGORY, profile["prompts"], profile["prompts_per_scheme"], 0)
    [plans, *_] = plan_samples("m", prompts, settings)
    encoded: dict[str, torch.Tensor] = {}
    with FlopCounterMode(display=False) as counter:
        synthesize(base, plans, settings, encoded=encoded)  # also warms up
    started = time.perf_counter()
    synthesize(base, plans, settings, encoded=encoded)
    sample_seconds = time.perf_counter() - started
    rate = matrix_products(base.device, base.precision)
    return {
        "method": method,
        "gradient_checkpointing": checkpointing,
        "precision": base.precision,
        "batch": batch,
        "sample_batch": len(plans),
        "solver_steps": settings.solver_steps,
        "guidance": settings.guidance,
        "resolution": base.resolution,
        "steps": steps,
        "steps_a_second": steps / seconds,
        "customize_seconds": seconds_in_all,
        "samples_a_second": len(plans) / sample_seconds,
        "peak_gflops": rate / 1e9,
        "training_share": (counts[1] - counts[0]) * steps / seconds / rate,
        "sampling_share": counter.get_total_flops() / sample_seconds / rate,
        "memory_gib": memory,
        "memory_before_gib": before,
        "delta_mb": sum(tensor.numel() * tensor.element_size() for tensor in delta.values()) / 1e6,
    }


def kept_for_backward(shape: str) -> dict:
    """GiB per picture that a training step of custom-diffusion keeps until the backward pass."""
    base = sd15() if shape == "sd15" else load_base_model("icon-sd")
    base.precision = resolved_precision("auto", base.device)
    unet = base.pipeline.unet
    for name, weight in unet.named_parameters():
        weight.requires_grad_(name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")))
    weights = {weight.untyped_storage().data_ptr() for weight in unet.parameters()}
    side, text = unet.config.sample_size, base.pipeline.text_encoder.config
    noisy = torch.randn(1, unet.config.in_channels, side, side, device=base.device)
    states = torch.randn(1, text.max_position_embeddings, text.hidden_size, device=base.device, requires_grad=True)
    kept_gib = {"precision": base.precision}
    for way in ("plain", "gradient checkpointing"):
        if way != "plain":
            unet.enable_gradient_checkpointing()
        kept: dict[int, tuple[int, torch.Tensor]] = {}

        def keep(tensor: torch.Tensor, kept: dict = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes(), tensor  # alive, so that its address is not used again
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            base.predict(noisy, torch.tensor([500], device=base.device), states)
        kept_gib[way] = sum(n_bytes for n_bytes, _ in kept.values()) / 2**30
    return kept_gib


def matrix_products(device: str, precision: str) -> float:
    """Operations per second of large square matrix products, the best of six."""
    side = 2048 if is_cpu(device) else 8192
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def measured(
    shape: str, steps: int, batch: int, sample_batch: int, solver_steps: int, methods: Sequence[str]
) -> tuple[list[dict], dict]:
    """`closely` for every method, and for one also with gradient checkpointing; and `kept_for_backward`."""
    context = multiprocessing.get_context("spawn")
    results = []
    for method, checkpointing in [(method, False) for method in methods] + [(DEFAULT_METHOD, True)]:
        with context.Pool(1) as pool:
            arguments = (shape, method, steps, batch, sample_batch, solver_steps, checkpointing)
            results.append(pool.apply(closely, arguments))
        click.echo(json.dumps(results[-1]))
    kept = kept_for_backward(shape)
    click.echo(json.dumps(kept))
    return results, kept


@click.command()
@click.option("--shape", type=click.Choice(["icon-sd", "sd15"]), default="sd15", show_default=True)
@click.option("--steps", type=click.IntRange(1), default=100, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True)
@click.option("--sample-batch", type=click.IntRange(1), default=16, show_default=True)
@click.option("--solver-steps", type=click.IntRange(1), default=20, show_default=True)
@click.option("--method", "methods", multiple=True, help="Default: all at icon-sd's shape, one at another.")
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(
    shape: str,
    steps: int,
    batch: int,
    sample_batch: int,
    solver_steps: int,
    methods: tuple[str, ...],
    out: Path | None,
) -> None:
    """Measure one shape: every method at icon-sd's, the default method at Stable Diffusion's."""
    device = default_device()
    result: dict = {"machine": describe("torch", "diffusers", "peft"), "shape": shape, "steps": steps, "batch": batch}
    result |= {"device": device if is_cpu(device) else torch.cuda.get_device_name(device)}
    result |= {"threads": torch.get_num_threads()}
    methods = methods or (BUILT_IN if shape == "icon-sd" else (DEFAULT_METHOD,))
    result["methods"], result["kept_gib_a_picture"] = measured(shape, steps, batch, sample_batch, solver_steps, methods)
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
