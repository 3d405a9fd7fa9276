"""Ingest a corpus: pretraining images from a folder, Parquet files or webdataset shards, encoded on the way in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from attrdb.database import Database
from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.encode import Encoder, encode
from attrdb.ingest.encode.stream import Encoded, encode_stream
from attrdb.ingest.read.pictures import Picture, image_files
from attrdb.ingest.read.sources import Item, count_rows, folder_items, parquet_items
from attrdb.ingest.read.webdataset import count_webdataset, shards, webdataset_items
from attrdb.progress import Progress, counted, no_progress
from attrdb.store import jobs
from attrdb.store.blocklist import Blocklist, blocklist
from attrdb.store.jobs import JobResult
from attrdb.store.schema import IMAGES, encoder_id_of, feature_array

CHUNK = 1024  # images a commit
CHUNK_BYTES = 128 * 2**20  # of encoded images, beyond which a commit is closed early: Arrow takes 2 GiB at most


@dataclass(frozen=True)
class Corpus:
    """Images that may be ingested. n_items: how many there are, None where that would take reading all of them."""

    path: Path
    source: str
    n_items: int | None
    items: Callable[[], Iterator[Item]]


def open_corpus(path: Path, source: str | None = None) -> Corpus:
    """The corpus at a path, looked at but not read: an image folder, Parquet files, or webdataset shards.

    source:  name of the data set; the folder's name when left out, for Parquet files what their rows say
    raises:  NotFound if there is nothing at the path, InvalidValue if it is no corpus or has no image in it
    """
    if not path.exists():
        raise NotFound(f"no folder or file {path}")
    name = source or path.resolve().name
    if shards(path):
        name = source or path.resolve().stem
        return Corpus(path, name, count_webdataset(path), partial(webdataset_items, path, name))
    tables = [path] if path.suffix == ".parquet" else sorted(path.glob("*.parquet")) if path.is_dir() else []
    if tables:
        n_items = sum(count_rows(table) for table in tables)
        items: Callable[[], Iterator[Item]] = partial(
            chain.from_iterable, [parquet_items(table, source) for table in tables]
        )
    elif path.is_dir():
        n_items = sum(1 for _ in image_files(path))
        items = partial(folder_items, path, name)
    else:
        raise InvalidValue(f"{path} is neither a folder of images nor a .parquet or .tar file")
    if not n_items:
        raise InvalidValue(f"{path} has no image in it; PNG, JPEG, WebP, BMP and GIF files are read")
    return Corpus(path, name, n_items, items)


def register(db: Database, encoders: Sequence[Encoder]) -> None:
    """Check the encoders against those the database has, and add the new ones.

    raises: InvalidValue for an encoder that differs from the stored one, or a new one once images are stored
    """
    identities = [(one.spec, one.dimension, one.preprocessing, one.weights_fingerprint) for one in encoders]
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
    """Rows for `Database.append_images`: the given fields, with what the pictures and encoders add.

    features: (n, dimension) of every encoder, where they are there already
    """
    full = [{**row, **picture_fields(picture)} for row, picture in zip(rows, pictures, strict=True)]
    table = pa.Table.from_pylist(full, IMAGES)
    images = [picture.image for picture in pictures]
    for number, encoder in enumerate(encoders):
        found = encode(encoder, images) if features is None else features[number]
        table = table.append_column(encoder_id_of(encoder.spec), feature_array(found))
    return table


def ingest_corpus(
    db: Database,
    corpus: Corpus,
    encoders: Sequence[Encoder],
    *,
    retry_failed: bool = False,
    report: Progress = no_progress,
) -> JobResult:
    """Append the images of a corpus that are not stored yet, a commit for every CHUNK of them.

    An image that cannot be used is left out and recorded with its reason; given again, the job goes on where it was and
    passes over what has failed, unless retry_failed. Pictures are read and decoded while the encoders work.
    raises: InvalidValue for an encoder as `register`
    """
    register(db, encoders)
    settings = {
        "source": corpus.source,
        "path": str(corpus.path.resolve()),
        "encoders": [encoder.spec for encoder in encoders],
    }
    add_done = counted(report, f"ingest {corpus.source}", corpus.n_items)
    with jobs.running(db.writer, "ingest corpus", f"{corpus.source} from {corpus.path.resolve()}", settings) as job:
        fresh = _Fresh(db, corpus, set() if retry_failed else set(job.failures), add_done)
        with closing(encode_stream(encoders, fresh.items(), partial(_read, blocklist(db.snapshot)))) as encoded:
            while chunk := _chunk(encoded):
                _append(db, chunk, encoders, fresh, job)
                add_done(len(chunk))
        job.failed(fresh.failures)
        # What has failed before and did not come up again: a shard that is whole now, a file that was taken away.
        job.mended(set(job.failures) - fresh.seen_failing)
        job.n_stored += fresh.n_stored
    return job.result()


def _chunk(encoded: Iterator[Encoded]) -> list[Encoded]:
    """The next images that are committed together."""
    chunk: list[Encoded] = []
    size = 0
    while len(chunk) < CHUNK and size < CHUNK_BYTES and (one := next(encoded, None)):
        chunk.append(one)
        size += len(one.kept["image"]) if one.kept else 0
    return chunk


class _Fresh:
    """The items of a corpus that are neither stored nor passed over; counts and checks the others on the way."""

    def __init__(self, db: Database, corpus: Corpus, passed_over: set[str], add_done: Callable[[int], None]):
        self.db = db
        self.corpus = corpus
        self.passed_over = passed_over
        self.add_done = add_done
        self.n_stored = 0
        self.failures: dict[str, str] = {}
        self.underway: dict[str, Item] = {}  # given out and not committed yet
        self.seen_failing: set[str] = set()

    def items(self) -> Iterator[Item]:
        items = self.corpus.items()
        while chunk := list(islice(items, CHUNK)):
            stored = self.db.snapshot.stored([item.image_id for item in chunk])
            for item in chunk:
                if item.image_id in self.passed_over:
                    self.seen_failing.add(item.image_id)
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
            self.n_stored += 1
        except InvalidValue as error:
            self.failures[item.image_id] = str(error)
            self.seen_failing.add(item.image_id)


def _read(blocked: Blocklist, item: Item) -> tuple[dict[str, Any], Image.Image]:
    picture = item.read()
    blocked.check(item.image_id, picture.sha256, item.uri)
    row = {"image_id": item.image_id, "role": "pretraining", **item.fields(), **picture_fields(picture)}
    return row, picture.image


def _append(db: Database, chunk: list[Encoded], encoders: Sequence[Encoder], fresh: _Fresh, job: jobs.Job) -> None:
    """Commit a chunk and record its failures."""
    good = [one for one in chunk if one.error is None]
    if good:
        table = pa.Table.from_pylist([one.kept for one in good], IMAGES)
        for encoder, features in zip(encoders, zip(*(one.features for one in good), strict=True), strict=True):
            table = table.append_column(encoder_id_of(encoder.spec), feature_array(np.stack(features)))
        appended = db.writer.append_images(table)
        job.n_done += appended.n_appended
        job.n_stored += appended.n_skipped
        job.mended(one.item.image_id for one in good)
    for one in chunk:
        del fresh.underway[one.item.image_id]
    failures = {one.item.image_id: str(one.error) for one in chunk if one.error}
    fresh.seen_failing |= failures.keys()
    job.failed(fresh.failures | failures)
    fresh.failures.clear()


def _check_same(item: Item, stored: dict) -> None:
    """raises: InvalidValue if another picture is stored under the item's id"""
    if item.uri is not None and item.uri == stored.get("uri"):
        return
    if item.read().sha256 != stored["sha256"]:
        raise InvalidValue(
            f"image {item.image_id!r} is stored already, with other content, from {stored.get('uri')}; "
            "give this corpus another --source"
        )
