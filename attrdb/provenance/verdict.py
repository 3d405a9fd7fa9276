"""The test of a model: its answers beside those of innocent models, stratum by stratum."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from attrdb.errors import InvalidValue, NotFound
from attrdb.provenance.confidence import near_by_rank, p_value
from attrdb.store.predicates import literal
from attrdb.store.schema import Row
from attrdb.store.snapshot import Snapshot
from attrdb.store.writer import Writer

INNOCENT, INFRINGING = "innocent", "infringing"
UNNAMED = "innocent"  # the stratum of innocent models without one

STRATA = pa.schema(
    [
        ("stratum", pa.string()),
        ("n_models", pa.int32()),
        ("lowest_conf", pa.float64()),
        ("highest_conf", pa.float64()),
        ("conf", pa.float64()),
        ("p", pa.float64()),
    ]
)
Distances = dict[
    str, dict[str, list[float]]
]  # suspect_id -> key_id -> of its answers, in an order that chance has made


@dataclass(frozen=True)
class Stratum:
    """Innocent models of one kind. conf: of each, sorted; p: of the tested model among them; None for a single model."""

    name: str
    conf: tuple[float, ...]
    p: float | None


@dataclass(frozen=True)
class Verdict:
    """What the answers of a model say about training on the source's pictures.

    conf:      share of the keys to which one of its answers comes near
    p:         the largest p-value over the strata; None without a stratum of two models
    n_missing: keys that it did not answer
    n_answers: of the model; of every innocent one as many were compared, key by key
    left_out:  innocent models with fewer answers
    """

    key_set: Row
    suspect_id: str
    threshold: float | None
    conf: float
    p: float | None
    n_keys: int
    n_missing: int
    n_answers: int
    strata: tuple[Stratum, ...]
    left_out: tuple[str, ...]

    @property
    def n_innocents(self) -> int:
        return sum(len(stratum.conf) for stratum in self.strata)

    @property
    def least_p(self) -> float | None:
        """The smallest p-value that these innocent models could give."""
        sizes = [len(stratum.conf) for stratum in self.strata if stratum.p is not None]
        return 1 / (min(sizes) + 1) if sizes else None

    @property
    def row(self) -> Row:
        """Its row in `verdicts`."""
        return {
            "verdict_id": f"{self.key_set['key_set_id']}/{self.suspect_id}",
            "key_set_id": self.key_set["key_set_id"],
            "suspect_id": self.suspect_id,
            "conf": self.conf,
            "threshold": self.threshold,
            "p": self.p,
            "n_keys": self.n_keys,
            "n_answers": self.n_answers,
            "n_innocents": self.n_innocents,
            "strata": json.dumps({one.name: {"n": len(one.conf), "conf": one.conf, "p": one.p} for one in self.strata}),
            "created_at": datetime.now(UTC),
        }


def key_set_of(snapshot: Snapshot, key_set_id: str) -> Row:
    """The row of a key set.

    raises: NotFound, with the nearest ids
    """
    rows = {row["key_set_id"]: row for row in snapshot.rows("key_sets")}
    if key_set_id not in rows:
        hint = _near(key_set_id, rows) if rows else "make one with: attrdb keys find"
        raise NotFound(f"no key set {key_set_id!r} in {snapshot.path}; {hint}")
    return rows[key_set_id]


def _near(name: str, known: Iterable[str]) -> str:
    return f"nearest are {', '.join(map(repr, difflib.get_close_matches(name, list(known), 3, 0)))}"


def keys_of(snapshot: Snapshot, key_set_id: str) -> list[Row]:
    """The keys of a key set, by number."""
    rows = snapshot.rows("keys", f"key_set_id = {literal(key_set_id)}")
    return sorted(rows, key=lambda row: row["number"])


def verdict(snapshot: Snapshot, key_set_id: str, suspect_id: str, threshold: float | None = None) -> Verdict:
    """Test a model by its stored answers.

    threshold: of distance, for all keys; None: at each key the nearest tenth of the models that are compared is near
    raises:    NotFound for an unknown key set, or a model without answers to it; InvalidValue if the model is the source
    """
    key_set = key_set_of(snapshot, key_set_id)
    if suspect_id == key_set["source"]:
        raise InvalidValue(f"{suspect_id!r} is the source of key set {key_set_id!r}; test a model that is not")
    distances = answers_to(snapshot, key_set_id)
    own = distances.pop(suspect_id, None)
    if own is None:
        hint = _near(suspect_id, distances) if distances else "add some with: attrdb answers add"
        raise NotFound(f"model {suspect_id!r} has no answers to key set {key_set_id!r}; {hint}")
    strata = _innocents(snapshot, key_set["source"], suspect_id, distances)
    least = {key_id: len(answers) for key_id, answers in sorted(own.items())}
    whole = {name for names in strata.values() for name in names if _has(distances[name], least)}
    left_out = sorted({name for names in strata.values() for name in names} - whole)
    strata = {name: [one for one in names if one in whole] for name, names in strata.items()}
    innocents = [one for names in strata.values() for one in names]
    matrix = np.array([_nearest(one, least) for one in (own, *(distances[name] for name in innocents))])
    near = near_by_rank(matrix) if threshold is None else matrix <= threshold
    conf = dict(zip(("", *innocents), near.mean(axis=1).tolist(), strict=True))
    found = tuple(_stratum(name, conf[""], [conf[one] for one in names]) for name, names in strata.items() if names)
    p_values = [one.p for one in found if one.p is not None]
    return Verdict(
        key_set,
        suspect_id,
        threshold,
        conf[""],
        max(p_values, default=None),
        len(least),
        len(keys_of(snapshot, key_set_id)) - len(least),
        sum(least.values()),
        found,
        tuple(left_out),
    )


def store(writer: Writer, found: Verdict) -> None:
    """Store a verdict in the place of an earlier one of the same model and key set."""
    writer.upsert("verdicts", [found.row])


def answers_to(snapshot: Snapshot, key_set_id: str) -> Distances:
    """The distances of all models' answers to a key set."""
    keys = {row["key_id"] for row in keys_of(snapshot, key_set_id)}
    found: Distances = {}
    # Ids end in a digest of the picture: an order that no machine and no file name decides.
    for row in sorted(snapshot.rows("answers"), key=lambda row: row["image_id"]):
        if row["key_id"] in keys:
            found.setdefault(row["suspect_id"], {}).setdefault(row["key_id"], []).append(row["distance"])
    return found


