"""Loading the base model: any Stable Diffusion 1.x or 2.x pipeline, from a folder or a hub id."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.customize.attention import Projected, use_prompt_attention
from attrdb.ingest.customize.weight_files import WEIGHTED, loaded_files, missing_weights, variant_of
from attrdb.ingest.devices import default_device, enough_memory, is_cpu
from attrdb.ingest.hub import hub
from attrdb.search.memory import keep_freed_memory

HASHED_BEFORE = (".safetensors", ".json", ".txt")
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
NEEDED = (*WEIGHTED, "tokenizer", "scheduler")
LIBRARIES = ("diffusers", "transformers")  # whose classes are loaded
BUNDLED = "icon-sd"  # the tiny base model that comes with attrdb
# What came with attrdb under that name, by `weights_hash`, and where it is.
EDITIONS = {
    "3582b8f4fedcf5703dbcee9e04dee03a2dbc1b1a81cf7089b7732285aab2c8fa": "the first edition of icon-sd, in "
    "attrdb/assets/icon-sd of commit 564bcf6 of attrdb's repository",
    "46d2bc6816fdc4936de6241af28df6f22257ddecf0c93b97c11681da9fb270cf": "icon-sd after 1,291,328 scenes, in "
    "attrdb/assets/icon-sd of attrdb's repository since 2026-11-29",
}
# Up to this many latent positions a side, plain attention beats the fused one on a CPU that multiplies bf16: a training
# step at 8 x 8 takes 0.57 of the time. In float32 they are equal. Beyond it, its score matrices take too much memory.
SMALL = 16
PREDICTIONS = ("epsilon", "v_prediction")


@dataclass
class BaseModel:
    """A pipeline with weights in float32, where it is and what it was called.

    precision: what the U-Net multiplies in, 'float32' or 'bf16'; weights, solver and autoencoder are float32 in both
    What is changed by `add_token` and `replace` is put back by `restore`, bit for bit, so that one loaded base model
    serves many customized ones.
    """

    name: str
    pipeline: StableDiffusionPipeline
    device: str
    precision: str = "float32"
    _replaced: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        embedding = self.pipeline.text_encoder.get_input_embeddings()
        unet = self.pipeline.unet
        self.prompt_attention = use_prompt_attention(unet, not (is_cpu(self.device) and self.latent_side <= SMALL))
        self._plain = (self.pipeline.tokenizer, self.pipeline.scheduler, embedding.weight)

    @property
    def latent_side(self) -> int:
        """Latent positions a side."""
        return square_side(self.pipeline.unet.config.sample_size, self.name)

    @property
    def resolution(self) -> int:
        """Pixels a side."""
        return self.latent_side * self.pipeline.vae_scale_factor

    def predict(
        self, noisy: torch.Tensor, times: torch.Tensor, states: torch.Tensor, projected: Projected | None = None
    ) -> torch.Tensor:
        """The U-Net's prediction for noisy latents (n, channels, height, width), float32, in this model's precision.

        states:    of the prompts, (n or 1, length, width)
        projected: a dictionary for all calls with the same states: their K and V are computed once
        """
        noisy, given = noisy.contiguous(memory_format=torch.channels_last), {}
        if not self.prompt_attention:
            states = states.expand(len(noisy), -1, -1)
        elif projected is not None:
            given = {"projected": projected}
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16"):
            unet = self.pipeline.unet
            return unet(noisy, times, states, cross_attention_kwargs=given, return_dict=False)[0].float()

    @contextmanager
    def lowered(self) -> Iterator[None]:
        """In it the U-Net's frozen weights are held in this model's precision; afterwards they are what they were.

        Otherwise they are converted for every step, a tenth of a training step at icon-sd.
        """
        layers = (torch.nn.Conv2d, torch.nn.Linear)
        modules = [one for one in self.pipeline.unet.modules() if isinstance(one, layers)] * (self.precision == "bf16")
        frozen = [p for one in modules for p in one.parameters(recurse=False) if not p.requires_grad]
        kept = [weight.data for weight in frozen]
        try:
            for weight in frozen:
                weight.data = weight.data.to(torch.bfloat16)
            yield
        finally:
            for weight, data in zip(frozen, kept, strict=True):
                weight.data = data

    def add_token(self, token: str, like: str) -> int:
        """Add a token to tokenizer and text encoder; its id. Its embedding is the mean of the tokens of `like`.

        raises: InvalidValue if the vocabulary has the token already
        """
        tokenizer = copy.deepcopy(self.pipeline.tokenizer)
        # Not asked of add_tokens, which counts a token that is there as added (transformers 5).
        if len(tokenizer.tokenize(token)) == 1:
            raise InvalidValue(f"the base model's vocabulary has {token!r} already; choose another modifier token")
        tokenizer.add_tokens(token)
        token_id = tokenizer.convert_tokens_to_ids(token)
        ids = tokenizer(like, add_special_tokens=False).input_ids or [tokenizer.eos_token_id]
        table = self.pipeline.text_encoder.get_input_embeddings().weight.data
        grown = table.new_zeros(max(len(tokenizer), len(table)), table.shape[1])
        grown[: len(table)] = table
        grown[token_id] = table[ids].mean(dim=0)
        self._embed(torch.nn.Parameter(grown, requires_grad=False))
        self.pipeline.tokenizer = tokenizer
        return token_id

    def replace(self, values: Mapping[str, torch.Tensor]) -> None:
        """Put values in the place of the U-Net's weights of these names."""
        weights = dict(self.pipeline.unet.named_parameters())
        for name, value in values.items():
            self._replaced.setdefault(name, weights[name].data.clone())
            weights[name].data.copy_(value)

    def restore(self) -> None:
        """Weights, tokenizer and scheduler as they were when the base model was loaded."""
        self.replace(self._replaced)
        self._replaced.clear()
        self.pipeline.tokenizer, self.pipeline.scheduler, table = self._plain
        self._embed(table)

    def _embed(self, table: torch.nn.Parameter) -> None:
        embedding = self.pipeline.text_encoder.get_input_embeddings()
        embedding.weight, embedding.num_embeddings = table, len(table)
        self.pipeline.text_encoder.config.vocab_size = len(table)


