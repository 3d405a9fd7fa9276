"""Training a mapper: pairs chosen by SQL, killed and resumed to the same mapper, and what cannot be learned from."""

import errno
import json
import pickle
import random
import shutil
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from learnable import DIMENSION, table
from PIL import Image

import attrdb
from attrdb.attribution.methods import resolve_method
from attrdb.cli import main
from attrdb.errors import InvalidValue, NotFound, StorageError
from attrdb.ingest.customize.augmentation import VIEWS, views
from attrdb.ingest.encode import encode, load_encoder
from attrdb.ingest.read.corpus import image_rows, register
from attrdb.ingest.read.pictures import read_picture, webp
from attrdb.search.mapper import Mapper
from attrdb.store.job_folders import train_job
from attrdb.training import augment as augment_module
from attrdb.training import pairs as pairs_module
from attrdb.training.evaluate import evaluate
from attrdb.training.objective import STORED_FORMS, Maps
from attrdb.training.pairs import Choice, Pairs
from attrdb.training.train import TrainSettings, Validation, train

QUICK = TrainSettings(lr=0.01, batch=8, epochs=6, patience=6)


@pytest.fixture
def db(learnable, tmp_path):
    """A copy that a test may change."""
    return attrdb.open(shutil.copytree(learnable.path, tmp_path / "copy.attrdb"))


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_an_epoch_takes_every_sample_once_with_an_exemplar_of_its_model(learnable):
    rows = learnable.query("pairs").to_pylist()
    wanted = learnable.sql(
        "SELECT image_id FROM samples JOIN models USING (model_id) WHERE models.split = 'train' ORDER BY 1"
    )
    assert sorted(row["sample_id"] for row in rows) == wanted["image_id"].to_pylist()
    for row in rows:
        assert row["sample_id"].split("/")[0] == row["exemplar_id"].split("/")[0] == row["model_id"]
    at = [(row["position"], row["model_id"]) for row in rows]
    assert len(set(at)) == len(at)
    assert [position for position, _ in at] == sorted(position for position, _ in at)


def test_pairs_follow_from_seed_and_epoch(learnable):
    first = learnable.query("pairs", seed=1, epoch=2).to_pylist()
    assert learnable.query("pairs", seed=1, epoch=2).to_pylist() == first
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
        assert learnable.query("pairs", **other).to_pylist() != first
    drawn = {row["exemplar_id"] for epoch in range(8) for row in learnable.query("pairs", epoch=epoch).to_pylist()}
    assert len([one for one in drawn if one.startswith("m00/")]) == 3  # every exemplar of a style has its turn


@pytest.mark.parametrize(
    ("given", "n_rows"),
    [
        ({"kind": "object"}, 192),
        ({"kind": "style"}, 96),
        ({"prompt_scheme": "gpt"}, 144),
        ({"split": "val"}, 48),
        ({"split": "nowhere"}, 0),
        ({"kind": "object", "split": "val", "prompt_scheme": "procedural"}, 16),
    ],
)
def test_pairs_of_a_kind_a_split_and_a_scheme(learnable, given, n_rows):
    assert len(learnable.query("pairs", **given)) == n_rows


def test_batches_have_the_features_of_their_pairs(learnable, tmp_path):
    pairs = Pairs(learnable, "toy_12", Choice(), tmp_path / "features.f32")
    rows = learnable.query("pairs", epoch=3).to_pylist()
    stored = learnable.sql("SELECT image_id, toy_12 FROM images")
    feature = dict(zip(stored["image_id"].to_pylist(), stored["toy_12"].to_pylist(), strict=True))
    seen = 0
    for exemplars, samples in pairs.batches(3, 10):
        part = rows[seen : seen + len(samples)]
        seen += len(samples)
        assert 2 <= len(part) <= 10
        assert len({row["model_id"] for row in part}) == len(part)
        np.testing.assert_array_equal(exemplars, np.array([feature[row["exemplar_id"]] for row in part], np.float32))
        np.testing.assert_array_equal(samples, np.array([feature[row["sample_id"]] for row in part], np.float32))
    assert seen == len(rows)


