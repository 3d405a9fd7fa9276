"""Ingest a corpus: pretraining images from folders, tables and webdataset shards, encoded on the way in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from attrdb.database import Database
from attrdb.errors import InvalidValue
from attrdb.ingest.encode import Encoder, encode
from attrdb.ingest.encode.stream import Encoded, encode_stream
from attrdb.ingest.read.discover import Corpus
from attrdb.ingest.read.pictures import Picture
from attrdb.ingest.read.sources import Item
from attrdb.progress import Progress, counted, no_progress
from attrdb.store import jobs
from attrdb.store.blocklist import Blocklist, blocklist
from attrdb.store.jobs import JobResult
from attrdb.store.schema import IMAGES, encoder_id_of, feature_array

CHUNK = 1024  # images a commit
CHUNK_BYTES = 128 * 2**20  # of encoded images, beyond which a commit is closed early: Arrow takes 2 GiB at most


@dataclass
class Outcome:
    """What became of the items of one kind of source."""

    n_done: int = 0
    n_stored: int = 0  # before
    n_failed: int = 0


@dataclass
class CorpusResult(JobResult):
    """What an import did. outcomes: by kind of source; failures: by image_id."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)


def register(db: Database, encoders: Sequence[Encoder]) -> None:
    """Check the encoders against those the database has, and add the new ones.

    raises: InvalidValue for an encoder that differs from the stored one, a new one once images are stored, or one given twice
    """
    specs = [encoder.spec for encoder in encoders]
    if twice := sorted({spec for spec in specs if specs.count(spec) > 1}):
        raise InvalidValue(f"encoder {twice[0]!r} is given twice; give it once")
    identities = [
        (encoder.spec, encoder.dimension, encoder.preprocessing, encoder.weights_fingerprint) for encoder in encoders
    ]
    new = [identity for identity in identities if not db.writer.check_encoder(*identity)]
    if new and db.snapshot.count("true"):
        known = ", ".join(row["spec"] for row in db.encoders.values())
        raise InvalidValue(
            f"encoder {new[0][0]!r} is new, and the images in {db.path} have no features of it; its encoders are: {known}"
        )
    for identity in identities:
        db.writer.add_encoder(*identity)


def picture_fields(picture: Picture) -> dict[str, Any]:
    """The columns of images that a picture fills."""
    return {
        "sha256": picture.sha256,
        "width": picture.width,
        "height": picture.height,
        "image": picture.encoded,
    }


def image_rows(
    rows: list[dict],
    pictures: list[Picture],
    encoders: Sequence[Encoder],
    features: Sequence[np.ndarray] | None = None,
) -> pa.Table:
    """Rows for `Writer.append_images`: the given fields, with what the pictures and encoders add.

    features: (n, dimension) of every encoder, where they are there already
    """
    full = [{**row, **picture_fields(picture)} for row, picture in zip(rows, pictures, strict=True)]
    table = pa.Table.from_pylist(full, IMAGES)
    images = [picture.image for picture in pictures]
    for number, encoder in enumerate(encoders):
        column = encode(encoder, images) if features is None else features[number]
        table = table.append_column(encoder_id_of(encoder.spec), feature_array(column))
    return table


def ingest_corpus(
    db: Database,
    corpus: Corpus,
    encoders: Sequence[Encoder],
    *,
    retry_failed: bool = False,
    report: Progress = no_progress,
) -> CorpusResult:
    """Append the images of a corpus that are not stored yet, a commit for every CHUNK of them.

    An image that cannot be used is left out and recorded with its reason. Rerun, the job resumes where it was and passes over
    what has failed, unless retry_failed. Pictures are read and decoded while the encoders work.
    raises: InvalidValue for an encoder as `register`, and for nothing that an item holds
    """
    register(db, encoders)
    settings = {
        "source": corpus.source,
        "path": str(corpus.path.resolve()),
        "encoders": [encoder.spec for encoder in encoders],
    }
    add_done = counted(report, f"ingest {corpus.source}", corpus.n_items)
    with jobs.running(db.writer, "ingest corpus", f"{corpus.source} from {corpus.path.resolve()}", settings) as job:
        work = _Import(db, corpus, encoders, job, set() if retry_failed else set(job.failures), add_done)
        with closing(encode_stream(encoders, work.fresh_items(), partial(_read, blocklist(db.snapshot)))) as encoded:
            while chunk := _chunk(encoded):
                work.append(chunk)
                add_done(len(chunk))
        work.record_failures({})
        # What has failed before and did not come up again: a shard that is whole now, a file that was taken away.
        job.mended(set(job.failures) - work.seen_failing)
        job.n_stored = sum(outcome.n_stored for outcome in work.outcomes.values())
        return CorpusResult(**vars(job.result()), outcomes=dict(work.outcomes))


