"""Encoders that other packages add: entry points of the group `attrdb.encoders`, checked before they are used.

The entry point's name is the spec, or what stands before its colon; its object is called with what stands after it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from attrdb import plugins

if TYPE_CHECKING:
    from attrdb.ingest.encode import Encoder

GROUP = "attrdb.encoders"
ATTRIBUTES = {"spec": (str,), "dimension": (int,), "preprocessing": (dict,), "weights_fingerprint": (str,)}


def names() -> list[str]:
    return sorted(entry_points(group=GROUP).names)


def check_clash(prefix: str, own: Iterable[str]) -> None:
    """raises: InvalidValue if a package claims a prefix that attrdb or another package has"""
    plugins.check_clash(GROUP, prefix, own, "an encoder")


def load(spec: str, prefix: str, argument: str) -> Encoder | None:
    """The encoder that an installed package makes of a spec, tried on a grey picture; None if no package adds the prefix.

    raises: InvalidValue, with the package named, if it fails or is not what `Encoder` says; what it raises as an
            AttrdbError is passed on
    """
    return plugins.load(
        GROUP, prefix, lambda loaded: loaded(argument), lambda made: _check(made, spec), f"encoder {spec!r}"
    )


def _check(encoder: Encoder, spec: str) -> None:
    """raises: TypeError or ValueError, for `plugins.make` to complete"""
    plugins.check_members(encoder, ATTRIBUTES, ("prepare", "features"), "attrdb.ingest.encode.Encoder")
    if encoder.spec != spec:
        raise ValueError(f"it calls itself {encoder.spec!r}; its spec has to load it again")
    json.dumps(encoder.preprocessing)
    batch = encoder.prepare(Image.new("RGB", (64, 48), (120, 130, 140)))[None]
    features = encoder.features(batch)
    if np.shape(features) != (1, encoder.dimension):
        raise ValueError(f"features of one picture have shape {np.shape(features)}, needed is (1, {encoder.dimension})")
    if not np.isfinite(features).all():
        raise ValueError("features of a grey picture are not finite")
