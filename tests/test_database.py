"""Appending and reading: atomic, deterministic, and refused with the row named."""

import shutil

import lance
import lancedb
import numpy as np
import pyarrow as pa
import pytest
from conftest import TOY, rows

import attrdb
from attrdb.errors import InvalidValue, NotFound
from attrdb.store.schema import SCHEMA_VERSION, feature_array
from attrdb.store.validation import conform_images
from attrdb.upkeep.optimize import optimize


def ids(db):
    return db.sql("SELECT image_id FROM images ORDER BY image_id")["image_id"].to_pylist()


def test_append_skips_what_is_stored(toy):
    again = rows([("p10", "pretraining", None, 10), ("p30", "pretraining", None, 30)])
    appended = toy.writer.append_images(again)
    assert (appended.n_appended, appended.n_skipped) == (1, 1)
    assert ids(toy).count("p10") == 1
    version = toy.version
    assert toy.writer.append_images(again).n_appended == 0
    assert toy.version == version


def test_two_writers_that_do_not_see_each_other_store_an_image_once(toy):
    other = attrdb.open(toy.path)
    same = rows([("new", "pretraining", None, 30)])
    # What append_images does after its look-up, which two processes may both pass.
    for db in (toy, other):
        images = db.snapshot.tables["images"]
        table = conform_images(same, images.schema)
        images.merge_insert("image_id").when_not_matched_insert_all().execute(table)
    for model_id in ("n", "n", "o"):
        toy.writer.upsert("models", [{"model_id": model_id}], update=False)
    toy.refresh()
    assert ids(toy).count("new") == 1
    assert toy.sql("SELECT model_id FROM models ORDER BY 1")["model_id"].to_pylist() == ["m", "n", "o"]


def test_writers_of_different_images_lose_none(toy):
    other = attrdb.open(toy.path)
    toy.writer.append_images(rows([("a", "pretraining", None, 30)]))
    other.writer.append_images(rows([("b", "pretraining", None, 31)]))
    toy.refresh()
    assert {"a", "b"} <= set(ids(toy))


def test_a_model_is_one_commit(toy):
    versions = lance.dataset(str(toy.path / "images.lance")).versions()
    # empty, encoder column, corpus, model
    assert len(versions) == 4


def test_a_reader_stays_at_its_version(toy):
    reader = attrdb.open(toy.path)
    toy.writer.append_images(rows([("late", "pretraining", None, 50)]))
    assert "late" not in ids(reader)
    reader.refresh()
    assert "late" in ids(reader)


def test_only_tables_that_have_changed_are_opened_again(toy):
    reader = attrdb.open(toy.path)
    before = reader.snapshot
    reader.refresh()
    assert reader.snapshot is before
    toy.writer.append_images(rows([("late", "pretraining", None, 50)]))
    reader.refresh()
    reopened = {name for name, table in before.tables.items() if reader.snapshot.tables[name] is not table}
    assert reopened == {"images"}
    assert "late" in ids(reader)


def test_no_write_changes_a_snapshot_that_others_hold(toy):
    def new(image_id):
        return rows([(image_id, "pretraining", None, 50)])

    model = rows([("n/e", "exemplar", "n", 3), ("n/0/1", "sample", "n", 4)])
    writes = [
        lambda: toy.writer.append_images(new("one")),
        lambda: toy.writer.append_bulk(new("two")),
        lambda: toy.writer.add_encoder("late:3", 3, {}, "none"),
        lambda: toy.writer.append_model(model, {"model_id": "n"}),
        lambda: toy.writer.upsert("models", [{"model_id": "m", "kind": "object"}]),
        lambda: toy.writer.update("models", "model_id = 'm'", {"split": "val"}),
        lambda: toy.writer.delete("models", "model_id = 'n'"),
        lambda: toy.writer.delete_matching("images", pa.table({"image_id": ["one"]})),
        lambda: toy.remove(ids=["two"]),
        lambda: optimize(toy.writer),
    ]
    for write in writes:
        held = toy.snapshot
        before = {name: (table.version, table.to_table()) for name, table in held.tables.items()}
        write()
        assert {name: (table.version, table.to_table()) for name, table in held.tables.items()} == before
        assert toy.snapshot is not held


def test_a_snapshot_whose_table_a_write_has_moved_on_is_not_taken_for_the_newest(toy):
    """A dataset is at the version of its own write afterwards, and what was derived from the snapshot is older."""
    assert toy.snapshot.encoders
    toy.snapshot.tables["encoders"].delete("true")
    toy.refresh()
    assert not toy.snapshot.encoders