@pytest.mark.parametrize(
    ("positions", "size", "sizes"),
    [([0] * 5, 5, [5]), ([0] * 6, 5, [3, 3]), ([0, 0, 0, 1, 1], 8, [3, 2]), ([0, 0, 1], 8, [2]), ([], 8, [])],
)
def test_batches_lie_in_one_position_and_none_is_of_one_pair(positions, size, sizes):
    parts = pairs_module._parts(np.array(positions, int), size)
    assert [part.stop - part.start for part in parts] == sizes
    assert all(len(set(positions[part])) == 1 for part in parts)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", STORED_FORMS)
def test_a_mapper_learns_what_tells(learnable, db, form):
    settings = TrainSettings(form=form, lr=0.01, batch=72, epochs=50)
    result = train(db, settings=settings)
    assert result.trained
    assert result.recall > result.recall_before + 0.15
    [row] = db.sql("SELECT * FROM mappers").to_pylist()
    assert (row["mapper_id"], row["encoder_id"], row["trained_on"]) == (result.mapper_id, "toy_12", "both")
    assert json.loads(row["settings"])["temperature"] == 0.1
    assert row["images_version"] == learnable.version
    curves = json.loads(row["curves"])
    assert [one["epoch"] for one in curves] == list(range(result.n_epochs + 1))
    assert curves[result.best_epoch]["recall"] == result.recall
    ranked = [one["mean_log_rank"] for one in curves]
    assert ranked[result.best_epoch] == result.mean_log_rank == min(ranked) < result.mean_log_rank_before == ranked[0]
    assert not train_job(db.path, result.mapper_id).path.exists()
    # Nothing of the test models was seen; their ranks are better, too.
    found = {}
    for mapper_id in (None, result.mapper_id):
        evaluate(db, mapper_id)
        rows = db.query("recall_at_k", k=10).to_pylist()
        mine = [row for row in rows if row["split"] == "test" and row["mapper_id"] == (mapper_id or "")]
        found[mapper_id] = np.mean([row["recall_at_k"] for row in mine])
    assert found[result.mapper_id] > found[None]


def test_run_twice_is_run_once(db):
    first = train(db, settings=QUICK)
    again = train(db, settings=QUICK)
    assert (first.trained, again.trained) == (True, False)
    assert (again.mapper_id, again.recall, again.best_epoch) == (first.mapper_id, first.recall, first.best_epoch)
    assert len(db.sql("SELECT mapper_id FROM mappers")) == 1


def test_killed_and_resumed_is_the_same_mapper(learnable, db):
    def stop(_stage, done, _total, _note=""):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(db, settings=QUICK, mapper_id="a", report=stop)
    with pytest.raises(InvalidValue, match=r"'a' is half trained in .* with lr = 0.01, now it is 0.02"):
        train(db, settings=TrainSettings(lr=0.02, batch=8, epochs=6, patience=6), mapper_id="a")
    seen = []
    train(db, settings=QUICK, mapper_id="a", report=lambda _, done, *rest: seen.append(done))
    assert seen == [3, 4, 5, 6]
    train(db, settings=QUICK, mapper_id="b")
    one, other = db.sql("SELECT parameters, curves, metrics FROM mappers ORDER BY mapper_id").to_pylist()
    assert one == other


