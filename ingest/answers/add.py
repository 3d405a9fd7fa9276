"""Storing the answers of a model to a key set, with their distances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
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
from attrdb.store.ids import check_id
from attrdb.store.jobs import JobResult, running
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

    n_unanswered: keys without any; n_short: keys with fewer answers than the key set takes
    n_surplus: answers beyond that number, left out; n_repeated, n_others: see `Answers`
    n_references: answers that are, byte for byte, the source's own picture of the key
    """

    n_unanswered: int = 0
    n_short: int = 0
    n_surplus: int = 0
    n_repeated: int = 0
    n_others: int = 0
    n_references: int = 0


def add_answers(
    db: Database,
    key_set_id: str,
    suspect_id: str,
    path: Path,
    label: Label | None = None,
    report: Progress = no_progress,
) -> AnswersResult:
    """Store the answers of a model, from a folder or a Parquet file, see `files`. A rerun adds what has come since.

    label:  what is known of the model and the key set's source; None changes nothing
    raises: NotFound for an unknown key set or path; InvalidValue if the model is the source, if its label is another, or for
            an encoder that is not the one of the key set; as `read_answers`
    """
    check_id("model", suspect_id)
    db.refresh()
    key_set = key_set_of(db.snapshot, key_set_id)
    if suspect_id == key_set["source"]:
        raise InvalidValue(
            f"{suspect_id!r} is the source of key set {key_set_id!r}, whose answers chose its keys; give another name to a "
            "model that is not the source"
        )
    labels = [] if label is None else [_labelled(db, key_set["source"], suspect_id, label)]
    keys = {key["number"]: key for key in keys_of(db.snapshot, key_set_id)}
    descriptor = Descriptor(key_set["descriptor"])
    if descriptor.fingerprint != key_set["descriptor_hash"]:
        raise InvalidValue(
            f"encoder {descriptor.spec!r} has other weights here than those that key set {key_set_id!r} was made with; "
            "distances cannot be compared"
        )
    answers = read_answers(path, set(keys), report)
    settings = {"key_set_id": key_set_id, "suspect_id": suspect_id, "path": str(path)}
    with running(db.writer, "answers", f"{key_set_id}/{suspect_id}", settings) as job:
        taker = _Taker(db, key_set, list(keys.values()), suspect_id, descriptor)
        for done, (number, key) in enumerate(keys.items(), 1):
            report("compare answers", done, len(keys))
            taker.take(key, answers.of_prompt.get(number, ()))
        if taker.rows:
            db.writer.append_images(pa.Table.from_pylist(taker.images, IMAGES))
            db.writer.upsert("answers", taker.rows)
        db.writer.upsert("suspects", [{"suspect_id": suspect_id, "origin": str(path), "created_at": datetime.now(UTC)}])
        db.writer.upsert("suspect_labels", labels)
        job.failed(answers.failures)
        job.mended([name for name in job.failures if name not in answers.failures])
        job.n_done = len(taker.rows)
    counts = {"n_done": len(taker.rows), "n_repeated": answers.n_repeated, "n_others": answers.n_others}
    return replace(taker.result, **counts, failures=answers.failures)


def _labelled(db: Database, source: str, suspect_id: str, label: Label) -> Row:
    """raises: InvalidValue if the model has another label"""
    stored = labels_of(db.snapshot, source).get(suspect_id)
    if stored and stored["label"] != label.label:
        raise InvalidValue(
            f"model {suspect_id!r} is stored as {stored['label']} towards source {source!r}, not {label.label}; verdicts "
            "rest on that: give the model another name"
        )
    row = {"label_id": f"{source}/{suspect_id}", "source": source, "suspect_id": suspect_id, "label": label.label}
    return row | {"stratum": label.stratum if label.label == INNOCENT else None, "rho": label.rho}


class _Taker:
    """Takes answers of one model, key by key, and keeps the rows to be stored."""

    def __init__(self, db: Database, key_set: Row, keys: Sequence[Row], suspect_id: str, descriptor: Descriptor):
        where = f"suspect_id = {literal(suspect_id)} AND {among('key_id', [key['key_id'] for key in keys])}"
        self.stored = {row["image_id"]: row["key_id"] for row in db.snapshot.rows("answers", where)}
        self.references = _references(db, keys)
        self.key_set, self.suspect_id, self.descriptor = key_set, suspect_id, descriptor
        self.result = AnswersResult()
        self.images: list[Row] = []
        self.rows: list[Row] = []

    def take(self, key: Row, answers: Sequence[Answer]) -> None:
        """Keep the answers that are new, as many as the key set has room for."""
        start = f"answers/{self.key_set['key_set_id']}/{self.suspect_id}/{key['number']}"
        ids = {f"{start}/{answer.sha256[:16]}": answer for answer in answers}
        n_known = sum(key_id == key["key_id"] for key_id in self.stored.values())
        new = {image_id: answer for image_id, answer in ids.items() if image_id not in self.stored}
        kept = dict(islice(new.items(), max(self.key_set["n_answers"] - n_known, 0)))
        result, n_of_key = self.result, n_known + len(kept)
        result.n_stored += len(ids) - len(new)
        result.n_surplus += len(new) - len(kept)
        result.n_unanswered += n_of_key == 0
        result.n_short += 0 < n_of_key < self.key_set["n_answers"]
        if kept:
            self._keep(key, kept)

    def _keep(self, key: Row, kept: Mapping[str, Answer]) -> None:
        reference, pictures = self.references[key["image_id"]], [answer.read() for answer in kept.values()]
        self.result.n_references += sum(picture.sha256 == reference.sha256 for picture in pictures)
        [vector] = self.descriptor.describe([reference])
        distances = self.descriptor.distances(self.descriptor.describe(pictures), vector)
        for image_id, picture, distance in zip(kept, pictures, distances.tolist(), strict=True):
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
