"""A stored model's row and trained weights, for whoever uses the model again."""

from __future__ import annotations

import hashlib

from attrdb.database import Database
from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.customize.base_model import EDITIONS, base_model_folder, is_made_from
from attrdb.ingest.customize.customize import Delta, load_delta
from attrdb.ingest.options import Concept, CustomizeSettings, ModelSettings, SynthesizeSettings
from attrdb.store.ids import stored_file
from attrdb.store.schema import Row


def stored_model(db: Database, model_id: str, lacking: str) -> Row:
    """The row of a model that has weights.

    lacking: what cannot be had of a model without weights, for the error
    raises:  NotFound for an unknown model, InvalidValue for one that was imported without its weights
    """
    rows = db.sql("SELECT * FROM models WHERE model_id = $id", {"id": model_id}).to_pylist()
    if not rows:
        raise NotFound(f"no customized model {model_id!r} in {db.path}; list them with: attrdb models list {db.path}")
    row: Row = rows[0]
    if not row["weights_path"]:
        raise InvalidValue(f"model {model_id!r} was imported without its weights; {lacking}")
    return row


def check_base_model(row: Row, name: str | None = None, advice: str = "put that one in its place") -> None:
    """See that a base model is the one that a model was made from.

    name:   where it is; None: where the model's row says
    advice: how to give the right one, for the error
    raises: NotFound if it is not there, InvalidValue if it is another one now
    """
    name = name or row["base_model"]
    if not is_made_from(base_model_folder(name), row["base_model_hash"]):
        edition = EDITIONS.get(row["base_model_hash"])
        that = f", {edition}" if edition else ""
        raise InvalidValue(
            f"base model {name!r} is not the one that model {row['model_id']!r} was made from{that}; {advice}"
        )


def stored_delta(db: Database, row: Row) -> Delta:
    """The trained weights that a model's row names.

    raises: InvalidValue for weights that cannot be read, have changed, or lie outside of the database
    """
    weights = stored_file(db.path, row["weights_path"])
    delta = load_delta(weights, row["method"])
    if hashlib.sha256(weights.read_bytes()).hexdigest() != row["weights_hash"]:
        raise InvalidValue(
            f"the weights {weights} have changed since model {row['model_id']!r} was stored; put the old ones back"
        )
    return delta


def stored_settings(record: dict) -> ModelSettings:
    """The settings that a model's row has recorded, as far as its training and its samples depend on them."""
    concepts = record.get("concepts", ())
    return ModelSettings(
        kind=record["kind"],
        category=record["category"],
        base_model=record["base_model"],
        customize=CustomizeSettings(**record["customize"]),
        synthesize=SynthesizeSettings(**record["synthesize"]),
        concepts=tuple(Concept(concept["token"], concept["kind"], concept["category"]) for concept in concepts),
    )
