"""Adding an encoder to a database that holds images: every fragment, killed and rerun, beside writers and compaction."""

import lance
import numpy as np
import pyarrow as pa
import pytest
from conftest import ToyEncoder, picture
from test_ingest_corpus import ingest

from attrdb.errors import Busy, InvalidValue
from attrdb.ingest.encode import Pixels, encode
from attrdb.ingest.encode import add_encoder as module
from attrdb.ingest.encode.add_encoder import backfill
from attrdb.ingest.read import corpus
from attrdb.ingest.read.pictures import read_picture_file
from attrdb.store.job_folders import encode_job
from attrdb.store.locks import exclusive_lock
from attrdb.upkeep import optimize

N = 7


@pytest.fixture
def photos(tmp_path):
    for number in range(N):
        picture(tmp_path / "photos" / f"{number}.png", (30 * number, 255 - 30 * number, 40))
    return tmp_path / "photos"


@pytest.fixture
def stored(empty, photos, toy_encoder, monkeypatch):
    """Seven images in three fragments, encoded by the toy encoder only."""
    monkeypatch.setattr(corpus, "CHUNK", 3)
    ingest(empty, photos, [toy_encoder])
    return empty


def features(db):
    table = db.images("true", ["image_id", "pixels_2"]).sort_by("image_id")
    return table["image_id"].to_pylist(), table["pixels_2"].to_pylist()


def expected(photos):
    files = sorted(photos.iterdir())
    return [f"photos/{file.name}" for file in files], encode(
        Pixels(2), [read_picture_file(file).image for file in files]
    )


def assert_filled(db, photos):
    ids, found = features(db)
    wanted_ids, wanted = expected(photos)
    assert ids == wanted_ids
    np.testing.assert_allclose(np.array(found), wanted, atol=1e-6)


def test_every_image_gets_its_feature(stored, photos):
    assert len(stored.snapshot.tables["images"].get_fragments()) == 3
    result = backfill(stored, Pixels(2))
    assert (result.n_done, result.n_skipped, result.failures) == (N, 0, {})
    assert_filled(stored, photos)
    assert stored.status()["encoders"]["pixels_2"] == {
        "spec": "pixels:2",
        "dimension": 12,
        "n_encoded": N,
        "n_to_encode": 0,
        "index": {"state": "none"},
    }
    assert not (stored.path / "jobs" / ".encode-pixels_2").exists()


def test_the_other_columns_and_rows_stay_as_they_are(stored):
    columns = ["image_id", "sha256", "image", "toy_2"]
    before = stored.images("true", columns)
    backfill(stored, Pixels(2))
    assert stored.images("true", columns).equals(before)


def test_given_again_there_is_nothing_to_do(stored):
    backfill(stored, Pixels(2))
    version = stored.version
    assert backfill(stored, Pixels(2)).n_done == 0
    assert stored.version == version


def test_what_was_appended_since_is_encoded_by_the_next_call(stored, photos, toy_encoder):
    backfill(stored, Pixels(2))
    picture(photos / "9.png", (1, 2, 3))
    ingest(stored, photos, [toy_encoder])
    assert stored.status()["encoders"]["pixels_2"]["n_to_encode"] == 1
    assert backfill(stored, Pixels(2)).n_done == 1
    assert_filled(stored, photos)


class Counting(Pixels):
    """Pixels that end the job after some pictures."""

    def __init__(self, until):
        super().__init__(2)
        self.until, self.seen = until, 0

    def features(self, batch):
        self.seen += len(batch)
        if self.seen > self.until:
            raise KeyboardInterrupt
        return super().features(batch)


@pytest.mark.parametrize("until", [0, 1, 2, 3, 4, 5, 6])
def test_interrupted_anywhere_nothing_is_encoded_twice(stored, photos, monkeypatch, until):
    monkeypatch.setattr(module, "CHECKPOINT", 1)
    monkeypatch.setattr("attrdb.ingest.encode.stream.SMALL_BATCH", 1)
    monkeypatch.setattr("attrdb.ingest.encode.stream.LARGE_BATCH", 1)
    with pytest.raises(KeyboardInterrupt):
        backfill(stored, Counting(until))
    stored.refresh()
    n_left = stored.status()["encoders"]["pixels_2"]["n_to_encode"]
    kept = sum(1 for _ in (stored.path / "jobs" / ".encode-pixels_2").glob("*.parquet"))
    rest = Counting(N)
    assert backfill(stored, rest).n_done == n_left
    assert rest.seen == n_left - kept
    assert_filled(stored, photos)


def test_a_fragment_that_another_writer_merged_is_not_lost(stored, photos, monkeypatch):
    """Compaction in the middle: what was encoded for the old fragment is committed to the new one."""
    passes = []

    class Merging(Pixels):
        def features(self, batch):
            if not passes:
                images = lance.dataset(str(stored.path / "images.lance"))
                images.optimize.compact_files(target_rows_per_fragment=100)
            passes.append(len(batch))
            return super().features(batch)

    result = backfill(stored, Merging(2))
    assert_filled(stored, photos)
    assert len(stored.snapshot.tables["images"].get_fragments()) == 1
    assert sum(passes) == N
    assert result.n_done == N


def test_appends_in_the_middle_are_kept(stored, photos, toy_encoder):
    class Appending(Pixels):
        done = False

        def features(self, batch):
            if not self.done:
                self.done = True
                other = type(stored)(stored.path)
                other.writer.append_images(pa.table({"image_id": ["late"], "role": ["pretraining"]}))
            return super().features(batch)

    result = backfill(stored, Appending(2))
    assert result.n_done == N
    ids, found = features(stored)
    assert dict(zip(ids, found, strict=True))["late"] is None
    assert len(ids) == N + 1


def test_images_that_cannot_be_encoded_are_recorded_and_can_be_tried_again(stored):
    rows = {"image_id": ["broken", "bare"], "role": ["pretraining"] * 2, "image": [b"no picture", None]}
    stored.writer.append_images(pa.table(rows))
    result = backfill(stored, Pixels(2))
    assert (result.n_done, result.n_skipped) == (N, 1)
    assert list(result.failures) == ["broken"]
    assert "image broken cannot be decoded" in result.failures["broken"]
    found = stored.sql("SELECT job_id, item FROM failures").to_pylist()
    assert found == [{"job_id": "encode/pixels_2", "item": "broken"}]
    again = Counting(100)
    assert backfill(stored, again, retry_failed=False).failures == result.failures
    assert list(backfill(stored, again, retry_failed=True).failures) == ["broken"]
    assert again.seen == 0


def test_with_indices_and_after_optimize(stored, photos, toy_encoder):
    optimize.optimize(stored.writer)
    backfill(stored, Pixels(2))
    optimize.optimize(stored.writer)
    assert_filled(stored, photos)
    assert stored.snapshot.stored(["photos/3.png"]).keys() == {"photos/3.png"}


def test_another_encoder_of_that_name_is_refused(stored):
    other = ToyEncoder()
    other.weights_fingerprint = "other"
    with pytest.raises(InvalidValue, match="encoder 'toy_2' has weights fingerprint 'other'"):
        backfill(stored, other)


def test_two_at_once(stored):
    with (
        exclusive_lock(encode_job(stored.path, "pixels_2").lock, "held"),
        pytest.raises(Busy, match=r"encode-pixels_2 is being run by another process; wait for it"),
    ):
        backfill(stored, Pixels(2))
