"""The Arrow schemas of the tables, and the columns of features that encoders add to images."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pyarrow as pa

from attrdb.errors import InvalidValue
from attrdb.store.dictionary import DICTIONARY

SCHEMA_VERSION = 11  # every change has a step in upgrades.py

# Tables of a model's rows: shown with its row in `models`, taken out with it. All but the last two are written before it.
SHOWN_WITH_MODEL = (
    "images",
    "concepts",
    "monitor_steps",
    "monitor_changes",
    "monitor_probes",
    "attribution_tables",
    "retrainings",
    "counterfactuals",
)
OF_MODELS = ("exemplar", "sample")  # roles of images that belong to a customized model
CANDIDATE_ROLES = ("exemplar", "pretraining")  # as in `predicates.CANDIDATES`
OF_TESTS = ("key", "answer")  # roles of pictures that suspicious models are tested with, which are never candidates
ROLES = (*OF_MODELS, "pretraining", *OF_TESTS)

Row = dict[str, Any]  # of a table, by column

TABLES = {name: table.arrow for name, table in DICTIONARY.items()}
IMAGES = TABLES["images"]

CHECKPOINT_SUFFIXES = (".safetensors", ".torchscript", ".pt", ".pth", ".bin", ".tar")


def encoder_name(spec: str) -> str:
    """The spec without folder and suffix of a checkpoint: an encoder whose file has moved is the same encoder."""
    kind, colon, argument = spec.partition(":")
    name, mark, settings = argument.partition("?")
    start, slash, path = name.partition("/")
    if path.count("/") or (slash and not start):
        file = path.rpartition("/")[2]
        while file.endswith(CHECKPOINT_SUFFIXES):
            file = file.rpartition(".")[0]
        name = f"{start}/{file}" if start else file
    return f"{kind}{colon}{name}{mark}{settings}"


def encoder_id_of(spec: str) -> str:
    """The encoder_id of a spec, which is a column name: the lower-case words of its name, joined by underscores.

    raises: InvalidValue if that is empty, begins with a digit, or is a column of images
    """
    name = re.sub(r"[^a-z0-9]+", "_", encoder_name(spec).lower()).strip("_")
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
    """A vector column without nulls as (n, dimension) float32; not copied if it is one Arrow chunk."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    values: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(column), column.type.list_size)