def test_images_that_changed_under_a_half_trained_mapper(db):
    def stop(_stage, done, _total, _note=""):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(db, settings=QUICK, mapper_id="a", report=stop)
    db.writer.delete("models", "model_id = 'm00'")
    with pytest.raises(InvalidValue, match=r"have changed since its training began; delete .*\.train-a to start again"):
        train(db, settings=QUICK, mapper_id="a")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("checkpoint.pt", lambda whole: b""),
        ("checkpoint.pt", lambda whole: b"garbage"),
        ("checkpoint.pt", lambda whole: whole[: len(whole) // 2]),
        ("checkpoint.pt", lambda whole: pickle.dumps({"pairs": 1})),
        ("settings.json", lambda whole: b""),
        ("settings.json", lambda whole: whole[:20]),
    ],
)
def test_a_damaged_file_of_a_half_trained_mapper_is_named(db, name, damage):
    def stop(_stage, done, _total, _note=""):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(db, settings=QUICK, mapper_id="a", report=stop)
    job = train_job(db.path, "a")
    assert {file.suffix for file in job.path.iterdir()} == {".f32", ".json", ".pt"}  # no .part is left
    (job.path / name).write_bytes(damage((job.path / name).read_bytes()))
    with pytest.raises(InvalidValue, match=rf"{name} is damaged; delete .*\.train-a to start again"):
        train(db, settings=QUICK, mapper_id="a")
    job.remove()
    assert train(db, settings=QUICK, mapper_id="a").trained


def test_a_disk_that_is_full_while_a_checkpoint_is_written(db, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        StorageError, match=r"checkpoint.pt cannot be written: No space left on device; free some space"
    ):
        train(db, settings=QUICK, mapper_id="a")
    monkeypatch.undo()
    assert train(db, settings=QUICK, mapper_id="a").trained


def test_a_mapper_that_an_earlier_version_stopped_by_recall(db):
    train(db, settings=QUICK, mapper_id="a")
    [row] = db.sql("SELECT * FROM mappers").to_pylist()
    settings = json.loads(row["settings"])
    del settings["stopped_by"]
    db.writer.upsert("mappers", [{**row, "settings": json.dumps(settings)}])
    with pytest.raises(
        InvalidValue, match=r"'a' is in .*, made by an earlier attrdb .* train a new one with another --mapper-id"
    ):
        train(db, settings=QUICK, mapper_id="a")


def test_another_mapper_of_that_name(db):
    train(db, settings=QUICK, mapper_id="a")
    with pytest.raises(InvalidValue, match=r"mapper 'a' is in .* with kind = 'both', now it is 'object'; use the old"):
        train(db, settings=TrainSettings(kind="object", lr=0.01, batch=8, epochs=6, patience=6), mapper_id="a")


def test_ranks_with_a_mapper_are_those_of_a_full_sort(db):
    result = train(db, settings=QUICK)
    n_ranks = evaluate(db, result.mapper_id)
    mapper = db.mapper(result.mapper_id)
    rows = db.sql("SELECT image_id, role, model_id, toy_12 FROM images").to_pylist()
    of = {role: [row for row in rows if row["role"] == role] for role in ("exemplar", "sample", "pretraining")}

    def mapped(of_rows, how):
        return how(np.array([row["toy_12"] for row in of_rows], np.float32)).astype(np.float64)

    found = db.sql("SELECT sample_id, exemplar_id, rank FROM exemplar_ranks WHERE mapper_id <> ''").to_pylist()
    ranked = {(row["sample_id"], row["exemplar_id"]): row["rank"] for row in found}
    assert len(ranked) == n_ranks
    for sample in of["sample"]:
        gallery = [one for one in of["exemplar"] if one["model_id"] == sample["model_id"]] + of["pretraining"]
        similarity = mapped(gallery, mapper.exemplars) @ mapped([sample], mapper.samples)[0]
        order = [gallery[at]["image_id"] for at in np.argsort(-similarity)]
        for one in gallery:
            if one["role"] == "exemplar":
                assert ranked[sample["image_id"], one["image_id"]] == order.index(one["image_id"]) + 1


def test_validation_by_hand(db):
    """The mean over samples, then over cases, of the mean log rank of a sample's exemplars."""
    validation = Validation(db, "toy_12", QUICK)
    found = validation.measure(Mapper("plain", "toy_12", "affine", Maps("affine", 12).arrays()))
    evaluate(db)
    query = """
        SELECT avg(log_rank) AS mean_log_rank, avg(recall) AS recall FROM (
            SELECT avg(log_rank) AS log_rank, avg(recall) AS recall FROM (
                SELECT kind, prompt_scheme, sample_id, avg(ln(rank)) AS log_rank, avg((rank <= 10)::INT) AS recall
                FROM exemplar_ranks AS r JOIN samples AS s ON s.image_id = r.sample_id JOIN models USING (model_id)
                WHERE models.split = 'val' GROUP BY ALL
            ) GROUP BY kind, prompt_scheme
        )"""
    [wanted] = db.sql(query).to_pylist()
    assert found == pytest.approx(wanted)


