"""Pictures that were taken out for good, which no import stores again; a real picture's whole way out of a database."""

import hashlib
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TOY, angle, rows
from PIL import Image
from removable import files

from attrdb.errors import InvalidValue
from attrdb.ingest.models.exemplars import read_exemplars
from attrdb.ingest.models.ingest_one import ingest_model
from attrdb.ingest.models.settings import settings_for
from attrdb.ingest.read.corpus import ingest_corpus
from attrdb.ingest.read.discover import open_corpus
from attrdb.ingest.read.embedding_shards import open_embeddings
from attrdb.ingest.read.embeddings import ingest_embeddings
from attrdb.upkeep.health import check


def ingest(db, folder, encoder, **options):
    return ingest_corpus(db, open_corpus(folder), [encoder], **options)


def ids(db):
    return db.sql("SELECT image_id FROM images ORDER BY 1")["image_id"].to_pylist()


@pytest.fixture
def photos(tmp_path):
    """Two pictures of noise, which no compression makes shorter than a needle."""
    for name in ("a", "b"):
        pixels = np.random.default_rng(ord(name)).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        file = tmp_path / "photos" / f"{name}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(file)
        file.with_suffix(".txt").write_text(f"the caption of picture {name}")
    return tmp_path / "photos"


def test_a_blocked_picture_is_left_out_whatever_it_is_called(empty, photos, toy_encoder, tmp_path):
    ingest(empty, photos, toy_encoder)
    removal = empty.remove(ids=["photos/a.png"], block=True)
    assert removal.n_blocked == 1  # a file's address is not blocked: it may be another picture's tomorrow
    digest = hashlib.sha256((photos / "a.png").read_bytes()).hexdigest()
    assert empty.sql("SELECT digest, kind, removal_id FROM blocked_digests").to_pylist() == [
        {"digest": digest, "kind": "image", "removal_id": removal.removal_id}
    ]
    result = ingest(empty, photos, toy_encoder)
    said = f"its picture was taken out of this database for good by removal {removal.removal_id}; leave it out"
    assert (result.n_done, result.n_stored) == (0, 1)
    assert result.failures == {"photos/a.png": f"image photos/a.png: {said}"}
    other = tmp_path / "other" / "renamed.png"
    other.parent.mkdir()
    shutil.copy(photos / "a.png", other)
    assert ingest(empty, other.parent, toy_encoder, retry_failed=True).failures == {
        "other/renamed.png": f"image other/renamed.png: {said}"
    }
    assert ids(empty) == ["photos/b.png"]
    assert empty.sql("SELECT item, reason LIKE '%for good%' AS is_told FROM failures ORDER BY 1").to_pylist() == [
        {"item": "other/renamed.png", "is_told": True},
        {"item": "photos/a.png", "is_told": True},
    ]


def test_without_block_nothing_is_kept_of_it_and_it_may_come_back(empty, photos, toy_encoder):
    ingest(empty, photos, toy_encoder)
    empty.remove(ids=["photos/a.png"], purge=True)
    digest = hashlib.sha256((photos / "a.png").read_bytes()).hexdigest()
    assert not [file for file, data in files(empty.path).items() if digest.encode() in data]
    assert ingest(empty, photos, toy_encoder).n_done == 1


def test_a_list_also_blocks_what_is_not_stored_yet(empty, photos, toy_encoder):
    digest = hashlib.sha256((photos / "b.png").read_bytes()).hexdigest()
    removal = empty.remove(ids=[digest.upper(), "nobody"], block=True)
    assert (removal.n_images, removal.n_not_found, removal.n_blocked) == (0, 2, 1)
    assert ingest(empty, photos, toy_encoder).n_done == 1
    assert ids(empty) == ["photos/a.png"]
    assert empty.remove(ids=[digest.upper(), "nobody"], block=True).removal_id is None  # nothing is left to do
    assert empty.sql("SELECT n_images, n_blocked FROM removals").to_pylist() == [{"n_images": 0, "n_blocked": 1}]


