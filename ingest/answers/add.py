"""Storing the answers of a model to a key set, with their distances."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from attrdb.database import Database
from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.answers.descriptor import Descriptor
from attrdb.ingest.answers.files import Answer, read_answers
from attrdb.ingest.read.corpus import picture_fields
from attrdb.ingest.read.pictures import Picture, read_picture
from attrdb.progress import Progress, no_progress
from attrdb.provenance.verdict import INNOCENT, key_set_of, keys_of, labels_of
from attrdb.store.blocklist import blocklist
from attrdb.store.ids import check_id, lock_file
from attrdb.store.jobs import JobResult, running
from attrdb.store.locks import exclusive_lock
from attrdb.store.predicates import among, literal
from attrdb.store.schema import IMAGES, Row


@dataclass(frozen=True)
class Label:
    """What is known of a model and a source. rho: share of its training images that the source has made"""

    label: str
    stratum: str | None = None
    rho: float | None = None

    def __post_init__(self) -> None:
        if self.stratum is not None:
            check_id("stratum", self.stratum)
        if self.rho is not None and not 0 < self.rho <= 1:
            raise InvalidValue(f"rho is {self.rho}; it is a share of training images, above 0 and at most 1")


@dataclass
class AnswersResult(JobResult):
    """What became of answers.

    n_unanswered: keys without any; n_short: keys with fewer answers than the key set asks for
    n_surplus:    answers beyond that number, which are stored and not compared
    n_others:     pictures whose number is that of no key
    n_references: answers that are, byte for byte, the source's own picture of the key
    n_verdicts:   verdicts that rested on another label, and were deleted
    """

    n_unanswered: int = 0
    n_short: int = 0
    n_surplus: int = 0
    n_others: int = 0
    n_references: int = 0
    n_verdicts: int = 0


def add_answers(
    db: Database,
    key_set_id: str,
    suspect_id: str,
    path: Path,
    label: Label | None = None,
    report: Progress = no_progress,
) -> AnswersResult:
    """Store the answers of a model, from a folder or a Parquet file, see `files`. A rerun adds what has come since.

    label:  what is known of the model and the key set's source; None changes nothing. Another label than the stored one takes
            its place, and verdicts on that source are deleted
    raises: NotFound for an unknown key set or path; InvalidValue if the model is the source, or an innocent one that the keys
            were chosen against, or for an encoder that is not the one of the key set; as `read_answers`; Busy if answers of
            the model to this key set are being stored
    """
    check_id("model", suspect_id)
    db.refresh()
    key_set = key_set_of(db.snapshot, key_set_id)
    _check_suspect(key_set, suspect_id, label)
    keys = {key["number"]: key for key in keys_of(db.snapshot, key_set_id)}
    if not keys:
        raise NotFound(f"all keys of key set {key_set_id!r} were taken out of {db.path}; find keys anew")
    descriptor = Descriptor(key_set["descriptor"])
    if descriptor.fingerprint != key_set["descriptor_hash"]:
        raise InvalidValue(
            f"encoder {descriptor.spec!r} has other weights here than those that key set {key_set_id!r} was made with; "
            "distances cannot be compared"
        )
    answers = read_answers(path, set(keys), report)
    settings = {"key_set_id": key_set_id, "suspect_id": suspect_id, "path": str(path)}
    lock = lock_file(db.path, "answers", key_set_id, suspect_id)
    with (
        exclusive_lock(lock, f"answers of {suspect_id!r} to key set {key_set_id!r} are being stored"),
        running(db.writer, "answers", f"{key_set_id}/{suspect_id}", settings) as job,
    ):
        db.refresh()
        found = _NewAnswers(db, key_set, list(keys.values()), suspect_id, descriptor)
        for done, (number, key) in enumerate(keys.items(), 1):
            report("compare answers", done, len(keys))
            found.add(key, answers.of_prompt.get(number, ()))
        if found.rows:
            db.writer.append_images(pa.Table.from_pylist(found.images, IMAGES))
            db.writer.upsert("answers", found.rows)
        row = {"suspect_id": suspect_id, "origin": str(path), "created_at": datetime.now(UTC)}
        db.writer.upsert("suspects", [row], update=False)
        n_verdicts = 0 if label is None else _store_label(db, key_set["source"], suspect_id, label)
        failures = answers.failures | found.failures
        job.failed(failures)
        job.mended([name for name in job.failures if name in answers.names and name not in failures])
        job.n_done = len(found.rows)
    counts = {"n_done": len(found.rows), "n_others": answers.n_others, "n_verdicts": n_verdicts}
    return replace(found.result, **counts, failures=failures)


def _check_suspect(key_set: Row, suspect_id: str, label: Label | None) -> None:
    """raises: InvalidValue"""
    key_set_id = key_set["key_set_id"]
    if suspect_id == key_set["source"]:
        raise InvalidValue(
            f"{suspect_id!r} is the source of key set {key_set_id!r}, whose answers chose its keys; give another name to a "
            "model that is not the source"
        )
    if label and label.label == INNOCENT and suspect_id in json.loads(key_set["settings"] or "{}").get("others", ()):
        raise InvalidValue(
            f"{suspect_id!r} is a model that the keys of {key_set_id!r} were chosen against (--other): its answers are far "
            "from them by choice, so it must not be among the innocent models; take others"
        )


def _store_label(db: Database, source: str, suspect_id: str, label: Label) -> int:
    """Store what is known of a model; the number of verdicts that rested on something else, and are deleted."""
    stored = labels_of(db.snapshot, source).get(suspect_id)
    new = {"label": label.label, "stratum": label.stratum, "rho": label.rho}
    if stored and label.rho is None and stored["label"] == label.label:
        new["rho"] = stored["rho"]
    if stored and all(stored[name] == value for name, value in new.items()):
        return 0
    row = {"label_id": f"{source}/{suspect_id}", "source": source, "suspect_id": suspect_id}
    db.writer.upsert("suspect_labels", [row | new])
    if stored is None:
        return 0
    sets = [row["key_set_id"] for row in db.snapshot.rows("key_sets", f"source = {literal(source)}")]
    resting = db.snapshot.rows("verdicts", among("key_set_id", sets), ["verdict_id"])
    db.writer.delete_matching("verdicts", pa.table({"verdict_id": [row["verdict_id"] for row in resting]}))
    return len(resting)


class _NewAnswers:
    """The answers of one model that are not stored yet, key by key, as rows."""

    def __init__(self, db: Database, key_set: Row, keys: Sequence[Row], suspect_id: str, descriptor: Descriptor):
        where = f"suspect_id = {literal(suspect_id)} AND {among('key_id', [key['key_id'] for key in keys])}"
        self.stored = {row["image_id"]: row["key_id"] for row in db.snapshot.rows("answers", where)}
        self.references, self.blocked = _references(db, keys), blocklist(db.snapshot)
        self.key_set, self.suspect_id, self.descriptor = key_set, suspect_id, descriptor
        self.result = AnswersResult()
        self.failures: dict[str, str] = {}
        self.images: list[Row] = []
        self.rows: list[Row] = []

    def add(self, key: Row, answers: Sequence[Answer]) -> None:
        start = f"answers/{self.key_set['key_set_id']}/{self.suspect_id}/{key['number']}"
        copies: Counter[str] = Counter()
        n_known = sum(key_id == key["key_id"] for key_id in self.stored.values())
        new: dict[str, Answer] = {}
        for answer in answers:
            copies[answer.sha256] += 1  # a model that answers alike each time has answered each time
            image_id = f"{start}/{answer.sha256[:16]}-{copies[answer.sha256]}"
            if image_id in self.stored:
                self.result.n_stored += 1
            elif refusal := self.blocked.refusal(image_id, answer.sha256, None):
                self.failures[image_id] = refusal
            else:
                new[image_id] = answer
        n_of_key, wanted = n_known + len(new), self.key_set["n_answers"]
        self.result.n_surplus += max(n_of_key - wanted, 0)
        self.result.n_unanswered += n_of_key == 0
        self.result.n_short += 0 < n_of_key < wanted
        if new:
            self._describe(key, new)

    def _describe(self, key: Row, new: Mapping[str, Answer]) -> None:
        reference, pictures = self.references[key["image_id"]], [answer.read() for answer in new.values()]
        self.result.n_references += sum(picture.sha256 == reference.sha256 for picture in pictures)
        [vector] = self.descriptor.describe([reference])
        distances = self.descriptor.distances(self.descriptor.describe(pictures), vector)
        for image_id, picture, distance in zip(new, pictures, distances.tolist(), strict=True):
            shared = {"role": "answer", "source": self.suspect_id, "prompt": key["prompt"]}
            self.images.append({"image_id": image_id, **shared, **picture_fields(picture)})
            row = {"key_id": key["key_id"], "suspect_id": self.suspect_id, "distance": distance}
            self.rows.append({"image_id": image_id, **row})


def _references(db: Database, keys: Sequence[Row]) -> dict[str, Picture]:
    """raises: NotFound if a reference was taken out"""
    ids = [key["image_id"] for key in keys]
    stored = {
        row["image_id"]: row["image"] for row in db.images(among("image_id", ids), ["image_id", "image"]).to_pylist()
    }
    if gone := sorted(image_id for image_id in ids if stored.get(image_id) is None):
        raise NotFound(f"the picture {gone[0]!r} of a key was taken out of {db.path}; find keys anew")
    return {image_id: read_picture(image_id, encoded) for image_id, encoded in stored.items()}
