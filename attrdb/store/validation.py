"""Rules for images, which are checked before they are appended; an error names the row."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attrdb.errors import InvalidValue
from attrdb.store.schema import OF_MODELS, ROLES, feature_columns, feature_matrix

FEATURE_NORM_TOLERANCE = 1e-3


def conform_images(table: pa.Table, stored: pa.Schema) -> pa.Table:
    """The rows in the stored schema's columns and order, absent columns null.

    raises: InvalidValue, with the row named, for an unknown column or encoder, a feature of another length, with NaN or
            infinity, or not of unit length, a role outside ROLES, a missing or repeated image_id
    """
    encoders = feature_columns(stored)
    for name in table.column_names:
        if name in stored.names:
            continue
        if pa.types.is_fixed_size_list(table.schema.field(name).type):
            known = ", ".join(repr(encoder) for encoder in encoders) or "none"
            raise InvalidValue(f"column {name!r} is of an encoder that this database does not have (it has: {known})")
        raise InvalidValue(f"images have no column {name!r}; keep such values as JSON in 'metadata'")
    for name in ("image_id", "role"):
        if name not in table.column_names or table[name].null_count:
            raise InvalidValue(f"every image needs a value in {name!r}")
    check_ids(table["image_id"])
    _check_roles(table)
    for encoder_id, dimension in encoders.items():
        if encoder_id in table.column_names:
            _check_features(table["image_id"], table[encoder_id], encoder_id, dimension)
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in stored
    ]
    return pa.table(columns, schema=stored)


def check_ids(ids: pa.ChunkedArray | pa.Array) -> None:
    """raises: InvalidValue if an id appears more than once"""
    if pc.count_distinct(ids).as_py() < len(ids):
        counts = pc.value_counts(ids)
        repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))[0].as_py()
        raise InvalidValue(f"image {repeated!r} appears more than once in the batch; give every image an id of its own")


def _check_roles(table: pa.Table) -> None:
    roles = table["role"]
    known = pc.is_in(roles, pa.array(ROLES))
    if not pc.all(known).as_py() and len(table):
        row = pc.index(known, False).as_py()
        raise InvalidValue(
            f"image {table['image_id'][row].as_py()!r} has the role {roles[row].as_py()!r}; "
            f"a role is one of {', '.join(ROLES)}"
        )
    models = table["model_id"] if "model_id" in table.column_names else pa.nulls(len(table), pa.string())
    fits = pc.equal(pc.is_in(roles, pa.array(OF_MODELS)), pc.is_valid(models))
    if not pc.all(fits).as_py() and len(table):
        row = pc.index(fits, False).as_py()
        raise InvalidValue(
            f"image {table['image_id'][row].as_py()!r} has role {roles[row].as_py()!r} and model_id "
            f"{models[row].as_py()!r}; exemplars and samples belong to a model, other images to none"
        )


def _check_features(ids: pa.ChunkedArray, column: pa.ChunkedArray, encoder_id: str, dimension: int) -> None:
    length = getattr(column.type, "list_size", None)
    if length != dimension:
        raise InvalidValue(
            f"image {ids[0].as_py()!r} has a feature of length {length}, encoder {encoder_id!r} makes {dimension}; "
            "encode it with that encoder or open another database"
            if len(ids)
            else f"features of length {length} for encoder {encoder_id!r}, which makes {dimension}"
        )
    features = column if not column.null_count else column.drop_null()
    norms = np.sqrt(np.concatenate([_squared_norms(chunk) for chunk in features.chunks] or [np.empty(0)]))
    wrong = np.flatnonzero(~(np.abs(norms - 1) <= FEATURE_NORM_TOLERANCE))
    if len(wrong):
        row, norm = pc.indices_nonzero(pc.is_valid(column))[int(wrong[0])].as_py(), norms[wrong[0]]
        fault = "NaN or infinity in it" if not np.isfinite(norm) else f"length {norm:.4g}"
        raise InvalidValue(
            f"image {ids[row].as_py()!r} has a {encoder_id!r} feature with {fault}; features are stored at unit length"
        )


def _squared_norms(chunk: pa.FixedSizeListArray) -> np.ndarray:
    features = feature_matrix(chunk)
    with np.errstate(over="ignore", invalid="ignore"):
        norms: np.ndarray = np.einsum("nd,nd->n", features, features)
    return norms
