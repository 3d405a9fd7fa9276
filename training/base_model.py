"""Train icon-sd, the tiny base model: a Stable Diffusion pipeline folder made from a few thousand icons.

    python -m attrdb.training.base_model --corpus icons.parquet --run runs/icon-sd --out icon-sd --minutes 120

Four stages, each resumed where it was left when the command is given again:

    tokenizer   a byte-pair vocabulary in CLIP's format, learned from the captions
    vae         AutoencoderKL, 32x32 pixels -> 8x8 latents
    unet        UNet2DConditionModel and CLIPTextModel, trained together with v-prediction, EMA weights
    export      `StableDiffusionPipeline.save_pretrained` in fp16, with a model card's figures in `training.json`

What the parts are, base_architecture.py says.
"""

from __future__ import annotations

import io
import json
import math
import platform
import random
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

from attrdb.errors import InvalidValue
from attrdb.ingest.devices import resolved_precision
from attrdb.training.base_architecture import (
    BaseModelSettings,
    export,
    new_scheduler,
    new_text_encoder,
    new_unet,
    new_vae,
    train_tokenizer,
)

REPORT_STEPS = 100  # between two checkpoints


def caption(category: str, style: str, rng: random.Random) -> str:
    """One of the ways to say it; 'nothing' in a tenth of the cases, for classifier-free guidance."""
    draw = rng.random()
    if draw < 0.10:
        return ""
    if draw < 0.30:
        return category
    if draw < 0.45:
        return f"a {style} icon of {category}"
    return f"a picture of {category} in the style of {style} art"


def read_corpus(path: Path, size: int) -> tuple[torch.Tensor, list[str], list[str]]:
    """Pixels (n, 3, size, size) uint8, categories and styles of the pretraining rows."""
    rows = [row for row in pq.read_table(path).to_pylist() if row["role"] == "pretraining"]
    images = (Image.open(io.BytesIO(row["image"])).convert("RGB").resize((size, size), Image.LANCZOS) for row in rows)
    pixels = np.stack([np.asarray(image) for image in images])
    styles = [row["prompt"].removeprefix(row["category"] + " in the style of ").removesuffix(" art") for row in rows]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), [row["category"] for row in rows], styles


# --- stages ---------------------------------------------------------------------------------------------------------


class Run:
    """A stage's folder: one checkpoint, replaced atomically, and a log with a JSON line per report."""

    def __init__(self, folder: Path, stage: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint = folder / f"{stage}.pt"
        self.log_file = folder / f"{stage}.jsonl"

    def load(self) -> dict | None:
        return torch.load(self.checkpoint, weights_only=True) if self.checkpoint.exists() else None

    def save(self, state: dict) -> None:
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.checkpoint)

    def log(self, **figures: float) -> None:
        line = json.dumps(figures)
        click.echo(f"{self.checkpoint.stem} {line}", err=True)
        with self.log_file.open("a") as file:
            file.write(line + "\n")


def train_vae(pixels: torch.Tensor, settings: BaseModelSettings, run: Run, device: str) -> AutoencoderKL:
    """The autoencoder after `vae_images` images: L1 in pixels, at full and quarter size, plus a small KL term."""
    torch.manual_seed(settings.seed)
    vae = new_vae(settings).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.vae_lr, weight_decay=0.0)
    n_steps = math.ceil(settings.vae_images / settings.vae_batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.vae_lr, total_steps=n_steps + 1, pct_start=0.05)
    first, seconds = 0, 0.0
    if state := run.load():
        vae.load_state_dict(state["vae"])
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
        first, seconds = state["step"], state["seconds"]
    losses: list[float] = []
    for step in range(first, n_steps):
        started = time.monotonic()
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        picks = torch.randint(len(pixels), (settings.vae_batch,), generator=generator)
        x = pixels[picks].to(device).float() / 127.5 - 1
        if torch.rand((), generator=generator) < 0.5:
            x = x.flip(-1)
        with torch.autocast(device, torch.bfloat16, enabled=resolved_precision("auto", device) == "bf16"):
            posterior = vae.encode(x).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample.float()
        loss = F.l1_loss(decoded, x) + F.l1_loss(F.avg_pool2d(decoded, 4), F.avg_pool2d(x, 4))
        loss = loss + settings.kl_weight * posterior.kl().float().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        seconds += time.monotonic() - started
        if (step + 1) % REPORT_STEPS == 0 or step + 1 == n_steps:
            figures = {"images": (step + 1) * settings.vae_batch, "loss": sum(losses) / len(losses)}
            run.log(**figures, seconds=round(seconds, 1))
            losses.clear()
            run.save(
                {
                    "vae": vae.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "step": step + 1,
                    "seconds": seconds,
                }
            )
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_corpus(vae: AutoencoderKL, pixels: torch.Tensor, device: str) -> torch.Tensor:
    """Latents (n, latent_channels, 8, 8) float32, scaled; sets the VAE's scaling factor so that their deviation is 1."""
    batches = (part.to(device).float() / 127.5 - 1 for part in pixels.split(256))
    latents = torch.cat([vae.encode(x).latent_dist.mean.cpu() for x in batches])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return latents * vae.config.scaling_factor


