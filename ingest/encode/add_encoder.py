"""Backfill: give an encoder's column to the images of an existing database.

<database>/jobs/.encode-<encoder_id>/  features of images whose fragment is not finished, in Parquet files that appear whole

Lance keeps a table in fragments, and a column of one can be replaced without touching the others. A fragment is committed
once all of its images are encoded; until then its features wait in the job's folder, from where a rerun takes them.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from lance.commit import CommitConflictError
from PIL import Image

from attrdb.database import Database
from attrdb.ingest.encode import Encoder
from attrdb.ingest.encode.stream import Encoded, encode_stream
from attrdb.ingest.read.pictures import read_picture
from attrdb.progress import Progress, counted, no_progress
from attrdb.store import jobs
from attrdb.store.files import write_whole
from attrdb.store.job_folders import encode_job
from attrdb.store.jobs import JobResult
from attrdb.store.lance_errors import storage
from attrdb.store.locks import exclusive_lock
from attrdb.store.predicates import among
from attrdb.store.schema import OF_TESTS, feature_array, feature_type

CHECKPOINT = 1024  # images; what a kill costs at most
READ_ROWS = 64  # encoded images that are read at once


def backfill(
    db: Database,
    encoder: Encoder,
    *,
    retry_failed: bool = False,
    report: Progress = no_progress,
) -> JobResult:
    """Encode every image that has no feature of the encoder yet, from its stored bytes.

    Others may read and append meanwhile; what they append without this encoder is left to the next call. An image that
    cannot be decoded is recorded with its reason and passed over, unless retry_failed.
    raises: InvalidValue if the database has an encoder of that id that differs, Busy if another process is at it
    """
    encoder_id = db.writer.add_encoder(
        encoder.spec, encoder.dimension, encoder.preprocessing, encoder.weights_fingerprint
    )
    folder = encode_job(db.path, encoder_id)
    with (
        exclusive_lock(folder.lock, f"encode-{encoder_id} is being run"),
        jobs.running(db.writer, "encode", encoder_id, {"spec": encoder.spec}) as job,
    ):
        folder.make()
        job.n_skipped = db.snapshot.count(f"`{encoder_id}` IS NULL AND image IS NULL")
        passed_over = set() if retry_failed else set(job.failures)
        n_missing = db.snapshot.count(missing(encoder_id))
        add_done = counted(report, f"encode {encoder_id}", n_missing)
        add_done(0)
        work = _Work(db, encoder, encoder_id, folder.path, job, passed_over, add_done)
        finished: set[int] = set()
        while left := [fragment for fragment in work.fragments() if fragment.fragment_id not in finished]:
            n_encoded = work.fill(left[0])
            if n_encoded is not None:
                finished.add(left[0].fragment_id)
                job.n_done += n_encoded
        folder.remove()
    return job.result()


def missing(encoder_id: str) -> str:
    """The predicate of images that lack a feature; pictures of source-model tests are compared once, as they are stored."""
    return f"`{encoder_id}` IS NULL AND image IS NOT NULL AND NOT ({among('role', OF_TESTS)})"


@dataclass
class _Work:
    db: Database
    encoder: Encoder
    encoder_id: str
    folder: Path
    job: jobs.Job
    passed_over: set[str]
    add_done: Callable[[int], None]

    def fragments(self) -> list[lance.LanceFragment]:
        return self.db.snapshot.tables["images"].get_fragments()

    def fill(self, fragment: lance.LanceFragment) -> int | None:
        """Encode the images of a fragment that lack a feature, and commit them; how many.

        None if another writer changed the fragment meanwhile: then nothing is committed, and nothing has to be encoded
        again.
        """
        with storage(self.db.path):
            batches = fragment.to_batches(columns=["image_id"], filter=missing(self.encoder_id))
            wanted = {image_id for batch in batches for image_id in batch["image_id"].to_pylist()}
        known = self._checkpointed(wanted)
        parts = list(known.values())
        have = {image_id for part in parts for image_id in part["image_id"].to_pylist()}
        self.add_done(len(have))
        files = list(known)
        with closing(encode_stream([self.encoder], self._items(fragment, have), _read)) as encoded:
            while chunk := list(islice(encoded, CHECKPOINT)):
                self.job.failed({image.item[0]: str(image.error) for image in chunk if image.error})
                if good := [image for image in chunk if not image.error]:
                    parts.append(self._table(good))
                    files.append(self._checkpoint(parts[-1]))
                self.add_done(len(chunk))
        if parts and not self._commit(fragment, parts):
            return None
        for file in files:
            file.unlink()
        encoded_ids = [image_id for part in parts for image_id in part["image_id"].to_pylist()]
        self.job.mended(encoded_ids)
        return len(encoded_ids)

    def _items(self, fragment: lance.LanceFragment, have: set[str]) -> Iterator[tuple[str, bytes]]:
        for batch in fragment.to_batches(
            columns=["image_id", "image"], filter=missing(self.encoder_id), batch_size=READ_ROWS
        ):
            for image_id, image in zip(batch["image_id"].to_pylist(), batch["image"], strict=True):
                if image_id not in have and image_id not in self.passed_over:
                    yield image_id, image.as_py()

    def _table(self, good: list[Encoded]) -> pa.Table:
        features = feature_array(np.stack([image.features[0] for image in good]))
        return pa.table(
            {"image_id": [image.item[0] for image in good], self.encoder_id: features}, schema=self._schema()
        )

    def _schema(self) -> pa.Schema:
        return pa.schema(
            [pa.field("image_id", pa.string(), nullable=False), (self.encoder_id, feature_type(self.encoder.dimension))]
        )

    def _checkpoint(self, table: pa.Table) -> Path:
        file = self.folder / f"{uuid.uuid4().hex}.parquet"
        write_whole(file, lambda part: pq.write_table(table, part))
        return file

    def _checkpointed(self, wanted: set[str]) -> dict[Path, pa.Table]:
        """What waits in the job's folder of the wanted images, by file."""
        tables = {}
        for file in sorted(self.folder.glob("*.parquet")):
            table = pq.read_table(file, schema=self._schema())
            mine = pa.array([image_id in wanted for image_id in table["image_id"].to_pylist()], pa.bool_())
            if pc.any(mine).as_py():
                tables[file] = table.filter(mine)
        return tables

    def _commit(self, fragment: lance.LanceFragment, parts: list[pa.Table]) -> bool:
        """Write the features into the fragment's column; False if another writer changed the fragment meanwhile."""
        batches = [batch for part in parts for batch in part.to_batches()]
        reader = pa.RecordBatchReader.from_batches(self._schema(), batches)
        images = self.db.snapshot.tables["images"]

        def commit() -> None:
            updated, fields = fragment.update_columns(reader, left_on="image_id")
            change = lance.LanceOperation.Update(
                updated_fragments=[updated], fields_modified=fields, update_mode="rewrite_columns"
            )
            lance.LanceDataset.commit(images.uri, change, read_version=images.version)

        try:
            with storage(self.db.path), self.db.writer.writing():
                commit()
        except CommitConflictError:
            return False
        finally:
            self.db.refresh()
        return True


def _read(item: tuple[str, bytes]) -> tuple[None, Image.Image]:
    return None, read_picture(*item).image