class OneBaseModel:
    """Keeps the base model that was loaded last, for jobs that make many models of it one after another."""

    def __init__(self) -> None:
        self._kept: tuple[tuple, BaseModel] | None = None

    def load(self, name: str) -> BaseModel:
        """As `load_base_model`; loaded once for as long as its files stay the same."""
        key = (name, _stamps(loaded_files(base_model_folder(name), NEEDED)))
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # two of them need not fit into memory
            self._kept = (key, load_base_model(name))
        return self._kept[1]

    def forget(self) -> None:
        """Load it again next time: nobody knows what an error that was not foreseen has left of it."""
        self._kept = None


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
        folder = _download(name)
    if not (folder / "model_index.json").is_file():
        raise InvalidValue(f"base model {folder} has no model_index.json; a diffusers pipeline folder is needed")
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise InvalidValue(f"base model {folder} is a {kind}; a StableDiffusionPipeline (SD 1.x or 2.x) is needed")
    for part, entry in index.items():
        library = entry[0] if isinstance(entry, list) and entry else None
        if library and part != "safety_checker" and library not in LIBRARIES:  # that one is not loaded
            raise InvalidValue(
                f"base model {folder} has a {part} of code of its own ({'.'.join(map(str, entry))}), which attrdb never "
                f"runs; a pipeline whose parts are classes of {' and '.join(LIBRARIES)} is needed"
            )
    missing = [part for part in NEEDED if not (folder / part).is_dir()]
    missing += [file for file in missing_weights(folder) if file.partition("/")[0] not in missing]
    if missing:
        pickled = sorted(file for part in WEIGHTED for end in PICKLED for file in (folder / part).glob(f"*{end}"))
        if pickled:
            raise InvalidValue(
                f"base model {folder} lacks {', '.join(missing)}; {pickled[0].relative_to(folder)} is a pickle, which attrdb "
                "never reads: load the pipeline where you trust it and save it with save_pretrained(safe_serialization=True)"
            )
        raise InvalidValue(f"base model {folder} lacks {', '.join(missing)}; fetch the whole pipeline folder")
    variant_of(folder)
    square_side(read_json(folder / "unet" / "config.json").get("sample_size"), str(folder))
    return folder


