"""The test of a model: its answers beside those of innocent models, stratum by stratum."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
from attrdb.text import nearest

INNOCENT = "innocent"  # a label, and the stratum of innocent models without one

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
LEVEL = 0.05  # of p, up to which a verdict calls answers unusual
# suspect_id -> key_id -> the distances of its answers, in the order of their digests.
Distances = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Stratum:
    """Innocent models of one kind.

    conf: of each, sorted; n_left_out: of models with too few answers
    p:    of the tested model among them; None for a single model, which is no distribution, or if models had to be left out
          until less than two remained
    """

    name: str
    conf: tuple[float, ...]
    n_left_out: int
    p: float | None

    @property
    def is_emptied(self) -> bool:
        """Whether it would have a p-value, had its models answered."""
        return self.p is None and len(self.conf) + self.n_left_out > 1


@dataclass(frozen=True)
class Verdict:
    """What the answers of a model say about training on the source's pictures.

    conf:      share of the keys to which one of its answers comes near; None without a threshold and an innocent model
    p:         the largest p-value over the strata; None if there is none, or if a stratum is emptied
    n_missing: keys that it did not answer
    n_answers: of the model; of every innocent one as many were compared, key by key
    left_out:  innocent models with fewer answers
    """

    key_set: Row
    suspect_id: str
    threshold: float | None
    conf: float | None
    n_keys: int
    n_missing: int
    n_answers: int
    strata: tuple[Stratum, ...]
    left_out: tuple[str, ...]

    @property
    def p(self) -> float | None:
        found = [stratum.p for stratum in self.strata if stratum.p is not None]
        return None if any(stratum.is_emptied for stratum in self.strata) else max(found, default=None)

    @property
    def n_innocents(self) -> int:
        """Innocent models that the p-value rests on."""
        return sum(len(stratum.conf) for stratum in self.strata if stratum.p is not None)

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
        hint = f"nearest are {nearest(key_set_id, rows)}" if rows else "make one with: attrdb keys find"
        raise NotFound(f"no key set {key_set_id!r} in {snapshot.path}; {hint}")
    return rows[key_set_id]


def keys_of(snapshot: Snapshot, key_set_id: str) -> list[Row]:
    """The keys of a key set, by number."""
    rows = snapshot.rows("keys", f"key_set_id = {literal(key_set_id)}")
    return sorted(rows, key=lambda row: row["number"])


def verdict(snapshot: Snapshot, key_set_id: str, suspect_id: str, threshold: float | None = None) -> Verdict:
    """Test a model by its stored answers.

    threshold: of distance, for all keys; None: at each key the nearest tenth of the models that are compared is near
    raises:    NotFound for an unknown key set, or a model without answers to it; InvalidValue if the model is the source, or
               for a threshold that is no distance
    """
    if threshold is not None and not threshold >= 0:
        raise InvalidValue(f"threshold is {threshold}; it is a distance, from 0 on")
    key_set = key_set_of(snapshot, key_set_id)
    if suspect_id == key_set["source"]:
        raise InvalidValue(f"{suspect_id!r} is the source of key set {key_set_id!r}; test a model that is not")
    distances = answers_to(snapshot, key_set)
    own = distances.pop(suspect_id, None)
    if own is None:
        hint = f"nearest are {nearest(suspect_id, distances)}" if distances else "add some with: attrdb answers add"
        raise NotFound(f"model {suspect_id!r} has no answers to key set {key_set_id!r}; {hint}")
    named = _innocents(snapshot, key_set["source"], suspect_id, distances)
    # The nearest of more answers is nearer with any model, so as many of each are compared, key by key.
    wanted = {key_id: len(answers) for key_id, answers in sorted(own.items())}
    compared = [name for names in named.values() for name in names if _has(distances[name], wanted)]
    matrix = np.array([_nearest(answers, wanted) for answers in (own, *(distances[name] for name in compared))])
    near = near_by_rank(matrix) if threshold is None else matrix <= threshold
    conf, *others = near.mean(axis=1).tolist()
    conf_of = dict(zip(compared, others, strict=True))
    return Verdict(
        key_set,
        suspect_id,
        threshold,
        conf if compared or threshold is not None else None,
        len(wanted),
        len(keys_of(snapshot, key_set_id)) - len(wanted),
        sum(wanted.values()),
        tuple(_stratum(name, conf, names, conf_of) for name, names in named.items()),
        tuple(sorted({name for names in named.values() for name in names} - conf_of.keys())),
    )


def store(writer: Writer, found: Verdict) -> None:
    """Store a verdict in the place of an earlier one of the same model and key set."""
    writer.upsert("verdicts", [found.row])


def answers_to(snapshot: Snapshot, key_set: Row) -> Distances:
    """The distances of all models' answers to a key set, at most as many per key as it asks for."""
    keys = {row["key_id"] for row in keys_of(snapshot, key_set["key_set_id"])}
    found: Distances = {}
    # Ids end in a digest of the picture: an order that no machine and no file name decides.
    for row in sorted(snapshot.rows("answers"), key=lambda row: row["image_id"]):
        if row["key_id"] in keys:
            of_key = found.setdefault(row["suspect_id"], {}).setdefault(row["key_id"], [])
            if len(of_key) < key_set["n_answers"]:
                of_key.append(row["distance"])
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
            strata.setdefault(label["stratum"] or INNOCENT, []).append(suspect_id)
    return dict(sorted(strata.items()))


