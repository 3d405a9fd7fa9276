"""The attribution methods of a database, and how they are found by name.

Two kinds are built in: *similarity* compares an encoder's features, *stored* reads the table `scores`. A package adds a
method by filling that table, under the entry point group `attrdb.methods` (see `attrdb.ingest.score`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attrdb.attribution.influence import Calibrated
from attrdb.attribution.protocol import Method
from attrdb.attribution.similarity import Similarity
from attrdb.attribution.stored import Stored
from attrdb.errors import InvalidValue, NotFound
from attrdb.search.mapper import stored_mapper
from attrdb.store.methods import similarity_id, similarity_row
from attrdb.store.predicates import among_parts
from attrdb.store.snapshot import Snapshot
from attrdb.text import nearest

IDS_AT_ONCE = 4096  # in a predicate


def method_rows(snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    """The rows of `methods`, by method_id: similarity by encoder and by mapper, then stored methods, each by name.

    Similarity of an encoder or mapper is there also where its row is missing: it was added by a command that was killed in
    between, or the moment that is read is older than the table.
    """
    return snapshot.once(_method_rows)


def _method_rows(snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    stored = {row["method_id"]: row for row in snapshot.rows("methods")}
    mappers = snapshot.rows("mappers", columns=["mapper_id", "encoder_id", "created_at"])
    pairs: list[tuple[str, str | None, Any]] = [(encoder_id, None, None) for encoder_id in snapshot.encoders]
    for row in sorted(mappers, key=lambda row: row["mapper_id"]):
        if row["encoder_id"] in snapshot.encoders:
            pairs.append((row["encoder_id"], row["mapper_id"], row["created_at"]))
    rows = {}
    for encoder_id, mapper_id, created_at in pairs:
        method_id = similarity_id(encoder_id, mapper_id)
        rows[method_id] = stored.get(method_id) or similarity_row(encoder_id, mapper_id) | {"created_at": created_at}
    # Of an encoder that is missing: adding it was interrupted. Results may belong to a mapper that was deleted.
    others = sorted(
        name for name, row in stored.items() if row["encoder_id"] is None or row["encoder_id"] in snapshot.encoders
    )
    return rows | {name: stored[name] for name in others if name not in rows}


def resolve_method(
    snapshot: Snapshot, method: str | None = None, encoder_id: str | None = None, mapper_id: str | None = None
) -> str:
    """The id of the method that is asked for; similarity of the database's first encoder where nothing is.

    method:    a method_id, an encoder_id or a mapper_id
    encoder_id, mapper_id: similarity of that encoder, with that mapper; in the place of a method
    raises:    NotFound if this database has no such method, encoder or mapper, or no encoder at all; InvalidValue if the
               names do not go together
    """
    if method is None:
        if not mapper_id:
            return snapshot.encoder_id(encoder_id)
        mapper = stored_mapper(snapshot, mapper_id)
        if encoder_id not in (None, mapper.encoder_id):
            raise InvalidValue(f"mapper {mapper_id!r} is of encoder {mapper.encoder_id!r}, not of {encoder_id!r}")
        return similarity_id(snapshot.encoder_id(mapper.encoder_id), mapper_id)
    rows = method_rows(snapshot)
    named = [name for name, row in rows.items() if row["mapper_id"] == method] if method not in rows else [method]
    if len(named) != 1:
        near = nearest(method, rows)
        hint = f"; nearest: {near}" if near else "; ingest a corpus or a model first"
        raise NotFound(f"no method {method!r} in {snapshot.path}{hint}")
    row = rows[named[0]]
    for noun, name, wanted in (("encoder", row["encoder_id"], encoder_id), ("mapper", row["mapper_id"], mapper_id)):
        if wanted and wanted != name:
            raise InvalidValue(
                f"method {method!r} is of {noun} {name!r}, not of {wanted!r}; give the method alone"
                if name
                else f"method {method!r} has no {noun}; give the method alone, or the {noun} {wanted!r} alone"
            )
    return named[0]


def load_method(snapshot: Snapshot, method_id: str) -> Method:
    """The method of an id as `resolve_method` gives it."""
    row = method_rows(snapshot)[method_id]
    if row["kind"] != "similarity":
        return Stored(method_id)
    mapper = stored_mapper(snapshot, row["mapper_id"]) if row["mapper_id"] else None
    return Similarity(method_id, row["encoder_id"], mapper)


def calibration(
    snapshot: Snapshot, method_id: str, tau: float | None = None, lam: float | None = None, kind: str | None = None
) -> Calibrated:
    """How a method's scores become influence: as given, else as calibrated, else as the method's row has them.

    Where tau or lam is given, nothing is left unattributed: that share was found with the calibrated ones.
    kind: of the model whose sample is attributed; its own calibration counts, if there is one
    """
    fitted = _of_method(snapshot, method_id)
    row = fitted.get(kind) or fitted.get(None) or method_rows(snapshot)[method_id]
    unattributed = (row.get("unattributed") or 0.0) if tau is None and lam is None else 0.0
    return Calibrated(row["tau"] if tau is None else tau, row["lam"] if lam is None else lam, unattributed)


def calibrations_of(
    snapshot: Snapshot,
    method_id: str,
    image_ids: Sequence[str | None],
    tau: float | None = None,
    lam: float | None = None,
) -> list[Calibrated]:
    """`calibration` for each of some images: for a sample, that of its model's kind. None: an image that is not stored."""
    kinds: dict[str | None, str | None] = {}
    if (tau is None or lam is None) and _of_method(snapshot, method_id).keys() - {None}:
        of_model = snapshot.once(model_kinds)
        ids = [image_id for image_id in image_ids if image_id is not None]
        for where in among_parts("image_id", ids, IDS_AT_ONCE):
            rows = snapshot.images(f"role = 'sample' AND {where}", ["image_id", "model_id"]).to_pylist()
            kinds |= {row["image_id"]: of_model.get(row["model_id"]) for row in rows}
    by_kind = {kind: calibration(snapshot, method_id, tau, lam, kind) for kind in {None, *kinds.values()}}
    return [by_kind[kinds.get(image_id)] for image_id in image_ids]


def is_calibrated(snapshot: Snapshot, method_id: str) -> bool:
    """Whether tau and lambda of a method were fitted."""
    return bool(_of_method(snapshot, method_id))


def _of_method(snapshot: Snapshot, method_id: str) -> dict[str | None, dict[str, Any]]:
    return snapshot.once(_calibrations).get(method_id, {})


def _calibrations(snapshot: Snapshot) -> dict[str, dict[str | None, dict[str, Any]]]:
    """Rows of `calibrations` by method and kind."""
    by_method: dict[str, dict[str | None, dict[str, Any]]] = {}
    for row in snapshot.rows("calibrations"):
        # A moment of before schema 6 has encoder and mapper in the place of a method.
        method_id = row.get("method_id") or similarity_id(row["encoder_id"], row["mapper_id"])
        by_method.setdefault(method_id, {})[row.get("kind")] = row
    return by_method


def model_kinds(snapshot: Snapshot) -> dict[str, str | None]:
    """The kind of each model, by model_id; for `snapshot.once`."""
    return {row["model_id"]: row["kind"] for row in snapshot.rows("models", columns=["model_id", "kind"])}
