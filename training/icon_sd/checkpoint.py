"""Carry a run from one machine to another: its weights in small files that git keeps, without the state of optimizers.

    python -m attrdb.training.icon_sd.checkpoint restore runs/icon-sd
    python -m attrdb.training.icon_sd.build --run runs/icon-sd --out runs/icon-sd-out --minutes 120
    python -m attrdb.training.icon_sd.checkpoint save runs/icon-sd

The weights of the autoencoder, and the EMA weights of U-Net and text encoder, are kept in fp16.
An optimizer's moments build up again within some hundred steps.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file

from attrdb.training.icon_sd.runs import Stage

FOLDER = Path(__file__).resolve().parent / "checkpoint"
COUNTS = {"vae": ("step", "seconds", "finished", "refined", "scale"), "unet": ("step", "images", "seconds", "loss")}


def save(run: Path, folder: Path = FOLDER) -> list[str]:
    """Write the stages that a run has; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, counts in COUNTS.items():
        state = Stage(run, name).load()
        if state is None:
            continue
        tensors = state["vae"] if name == "vae" else state["ema"]
        weights = {
            key: (value.half() if value.is_floating_point() else value).contiguous() for key, value in tensors.items()
        }
        save_file(weights, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(
            json.dumps({count: state[count] for count in counts if count in state}, indent=2) + "\n"
        )
        log = run / f"{name}.jsonl"
        if log.is_file():
            shutil.copyfile(log, folder / log.name)
        written.append(name)
    if written:
        shutil.copyfile(run / "settings.json", folder / "settings.json")
        shutil.copytree(run / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    return written


def restore(run: Path, folder: Path = FOLDER) -> list[str]:
    """Begin a new run at the stages that were saved; their names. A run that has settings already stays as it is."""
    if (run / "settings.json").exists() or not (folder / "settings.json").exists():
        return []
    run.mkdir(parents=True, exist_ok=True)
    restored = []
    for name in COUNTS:
        file = folder / f"{name}.safetensors"
        if not file.exists():
            continue
        weights = {
            key: value.float() if value.dtype == torch.float16 else value for key, value in load_file(file).items()
        }
        counts = json.loads((folder / f"{name}.json").read_text())
        state = {"vae": weights} if name == "vae" else {"weights": weights, "ema": weights}
        Stage(run, name).save(state | counts)
        if (folder / f"{name}.jsonl").is_file():
            shutil.copyfile(folder / f"{name}.jsonl", run / f"{name}.jsonl")
        restored.append(name)
    shutil.copytree(folder / "tokenizer", run / "tokenizer")
    shutil.copyfile(folder / "settings.json", run / "settings.json")
    return restored


@click.group()
def main() -> None:
    """Carry a run of icon-sd from one machine to another."""


@main.command("save")
@click.argument("run", type=click.Path(file_okay=False, path_type=Path))
def save_command(run: Path) -> None:
    """Write a run's weights into the checkpoint folder."""
    click.echo(f"saved: {', '.join(save(run)) or 'nothing'}")


@main.command("restore")
@click.argument("run", type=click.Path(file_okay=False, path_type=Path))
def restore_command(run: Path) -> None:
    """Begin a new run at the checkpoint folder's weights."""
    click.echo(f"restored: {', '.join(restore(run)) or 'nothing'}")


if __name__ == "__main__":
    main()
