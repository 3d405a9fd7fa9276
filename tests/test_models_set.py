"""attrdb models set: splits and categories of stored models."""

import json

import pytest
from click.testing import CliRunner
from conftest import rows

import attrdb
from attrdb.cli import main
from attrdb.models import set_models


def run(*words, code=0):
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def two(toy):
    table = rows([("n/e0", "exemplar", "n", 5), ("n/0/1", "sample", "n", 6)])
    toy.writer.append_model(
        table, {"model_id": "n", "kind": "object", "split": "test", "n_exemplars": 1, "n_samples": 1}
    )
    return toy


def labels(db):
    db.refresh()
    models = db.sql("SELECT model_id, split, category FROM models ORDER BY model_id").to_pylist()
    images = db.sql("SELECT DISTINCT model_id, split, category FROM images WHERE model_id IS NOT NULL ORDER BY 1")
    return models, images.to_pylist()


def test_a_split_changes_with_its_images(two):
    done = run("models", "set", two.path, "m", "--split", "val")
    assert done.stderr == "1 models changed, with 4 images\n"
    assert done.stdout == ""
    expected = [
        {"model_id": "m", "split": "val", "category": None},
        {"model_id": "n", "split": "test", "category": None},
    ]
    models, images = labels(two)
    assert models == expected
    assert images == [expected[0], {"model_id": "n", "split": None, "category": None}]
    assert two.sql("SELECT count(*) AS n FROM pretraining_images WHERE split IS NULL")["n"][0].as_py() == 3


def test_several_models_get_both_labels(two):
    run("models", "set", two.path, "m", "n", "--split", "train", "--category", "it's a vase")
    models, images = labels(two)
    assert models == images
    assert {(row["split"], row["category"]) for row in models} == {("train", "it's a vase")}
    again = run("models", "set", two.path, "m", "n", "--split", "train", "--category", "it's a vase")
    assert again.stderr == "0 models changed, with 0 images\n"


def test_nothing_else_changes(two):
    before = two.sql("SELECT * EXCLUDE (split) FROM images ORDER BY image_id")
    rest = two.sql("SELECT * EXCLUDE (split) FROM models ORDER BY model_id")
    run("models", "set", two.path, "m", "--split", "val")
    two.refresh()
    assert two.sql("SELECT * EXCLUDE (split) FROM images ORDER BY image_id").equals(before)
    assert two.sql("SELECT * EXCLUDE (split) FROM models ORDER BY model_id").equals(rest)


def test_an_interrupted_change_is_completed(two, monkeypatch):
    update = two.writer.update

    def interrupted(table, where, values):
        if table == "models":
            raise KeyboardInterrupt
        update(table, where, values)

    monkeypatch.setattr(two.writer, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        set_models(two, ["m"], split="val")
    monkeypatch.undo()
    changed = set_models(two, ["m"], split="val")
    assert (changed.n_models, changed.n_images) == (1, 0)
    assert labels(two)[0][0]["split"] == "val"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["nope", "--split", "val"], 1, "no customized model 'nope'; nearest are 'm', 'n'"),
        (["m", "nope", "--split", "val"], 1, "no customized model 'nope'"),
        (["m"], 1, "nothing to set: give --split or --category"),
        (["m", "--split", ""], 1, "an empty split; give a name, such as train, val or test"),
        (["m", "--category", " "], 1, "an empty category"),
        (["--split", "val"], 2, "Missing argument 'ID...'"),
        (["", "--split", "val"], 2, "an empty model id"),
    ],
)
def test_what_is_refused_changes_nothing(two, words, code, says):
    before = labels(two)
    assert says in run("models", "set", two.path, *words, code=code).stderr
    assert labels(two) == before


def test_a_read_only_moment_is_not_changed(two):
    with pytest.raises(attrdb.InvalidValue, match="read-only"):
        set_models(attrdb.open(two.path, read_only=True), ["m"], split="val")


def test_mappers_of_a_split_that_changes_are_named(two):
    for mapper_id, split in (("a", "test"), ("b", "other")):
        two.writer.add_mapper(
            {"mapper_id": mapper_id, "encoder_id": "toy_2", "form": "gain", "settings": json.dumps({"split": split})}
        )
    assert set_models(two, ["n"], category="vase").fitted == []
    done = run("models", "set", two.path, "n", "--split", "val")
    assert "trained on a split as it was before: a; " in done.stderr
