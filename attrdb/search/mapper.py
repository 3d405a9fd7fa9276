"""A mapper: the learned pair of maps that turns an encoder's features into features for attribution.

It is trained in attrdb.training and applied here, without torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attrdb.errors import InvalidValue, NotFound
from attrdb.store.predicates import literal
from attrdb.store.snapshot import Snapshot
from attrdb.text import nearest

FORMS = ("affine", "gain", "mlp")
SIDES = ("exemplar", "sample")  # h for training images (exemplars and pretraining images), h~ for samples
ARRAYS = {"affine": ("weight", "bias"), "gain": ("gain", "bias"), "mlp": ("weight", "bias", "up", "up_bias", "down")}


@dataclass(frozen=True)
class Mapper:
    """h and h~ on the features of one encoder; `parameters` holds the arrays by `<side>.<name>`, see ARRAYS.

        affine   h(x) = W x + b                          weight (d, d), bias (d,)
        gain     h(x) = g * x + b                        gain (d,), bias (d,)
        mlp      h(x) = W x + b + D max(0, U x + c)      as affine, and up (m, d), up_bias (m,), down (d, m)

    source: Wang et al. 2023, section 4 (affine); the forms of the other two, which are ablations there, are ours
    """

    mapper_id: str
    encoder_id: str
    form: str
    parameters: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise InvalidValue(f"mapper {self.mapper_id!r} has form {self.form!r}; it must be {', '.join(FORMS)}")
        needed = {f"{side}.{name}" for side in SIDES for name in ARRAYS[self.form]}
        if needed != self.parameters.keys():
            raise InvalidValue(
                f"mapper {self.mapper_id!r} of form {self.form!r} has the arrays {', '.join(sorted(self.parameters))}; it "
                f"must have {', '.join(sorted(needed))}"
            )

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Mapper:
        """The mapper that a row of `mappers` holds."""
        arrays = {
            array["name"]: np.asarray(array["values"], dtype=np.float32).reshape(array["shape"])
            for array in row["parameters"]
        }
        return cls(row["mapper_id"], row["encoder_id"], row["form"], arrays)

    def row(self) -> dict[str, Any]:
        """The columns of `mappers` that hold it."""
        arrays = [
            {"name": name, "shape": list(array.shape), "values": array.ravel()}
            for name, array in sorted(self.parameters.items())
        ]
        return {
            "mapper_id": self.mapper_id,
            "encoder_id": self.encoder_id,
            "form": self.form,
            "parameters": arrays,
        }

    def exemplars(self, features: np.ndarray, dtype: type = np.float32) -> np.ndarray:
        """F(x) / |F(x)| of training images: (n, dimension) in and out, computed in dtype."""
        return self._mapped("exemplar", features, dtype)

    def samples(self, features: np.ndarray, dtype: type = np.float32) -> np.ndarray:
        """F~(x) / |F~(x)| of samples: (n, dimension) in and out, computed in dtype."""
        return self._mapped("sample", features, dtype)

    def norms(self, features: np.ndarray) -> np.ndarray:
        """(n,): n(x) = |F(x)| of training images, computed in the dtype of the features."""
        norms: np.ndarray = np.linalg.norm(self._unscaled("exemplar", features, features.dtype.type), axis=1)
        return norms

    def candidates(self, gallery: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The blocks of a gallery, ids and features, with their features mapped as those of training images."""
        for ids, features in gallery:
            yield ids, self.exemplars(features)

    def arrays(self, side: str) -> dict[str, np.ndarray]:
        """The arrays of one side by name, see ARRAYS."""
        return {name: self.parameters[f"{side}.{name}"] for name in ARRAYS[self.form]}

    def applied(self, arrays: Mapping[str, Any], features: Any) -> Any:
        """F(x) by the arrays of a side: (n, dimension) in and out, all NumPy's or all torch's, not made unit length."""
        mapped = features * arrays["gain"] if self.form == "gain" else features @ arrays["weight"].T
        mapped = mapped + arrays["bias"]
        if self.form == "mlp":
            mapped = mapped + (features @ arrays["up"].T + arrays["up_bias"]).clip(0) @ arrays["down"].T
        return mapped

    def check_norms(self, norms: np.ndarray) -> None:
        """raises: InvalidValue for mapped features of a length that is zero or not finite"""
        if not (np.isfinite(norms) & (norms > 0)).all():
            raise InvalidValue(f"mapper {self.mapper_id!r} makes a feature that is zero or not finite; retrain it")

    def _mapped(self, side: str, features: np.ndarray, dtype: type) -> np.ndarray:
        mapped = self._unscaled(side, features, dtype)
        norms = np.linalg.norm(mapped, axis=1, keepdims=True)
        self.check_norms(norms)
        scaled: np.ndarray = mapped / norms
        return scaled

    def _unscaled(self, side: str, features: np.ndarray, dtype: type) -> np.ndarray:
        arrays: dict[str, np.ndarray] = {
            name: array.astype(dtype, copy=False) for name, array in self.arrays(side).items()
        }
        mapped: np.ndarray = self.applied(arrays, features.astype(dtype, copy=False))
        return mapped


def stored_mapper(snapshot: Snapshot, mapper_id: str) -> Mapper:
    """A mapper of the database; read once per snapshot.

    raises: NotFound, with the nearest ids
    """
    read = snapshot.once(_mappers_read)
    if mapper_id not in read:
        rows = snapshot.rows("mappers", f"mapper_id = {literal(mapper_id)}")
        if not rows:
            known = [row["mapper_id"] for row in snapshot.rows("mappers", columns=["mapper_id"])]
            near = nearest(mapper_id, known)
            hint = f"; nearest: {near}" if near else ", it has none yet: attrdb train makes them"
            raise NotFound(f"no mapper {mapper_id!r} in {snapshot.path}{hint}")
        read[mapper_id] = Mapper.of_row(rows[0])
    return read[mapper_id]


def _mappers_read(snapshot: Snapshot) -> dict[str, Mapper]:
    return {}