def _chunk(encoded: Iterator[Encoded]) -> list[Encoded]:
    """The next images that are committed together."""
    chunk: list[Encoded] = []
    size = 0
    while len(chunk) < CHUNK and size < CHUNK_BYTES and (image := next(encoded, None)):
        chunk.append(image)
        size += len(image.kept["image"]) if image.kept else 0
    return chunk


class _Import:
    """An import under way: gives out the items that are neither stored nor passed over, and commits what became of them."""

    def __init__(
        self,
        db: Database,
        corpus: Corpus,
        encoders: Sequence[Encoder],
        job: jobs.Job,
        passed_over: set[str],
        add_done: Callable[[int], None],
    ):
        self.db = db
        self.corpus = corpus
        self.encoders = encoders
        self.job = job
        self.passed_over = passed_over
        self.add_done = add_done
        self.outcomes: dict[str, Outcome] = defaultdict(Outcome)
        self.failures: dict[str, str] = {}  # not recorded yet
        self.underway: dict[str, Item] = {}  # given out and not committed yet
        self.seen_failing: set[str] = set()

    def fresh_items(self) -> Iterator[Item]:
        items = self.corpus.items()
        while chunk := list(islice(items, CHUNK)):
            stored = self.db.snapshot.stored([item.image_id for item in chunk])
            for item in chunk:
                if item.image_id in self.passed_over:
                    self.seen_failing.add(item.image_id)
                    self.outcomes[item.kind].n_failed += 1
                    self.add_done(1)
                elif known := stored.get(item.image_id) or self.underway.get(item.image_id):
                    self._compare(item, known)
                    self.add_done(1)
                else:
                    self.underway[item.image_id] = item
                    yield item

    def _compare(self, item: Item, known: dict | Item) -> None:
        try:
            row = {"uri": known.uri, "sha256": known.read().sha256} if isinstance(known, Item) else known
            _check_same(item, row)
            self.outcomes[item.kind].n_stored += 1
        except InvalidValue as error:
            self.failures[item.image_id] = str(error)
            self.seen_failing.add(item.image_id)
            self.outcomes[item.kind].n_failed += 1

    def append(self, chunk: list[Encoded]) -> None:
        """Commit a chunk and record its failures."""
        good = [image for image in chunk if image.error is None]
        if good:
            appended = self.db.writer.append_images(self._table(good))
            n_skipped = appended.n_skipped  # that another process has stored meanwhile
            for number, image in enumerate(good):
                outcome = self.outcomes[image.item.kind]
                if number < n_skipped:
                    outcome.n_stored += 1
                else:
                    outcome.n_done += 1
            self.job.n_done += appended.n_appended
            self.job.mended(image.item.image_id for image in good)
        for image in chunk:
            del self.underway[image.item.image_id]
            self.outcomes[image.item.kind].n_failed += image.error is not None
        self.record_failures({image.item.image_id: str(image.error) for image in chunk if image.error})

    def _table(self, good: list[Encoded]) -> pa.Table:
        table = pa.Table.from_pylist([image.kept for image in good], IMAGES)
        columns = zip(*(image.features for image in good), strict=True)
        for encoder, features in zip(self.encoders, columns, strict=True):
            table = table.append_column(encoder_id_of(encoder.spec), feature_array(np.stack(features)))
        return table

    def record_failures(self, failures: dict[str, str]) -> None:
        self.seen_failing |= failures.keys()
        self.job.failed(self.failures | failures)
        self.failures.clear()


def _read(blocked: Blocklist, item: Item) -> tuple[dict[str, Any], Image.Image]:
    picture = item.read()
    blocked.check(item.image_id, picture.sha256, item.uri)
    row = {"image_id": item.image_id, "role": "pretraining", **item.fields(), **picture_fields(picture)}
    return row, picture.image


def _check_same(item: Item, stored: dict) -> None:
    """raises: InvalidValue if another picture is stored under the item's id"""
    if item.uri is not None and item.uri == stored.get("uri"):
        return
    if item.read().sha256 != stored["sha256"]:
        raise InvalidValue(
            f"image {item.image_id!r} is stored already, with other content, from {stored.get('uri')}; "
            "give this corpus another --source"
        )