def test_a_database_that_takes_the_place_of_another_is_read(tmp_path):
    """Its tables may have the same versions as those of the other."""
    db = attrdb.create(tmp_path / "db")
    db.writer.upsert("models", [{"model_id": "of the first"}])
    versions = {name: table.version for name, table in db.snapshot.tables.items()}
    shutil.rmtree(db.path)
    second = attrdb.create(db.path)
    second.writer.upsert("models", [{"model_id": "of the second"}])
    assert {name: table.version for name, table in second.snapshot.tables.items()} == versions
    db.refresh()
    assert db.sql("SELECT model_id FROM models")["model_id"].to_pylist() == ["of the second"]


def test_any_lancedb_client_opens_the_directory(toy):
    table = lancedb.connect(str(toy.path)).open_table("images")
    assert table.count_rows() == 7
    nearest = (
        table.search([1.0, 0.0], vector_column_name="toy_2").where("role = 'pretraining'", prefilter=True).limit(1)
    )
    assert nearest.to_list()[0]["image_id"] == "p10"


def test_images_without_a_feature_are_stored_with_null(toy):
    toy.writer.append_images(pa.table({"image_id": ["bare"], "role": ["pretraining"]}))
    assert toy.status()["encoders"]["toy_2"]["n_encoded"] == 7
    with pytest.raises(NotFound, match="'bare' has no 'toy_2' feature yet"):
        toy.attribute("bare")


@pytest.mark.parametrize(
    ("feature", "says"),
    [
        ([float("nan"), 0.0], "NaN or infinity"),
        ([float("inf"), 0.0], "NaN or infinity"),
        ([0.0, 0.0], "feature with length 0"),
        ([3.0, 4.0], "feature with length 5"),
        ([1.0, 0.0, 0.0], "'bad' has a feature of length 3, encoder 'toy_2' makes 2"),
    ],
)
def test_bad_features_are_refused_with_the_row_named(toy, feature, says):
    features = feature_array(np.array([feature], np.float32))
    before = ids(toy)
    with pytest.raises(InvalidValue, match=f"image 'bad'.*{says}|{says}"):
        toy.writer.append_images(pa.table({"image_id": ["bad"], "role": ["pretraining"], "toy_2": features}))
    toy.refresh()
    assert ids(toy) == before


def test_other_bad_rows_are_refused(toy):
    one = rows([("x", "sample", "m", 1)])
    with pytest.raises(InvalidValue, match="'x' appears more than once in the batch"):
        toy.writer.append_images(pa.concat_tables([one, one]))
    with pytest.raises(InvalidValue, match="role 'guess'; a role is one of exemplar, sample, pretraining"):
        toy.writer.append_images(rows([("x", "guess", None, 1)]))
    with pytest.raises(
        InvalidValue, match=r"column 'clip' is of an encoder that this database does not have \(it has: 'toy_2'\)"
    ):
        toy.writer.append_images(one.rename_columns({"toy_2": "clip"}))
    with pytest.raises(InvalidValue, match="images have no column 'colour'"):
        toy.writer.append_images(one.append_column("colour", pa.array(["red"])))
    with pytest.raises(InvalidValue, match="'x' has role 'sample' and model_id None; exemplars and samples"):
        toy.writer.append_images(rows([("x", "sample", None, 1)]))
    with pytest.raises(InvalidValue, match="'x' has role 'pretraining' and model_id 'm'"):
        toy.writer.append_images(rows([("x", "pretraining", "m", 1)]))
    with pytest.raises(InvalidValue, match="every image needs a value in 'image_id'"):
        toy.writer.append_images(one.drop_columns("image_id"))
    with pytest.raises(InvalidValue, match="images of model 'm' among those of model 'n'"):
        toy.writer.append_model(one, {"model_id": "n"})


def test_an_encoder_is_its_dimension_preprocessing_and_weights(toy):
    assert toy.writer.add_encoder(**TOY) == "toy_2"
    for what, value in (
        ("spec", "toy-2"),
        ("dimension", 3),
        ("preprocessing", {"size": 4}),
        ("weights_fingerprint", "other"),
    ):
        with pytest.raises(InvalidValue, match=f"encoder 'toy_2' has {what.replace('_', ' ')}"):
            toy.writer.add_encoder(**{**TOY, what: value})
    with pytest.raises(InvalidValue, match="would take the column 'prompt'"):
        toy.writer.add_encoder("prompt", 2, {}, "none")


def test_an_encoder_whose_checkpoint_has_moved_is_the_same(empty):
    weights = {"dimension": 2, "preprocessing": {}, "weights_fingerprint": "abc"}
    assert empty.writer.add_encoder("torchscript:/old/sscd.pt?size=288", **weights) == "torchscript_sscd_size_288"
    assert empty.writer.add_encoder("torchscript:/new/place/sscd.pt?size=288", **weights) == "torchscript_sscd_size_288"
    assert [row["spec"] for row in empty.encoders.values()] == ["torchscript:/new/place/sscd.pt?size=288"]


