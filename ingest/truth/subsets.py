"""Which exemplars of a model are left out, one subset per retraining."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from attrdb.errors import InvalidValue
from attrdb.store.schema import Row

NOTHING = "none"  # the model trained again with all exemplars, which the others are compared with
NOUNS = {"image": "exemplars", "concept": "concepts", "creator": "creators"}


@dataclass(frozen=True)
class Subset:
    """Exemplars that are left out.

    leave: none, image, concept, creator or half
    name:  the image_id, concept_id or creator that is left out, the number of the half, or empty
    """

    leave: str
    name: str = ""
    left_out: tuple[str, ...] = ()  # image_ids, sorted


def subsets(exemplars: Sequence[Row], leave: str, n_halves: int, seed: str) -> list[Subset]:
    """All subsets of one kind, in an order that does not change.

    exemplars: with image_id, concept_id and creator
    n_halves:  random halves, each other than the others; all of them if there are fewer
    seed:      of the halves
    raises:    InvalidValue if there is nothing to leave out that leaves an exemplar
    """
    ids = sorted(exemplar["image_id"] for exemplar in exemplars)
    if leave == "half":
        return _halves(ids, n_halves, seed)
    key = {"image": "image_id", "concept": "concept_id", "creator": "creator"}[leave]
    names = sorted({exemplar[key] for exemplar in exemplars} - {None})
    groups = {name: sorted(each["image_id"] for each in exemplars if each[key] == name) for name in names}
    found = [Subset(leave, name, tuple(left_out)) for name, left_out in groups.items() if len(left_out) < len(ids)]
    if not found:
        known = f"{len(names)} {NOUNS[leave] if len(names) != 1 else NOUNS[leave].removesuffix('s')}"
        raise InvalidValue(f"it has {known}, so that nothing is left without one; needed are two or more")
    return found


def _halves(ids: list[str], n_halves: int, seed: str) -> list[Subset]:
    n = len(ids) // 2
    if not n:
        raise InvalidValue("it has 1 exemplar, which has no half; needed are two or more")
    rng = random.Random(seed)
    found: dict[tuple[str, ...], None] = {}
    while len(found) < min(n_halves, math.comb(len(ids), n)):
        found[tuple(sorted(rng.sample(ids, len(ids) - n)))] = None
    return [Subset("half", str(number), left_out) for number, left_out in enumerate(found)]
