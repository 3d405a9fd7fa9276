"""Choosing keys: prompts to which the source answers with a picture of its own, as other models do not.

The strategies are those of Zhang et al. 2024 (arXiv 2409.15781), whose equations we do not have; the formulas are ours.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial

import numpy as np
import pyarrow as pa

from attrdb.database import Database
from attrdb.errors import InvalidValue
from attrdb.ingest.answers.descriptor import PIXELS, Descriptor
from attrdb.ingest.answers.files import Answer, Answers
from attrdb.ingest.read.corpus import picture_fields
from attrdb.ingest.read.pictures import Picture
from attrdb.progress import Progress, no_progress
from attrdb.store.ids import check_id
from attrdb.store.schema import IMAGES

STRATEGIES = ("generation", "detection", "random")
SAME = 0.05  # distance below which two references are taken for one


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
    """keys: chosen, best first; n_pool: prompts that could be keys; n_near: passed over, as another reference is the same"""

    keys: list[Key]
    n_pool: int
    n_near: int


def choose_keys(
    prompts: Mapping[int, str],
    source: Answers,
    others: Sequence[Answers],
    settings: KeySettings,
    images: Answers | None = None,
    report: Progress = no_progress,
) -> Chosen:
    """Choose keys of a source model.

    prompts: by number
    source:  the source's answers to them; strategy `generation` needs `n_answers` + 1 to a prompt
    others:  answers of other models that have not learned from the source, such as its base model
    images:  training images of the source, by the number of their caption; for `detection`, and for `random` if there are any
    raises:  InvalidValue if an option or answers are missing, or too few prompts can be keys
    """
    if settings.strategy == "detection" and images is None:
        raise InvalidValue(
            "strategy detection compares answers with training images of the source; give them with --images"
        )
    pool = []
    descriptor = Descriptor(settings.descriptor)
    for done, number in enumerate(sorted(prompts), 1):
        report("compare answers", done, len(prompts))
        key = _candidate(number, prompts[number], source, others, settings, images, descriptor)
        if key is not None:
            pool.append(key)
    if settings.strategy == "random":
        random.Random(f"{settings.seed}/keys").shuffle(pool)
    else:
        pool.sort(key=lambda key: (-key.score(settings.plain), key.number))
    apart = list(_apart(pool, descriptor))
    keys = apart[: settings.n_keys]
    if len(keys) < settings.n_keys:
        needed = settings.n_answers + (settings.strategy != "detection")
        raise InvalidValue(
            f"{len(keys):,} of {len(prompts):,} prompts can be keys, and {settings.n_keys:,} are wanted (-n); a prompt needs "
            f"{needed} answers of the source, and a picture that no other key has: {len(pool):,} have the answers, "
            f"{len(pool) - len(apart):,} of them a picture or a prompt of another key"
        )
    return Chosen(keys, len(pool), len(pool) - len(apart))


def _candidate(
    number: int,
    prompt: str,
    source: Answers,
    others: Sequence[Answers],
    settings: KeySettings,
    images: Answers | None,
    descriptor: Descriptor,
) -> Key | None:
    """A prompt as a key; None if it has not the pictures that a key needs."""
    own = source.of_prompt.get(number, [])
    if images is None:
        if len(own) <= settings.n_answers:
            return None
        reference, vector, self_distance = _medoid(own[: settings.n_answers + 1], settings, descriptor)
    else:
        if number not in images.of_prompt or len(own) < settings.n_answers:
            return None
        reference = images.of_prompt[number][0].read()
        [vector] = descriptor.describe([reference])
        nearest = partial(_nearest, vector=vector, n=settings.n_answers, descriptor=descriptor)
        self_distance = nearest(own)
    found = [
        _nearest(answers.of_prompt[number], vector, settings.n_answers, descriptor)
        for answers in others
        if len(answers.of_prompt.get(number, [])) >= settings.n_answers
    ]
    return Key(number, prompt, reference, vector, self_distance, float(np.median(found)) if found else None)


def _medoid(
    answers: Sequence[Answer], settings: KeySettings, descriptor: Descriptor
) -> tuple[Picture, np.ndarray, float]:
    """The picture that is nearest to the others, its vector, and the mean distance of all pairs; the first for `random`."""
    pictures = [answer.read() for answer in answers]
    vectors = descriptor.describe(pictures)
    distances = np.stack([descriptor.distances(vectors, vector) for vector in vectors])
    place = 0 if settings.strategy == "random" else int(distances.mean(axis=1).argmin())
    pairs = len(pictures) * (len(pictures) - 1)
    return pictures[place], vectors[place], float(distances.sum() / pairs)


def _nearest(answers: Sequence[Answer], vector: np.ndarray, n: int, descriptor: Descriptor) -> float:
    vectors = descriptor.describe([answer.read() for answer in answers[:n]])
    return float(descriptor.distances(vectors, vector).min())


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


def store_keys(db: Database, key_set_id: str, source: str, chosen: Chosen, settings: KeySettings) -> None:
    """Store a key set. A stored one never changes, since answers are measured by it.

    raises: InvalidValue for an id that cannot be one, or one that has other keys
    """
    check_id("key set", key_set_id)
    check_id("source", source)
    db.refresh()
    rows = [
        {
            "key_id": f"{key_set_id}/{place}",
            "key_set_id": key_set_id,
            "number": place,
            "prompt": key.prompt,
            "image_id": f"keys/{key_set_id}/{place}/{key.reference.sha256[:16]}",
            "self_distance": key.self_distance,
            "reference_distance": key.reference_distance,
        }
        for place, key in enumerate(chosen.keys, 1)
    ]
    if any(row["key_set_id"] == key_set_id for row in db.snapshot.rows("key_sets")):
        stored = {row["key_id"]: row for row in db.snapshot.rows("keys")}
        if all(stored.get(row["key_id"]) == row for row in rows):
            return
        raise InvalidValue(
            f"key set {key_set_id!r} is stored with other keys, and never changes; give the new one another id"
        )
    pictures = [
        {"image_id": row["image_id"], "role": "key", "source": source, "prompt": row["prompt"]}
        | picture_fields(key.reference)
        for row, key in zip(rows, chosen.keys, strict=True)
    ]
    fixed = {
        "source": source,
        "strategy": settings.strategy,
        "descriptor": settings.descriptor,
        "descriptor_hash": Descriptor(settings.descriptor).fingerprint,
        "n_answers": settings.n_answers,
        "settings": json.dumps(asdict(settings) | {"n_pool": chosen.n_pool}),
        "created_at": datetime.now(UTC),
    }
    db.writer.append_images(pa.Table.from_pylist(pictures, IMAGES))
    db.writer.upsert("keys", rows)
    db.writer.upsert("key_sets", [{"key_set_id": key_set_id, **fixed}])
