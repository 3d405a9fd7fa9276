"""The rows of the table `concepts` that belong to a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from attrdb.store.schema import Row

COPIED = ("model_id", "token", "kind", "category", "train_prompt")  # from the row of a model of one concept


def concept_id(model_id: str, token: str) -> str:
    return f"{model_id}/{token}"


def concept_rows(model: Row, images: pa.Table, concepts: Sequence[Row]) -> list[Row]:
    """The rows of a model's concepts, with their numbers of exemplars.

    images:   its exemplars and samples, as rows of `images`
    concepts: of a model of several, without n_exemplars; none for another, which is one concept if it has a token
    """
    exemplars = images.filter(pc.equal(images["role"], "exemplar"))
    if concepts:
        counts = Counter(exemplars["concept_id"].to_pylist())
        return [{**concept, "n_exemplars": counts[concept["concept_id"]]} for concept in concepts]
    if any(model.get(name) is None for name in ("token", "kind", "train_prompt")):
        return []
    copied = {name: model.get(name) for name in COPIED}
    return [{**copied, "concept_id": concept_id(model["model_id"], model["token"]), "n_exemplars": len(exemplars)}]
