"""Train icon-sd, or resume its training, and export it as a pipeline folder that diffusers loads.

    python -m attrdb.training.icon_sd.build --run runs/icon-sd --out icon-sd --minutes 120

The stages. Each resumes from its last checkpoint, and finishes before the next begins:

    tokenizer     as CLIP's, with merges learned from captions of scenes
    autoencoder   64 x 64 pixels to 8 x 8 latents (autoencoder.py)
    U-Net         with the text encoder, on latents of scenes (unet.py)
    export        fp16 safetensors, EMA weights, and `training.json` with the figures

`--decoder` trains the decoder of a finished autoencoder further: latents stay what they are, and the U-Net is not touched.

`--minutes` bounds the call; rerunning the command resumes the stage that was cut. The command runs on a CPU and on a GPU.
"""

from __future__ import annotations

import json
import math
import platform
import random
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from attrdb.bundled import SPRITES
from attrdb.ingest.devices import is_cpu
from attrdb.training.icon_sd.autoencoder import latent_scale, reconstruction, refine_decoder, train_autoencoder
from attrdb.training.icon_sd.parts import TINY, IconSdSettings, export, train_tokenizer
from attrdb.training.icon_sd.runs import Execution, Stage, check_settings, exclusive_run
from attrdb.training.icon_sd.scenes import Composer, Sprites
from attrdb.training.icon_sd.unet import train_unet

N_CAPTIONS = 40_000  # that the tokenizer learns from
COMPILED_FROM = 60  # minutes of a call; compiling takes 3 and a C++ compiler, and saves a fifteenth of each step


def learned_tokenizer(sprites: Sprites, settings: IconSdSettings, folder: Path) -> CLIPTokenizer:
    """The run's tokenizer. Its captions hold every name of a thing or style at least once, whatever is drawn."""
    if (folder / "tokenizer_config.json").exists():
        return CLIPTokenizer.from_pretrained(folder)
    composer, rng = Composer(sprites), random.Random(settings.seed)
    captions = [composer.draw(rng).caption for _ in range(N_CAPTIONS)]
    return train_tokenizer(captions + sorted({*sprites.things, *sprites.styles}), settings, folder)


def start_from(folder: Path, run_folder: Path, settings: IconSdSettings) -> None:
    """Begin a run at an exported pipeline: its weights, which were stored in fp16, and its counts.

    It holds no optimizer; the moments build up again within some steps.
    """
    if (run_folder / "unet.pt").exists():
        return
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
    )
    figures = json.loads((folder / "training.json").read_text())
    pipeline.tokenizer.save_pretrained(run_folder / "tokenizer")
    n_steps = math.ceil(figures.get("vae_images", settings.vae_images) / settings.vae_batch)
    vae_seconds = figures.get("vae_seconds", 0.0)
    vae = {"vae": pipeline.vae.state_dict(), "step": n_steps, "seconds": vae_seconds, "finished": True}
    Stage(run_folder, "vae").save(vae | {"scale": pipeline.vae.config.scaling_factor})
    both = torch.nn.ModuleDict({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}).state_dict()
    counts = {name: figures[f"unet_{name}"] for name in ("images", "seconds", "loss")} | {"step": figures["unet_steps"]}
    Stage(run_folder, "unet").save({"weights": both, "ema": both, **counts})