def test_ranks_that_rise_far_from_the_first_ten_keep_training_going(db, monkeypatch):
    """What tuning does for styles: Recall@10 stays at 0 while ranks fall from thousands to a hundred."""
    measured = iter([8.0, 7.0, 6.0, 5.0, 5.5, 5.6, 5.7])
    monkeypatch.setattr(Validation, "measure", lambda *_: {"recall": 0.0, "mean_log_rank": next(measured)})
    result = train(db, settings=TrainSettings(lr=0.01, batch=8, epochs=20, patience=2))
    assert (result.best_epoch, result.n_epochs, result.mean_log_rank) == (3, 5, 5.0)


# --- what cannot be learned from --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"split": "test"}, "--split is 'test': test models are for evaluation only; name another split"),
        ({"val_split": "test_unseen"}, "--val-split is 'test_unseen': test models are for evaluation"),
        ({"val_split": "train"}, "--split and --val-split are both 'train'"),
        (
            {"split": "nowhere"},
            r"no models in split 'nowhere' .*; its models: .*48 of kind 'object' in split 'train'.*--split",
        ),
        (
            {"val_split": "nowhere"},
            r"no models in split .nowhere. .*--val-split.*: attrdb models set .* --split nowhere",
        ),
        ({"kind": "thing"}, "kind is 'thing'; it must be object, style, both"),
        ({"prompt_scheme": "x"}, "prompt_scheme is 'x'; it must be gpt, procedural, both"),
        ({"form": "cubic"}, "form is 'cubic'; it must be affine, gain, mlp, released-gain, released-mlp"),
        ({"temperature": 0}, "temperature is 0; it must be above 0"),
        ({"lr": float("nan")}, "lr is nan; it must be above 0"),
        ({"batch": 1}, "batch is 1; it must be at least 2"),
        (
            {"lr": 1e30},
            r"the loss of epoch \d is (nan|inf); lower the learning rate|makes a feature that is zero or not finite",
        ),
    ],
)
def test_settings_that_cannot_be_used(db, given, says):
    with pytest.raises(InvalidValue, match=says):
        train(db, settings=TrainSettings(**given))
    assert len(db.sql("SELECT mapper_id FROM mappers")) == 0


def test_one_model_only(db):
    db.writer.delete("models", "split = 'train' AND model_id <> 'm01'")
    with pytest.raises(
        InvalidValue,
        match=r"^1 model in split 'train' of .*; training compares pairs of different models, so it needs at least 2; ",
    ):
        train(db)


def test_images_without_a_feature(db):
    more = table(["m90/e", "m90/0/0"], "exemplar", np.eye(DIMENSION, dtype=np.float32)[:2], "m90", [None, "gpt"])
    more = more.set_column(1, "role", pa.array(["exemplar", "sample"])).drop_columns(["toy_12"])
    db.writer.append_model(more, {"model_id": "m90", "kind": "object", "split": "train"})
    says = (
        r"2 images of the pairs have no 'toy_12' feature, such as 'm90/0/0'; encode them first: attrdb encode .* toy:12"
    )
    with pytest.raises(InvalidValue, match=says):
        train(db)
    # Its one sample is of the other scheme, so it is not asked for.
    assert train(db, settings=TrainSettings(prompt_scheme="procedural", epochs=1)).trained


