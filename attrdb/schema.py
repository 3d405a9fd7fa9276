"""The tables of an attrdb directory: their Arrow schemas, and what a row must satisfy before it is appended."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attrdb.errors import InvalidValue

SCHEMA_VERSION = 1

ROLES = ("exemplar", "sample", "pretraining")
KINDS = ("object", "style")


def key(name: str) -> pa.Field:
    """A table's id. Lance then lets no two writers insert the same one, even when neither saw the other's rows."""
    return pa.field(name, pa.string(), nullable=False, metadata={"lance-schema:unenforced-primary-key": "true"})


# Every encoder adds one column to these: its encoder_id, fixed_size_list<float32>[dimension], null until encoded.
IMAGES = pa.schema(
    [
        key("image_id"),
        pa.field("role", pa.string(), nullable=False),  # plain text: a bitmap index refuses a dictionary
        ("model_id", pa.string()),  # the customized model; null for pretraining images
        ("source", pa.string()),
        ("split", pa.string()),
        ("category", pa.string()),
        ("prompt", pa.string()),
        ("prompt_scheme", pa.string()),
        ("seed", pa.int64()),
        ("uri", pa.string()),
        ("sha256", pa.string()),  # of the encoded bytes
        ("width", pa.int32()),  # pixels
        ("height", pa.int32()),
        ("creator", pa.string()),
        ("license", pa.string()),
        ("metadata", pa.string()),  # JSON text
        ("image", pa.binary()),
    ]
)

MODELS = pa.schema(
    [
        key("model_id"),
        ("base_model", pa.string()),
        ("base_model_hash", pa.string()),
        ("method", pa.string()),
        ("kind", pa.string()),
        ("category", pa.string()),
        ("split", pa.string()),
        ("train_prompt", pa.string()),
        ("token", pa.string()),
        ("settings", pa.string()),  # JSON text
        ("settings_hash", pa.string()),
        ("weights_path", pa.string()),  # inside the database directory
        ("weights_hash", pa.string()),
        ("n_exemplars", pa.int32()),
        ("n_samples", pa.int32()),
        ("customize_seconds", pa.float64()),
        ("synthesize_seconds", pa.float64()),
        ("created_at", pa.timestamp("us", tz="UTC")),
    ]
)

ENCODERS = pa.schema(
    [
        key("encoder_id"),  # also the name of its column in images
        ("spec", pa.string()),
        ("dimension", pa.int32()),
        ("preprocessing", pa.string()),  # JSON text
        ("weights_fingerprint", pa.string()),
    ]
)

EXEMPLAR_RANKS = pa.schema(
    [
        pa.field("encoder_id", pa.string(), nullable=False),
        pa.field("mapper_id", pa.string(), nullable=False),  # empty: the encoder's own features, without a mapper
        pa.field("gallery", pa.string(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("exemplar_id", pa.string(), nullable=False),
        pa.field("rank", pa.int64(), nullable=False),  # from 1
        pa.field("gallery_size", pa.int64(), nullable=False),
        ("images_version", pa.int64()),
    ]
)

TABLES = {"images": IMAGES, "models": MODELS, "encoders": ENCODERS, "exemplar_ranks": EXEMPLAR_RANKS}

FEATURE_NORM_TOLERANCE = 1e-3


def encoder_id_of(spec: str) -> str:
    """The column name that an encoder's spec gives: lower-case words joined by underscores.

    raises: InvalidValue if that is no name: empty, beginning with a digit, or a column that images has
    """
    name = re.sub(r"[^a-z0-9]+", "_", spec.lower()).strip("_")
    if not re.match(r"[a-z]", name):
        raise InvalidValue(f"encoder {spec!r} gives no usable column name; its spec must begin with a letter")
    if name in IMAGES.names:
        raise InvalidValue(f"encoder {spec!r} would take the column {name!r} of images; name it otherwise")
    return name


def feature_type(dimension: int) -> pa.DataType:
    return pa.list_(pa.float32(), dimension)


def feature_columns(schema: pa.Schema) -> dict[str, int]:
    """encoder_id -> dimension, of the vector columns of an images schema."""
    return {
        field.name: field.type.list_size
        for field in schema
        if pa.types.is_fixed_size_list(field.type) and field.name not in IMAGES.names
    }


def feature_array(features: np.ndarray) -> pa.FixedSizeListArray:
    """(n, dimension) float32 as an Arrow column."""
    features = np.ascontiguousarray(features, dtype=np.float32)
    return pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])


def feature_matrix(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A vector column without nulls as (n, dimension) float32; no copy where Arrow holds it in one piece."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


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
    ids = table["image_id"].to_pylist()
    if len(set(ids)) < len(ids):
        repeated = next(i for n, i in enumerate(ids) if i in ids[:n])
        raise InvalidValue(f"image {repeated!r} stands more than once in one batch; give every image an id of its own")
    models = table["model_id"].to_pylist() if "model_id" in table.column_names else [None] * len(ids)
    for image_id, role, model_id in zip(ids, table["role"].to_pylist(), models, strict=True):
        if role not in ROLES:
            raise InvalidValue(f"image {image_id!r} has the role {role!r}; a role is one of {', '.join(ROLES)}")
        if (role == "pretraining") != (model_id is None):
            raise InvalidValue(
                f"image {image_id!r} has role {role!r} and model_id {model_id!r}; exemplars and samples belong to a model, "
                "pretraining images to none"
            )
    for encoder_id, dimension in encoders.items():
        if encoder_id in table.column_names:
            _check_features(ids, table[encoder_id], encoder_id, dimension)
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in stored
    ]
    return pa.table(columns, schema=stored)


def _check_features(ids: list[str], column: pa.ChunkedArray, encoder_id: str, dimension: int) -> None:
    found = getattr(column.type, "list_size", None)
    if found != dimension:
        raise InvalidValue(
            f"image {ids[0]!r} has a feature of length {found}, encoder {encoder_id!r} makes {dimension}; "
            "encode it with that encoder or open another database"
            if ids
            else f"features of length {found} for encoder {encoder_id!r}, which makes {dimension}"
        )
    encoded = pc.indices_nonzero(pc.is_valid(column)).to_pylist()
    norms = np.linalg.norm(feature_matrix(column.drop_null()).astype(np.float64), axis=1)
    wrong = np.flatnonzero(~(np.abs(norms - 1) <= FEATURE_NORM_TOLERANCE))
    if len(wrong):
        row, norm = encoded[wrong[0]], norms[wrong[0]]
        what = "NaN or infinity in it" if not np.isfinite(norm) else f"length {norm:.4g}"
        raise InvalidValue(
            f"image {ids[row]!r} has a {encoder_id!r} feature with {what}; features are stored at unit length"
        )
