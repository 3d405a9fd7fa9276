"""Two small encoders of the paper's kinds, trained on IconScenes: one learns from captions, one from pictures alone.

    python -m attrdb.training.icon_sd.encoders icon-clip --run runs/icon-clip --out encoders --minutes 60
    python -m attrdb.training.icon_sd.encoders icon-moco --run runs/icon-moco --out encoders --minutes 60

    icon-clip   language-image: an open_clip model with CLIP's loss on scenes and their captions (Radford et al. 2021);
                its image tower is the same ConvNeXt of timm as icon-moco's.
                Written as `icon-clip.safetensors`, `icon-clip.json` (open_clip's configuration) and a tokenizer; loads as
                open_clip:icon-clip/FILE
    icon-moco   self-supervised: a timm ConvNeXt with MoCo v3's loss on two views of a scene (Chen et al. 2021).
                Written as `icon-moco.safetensors`; loads as timm:convnext_zepto_rms/FILE?size=64&crop=1

Rerunning a command resumes it. Both run on a CPU and on a GPU, and stop after their minutes.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import open_clip
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from attrdb.bundled import SPRITES
from attrdb.ingest.devices import resolved_precision
from attrdb.training.icon_sd.build import learned_tokenizer
from attrdb.training.icon_sd.parts import IconSdSettings
from attrdb.training.icon_sd.runs import Counts, Execution, Stage, check_settings, exclusive_run
from attrdb.training.icon_sd.scenes import Sprites, compose
from attrdb.training.icon_sd.stream import Packed, SceneBatches

ARCH = "convnext_zepto_rms"  # of both, so that they differ in what they learn from


@dataclass(frozen=True)
class EncoderSettings:
    """All that decides an encoder, except the time that it learns.

    temperature, momentum: of MoCo
    network:               of timm, that sees the pictures
    scale:                 least share of a scene that a view of MoCo shows
    """

    kind: str
    batch: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.05
    temperature: float = 0.2
    momentum: float = 0.99
    scale: float = 0.3
    network: str = ARCH
    size: int = 64
    seed: int = 0


def clip_config(settings: EncoderSettings, vocabulary: int, n_tokens: int) -> dict:
    """open_clip's configuration of icon-clip."""
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": settings.size, "timm_model_name": settings.network},
        "text_cfg": {"context_length": n_tokens, "vocab_size": vocabulary, "width": 128, "heads": 4, "layers": 3},
    }


class ClipModel(torch.nn.Module):
    """icon-clip, and its loss on scenes (b, 3, size, size) in [0, 1] with their captions' tokens (b, n_tokens)."""

    def __init__(self, settings: EncoderSettings, vocabulary: int, n_tokens: int):
        super().__init__()
        self.config = clip_config(settings, vocabulary, n_tokens)
        self.clip = open_clip.CLIP(**self.config)
        self.contrast = open_clip.ClipLoss()
        for name in ("MEAN", "STD"):
            values = torch.tensor(getattr(open_clip, f"OPENAI_DATASET_{name}")).view(1, 3, 1, 1)
            self.register_buffer(name.lower(), values, persistent=False)

    def forward(self, pictures: torch.Tensor, tokens: torch.Tensor, _generator: torch.Generator) -> torch.Tensor:
        images, texts, scale = self.clip((pictures - self.mean) / self.std, tokens)[:3]
        return self.contrast(images, texts, scale)

    @torch.no_grad()
    def stepped(self) -> None:
        self.clip.logit_scale.clamp_(0, math.log(100))

    def exported(self) -> dict[str, torch.Tensor]:
        return self.clip.state_dict()