def test_no_such_mapper_or_encoder(db):
    with pytest.raises(NotFound, match=r"no mapper 'a' in .*, it has none yet: attrdb train makes them"):
        db.attribute("m00/0/0", mapper_id="a")
    with pytest.raises(NotFound, match=r"no method 'a' in .*; nearest: 'toy_12'"):
        evaluate(db, "a")
    with pytest.raises(NotFound, match="no encoder 'clip'"):
        train(db, "clip")
    result = train(db, settings=QUICK, mapper_id="mine")
    with pytest.raises(NotFound, match=r"no mapper 'mime' in .*; nearest: 'mine'"):
        db.mapper("mime")
    with pytest.raises(InvalidValue, match="mapper 'mine' is of encoder 'toy_12', not of 'pixels_8'"):
        resolve_method(db.snapshot, None, "pixels_8", result.mapper_id)


# --- commands ---------------------------------------------------------------------------------------------------------


def test_the_commands(db):
    words = ["train", str(db.path), "--lr", "0.01", "--batch", "8", "--epochs", "4", "--mapper-id", "mine"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "mapper mine: on validation models the typical rank of an exemplar is " in done.stderr
    assert "mapper mine was trained already, nothing to do" in CliRunner().invoke(main, words).stderr
    done = CliRunner().invoke(main, ["evaluate", str(db.path), "--mapper", "mine"])
    assert done.exit_code == 0, done.output
    assert "ranks by toy_12/mine, gallery own" in done.stderr
    done = CliRunner().invoke(main, ["train", str(db.path), "--split", "test"])
    assert done.exit_code == 1
    assert "for evaluation only" in done.output


def test_a_mapper_that_equals_no_mapper_is_said_to_change_nothing(db):
    words = ["train", str(db.path), "--batch", "8", "--epochs", "1", "--mapper-id", "idle", "--lr"]
    idle = CliRunner().invoke(main, [*words, "1e-30"])
    assert idle.exit_code == 0, idle.output
    assert "nothing that was learned is better than the encoder alone: this mapper changes nothing" in idle.stderr
    words[-2] = "useful"
    useful = CliRunner().invoke(main, [*words, "0.01"])
    assert useful.exit_code == 0, useful.output
    assert "changes nothing" not in useful.stderr


# --- augmentation -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Six models of one picture and two samples, with their pictures, and pictures of a corpus; features pixels:8."""
    rng = np.random.default_rng(0)
    db = attrdb.create(tmp_path_factory.mktemp("drawn") / "some.attrdb")
    encoder = load_encoder("pixels:8")
    register(db, [encoder])

    def rows_of(ids, role, model_id, arrays):
        pictures = [read_picture(name, webp(Image.fromarray(array))) for name, array in zip(ids, arrays, strict=True)]
        scheme = "gpt" if role == "sample" else None
        named = [{"image_id": name, "role": role, "model_id": model_id, "prompt_scheme": scheme} for name in ids]
        return image_rows(named, pictures, [encoder])

    corpus = rng.integers(0, 256, (20, 16, 16, 3), np.uint8)
    db.writer.append_images(rows_of([f"p{n:02d}" for n in range(20)], "pretraining", None, corpus))
    for number in range(6):
        model_id = f"m{number}"
        own = rng.integers(0, 256, (1, 16, 16, 3), np.uint8)
        near = (own.astype(int) + rng.integers(-20, 21, (2, 16, 16, 3))).clip(0, 255).astype(np.uint8)
        parts = [rows_of([f"{model_id}/e"], "exemplar", model_id, own)]
        parts.append(rows_of([f"{model_id}/{n}/0" for n in range(2)], "sample", model_id, near))
        split = "val" if number > 3 else "train"
        db.writer.append_model(pa.concat_tables(parts), {"model_id": model_id, "kind": "object", "split": split})
    return db


@pytest.mark.parametrize("augment", ["mild", "strong"])
def test_a_pair_takes_one_of_its_images_views(drawn, tmp_path, augment):
    plain = Pairs(drawn, "pixels_8", Choice(), tmp_path / "features.f32")
    pairs = Pairs(drawn, "pixels_8", Choice(), tmp_path / "features.f32", augment)
    assert pairs.features.shape == (12, VIEWS[augment], 192)
    np.testing.assert_allclose(np.linalg.norm(pairs.features, axis=2), 1, rtol=1e-5)
    encoder = load_encoder("pixels:8")
    for row, image_id in enumerate(pairs.ids.to_pylist()):
        picture = drawn.images(f"image_id = '{image_id}'", ["image"])["image"][0].as_py()
        image = read_picture(image_id, picture).image
        shown = [view.picture for view in views(image, augment, augment_module.SIDE, random.Random(f"0/{image_id}"))]
        np.testing.assert_allclose(pairs.features[row], encode(encoder, shown), atol=1e-6)
    batches = list(pairs.batches(1, 8))
    again = list(pairs.batches(1, 8))
    assert all((a[0] == b[0]).all() and (a[1] == b[1]).all() for a, b in zip(batches, again, strict=True))
    known = {tuple(view) for image in pairs.features for view in image}
    assert {tuple(row) for batch in batches for side in batch for row in side} <= known
    assert not all((a[0] == b[0]).all() for a, b in zip(batches, plain.batches(1, 8), strict=True))


def test_views_follow_the_images(drawn, tmp_path):
    """After a model has gone, those of the others are still their own."""
    before = Pairs(drawn, "pixels_8", Choice(), tmp_path / "features.f32", "mild")
    db = attrdb.open(shutil.copytree(drawn.path, tmp_path / "fewer.attrdb"))
    db.writer.delete("models", "model_id = 'm1'")
    db.refresh()
    after = Pairs(db, "pixels_8", Choice(), tmp_path / "features.f32", "mild")
    assert after.digest != before.digest
    kept = {name: row for row, name in enumerate(before.ids.to_pylist())}
    for row, name in enumerate(after.ids.to_pylist()):
        assert (after.features[row] == before.features[kept[name]]).all()


def test_views_are_encoded_once(drawn, tmp_path, monkeypatch):
    Pairs(drawn, "pixels_8", Choice(), tmp_path / "features.f32", "mild")
    monkeypatch.setattr(augment_module, "encode", None)
    Pairs(drawn, "pixels_8", Choice(), tmp_path / "features.f32", "mild")


def test_training_with_augmentation(drawn):
    found = train(drawn, settings=TrainSettings(augment="mild", batch=4, epochs=2), mapper_id="mild")
    assert found.n_epochs == 2
    [row] = drawn.sql("SELECT settings FROM mappers WHERE mapper_id = 'mild'").to_pylist()
    assert json.loads(row["settings"])["augment"] == "mild"
    with pytest.raises(InvalidValue, match="augment is 'wild'; it must be none, mild, strong"):
        train(drawn, settings=TrainSettings(augment="wild"))


def test_augmentation_needs_the_pictures(db):
    with pytest.raises(InvalidValue, match=r"no encoder 'toy:12'"):
        train(db, settings=TrainSettings(augment="mild"))


def test_augmentation_of_images_that_are_not_stored_is_refused(drawn, tmp_path):
    path = shutil.copytree(drawn.path, tmp_path / "bare.attrdb")
    lance.dataset(path / "images.lance").update({"image": "NULL"}, where="image_id = 'm2/1/0'")
    with pytest.raises(InvalidValue, match=r"image 'm2/1/0' .* is stored without its picture"):
        train(attrdb.open(path), settings=TrainSettings(augment="mild"))


def test_missing_splits_are_named_before_the_images_are_read(learnable, tmp_path, monkeypatch):
    """Models of splits train and test alone: the command names its option and the command that moves models, at once."""
    shutil.copytree(learnable.path, tmp_path / "x.attrdb")
    db = attrdb.open(tmp_path / "x.attrdb")
    db.writer.update("models", "split = 'val'", {"split": "test"})
    monkeypatch.setattr("attrdb.training.train.Validation", None)  # the first that reads features
    done = CliRunner().invoke(main, ["train", str(db.path)])
    assert done.exit_code == 1
    assert "no models in split 'val'" in done.stderr
    assert f"with --val-split, or move models: attrdb models set {db.path} MODEL_ID --split val" in done.stderr
    assert not list((db.path / "jobs").glob("*train*"))
