"""Loading the base model: any Stable Diffusion 1.x or 2.x pipeline, from a folder or a hub id."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from attrdb.errors import InvalidValue, NotFound

WEIGHTED = ("unet", "vae", "text_encoder")
NEEDED = (*WEIGHTED, "tokenizer", "scheduler")
BUNDLED = "icon-sd"  # the tiny base model that comes with attrdb
# Up to this many latent positions a side, plain attention beats the fused one on a CPU: a training step at 8 x 8 takes
# 0.57 of the time. Beyond it, its score matrices take too much memory.
SMALL = 16
PREDICTIONS = ("epsilon", "v_prediction")


@dataclass
class BaseModel:
    """A pipeline in float32, where it is and what it was called."""

    name: str
    pipeline: StableDiffusionPipeline
    device: str

    @property
    def resolution(self) -> int:
        """Pixels a side."""
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor


def base_model_folder(name: str) -> Path:
    """The local folder of a base model, checked to be whole; a hub id is downloaded, safetensors only.

    name:   a pipeline folder, 'icon-sd' for the one that comes with attrdb, or a hub id such as org/name
    raises: NotFound if there is neither a folder nor a hub id of that name, InvalidValue if a part is missing
    """
    folder = Path(name)
    if not folder.exists():
        bundled = Path(str(files("attrdb"))) / "assets" / name
        if name == BUNDLED and bundled.is_dir():
            return bundled
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise NotFound(f"no base model {name!r}: neither a folder nor a hub id (such as org/name)")
        try:
            folder = Path(StableDiffusionPipeline.download(name, use_safetensors=True, safety_checker=None))
        except Exception as error:  # the hub client raises many kinds; all mean the same here
            raise NotFound(f"no base model {name!r}: no such folder, and the hub says: {error}") from error
    if not (folder / "model_index.json").is_file():
        raise InvalidValue(f"base model {folder} has no model_index.json; a diffusers pipeline folder is needed")
    kind = read_json(folder / "model_index.json").get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise InvalidValue(f"base model {folder} is a {kind}; a StableDiffusionPipeline (SD 1.x or 2.x) is needed")
    missing = [part for part in NEEDED if not (folder / part).is_dir()]
    missing += [
        f"{part}/*.safetensors"
        for part in WEIGHTED
        if part not in missing and not any((folder / part).glob("*.safetensors"))
    ]
    if missing:
        raise InvalidValue(f"base model {folder} lacks {', '.join(missing)}; fetch the whole pipeline folder")
    return folder


def weights_hash(folder: Path) -> str:
    """A hash of the weights and configurations that decide what the base model generates."""
    digest = hashlib.sha256()
    for part in NEEDED:
        for file in sorted((folder / part).glob("*")):
            if file.suffix in (".safetensors", ".json", ".txt"):
                digest.update(f"{part}/{file.name}".encode())
                with file.open("rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def read_json(path: Path) -> dict:
    """raises: InvalidValue if the file is no JSON object"""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidValue(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidValue(f"{path} is not a JSON object")
    return found


def read_profile(folder: Path) -> dict:
    """The recommended settings beside a base model, empty where it has none."""
    path = folder / "customize.json"
    return read_json(path) if path.is_file() else {}


def quiet_libraries() -> None:
    """Keep the bars and hints of diffusers and transformers off stderr, which is for attrdb's own progress."""
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def load_base_model(name: str, device: str | None = None) -> BaseModel:
    """The base model, frozen and in float32.

    raises: NotFound or InvalidValue as `base_model_folder`, InvalidValue for another kind of pipeline or prediction
    """
    folder = base_model_folder(name)
    quiet_libraries()
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            dtype=torch.float32,
        )
    except Exception as error:  # diffusers, transformers and safetensors each raise kinds of their own
        raise InvalidValue(f"base model {folder} does not load as a Stable Diffusion pipeline: {error}") from error
    latent, width = pipeline.vae.config.latent_channels, pipeline.text_encoder.config.hidden_size
    if (pipeline.unet.config.in_channels, pipeline.unet.config.cross_attention_dim) != (latent, width):
        raise InvalidValue(
            f"base model {folder} is not text-to-image: its U-Net takes more than latents and the prompt"
        )
    prediction = pipeline.scheduler.config.prediction_type
    if prediction not in PREDICTIONS:
        raise InvalidValue(f"base model {folder} predicts {prediction!r}; {' or '.join(PREDICTIONS)} is needed")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    if device == "cpu" and pipeline.unet.config.sample_size <= SMALL:
        pipeline.unet.set_attn_processor(AttnProcessor())
    return BaseModel(str(name), pipeline.to(device), device)