class MocoModel(torch.nn.Module):
    """icon-moco with its heads and its slow copy; negatives are the other scenes of the batch."""

    def __init__(self, settings: EncoderSettings):
        super().__init__()
        self.settings = settings
        backbone = timm.create_model(settings.network, num_classes=0)
        width = backbone.num_features
        self.fast = torch.nn.Sequential(backbone, _head(width, 1024, 128))
        self.predictor = _head(128, 512, 128)
        self.slow = torch.nn.Sequential(timm.create_model(settings.network, num_classes=0), _head(width, 1024, 128))
        self.slow.load_state_dict(self.fast.state_dict())
        self.slow.requires_grad_(False)

    def forward(self, pictures: torch.Tensor, _tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        with torch.autocast(pictures.device.type, enabled=False):  # in bf16 a view would be off by an eighth of a pixel
            views = [view(pictures, self.settings.scale, generator) * 2 - 1 for _ in range(2)]
        with torch.no_grad():
            slow = [F.normalize(self.slow(x).float(), dim=1) for x in views]
        fast = [F.normalize(self.predictor(self.fast(x)).float(), dim=1) for x in views]
        scene = torch.arange(len(pictures), device=pictures.device)
        temperature = self.settings.temperature
        return F.cross_entropy(fast[0] @ slow[1].T / temperature, scene) + F.cross_entropy(
            fast[1] @ slow[0].T / temperature, scene
        )

    @torch.no_grad()
    def stepped(self) -> None:
        fast, slow = (list(part.state_dict().values()) for part in (self.fast, self.slow))
        for average, value in zip(slow, fast, strict=True):
            if average.is_floating_point():
                average.lerp_(value, 1 - self.settings.momentum)
            else:
                average.copy_(value)

    def exported(self) -> dict[str, torch.Tensor]:
        return self.fast[0].state_dict()


def _head(width: int, hidden: int, out: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Linear(width, hidden, bias=False),
        torch.nn.BatchNorm1d(hidden),
        torch.nn.ReLU(),
        torch.nn.Linear(hidden, out, bias=False),
        torch.nn.BatchNorm1d(out, affine=False),
    )


def view(pictures: torch.Tensor, least: float, generator: torch.Generator) -> torch.Tensor:
    """A random view of each scene: a crop, mirrored or not, with changed colours; one in five is grey.

    pictures, returns: (b, 3, side, side) in [0, 1]
    least:             share of its area that a crop shows at least
    """
    n, device = len(pictures), pictures.device

    def draw(low: float, high: float) -> torch.Tensor:
        return (torch.rand(n, generator=generator) * (high - low) + low).to(device)

    side = draw(least, 1).sqrt()
    mirrored = draw(-1, 1).sign()
    x, y = draw(-1, 1) * (1 - side), draw(-1, 1) * (1 - side)
    zero = torch.zeros_like(side)
    affine = torch.stack([torch.stack([side * mirrored, zero, x], 1), torch.stack([zero, side, y], 1)], 1)
    grid = F.affine_grid(affine, list(pictures.shape), align_corners=False)
    crop = F.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)
    grey = crop.mean(1, keepdim=True)
    strength = torch.where(draw(0, 1) < 0.2, zero, draw(0.6, 1.4)).view(-1, 1, 1, 1)
    crop = grey + (crop - grey) * strength
    tint = torch.stack([draw(0.8, 1.2) for _ in range(3)], 1).view(-1, 3, 1, 1)
    light, contrast = draw(-0.15, 0.15).view(-1, 1, 1, 1), draw(0.7, 1.3).view(-1, 1, 1, 1)
    return ((crop * tint - 0.5) * contrast + 0.5 + light).clamp(0, 1)


def _captioned(batches: Iterator[Packed], empty: torch.Tensor) -> Iterator[Packed]:
    """The scenes of each batch that have a caption."""
    for packed in batches:
        has_caption = (packed["tokens"] != empty).any(dim=1)
        yield {name: value[has_caption] for name, value in packed.items()}


def _rate(n_steps: int, spent: float) -> float:
    """The learning rate's factor: warm-up over the first steps of a call, then a half cosine over its time."""
    return min(1.0, (n_steps + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, spent))))