def train_unet(
    latents: torch.Tensor,
    categories: list[str],
    styles: list[str],
    tokenizer: CLIPTokenizer,
    settings: BaseModelSettings,
    run: Run,
    device: str,
    minutes: float,
    compiled: bool = False,
) -> tuple[UNet2DConditionModel, CLIPTextModel, dict]:
    """The EMA weights of U-Net and text encoder after `minutes` more minutes, with the figures so far.

    compiled: by torch.compile; on a CPU that multiplies float32 only, 105 images/s instead of 66 (two cores, batch 128)
    """
    torch.manual_seed(settings.seed)
    unet = new_unet(settings).to(device)
    text_encoder = new_text_encoder(tokenizer, settings).to(device)
    attention = nullcontext
    if device == "cpu":
        # Over 64 positions the fused attention's backward pass takes a third of a step: 67 images/s with it, 118 without.
        unet.set_attn_processor(AttnProcessor())
        attention = partial(sdpa_kernel, SDPBackend.MATH)
    both = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    optimizer = torch.optim.AdamW(
        both.parameters(), lr=settings.unet_lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True
    )
    ema = {name: value.detach().clone() for name, value in both.state_dict().items()}
    step, seconds, loss_now = 0, 0.0, float("nan")
    if state := run.load():
        both.load_state_dict(state["weights"])
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
        ema = {name: value.to(device) for name, value in state["ema"].items()}
        step, seconds, loss_now = state["step"], state["seconds"], state["loss"]

    predict = torch.compile(unet) if compiled else unet
    autocast = partial(torch.autocast, device, torch.bfloat16, enabled=resolved_precision("auto", device) == "bf16")
    alphas = new_scheduler().alphas_cumprod.to(device)
    losses: list[float] = []
    deadline = time.monotonic() + 60 * minutes
    while time.monotonic() < deadline:
        started = time.monotonic()
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        rng = random.Random(settings.seed * 1_000_003 + step)
        picks = torch.randint(len(latents), (settings.unet_batch,), generator=generator)
        captions = [caption(categories[i], styles[i], rng) for i in picks.tolist()]
        tokens = tokenizer(
            captions, padding="max_length", truncation=True, max_length=settings.max_tokens, return_tensors="pt"
        ).input_ids.to(device)
        x = latents[picks].to(device)
        t = torch.randint(1000, (len(x),), generator=generator).to(device)
        noise = torch.randn(x.shape, generator=generator).to(device)
        signal = alphas[t].sqrt().view(-1, 1, 1, 1)
        sigma = (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
        with autocast(), attention():
            states = text_encoder(tokens).last_hidden_state
            v = predict(signal * x + sigma * noise, t, states).sample.float()
        loss = F.mse_loss(v, signal * noise - sigma * x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = settings.unet_lr * min(1.0, (step + 1) / 300)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(settings.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, value in both.state_dict().items():
                if value.is_floating_point():
                    ema[name].lerp_(value, 1 - decay)
        losses.append(loss.item())
        step += 1
        seconds += time.monotonic() - started
        if step % REPORT_STEPS == 0 or time.monotonic() >= deadline:
            loss_now = sum(losses) / len(losses)
            losses.clear()
            run.log(images=step * settings.unet_batch, loss=loss_now, seconds=round(seconds, 1))
            run.save(
                {
                    "weights": both.state_dict(),
                    "ema": ema,
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "seconds": seconds,
                    "loss": loss_now,
                }
            )
    both.load_state_dict(ema)
    figures = {"unet_steps": step, "unet_images": step * settings.unet_batch, "unet_seconds": round(seconds)}
    return unet.eval(), text_encoder.eval(), {**figures, "unet_loss": loss_now}


def start_from(folder: Path, run_folder: Path, settings: BaseModelSettings) -> None:
    """Begin a run at an exported pipeline: its weights, which were stored in fp16, and its counts."""
    if (run_folder / "unet.pt").exists():
        return
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
    )
    figures = json.loads((folder / "training.json").read_text())
    pipeline.tokenizer.save_pretrained(run_folder / "tokenizer")
    # No optimizer in either: the autoencoder is finished, and the U-Net's moments build up again within some steps.
    Run(run_folder, "vae").save(
        {"vae": pipeline.vae.state_dict(), "step": math.ceil(settings.vae_images / settings.vae_batch), "seconds": 0.0}
    )
    both = torch.nn.ModuleDict({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}).state_dict()
    names = ("unet_steps", "unet_seconds", "unet_loss")
    step, seconds, loss = (figures[name] for name in names)
    Run(run_folder, "unet").save({"weights": both, "ema": both, "step": step, "seconds": seconds, "loss": loss})


def check_settings(settings: BaseModelSettings, folder: Path) -> None:
    """Refuse to go on with a run that was begun with other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    wanted = json.loads(json.dumps(asdict(settings)))
    if not path.exists():
        path.write_text(json.dumps(wanted, indent=2) + "\n")
        return
    found = json.loads(path.read_text())
    for name, value in wanted.items():
        if found.get(name) != value:
            raise InvalidValue(
                f"run {folder} was begun with {name}={found.get(name)!r}, now it is {value!r}; "
                "go on with the old settings or choose another --run folder"
            )


@click.command()
@click.option("--corpus", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--run", "run_folder", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--minutes", type=float, default=120, show_default=True, help="U-Net training time of this call.")
@click.option("--vae-images", type=int, default=BaseModelSettings.vae_images, show_default=True)
@click.option(
    "--start-from", "start", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Exported pipeline."
)
@click.option(
    "--compile/--no-compile", "compiled", default=False, show_default=True, help="The U-Net, by torch.compile."
)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(
    corpus: Path,
    run_folder: Path,
    out: Path,
    minutes: float,
    vae_images: int,
    start: Path | None,
    compiled: bool,
    device: str,
) -> None:
    """Train the tiny base model, or go on training it, and export it as a pipeline folder."""
    settings = replace(BaseModelSettings(), vae_images=vae_images)
    check_settings(settings, run_folder)
    if start:
        start_from(start, run_folder, settings)
    pixels, categories, styles = read_corpus(corpus, settings.size)
    rng = random.Random(settings.seed)
    captions = [caption(category, style, rng) for category, style in zip(categories, styles, strict=True)]
    tokenizer = train_tokenizer(captions * 3, settings, run_folder / "tokenizer")
    vae = train_vae(pixels, settings, Run(run_folder, "vae"), device)
    latents = encode_corpus(vae, pixels, device)
    unet, text_encoder, figures = train_unet(
        latents, categories, styles, tokenizer, settings, Run(run_folder, "unet"), device, minutes, compiled
    )
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    figures |= {
        "vae_images": settings.vae_images,
        "corpus_images": len(pixels),
        "hardware": hardware,
        "torch_threads": torch.get_num_threads(),
        "settings": asdict(settings),
    }
    export(vae, unet, text_encoder, tokenizer, figures, out)


if __name__ == "__main__":
    main()