def _has(answers: Mapping[str, Sequence[float]], wanted: Mapping[str, int]) -> bool:
    return all(len(answers.get(key_id, ())) >= n for key_id, n in wanted.items())


def _nearest(answers: Mapping[str, Sequence[float]], wanted: Mapping[str, int]) -> list[float]:
    return [min(answers[key_id][:n]) for key_id, n in wanted.items()]


def _stratum(name: str, conf: float, names: Sequence[str], conf_of: Mapping[str, float]) -> Stratum:
    null = sorted(conf_of[one] for one in names if one in conf_of)
    p = p_value(conf, np.array(null)) if len(null) > 1 else None
    return Stratum(name, tuple(null), len(names) - len(null), p)


def words(found: Verdict) -> str:
    """The verdict in a sentence or two; an estimate, with what it rests on."""
    source, conf = found.key_set["source"], found.conf
    text = f"{found.suspect_id}: conf {'-' if conf is None else f'{conf:.2f}'} on {found.n_keys} keys of {source}"
    if emptied := [stratum.name for stratum in found.strata if stratum.is_emptied]:
        return (
            f"{text}. No p-value: of the innocent models of stratum {emptied[0]} too few have as many answers as this one; "
            "add their missing answers with attrdb answers add"
        )
    if found.p is None or found.least_p is None:
        return (
            f"{text}. Without answers of two or more innocent models of a kind nothing follows from it: add some with "
            "attrdb answers add --innocent STRATUM"
        )
    kinds = ", ".join(f"{len(one.conf)} {one.name}" for one in found.strata if one.p is not None)
    text = f"{text}, p = {found.p:.3g} against {found.n_innocents} innocent models ({kinds})"
    if found.p > LEVEL:
        if found.least_p > LEVEL:
            return f"{text}: too few of them to tell, since p cannot fall below {found.least_p:.3g}"
        return f"{text}: not unusual enough to tell from innocent models"
    alike = [
        one.name for one in found.strata if one.p is None and one.conf and conf is not None and one.conf[0] >= conf
    ]
    if alike:
        return (
            f"{text}; but the innocent model of stratum {alike[0]} answers like this, too, so nothing follows from it"
        )
    return f"{text}: consistent with training on pictures of {source}; this is not proof"


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
        if one.conf
    ]
    return pa.Table.from_pylist([row | {"conf": found.conf} for row in rows or [{}]], STRATA)