def train_encoder(
    settings: EncoderSettings,
    sprites_file: Path,
    run_folder: Path,
    out: Path,
    minutes: float,
    execution: Execution,
) -> dict:
    """Train for so many minutes, from the last checkpoint, and write the encoder as it is then; the figures.

    A call takes at least one step. The learning rate falls over the minutes of a call; a resumed run warms up again.
    raises: InvalidValue for a run that began with other settings
    """
    device = execution.device
    check_settings(settings, run_folder)
    torch.manual_seed(settings.seed)
    stage = Stage(run_folder, settings.kind, minutes)
    sprites = Sprites.read(sprites_file)
    tokenizer = learned_tokenizer(sprites, IconSdSettings(seed=settings.seed), run_folder / "tokenizer")
    sprites = replace(sprites, pixels=sprites.pixels.to(device))
    makers: dict[str, Callable[[EncoderSettings], torch.nn.Module]] = {
        "icon-clip": partial(ClipModel, vocabulary=len(tokenizer), n_tokens=tokenizer.model_max_length),
        "icon-moco": MocoModel,
    }
    model = makers[settings.kind](settings).to(device, memory_format=torch.channels_last)  # twice as fast on a CPU
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    matrices, vectors = [w for w in trained if w.ndim > 1], [w for w in trained if w.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    counts = Counts()
    if stored := stage.load():
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        counts = Counts(stored["step"], stored["images"], stored["seconds"])
    kind = torch.device(device).type
    bf16 = resolved_precision("auto", device) == "bf16"
    budget, first, before = max(1e-9, stage.deadline - time.monotonic()), counts.step, counts.seconds
    batches = SceneBatches(sprites, settings.batch, settings.seed + 2, first, tokenizer).loaded(execution.workers)
    empty = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    captioned = _captioned(batches, empty)

    def step(seconds: float) -> torch.Tensor:
        packed, generator = next(captioned), torch.Generator().manual_seed(settings.seed * 1_000_003 + counts.step)
        pictures = compose(packed, sprites.pixels, settings.size).contiguous(memory_format=torch.channels_last)
        with torch.autocast(kind, torch.bfloat16, enabled=bf16):
            loss = model(pictures, packed["tokens"].to(device), generator)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * _rate(counts.step - first, (seconds - before) / budget)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.stepped()
        counts.step, counts.images = counts.step + 1, counts.images + len(pictures)
        return loss.detach()

    def state(seconds: float) -> dict[str, Any]:
        counts.seconds = seconds
        tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        return tensors | {"step": counts.step, "images": counts.images, "seconds": seconds}

    stage.take_steps(step, lambda: {"images": counts.images}, state, before)
    figures = {
        "images": counts.images,
        "steps": counts.step,
        "loss": stage.loss,
        "seconds": round(counts.seconds),
        "settings": asdict(settings),
    }
    _write(model, tokenizer if settings.kind == "icon-clip" else None, figures, settings.kind, out)
    return figures


def _write(model: torch.nn.Module, tokenizer: Any, figures: dict, name: str, out: Path) -> None:
    """The encoder in fp16, its configuration, and its card with the hash of the weights."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        key: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for key, value in model.exported().items()
    }
    file = out / f"{name}.safetensors"
    save_file(weights, file)
    if tokenizer is not None:
        (out / f"{name}.json").write_text(json.dumps(model.config, indent=2) + "\n")
        tokenizer.save_pretrained(out / f"{name}-tokenizer")
    card = figures | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    (out / f"{name}-training.json").write_text(json.dumps(card, indent=2) + "\n")


@click.command()
@click.argument("kind", type=click.Choice(["icon-clip", "icon-moco"]))
@click.option("--sprites", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=SPRITES)
@click.option("--run", "run_folder", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--minutes", type=float, default=60, show_default=True)
@click.option("--batch", type=int, default=EncoderSettings.batch, show_default=True)
@click.option("--lr", type=float, default=EncoderSettings.lr, show_default=True)
@click.option("--workers", type=int, default=0, show_default=True, help="Processes that draw scenes ahead.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(
    kind: str,
    sprites: Path,
    run_folder: Path,
    out: Path,
    minutes: float,
    batch: int,
    lr: float,
    workers: int,
    device: str,
) -> None:
    """Train one of the two encoders for some minutes, or resume its training."""
    settings = EncoderSettings(kind, batch=batch, lr=lr)
    with exclusive_run(run_folder):
        figures = train_encoder(settings, sprites, run_folder, out, minutes, Execution(device, workers))
    click.echo(json.dumps({name: value for name, value in figures.items() if name != "settings"}))


if __name__ == "__main__":
    main()
