"""Encoders of the three kinds of network that users bring: open_clip, timm and TorchScript.

The part of a spec after `?` changes the preprocessing that the name stands for.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image

from attrdb.errors import InvalidValue, MissingExtra
from attrdb.ingest.devices import default_device, is_cpu
from attrdb.ingest.encode.preprocessing import Preprocessing
from attrdb.ingest.encode.spec import file_spec, nearest, split_settings
from attrdb.ingest.encode.weights import file_fingerprint, fill, fingerprint, read_weights
from attrdb.ingest.hub import hub


class NetworkEncoder:
    """A network that takes (n, 3, size, size) float32 and gives (n, dimension), on the GPU if there is one."""

    def __init__(self, spec: str, network: torch.nn.Module, preprocessing: Preprocessing, weights_fingerprint: str):
        self.spec = spec
        self.preprocessing = preprocessing.identity()
        self.weights_fingerprint = weights_fingerprint
        self._preprocessing = preprocessing
        self._device = default_device()
        self.concurrent = is_cpu(self._device)
        self._network = network.eval().to(self._device)
        self._mean, self._std = (
            torch.tensor(values, device=self._device).view(3, 1, 1)
            for values in (preprocessing.mean, preprocessing.std)
        )
        self.dimension = self._tried()

    def prepare(self, image: Image.Image) -> np.ndarray:
        """(size, size, 3) uint8"""
        return self._preprocessing.prepare(image)

    def features(self, batch: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(batch).to(self._device).permute(0, 3, 1, 2)
        with torch.inference_mode():
            scaled = pixels.float().div_(255).sub_(self._mean).div_(self._std)
            output = self._network(scaled.contiguous())
            # CoCa's image tower gives its token embeddings besides.
            return (output[0] if isinstance(output, tuple) else output).float().cpu().numpy()

    def _tried(self) -> int:
        """The dimension, found on a grey picture."""
        size = self._preprocessing.size
        try:
            output = self.features(np.full((1, size, size, 3), 128, np.uint8))
        except Exception as error:  # a network may raise anything for a size that it does not take
            raise InvalidValue(
                f"the network of encoder {self.spec!r} fails on a picture of {size}x{size} pixels "
                f"({_summary(error)}); another size is given as ?size=N"
            ) from error
        if output.ndim != 2 or len(output) != 1:
            raise InvalidValue(
                f"the network of encoder {self.spec!r} gives one picture an output of shape {output.shape}; (1, dimension) "
                "is needed: pool it first"
            )
        return output.shape[1]


def open_clip_encoder(argument: str) -> NetworkEncoder:
    """ARCH/PRETRAINED: the image tower, with the weights of a tag of open_clip or of a checkpoint of the whole model.

    An architecture that open_clip does not know is read from ARCH.json beside the checkpoint, in open_clip's own format.
    """
    open_clip = _package("open_clip", "open_clip_torch")
    name, settings = split_settings(argument)
    arch, _, pretrained = name.partition("/")
    configuration = Path(pretrained).expanduser().with_name(f"{arch}.json") if pretrained else None
    if configuration is not None and configuration.is_file() and arch not in open_clip.list_models():
        open_clip.add_model_config(configuration)
    if arch not in open_clip.list_models():
        raise InvalidValue(f"open_clip has no architecture {arch!r}{nearest(arch, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if pretrained in tags:
        spec = f"open_clip:{argument}"
        model = _open_clip_tag(open_clip, arch, pretrained)
    else:
        path = _checkpoint(pretrained, f"open_clip:{arch}", "a tag of open_clip", tags)
        spec = file_spec(f"open_clip:{arch}/", path, settings)
        model = _open_clip_empty(open_clip, arch)
        weights = open_clip.convert.convert_state_dict(model, read_weights(path))
        tower = {key.removeprefix("visual."): value for key, value in weights.items() if key.startswith("visual.")}
        fill(model.visual, tower, f"checkpoint {path} for the image tower of open_clip's {arch}")
    trained_on = open_clip.get_model_preprocess_cfg(model)
    size = trained_on["size"] if isinstance(trained_on["size"], int) else trained_on["size"][0]
    if trained_on["size"] not in (size, (size, size), [size, size]):
        raise InvalidValue(
            f"open_clip's {arch} takes pictures of {trained_on['size']} pixels; only square ones are supported"
        )
    preprocessing = Preprocessing(
        size=size,
        resized=size,
        resize=trained_on["resize_mode"],
        interpolation=trained_on["interpolation"],
        mean=tuple(trained_on["mean"]),
        std=tuple(trained_on["std"]),
        fill=(trained_on["fill_color"],) * 3,
    ).changed(settings)
    return NetworkEncoder(spec, model.visual, preprocessing, fingerprint(model.visual.state_dict()))


def _open_clip_empty(open_clip: ModuleType, arch: str) -> torch.nn.Module:
    def is_relevant(record: logging.LogRecord) -> bool:
        return "No pretrained weights loaded" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(is_relevant)  # open_clip warns there of weights that are filled in next
    try:
        return open_clip.create_model(arch, pretrained_text=False)
    finally:
        root.removeFilter(is_relevant)


def _open_clip_tag(open_clip: ModuleType, arch: str, tag: str) -> torch.nn.Module:
    # open_clip only warns where weights meet another activation than they were trained with.
    trained_quick = bool(open_clip.get_pretrained_cfg(arch, tag).get("quick_gelu", False))
    if open_clip.get_model_config(arch).get("quick_gelu", False) and not trained_quick:
        plain = arch.removesuffix("-quickgelu")
        raise InvalidValue(f"weights {tag!r} were not trained with QuickGELU; name open_clip:{plain}/{tag}")
    try:
        with hub():
            return open_clip.create_model(arch, pretrained=tag, force_quick_gelu=trained_quick)
    except Exception as error:  # of a hub, of the network or of the disk
        raise InvalidValue(_unavailable(f"open_clip:{arch}/{tag}", f"open_clip:{arch}/FILE", error)) from error


def timm_encoder(argument: str) -> NetworkEncoder:
    """NAME or NAME/FILE: pooled features before the classifier. NAME decides the preprocessing in both cases."""
    timm = _package("timm", "timm")
    name, settings = split_settings(argument)
    name, slash, file = name.partition("/")
    arch, _, tag = name.partition(".")
    if not timm.is_model(arch):
        raise InvalidValue(f"timm has no model {arch!r}{nearest(arch, timm.list_models())}")
    tagged = timm.list_pretrained(f"{arch}.*")
    if tag and name not in tagged:
        raise InvalidValue(f"timm has no weights {tag!r} of {arch}{nearest(name, tagged)}")
    if slash:
        path = _checkpoint(file, f"timm:{name}", "a name of weights", ())
        spec = file_spec(f"timm:{name}/", path, settings)
        network = timm.create_model(name, pretrained=False, num_classes=0)
        classifiers = network.pretrained_cfg.get("classifier") or ()
        classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
        weights = read_weights(path)
        weights = {
            key: value for key, value in weights.items() if not key.startswith(tuple(f"{c}." for c in classifiers))
        }
        fill(network, weights, f"checkpoint {path} for timm's {name}")
    else:
        spec = f"timm:{argument}"
        if not tagged:
            raise InvalidValue(f"timm has no weights of {arch}; give a checkpoint as timm:{arch}/FILE")
        try:
            with hub():
                network = timm.create_model(name, pretrained=True, num_classes=0)
        except Exception as error:  # of a hub, of the network or of the disk
            raise InvalidValue(_unavailable(spec, f"timm:{name}/FILE", error)) from error
    preprocessing = _timm_preprocessing(timm, name, network).changed(settings)
    return NetworkEncoder(spec, network, preprocessing, fingerprint(network.state_dict()))


def _timm_preprocessing(timm: ModuleType, name: str, network: torch.nn.Module) -> Preprocessing:
    configuration = timm.data.resolve_model_data_config(network)
    _, height, size = configuration["input_size"]
    if height != size:
        raise InvalidValue(f"timm's {name} takes pictures of {size}x{height} pixels; only square ones are supported")
    return Preprocessing(
        size=size,
        resized=int(size / configuration["crop_pct"]),
        resize={"center": "shortest", "border": "longest", "squash": "squash"}[configuration["crop_mode"]],
        interpolation=configuration["interpolation"],
        mean=tuple(configuration["mean"]),
        std=tuple(configuration["std"]),
        fill=tuple(round(255 * value) for value in configuration["mean"]),
    )


def torchscript_encoder(argument: str) -> NetworkEncoder:
    """FILE: a whole network, which runs as its maker wrote it; ImageNet's mean and deviation at 224 pixels if not said."""
    name, settings = split_settings(argument)
    path = _checkpoint(name, "torchscript", "", ())
    try:
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # torch.jit is to go; files in it stay
            network = torch.jit.load(path, map_location="cpu")
    except Exception as error:  # a RuntimeError for most broken files
        raise InvalidValue(
            f"{path} is no TorchScript archive ({type(error).__name__}); save one with torch.jit.trace(...).save(...)"
        ) from error
    preprocessing = Preprocessing(size=224, resized=224).changed(settings)
    return NetworkEncoder(file_spec("torchscript:", path, settings), network, preprocessing, file_fingerprint(path))


LOADERS = {"open_clip": open_clip_encoder, "timm": timm_encoder, "torchscript": torchscript_encoder}


def _package(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(f"this encoder needs the package {package}: pip install {package}") from error


def _checkpoint(text: str, start: str, otherwise: str, names: list[str] | tuple) -> Path:
    path = Path(text).expanduser()
    if text and path.is_file():
        return path
    what = f"neither a file nor {otherwise}" if names else "no file"
    offered = nearest(text, names) or (f"; there are: {', '.join(names)}" if names else "")
    raise InvalidValue(f"encoder {start}: {text!r} is {what}{offered}")


def _unavailable(spec: str, instead: str, error: Exception) -> str:
    reason = f"the weights of {spec} could not be downloaded ({_summary(error)})"
    return f"{reason}; fetch them elsewhere and name the file: {instead}"


def _summary(error: Exception) -> str:
    """The line that says most: torch puts a traceback before it."""
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}" if str(error).strip() else type(error).__name__
    )
