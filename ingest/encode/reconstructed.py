"""An encoder of reconstructions: a picture first goes through the autoencoder of a base model.

Samples have been decoded by an autoencoder, and stored images have not. That difference alone separates the two, and a mapper
may learn it instead of influence. With every image reconstructed it is gone, so what remains is about what images show.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from attrdb.errors import InvalidValue
from attrdb.ingest.read.pictures import square

if TYPE_CHECKING:
    from attrdb.ingest.encode import Encoder

PREFIX = "vae"


class Reconstructed:
    """Features by `inner` of a picture that was encoded and decoded by the autoencoder of `base_model`.

    raises: NotFound or InvalidValue as `base_model_folder`
    """

    def __init__(self, base_model: str, inner: Encoder):
        from attrdb.ingest.customize.base_model import base_model_folder, load_autoencoder, read_json, square_side
        from attrdb.ingest.devices import is_cpu
        from attrdb.ingest.encode.weights import fingerprint

        folder = base_model_folder(base_model)
        self._inner, self._vae = inner, load_autoencoder(folder)
        factor = 2 ** (len(self._vae.config.block_out_channels) - 1)
        self._size = square_side(read_json(folder / "unet" / "config.json").get("sample_size"), str(folder)) * factor
        # A folder is stored with its whole path, so that it is found from any other folder.
        self.spec = f"{PREFIX}:{folder.absolute() if Path(base_model).is_dir() else base_model}+{inner.spec}"
        self.dimension = inner.dimension
        self.preprocessing = {"reconstructed": self._size, "then": inner.preprocessing}
        self.weights_fingerprint = f"{fingerprint(self._vae.state_dict())}-{inner.weights_fingerprint}"
        self.concurrent = is_cpu(str(self._vae.device)) and getattr(inner, "concurrent", False)

    def prepare(self, image: Image.Image) -> np.ndarray:
        """(size, size, 3) uint8"""
        return np.asarray(square(image, self._size))

    def features(self, batch: np.ndarray) -> np.ndarray:
        pictures = [Image.fromarray(pixels) for pixels in self._reconstructed(batch)]
        return self._inner.features(np.stack([self._inner.prepare(picture) for picture in pictures]))

    def _reconstructed(self, batch: np.ndarray) -> np.ndarray:
        """(n, size, size, 3) uint8"""
        import torch

        with torch.inference_mode():
            x = torch.from_numpy(batch).permute(0, 3, 1, 2).to(self._vae.device).float() / 127.5 - 1
            decoded = self._vae.decode(self._vae.encode(x).latent_dist.mean).sample
            pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        return pixels.permute(0, 2, 3, 1).cpu().numpy()


def split(argument: str) -> tuple[str, str]:
    """Base model and spec of the inner encoder, from BASE+ENCODER.

    raises: InvalidValue if one is missing
    """
    base_model, _, inner = argument.partition("+")
    if not base_model or not inner:
        raise InvalidValue(f"encoder '{PREFIX}:{argument}' names no base model and encoder; give {PREFIX}:BASE+ENCODER")
    return base_model, inner