def _download(name: str) -> Path:
    """raises: NotFound"""
    try:
        with hub():
            folder = _downloaded(name)
    except Exception as error:  # the hub client raises many kinds; all mean the same here
        raise NotFound(f"no base model {name!r}: no such folder, and the hub says: {error}") from error
    return Path(folder)


def _downloaded(name: str) -> str:
    try:
        folder: str = StableDiffusionPipeline.download(name, use_safetensors=True, safety_checker=None)
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        # Some have their weights in half precision alone.
        folder = StableDiffusionPipeline.download(name, use_safetensors=True, safety_checker=None, variant="fp16")
    return folder


def square_side(sample_size: object, name: str) -> int:
    """The side of a U-Net's latents, which its configuration gives as a number or as height and width.

    raises: InvalidValue if it is neither, or not square
    """
    sides: list[Any] = list(sample_size) if isinstance(sample_size, (list, tuple)) else [sample_size]
    is_square = len(sides) in (1, 2) and sides[0] == sides[-1]
    if not is_square or not all(type(side) is int and side > 0 for side in sides):
        raise InvalidValue(
            f"base model {name} has a U-Net of sample_size {sample_size!r}; one that makes square pictures is needed"
        )
    return int(sides[0])


def weights_hash(folder: Path) -> str:
    """A hash of the weights that are loaded and the configurations that decide what the base model generates.

    Copies of the weights that are not loaded, such as fp16 beside float32, do not count. Read once a process for as long as
    names, sizes and times of the files stay the same.
    """
    return _weights_hash(folder.resolve(), _stamps(loaded_files(folder, NEEDED)))


def is_made_from(folder: Path, stored_hash: str) -> bool:
    """Whether a base model is the one whose hash was stored; before version 0.2 a hash covered all copies of the weights."""
    if weights_hash(folder) == stored_hash:
        return True
    files = [file for part in NEEDED for file in sorted((folder / part).glob("*")) if file.suffix in HASHED_BEFORE]
    return _weights_hash(folder.resolve(), _stamps(files)) == stored_hash


def _stamps(files: list[Path]) -> tuple[tuple[str, int, int], ...]:
    """Part and name, size and time of change of files."""
    stats = [(file, file.stat()) for file in files]
    return tuple((f"{file.parent.name}/{file.name}", stat.st_size, stat.st_mtime_ns) for file, stat in stats)


@lru_cache(maxsize=16)
def _weights_hash(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, _, _ in stamps:
        digest.update(name.encode())
        with (folder / name).open("rb") as opened:
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


def load_autoencoder(folder: Path, device: str | None = None) -> AutoencoderKL:
    """The autoencoder of a base model's folder, frozen and in float32.

    raises: InvalidValue if it does not load
    """
    quiet_libraries()
    try:
        vae = AutoencoderKL.from_pretrained(
            folder,
            subfolder="vae",
            local_files_only=True,
            use_safetensors=True,
            variant=variant_of(folder),
            torch_dtype=torch.float32,
        )
    except Exception as error:  # diffusers and safetensors raise kinds of their own
        raise InvalidValue(f"the autoencoder of base model {folder} does not load: {error}") from error
    return vae.requires_grad_(False).eval().to(device or default_device())


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
            variant=variant_of(folder),
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
    device = device or default_device()
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    if is_cpu(device):
        keep_freed_memory()
    # On two cores with AVX2 a training step at icon-sd takes 0.91 of the time in this layout, one of sampling 0.92.
    pipeline.unet.to(memory_format=torch.channels_last)
    with enough_memory(device, f"loading base model {name}", "free some of it, or use another device"):
        pipeline = pipeline.to(device)
    return BaseModel(str(name), pipeline, device)
