"""What distances between pictures are of: their pixels, or the features of an encoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attrdb.ingest.encode import Encoder, encode, load_encoder
from attrdb.ingest.read.pictures import Picture, square

PIXELS = "l2"
SIDE = 64  # pixels a side to which pictures are brought for `l2`
DIGITS = 6  # that are kept: the last ones depend on what a network computes together


class Descriptor:
    """Describes pictures by vectors, and says how far two are apart.

    `l2`:       root mean square of the difference of pixels in [0, 1], whole pictures on 64 x 64. At full size it is the
                normalised l2 of Carlini et al. 2023; the threshold of Zhang et al. 2024, 0.15, is of such a distance
    an encoder: 1 - cosine similarity of its features
    raises:     as `load_encoder`
    """

    def __init__(self, spec: str):
        self.spec = spec
        self._encoder: Encoder | None = None if spec == PIXELS else load_encoder(spec)

    @property
    def fingerprint(self) -> str | None:
        """Of the encoder's weights."""
        return None if self._encoder is None else self._encoder.weights_fingerprint

    def describe(self, pictures: Sequence[Picture]) -> np.ndarray:
        """(n, length): int16 levels for `l2`, float32 features otherwise.

        raises: InvalidValue for a picture that the encoder cannot take
        """
        if self._encoder is not None:
            return encode(self._encoder, [picture.image for picture in pictures])
        levels = [np.asarray(square(picture.image, SIDE), np.int16).ravel() for picture in pictures]
        return np.stack(levels) if levels else np.empty((0, 3 * SIDE * SIDE), np.int16)

    def distances(self, vectors: np.ndarray, other: np.ndarray) -> np.ndarray:
        """(n,) of vectors (n, length) from one of (length,)."""
        if self._encoder is None:
            difference = vectors.astype(np.int64) - other
            apart = np.sqrt((difference * difference).mean(axis=1)) / 255
        else:
            apart = 1 - (vectors.astype(np.float64) * other).sum(axis=1)
        found: np.ndarray = np.round(np.maximum(apart, 0), DIGITS)
        return found