def labels_of(snapshot: Snapshot, source: str) -> dict[str, Row]:
    """What is known of models and a source, by suspect_id."""
    rows = snapshot.rows("suspect_labels", f"source = {literal(source)}")
    return {row["suspect_id"]: row for row in rows}


def _innocents(snapshot: Snapshot, source: str, tested: str, distances: Distances) -> dict[str, list[str]]:
    """The innocent models with answers, by stratum; all in one order."""
    strata: dict[str, list[str]] = {}
    for suspect_id, label in sorted(labels_of(snapshot, source).items()):
        if label["label"] == INNOCENT and suspect_id in distances and suspect_id != tested:
            strata.setdefault(label["stratum"] or UNNAMED, []).append(suspect_id)
    return dict(sorted(strata.items()))


def _has(answers: Mapping[str, Sequence[float]], least: Mapping[str, int]) -> bool:
    return all(len(answers.get(key_id, ())) >= n for key_id, n in least.items())


def _nearest(answers: Mapping[str, Sequence[float]], least: Mapping[str, int]) -> list[float]:
    """The smallest distance at each key, of as many answers as every model has: the minimum of more is smaller."""
    return [min(answers[key_id][:n]) for key_id, n in least.items()]


def _stratum(name: str, conf: float, null: list[float]) -> Stratum:
    p = p_value(conf, np.array(null)) if len(null) > 1 else None  # a single model is shown, and is no distribution
    return Stratum(name, tuple(sorted(null)), p)


def words(found: Verdict) -> str:
    """The verdict in a sentence or two; an estimate, with what it rests on."""
    source = found.key_set["source"]
    text = f"{found.suspect_id}: conf {found.conf:.2f} on {found.n_keys} keys of {source}"
    if found.p is None:
        return (
            f"{text}. Without answers of two or more innocent models of a kind nothing follows from it: add some with "
            "attrdb answers add --innocent STRATUM"
        )
    kinds = ", ".join(f"{n} {name}" for name, n in Counter({one.name: len(one.conf) for one in found.strata}).items())
    against = f"against {found.n_innocents} innocent models ({kinds})"
    if found.p <= 0.05:
        return f"{text}, p = {found.p:.3g} {against}: consistent with training on pictures of {source}; it proves none"
    least = found.least_p
    assert least is not None
    if least > 0.05:
        return f"{text}, p = {found.p:.3g} {against}: too few to tell, since p cannot fall below {least:.3g}"
    return f"{text}, p = {found.p:.3g} {against}: innocent models answer like this, too"


def strata_table(found: Verdict) -> pa.Table:
    """One row per stratum, with the tested model's conf; a single row without a stratum if there is none."""
    rows = [
        {
            "stratum": one.name,
            "n_models": len(one.conf),
            "lowest_conf": one.conf[0],
            "highest_conf": one.conf[-1],
            "p": one.p,
        }
        for one in found.strata
    ]
    return pa.Table.from_pylist([row | {"conf": found.conf} for row in rows or [{}]], STRATA)