def build(
    sprites_file: Path,
    run_folder: Path,
    out: Path,
    settings: IconSdSettings,
    minutes: float,
    execution: Execution,
    start: Path | None = None,
    lr_end: float = 1.0,
    vae_minutes: float = math.inf,
    decoder_alone: bool = False,
) -> dict:
    """Run the stages for so many minutes and export the pipeline as it is then; the figures, as in `training.json`.

    Nothing is exported before the U-Net has begun.
    start:       an exported pipeline to begin a new run at
    lr_end:      see `train_unet`
    vae_minutes: `minutes` of `train_autoencoder`
    decoder_alone: train the decoder of a finished autoencoder, see `refine_decoder`, and export nothing
    raises:      InvalidValue for a run that began with other settings
    """
    end = time.monotonic() + 60 * minutes
    check_settings(settings, run_folder)
    if start:
        start_from(start, run_folder, settings)
    sprites = Sprites.read(sprites_file)
    tokenizer = learned_tokenizer(sprites, settings, run_folder / "tokenizer")
    sprites = replace(sprites, pixels=sprites.pixels.to(execution.device))
    stage = Stage(run_folder, "vae", (end - time.monotonic()) / 60)
    if decoder_alone:
        return {"decibels": refine_decoder(sprites, settings, stage, execution)}
    vae = train_autoencoder(sprites, settings, stage, execution, vae_minutes)
    vae_state = stage.load() or {}
    vae_images = vae_state["step"] * settings.vae_batch
    figures = {"vae_images": vae_images, "vae_seconds": round(vae_state["seconds"])}
    if not vae_state["finished"]:
        return figures
    figures["decibels"] = round(reconstruction(vae, sprites, settings), 2)
    if "scale" not in vae_state:  # it stays what it is, also when scenes are drawn otherwise: the U-Net has learned it
        vae_state["scale"] = latent_scale(vae, sprites, settings)
        stage.save(vae_state)
    vae.register_to_config(scaling_factor=vae_state["scale"])
    stage = Stage(run_folder, "unet", (end - time.monotonic()) / 60)
    unet, text_encoder, unet_figures = train_unet(vae, sprites, tokenizer, settings, stage, execution, lr_end)
    hardware = f"{platform.machine()} CPU" if is_cpu(execution.device) else torch.cuda.get_device_name()
    figures |= unet_figures
    if not figures["unet_steps"]:
        return figures
    figures |= {
        "sprites": len(sprites.things),
        "hardware": hardware,
        "torch_threads": torch.get_num_threads(),
        "settings": asdict(settings),
    }
    export(vae, unet, text_encoder, tokenizer, figures, out)
    return figures


@click.command()
@click.option("--sprites", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=SPRITES)
@click.option("--run", "run_folder", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--minutes", type=float, default=120, show_default=True, help="Time of this call.")
@click.option("--vae-channels", type=int, nargs=4, default=IconSdSettings.vae_channels, show_default=True)
@click.option("--vae-images", type=int, default=IconSdSettings.vae_images, show_default=True)
@click.option("--vae-batch", type=int, default=IconSdSettings.vae_batch, show_default=True)
@click.option("--vae-lr", type=float, default=IconSdSettings.vae_lr, show_default=True)
@click.option(
    "--vae-minutes", type=float, default=math.inf, help="Training time after which the autoencoder is finished too."
)
@click.option("--unet-batch", type=int, default=IconSdSettings.unet_batch, show_default=True)
@click.option("--unet-lr", type=float, default=IconSdSettings.unet_lr, show_default=True)
@click.option(
    "--lr-end", type=float, default=1.0, show_default=True, help="Share of the learning rate that is left at the end."
)
@click.option(
    "--start-from",
    "start",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="An exported pipeline to begin a new run at.",
)
@click.option("--decoder", "decoder_alone", is_flag=True, help="Train the decoder of a finished autoencoder instead.")
@click.option("--recorded", is_flag=True, help="A GPU repeats a recording of each step.")
@click.option("--workers", type=int, default=0, show_default=True, help="Processes that draw scenes ahead.")
@click.option("--tiny", is_flag=True, help="Rehearse with the smallest sizes that run.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(
    sprites: Path,
    run_folder: Path,
    out: Path,
    minutes: float,
    lr_end: float,
    vae_minutes: float,
    start: Path | None,
    decoder_alone: bool,
    recorded: bool,
    workers: int,
    tiny: bool,
    device: str,
    **options: Any,
) -> None:
    """Train icon-sd for some minutes, or resume its training, and export it."""
    if decoder_alone and (start or lr_end != 1 or vae_minutes != math.inf):
        raise click.UsageError(
            "--decoder trains no other part; give it without --lr-end, --start-from and --vae-minutes"
        )
    settings = TINY if tiny else replace(IconSdSettings(), **options)
    execution = Execution(device, workers, recorded, compiled=is_cpu(device) and minutes >= COMPILED_FROM)
    torch.backends.cudnn.benchmark = True  # a GPU's shapes stay the same
    with exclusive_run(run_folder):
        figures = build(
            sprites, run_folder, out, settings, minutes, execution, start, lr_end, vae_minutes, decoder_alone
        )
    click.echo(json.dumps({name: value for name, value in figures.items() if name != "settings"}))
    if "settings" not in figures and not decoder_alone:
        click.echo("nothing is exported before the U-Net has begun; rerun the command", err=True)
        raise SystemExit(3)


if __name__ == "__main__":
    main()