def test_an_address_is_blocked_where_pictures_are_not_stored(empty, tmp_path):
    folder = tmp_path / "laion"
    for part in ("img_emb", "metadata"):
        (folder / part).mkdir(parents=True)
    np.save(folder / "img_emb" / "img_emb_0.npy", np.array([angle(degree) for degree in (0, 10, 20)], np.float16))
    table = {"key": ["k0", "k1", "k2"], "url": [f"https://example.org/{n}.jpg" for n in range(3)]}
    pq.write_table(pa.table(table), folder / "metadata" / "metadata_0.parquet")
    empty.remove(ids=["https://example.org/1.jpg"], block=True)
    result = ingest_embeddings(empty, open_embeddings(str(folder)), TOY["spec"], "web")
    assert ids(empty) == ["web/k0", "web/k2"]
    assert list(result.failures) == ["web/k1"]
    assert "image web/k1: its address was taken out of this database for good" in result.failures["web/k1"]
    again = ingest_embeddings(empty, open_embeddings(str(folder)), TOY["spec"], "web", retry_failed=True)
    assert (again.n_done, list(again.failures)) == (0, ["web/k1"])


def test_a_writer_refuses_it_as_a_pretraining_image_and_as_an_exemplar(toy):
    digest = hashlib.sha256(b"picture").hexdigest()
    toy.remove(ids=[digest], block=True)
    new = rows([("new", "pretraining", None, 5)], sha256=[digest])
    for append in (toy.writer.append_images, toy.writer.append_bulk):
        with pytest.raises(InvalidValue, match="image new: its picture was taken out of this database for good"):
            append(new)
    with pytest.raises(InvalidValue, match="image n/e: its picture was taken out"):
        toy.writer.append_model(rows([("n/e", "exemplar", "n", 5)], sha256=[digest]), {"model_id": "n"})
    sample = rows([("n/0/1", "sample", "n", 5)], sha256=[digest])  # what a model draws is not the picture
    assert toy.writer.append_model(sample, {"model_id": "n"}).n_appended == 1


# --- a customized model ----------------------------------------------------------------------------------------------


def make(db, folder, base, encoder, report=lambda *_: None):
    settings = settings_for(str(base), "object", "vase", {})
    return ingest_model(db, read_exemplars(folder), settings, [encoder], "vase-1", report)


def needles(file):
    """Some bytes of a picture's file, and its caption."""
    return {"bytes": file.read_bytes()[-200:-40], "caption": file.with_suffix(".txt").read_bytes()}


def found(db, file):
    data = files(db.path).values()
    return {what for what, needle in needles(file).items() if any(needle in one for one in data)}


def test_a_picture_with_the_model_that_was_customized_on_it(empty, photos, tiny_base, toy_encoder, tmp_path):
    corpus = tmp_path / "corpus"
    shutil.copytree(photos, corpus)
    ingest(empty, corpus, toy_encoder)
    make(empty, photos, tiny_base, toy_encoder)
    assert found(empty, photos / "a.png") == {"bytes", "caption"}
    digest = hashlib.sha256((photos / "a.png").read_bytes()).hexdigest()
    removal = empty.remove(ids=[digest], models="remove", purge=True, block=True)
    assert removal.images == {"exemplar": 2, "pretraining": 1, "sample": 4}
    assert found(empty, photos / "a.png") == set()
    assert found(empty, corpus / "b.png") == {"bytes", "caption"}  # of the corpus
    assert list((empty.path / "weights").iterdir()) == []
    assert check(empty.snapshot) == []
    reported = []
    with pytest.raises(InvalidValue, match=r"a\.png: its picture was taken out of this database for good"):
        make(empty, photos, tiny_base, toy_encoder, lambda *stage: reported.append(stage))
    assert reported == []  # before training
    (photos / "a.png").unlink()
    assert make(empty, photos, tiny_base, toy_encoder).appended


def test_a_model_that_stays_is_not_taken_for_one_on_all_of_its_exemplars(empty, photos, tiny_base, toy_encoder):
    make(empty, photos, tiny_base, toy_encoder)
    digest = hashlib.sha256((photos / "a.png").read_bytes()).hexdigest()
    removal = empty.remove(ids=[digest], purge=True)
    assert [(model.model_id, model.action, model.left) for model in removal.models] == [("vase-1", "list", (1, 4))]
    assert found(empty, photos / "a.png") == set()
    assert not [file for file, data in files(empty.path).items() if digest.encode() in data]
    with pytest.raises(InvalidValue, match=r"model 'vase-1' is in .* with exemplars = "):
        make(empty, photos, tiny_base, toy_encoder)
    assert check(empty.snapshot) == []
