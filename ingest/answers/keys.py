"""Choosing keys: prompts to which the source answers with a picture of its own, as other models do not.

The strategies are those of Zhang et al. 2024 (arXiv 2409.15781), whose equations we do not have; the formulas are ours.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from attrdb.database import Database
from attrdb.errors import InvalidValue
from attrdb.ingest.answers.descriptor import PIXELS, Descriptor
from attrdb.ingest.answers.files import Answer, Answers
from attrdb.ingest.read.corpus import picture_fields
from attrdb.ingest.read.pictures import Picture
from attrdb.progress import Progress, no_progress
from attrdb.store.ids import check_id, lock_file
from attrdb.store.locks import exclusive_lock
from attrdb.store.predicates import among, literal
from attrdb.store.schema import IMAGES, Row

SAME = 0.05  # distance below which two references are taken for one; of pixels a copy, of features much alike


@dataclass(frozen=True)
class KeySettings:
    """How keys are chosen.

    strategy:   `generation`: prompts whose answers by the source are like each other; needs no training data.
                `detection`: training images of the source that its answers come near to. `random`: any, for comparison
    n_keys:     how many
    n_answers:  per key that models are asked for; of the source's, as many others are looked at besides the reference
    descriptor: `l2`, or the spec of an encoder
    plain:      rank by the source alone, as we take the paper to do, and not by contrast to other models
    """

    strategy: str = "generation"
    n_keys: int = 30
    n_answers: int = 4
    descriptor: str = PIXELS
    plain: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Key:
    """A prompt that may become a key. Distances: see the table `keys`."""

    number: int
    prompt: str
    reference: Picture
    vector: np.ndarray
    self_distance: float
    reference_distance: float | None

    def score(self, plain: bool) -> float:
        """The higher, the better a key."""
        contrast = 0.0 if plain or self.reference_distance is None else self.reference_distance
        return round(contrast - self.self_distance, 9)


@dataclass(frozen=True)
class Chosen:
    """keys: chosen, best first; n_pool: prompts that could be keys; n_near: passed over, as another reference is the same

    n_without: prompts that one of the other models gave too few answers to
    """

    keys: list[Key]
    n_pool: int
    n_near: int
    n_without: int


def choose_keys(
    prompts: Mapping[int, str],
    source: Answers,
    others: Mapping[str, Answers],
    settings: KeySettings,
    images: Answers | None = None,
    report: Progress = no_progress,
) -> Chosen:
    """Choose keys of a source model.

    prompts: by number
    source:  the source's answers to them; strategy `generation` needs `n_answers` + 1 to a prompt
    others:  answers of models that have not learned from the source, such as its base model, by name
    images:  training images of the source, by the number of their caption; for `detection`, and for `random` if there are any
    raises:  InvalidValue if an option or answers are missing or one too many, or too few prompts can be keys
    """
    if settings.strategy == "detection" and images is None:
        raise InvalidValue(
            "strategy detection compares answers with training images of the source; give them with --images"
        )
    if settings.strategy == "generation" and images is not None:
        raise InvalidValue(
            "strategy generation takes no training images; leave --images out, or take strategy detection"
        )
    chooser = _Chooser(source, others, settings, images)
    pool = []
    for done, number in enumerate(sorted(prompts), 1):
        report("compare answers", done, len(prompts))
        if key := chooser.candidate(number, prompts[number]):
            pool.append(key)
    if settings.strategy == "random":
        random.Random(f"{settings.seed}/keys").shuffle(pool)
    else:
        pool.sort(key=lambda key: (-key.score(settings.plain), key.number))
    apart = list(_apart(pool, chooser.descriptor))
    chosen = Chosen(apart[: settings.n_keys], len(pool), len(pool) - len(apart), chooser.n_without)
    if len(chosen.keys) < settings.n_keys:
        raise InvalidValue(
            f"{len(apart):,} of {len(prompts):,} prompts can be keys, and {settings.n_keys:,} are wanted (-n); a prompt "
            f"needs {chooser.n_needed} answers of the source, {settings.n_answers} of each other model, and its own picture: "
            f"{chosen.n_pool:,} have the answers, {chosen.n_near:,} of them a picture or prompt of another key; "
            f"{chosen.n_without:,} lack answers of another model"
        )
    return chosen


class _Chooser:
    """Turns prompts into keys."""

    def __init__(self, source: Answers, others: Mapping[str, Answers], settings: KeySettings, images: Answers | None):
        self.source, self.others, self.settings, self.images = source, others, settings, images
        self.descriptor = Descriptor(settings.descriptor)
        self.n_needed = settings.n_answers + (images is None)  # the reference is one of them
        self.n_without = 0

    def candidate(self, number: int, prompt: str) -> Key | None:
        """A prompt as a key; None if it has not the pictures that a key needs."""
        own = self.source.of_prompt.get(number, [])
        if len(own) < self.n_needed or (self.images is not None and number not in self.images.of_prompt):
            return None
        of_others = [answers.of_prompt.get(number, []) for answers in self.others.values()]
        if any(len(answers) < self.settings.n_answers for answers in of_others):
            self.n_without += 1
            return None
        if self.images is None:
            reference, vector, self_distance = self._medoid(own[: self.n_needed])
        else:
            reference = self.images.of_prompt[number][0].read()
            [vector] = self.descriptor.describe([reference])
            self_distance = self._nearest(own, vector)
        contrast = [self._nearest(answers, vector) for answers in of_others]
        return Key(number, prompt, reference, vector, self_distance, float(np.median(contrast)) if contrast else None)

    def _medoid(self, answers: Sequence[Answer]) -> tuple[Picture, np.ndarray, float]:
        """The picture nearest to the others (for `random` the first), its vector, and the mean distance of all pairs."""
        pictures = [answer.read() for answer in answers]
        vectors = self.descriptor.describe(pictures)
        distances = np.stack([self.descriptor.distances(vectors, vector) for vector in vectors])
        place = 0 if self.settings.strategy == "random" else int(distances.mean(axis=1).argmin())
        n_pairs = len(pictures) * (len(pictures) - 1)
        return pictures[place], vectors[place], float(distances.sum() / n_pairs)

    def _nearest(self, answers: Sequence[Answer], vector: np.ndarray) -> float:
        vectors = self.descriptor.describe([answer.read() for answer in answers[: self.settings.n_answers]])
        return float(self.descriptor.distances(vectors, vector).min())


def _apart(pool: Sequence[Key], descriptor: Descriptor) -> Iterator[Key]:
    """In their order, those whose prompt and reference are not those of an earlier one."""
    taken: list[np.ndarray] = []
    prompts: set[str] = set()
    for key in pool:
        asked = " ".join(key.prompt.casefold().split())
        if asked in prompts or (taken and descriptor.distances(np.stack(taken), key.vector).min() < SAME):
            continue
        taken.append(key.vector)
        prompts.add(asked)
        yield key


def store_keys(
    db: Database, key_set_id: str, source: str, chosen: Chosen, settings: KeySettings, others: Iterable[str] = ()
) -> None:
    """Store a key set. A stored one never changes, since answers are measured by it.

    others: names of the models that keys were chosen against
    raises: InvalidValue for an id that cannot be one, or that of another key set; Busy if one of that id is being stored
    """
    check_id("key set", key_set_id)
    check_id("source", source)
    keys = [
        {
            "key_id": f"{key_set_id}/{number}",
            "key_set_id": key_set_id,
            "number": number,
            "prompt": key.prompt,
            "image_id": f"keys/{key_set_id}/{number}/{key.reference.sha256[:16]}",
            "self_distance": key.self_distance,
            "reference_distance": key.reference_distance,
        }
        for number, key in enumerate(chosen.keys, 1)
    ]
    kept = asdict(settings) | {"n_pool": chosen.n_pool, "others": sorted(others)}
    row: Row = {
        "key_set_id": key_set_id,
        "source": source,
        "strategy": settings.strategy,
        "descriptor": settings.descriptor,
    }
    row |= {"descriptor_hash": Descriptor(settings.descriptor).fingerprint, "n_answers": settings.n_answers}
    row |= {"settings": json.dumps(kept, sort_keys=True)}
    pictures = [
        {"image_id": of_key["image_id"], "role": "key", "source": source, "prompt": of_key["prompt"]}
        | picture_fields(key.reference)
        for of_key, key in zip(keys, chosen.keys, strict=True)
    ]
    with exclusive_lock(lock_file(db.path, "keys", key_set_id), f"key set {key_set_id!r} is being stored"):
        db.refresh()
        mine = f"key_set_id = {literal(key_set_id)}"
        stored = sorted(db.snapshot.rows("keys", mine), key=lambda key: key["number"])
        if found := db.snapshot.rows("key_sets", mine):
            if stored == keys and {name: found[0][name] for name in row} == row:
                return
            raise InvalidValue(
                f"key set {key_set_id!r} is stored with other keys or settings, and never changes; give the new another id"
            )
        if stored:  # by a command that was interrupted
            db.writer.delete("images", among("image_id", [key["image_id"] for key in stored]))
            db.writer.delete("keys", mine)
        db.writer.upsert("keys", keys)
        db.writer.append_images(pa.Table.from_pylist(pictures, IMAGES))
        db.writer.upsert("key_sets", [row | {"created_at": datetime.now(UTC)}])