def test_an_encoder_of_imported_features_is_known_once_it_is_used(toy):
    """Its row is written again then, and stays the second of two."""
    imported = {"spec": "clip:b", "dimension": 4, "preprocessing": {}, "weights_fingerprint": ""}
    toy.writer.add_encoder(**imported)
    toy.writer.add_encoder("third", 2, {}, "none")
    used = {**imported, "preprocessing": {"size": 224}, "weights_fingerprint": "abc"}
    assert toy.writer.check_encoder(**used)
    assert toy.encoders["clip_b"]["weights_fingerprint"] == ""
    toy.writer.add_encoder(**used)
    assert toy.encoders["clip_b"]["weights_fingerprint"] == "abc"
    assert list(toy.encoders) == ["toy_2", "clip_b", "third"]
    with pytest.raises(InvalidValue, match="encoder 'clip_b' has weights fingerprint 'xyz'"):
        toy.writer.add_encoder(**{**used, "weights_fingerprint": "xyz"})
    with pytest.raises(InvalidValue, match="encoder 'clip_b' has dimension 8"):
        toy.writer.check_encoder(**{**used, "dimension": 8})


def test_paths_that_are_no_database(tmp_path):
    with pytest.raises(NotFound, match="does not exist; make one with: attrdb init"):
        attrdb.open(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    with pytest.raises(NotFound, match="is not an attrdb database"):
        attrdb.open(tmp_path / "folder")
    with pytest.raises(InvalidValue, match="is not an empty directory"):
        attrdb.create(tmp_path / "folder")
    attrdb.create(tmp_path / "new")
    with pytest.raises(InvalidValue, match="is an attrdb database already"):
        attrdb.create(tmp_path / "new")


def test_an_interrupted_creation_is_completed(tmp_path):
    import shutil

    attrdb.create(tmp_path / "db")
    shutil.rmtree(tmp_path / "db" / "images.lance")
    with pytest.raises(NotFound):
        attrdb.open(tmp_path / "db")
    assert ids(attrdb.create(tmp_path / "db")) == []


def test_another_schema_version_is_refused(tmp_path):
    db = attrdb.create(tmp_path / "db")
    dataset = lance.dataset(str(db.path / "images.lance"))
    dataset.update_schema_metadata({"attrdb.schema_version": "99"}, replace=True)
    with pytest.raises(
        InvalidValue, match=f"has schema version 99, this attrdb reads {SCHEMA_VERSION}; install a newer attrdb"
    ):
        attrdb.open(db.path)


@pytest.mark.parametrize("table", ["models", "images"])
def test_a_database_with_a_table_gone(toy, table):
    shutil.rmtree(toy.path / f"{table}.lance")
    (toy.path / "images.lance").mkdir(exist_ok=True)
    with pytest.raises(NotFound, match=f"is not a whole attrdb database: its table {table} cannot be opened"):
        attrdb.open(toy.path)


@pytest.mark.parametrize("spec", ["order", "select", "table:2"])
def test_an_encoder_may_be_called_like_an_sql_word(tmp_path, spec):
    db = attrdb.create(tmp_path / "db")
    encoder_id = db.writer.add_encoder(spec, 2, {}, "none")
    table = rows([("a", "pretraining", None, 5), ("b", "pretraining", None, 9)]).rename_columns({"toy_2": encoder_id})
    db.writer.append_images(table)
    assert db.attribute("a", k=1)["image_id"].to_pylist() == ["b"]
    assert db.sql("SELECT count(*) AS n FROM features")["n"].to_pylist() == [2]


@pytest.mark.parametrize("spec", ["3d:x", "", "!"])
def test_an_encoder_that_gives_no_column_name(empty, spec):
    with pytest.raises(InvalidValue, match="its spec must begin with a letter"):
        empty.writer.add_encoder(spec, 2, {}, "none")


def test_an_encoder_left_half_added_is_completed(empty):
    from attrdb.store.schema import feature_type

    empty.snapshot.tables["images"].add_columns(pa.field("toy_2", feature_type(5)))
    attrdb.open(empty.path).writer.add_encoder(**TOY)
    db = attrdb.open(empty.path)
    db.writer.append_images(rows([("a", "pretraining", None, 5)]))
    assert list(db.encoders) == ["toy_2"]


def test_two_openers_add_the_same_encoder(empty):
    other = attrdb.open(empty.path)
    assert empty.writer.add_encoder(**TOY) == other.writer.add_encoder(**TOY)
    assert list(attrdb.open(empty.path).encoders) == ["toy_2"]


def test_status_counts(toy):
    found = toy.status()
    assert found["n_images"] == 7
    assert found["images_by_role"] == {"exemplar": 2, "pretraining": 3, "sample": 2}
    assert found["models_by_kind"] == {"style": 1}
    told = {"spec": "toy:2", "dimension": 2, "n_encoded": 7, "n_to_encode": 0, "index": {"state": "none"}}
    assert found["encoders"] == {"toy_2": told}
    assert found["bytes"] > 0
