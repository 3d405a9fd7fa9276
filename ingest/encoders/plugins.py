"""Encoders that other packages add: entry points of the group `attrdb.encoders`, checked before they are used.

The entry point's name is the spec, or what stands before its colon; its object is called with what stands after it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from attrdb.errors import AttrdbError, InvalidValue

if TYPE_CHECKING:
    from attrdb.ingest.encoders import Encoder

GROUP = "attrdb.encoders"
ATTRIBUTES = {"spec": str, "dimension": int, "preprocessing": dict, "weights_fingerprint": str}


def names() -> list[str]:
    return sorted(entry_points(group=GROUP).names)


def check_clash(prefix: str, own: Iterable[str]) -> None:
    """raises: InvalidValue if a package claims a prefix that attrdb or another package has"""
    packages = sorted({_package(point) for point in entry_points(group=GROUP, name=prefix)})
    if packages and prefix in own:
        raise InvalidValue(f"package {packages[0]} adds an encoder {prefix!r}, which attrdb has itself; uninstall it")
    if len(packages) > 1:
        raise InvalidValue(
            f"the packages {' and '.join(packages)} both add an encoder {prefix!r}; uninstall one of them"
        )


def load(spec: str, prefix: str, argument: str) -> Encoder | None:
    """The encoder that an installed package makes of a spec, tried on a grey picture; None if no package adds the prefix.

    raises: InvalidValue, with the package named, if it fails or is not what `Encoder` says; what it raises as an
            AttrdbError is passed on
    """
    for point in entry_points(group=GROUP, name=prefix):
        try:
            encoder = point.load()(argument)
            _check(encoder, spec)
        except AttrdbError:
            raise
        except Exception as error:  # whatever code of others raises
            raise InvalidValue(
                f"encoder {spec!r} of package {_package(point)} fails with {type(error).__name__}: {error}"
            ) from error
        return encoder
    return None


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value


def _check(encoder: Encoder, spec: str) -> None:
    """raises: TypeError or ValueError, for `load` to complete"""
    for name, kind in ATTRIBUTES.items():
        if not isinstance(getattr(encoder, name, None), kind):
            raise TypeError(
                f"it needs the attribute {name}, of type {kind.__name__}; see attrdb.ingest.encoders.Encoder"
            )
    for name in ("prepare", "features"):
        if not callable(getattr(encoder, name, None)):
            raise TypeError(f"it needs the method {name}; see attrdb.ingest.encoders.Encoder")
    if encoder.spec != spec:
        raise ValueError(f"it calls itself {encoder.spec!r}; its spec has to load it again")
    json.dumps(encoder.preprocessing)
    batch = encoder.prepare(Image.new("RGB", (64, 48), (120, 130, 140)))[None]
    features = encoder.features(batch)
    if np.shape(features) != (1, encoder.dimension):
        raise ValueError(f"features of one picture have shape {np.shape(features)}, needed is (1, {encoder.dimension})")
    if not np.isfinite(features).all():
        raise ValueError("features of a grey picture are not finite")
