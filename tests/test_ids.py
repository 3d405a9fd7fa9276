"""Ids that become part of a path: none leaves its folder, none deletes what it did not make, every command refuses alike."""

import json
import re
import shutil

import pytest
from click.testing import CliRunner

import attrdb
from attrdb.cli import main
from attrdb.errors import InvalidValue
from attrdb.ingest.models.exemplars import read_exemplars
from attrdb.ingest.models.settings import default_model_id, settings_for
from attrdb.models import training_record
from attrdb.store import ids, job_folders, writer
from attrdb.training.train import TrainSettings, train

HOSTILE = ["/../../../precious", "../precious", "/../../images.lance", "a/b", "a\\b", ".", "..", ".hidden", "-x", "a b"]
HOSTILE += ["a\nb", "a\0b", "é", "x" * 121, "x" * 300, " "]
NOT_GIVEN = [""]
SOME = ["/../../../precious", "/../../images.lance", "..", "a\nb", "x" * 300, " ", ""]  # for what copies a database


@pytest.fixture
def db(learnable, tmp_path):
    """A copy, with a folder beside it that nothing may touch."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "work.txt").write_text("years of it")
    return attrdb.open(shutil.copytree(learnable.path, tmp_path / "deep" / "some.attrdb"))


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("good", ["a", "0", "vase-1", "A.b_c-9", "x" * 120])
def test_ids_that_can_be_used(good):
    assert ids.check_id("model", good) == good


@pytest.mark.parametrize("bad", HOSTILE + NOT_GIVEN)
def test_ids_that_cannot_be_used(bad, tmp_path):
    for make in (job_folders.model_job, job_folders.train_job, ids.weights_file):
        with pytest.raises(
            InvalidValue, match=r"id '.*' \(\d+ characters\) cannot be used; an id has 1 to 120 letters"
        ):
            make(tmp_path, bad)
    for made in (ids.lock_file(tmp_path, "attribute", bad), job_folders.encode_job(tmp_path, bad).path):
        assert made.parent == tmp_path / "jobs"
        assert len(made.name) < 100


@pytest.mark.parametrize("bad", SOME)
@pytest.mark.parametrize(
    "command",
    [
        ["train", "DB", "--mapper-id", "ID"],
        [
            "ingest",
            "model",
            "DB",
            "--exemplars",
            "EXEMPLARS",
            "--category",
            "vase",
            "--base-model",
            "X",
            "--model-id",
            "ID",
        ],
    ],
)
def test_commands_that_store_an_id_refuse_it_and_touch_nothing(db, tmp_path, exemplar_folder, command, bad):
    before = content(tmp_path)
    known = {"DB": str(db.path), "EXEMPLARS": str(exemplar_folder), "ID": bad}
    result = CliRunner().invoke(main, [known.get(word, word) for word in command])
    assert result.exit_code == 2
    assert "cannot be used" in result.output or "leave it out" in result.output
    assert content(tmp_path) == before


@pytest.mark.parametrize("bad", SOME)
def test_ids_in_a_list_of_models_are_refused_by_line(db, tmp_path, exemplar_folder, bad):
    wanted = tmp_path / "models.jsonl"
    line = {"exemplars": str(exemplar_folder), "kind": "object", "category": "vase", "base_model": "icon-sd"}
    wanted.write_text(json.dumps({**line, "model_id": bad}) + "\n")
    before = content(tmp_path)
    result = CliRunner().invoke(main, ["ingest", "models", str(db.path), str(wanted), "--encoder", "pixels:8"])
    assert result.exit_code != 0
    assert "cannot be used" in result.output
    assert "line 1" in result.output
    assert {path: held for path, held in content(tmp_path).items() if path in before} == before


@pytest.mark.parametrize("bad", SOME)
@pytest.mark.parametrize(
    "command",
    [
        ["attribute", "DB", "m00/0/0", "--mapper", "ID"],
        ["attribute", "DB", "m00/0/0", "--encoder", "ID"],
        ["attribute", "DB", "--samples", "true", "--mapper", "ID"],
        ["calibrate", "DB", "--mapper", "ID"],
        ["calibrate", "DB", "--encoder", "ID"],
        ["evaluate", "DB", "--mapper", "ID"],
        ["evaluate", "DB", "--encoder", "ID"],
        ["index", "DB", "--encoder", "ID"],
        ["models", "show", "DB", "ID"],
        ["train", "DB", "--encoder", "ID"],
    ],
)
def test_commands_that_look_an_id_up_find_none_and_touch_nothing(db, tmp_path, command, bad):
    before = content(tmp_path)
    known = {"DB": str(db.path), "ID": bad}
    result = CliRunner().invoke(main, [known.get(word, word) for word in command])
    assert result.exit_code in (1, 2)
    assert not isinstance(result.exception, OSError)
    assert "Traceback" not in result.output
    assert content(tmp_path) == before


def test_training_deletes_its_own_folder_and_no_other(db, tmp_path):
    settings = TrainSettings(lr=0.01, batch=8, epochs=1)
    with pytest.raises(InvalidValue, match="cannot be used"):
        train(db, settings=settings, mapper_id="/../../../precious")
    model_job = job_folders.model_job(db.path, "train-mine").make()
    (model_job / "half.safetensors").write_text("made")
    train(db, settings=settings, mapper_id="mine")
    assert (model_job / "half.safetensors").exists()
    assert not job_folders.train_job(db.path, "mine").path.exists()
    assert (tmp_path / "precious" / "work.txt").read_text() == "years of it"


def test_a_link_in_the_place_of_a_job_is_not_followed(db, tmp_path):
    job = job_folders.model_job(db.path, "vase")
    job.path.parent.mkdir(exist_ok=True)
    job.path.symlink_to(tmp_path / "precious")
    job.remove()
    assert (tmp_path / "precious" / "work.txt").exists()


def test_files_that_rows_name_outside_of_the_database_are_not_read(tmp_path):
    (tmp_path / "secret.json").write_text('{"losses": [1]}')
    (tmp_path / "my.attrdb").mkdir()
    (tmp_path / "my.json").write_text('{"losses": [1]}')
    (tmp_path / "my.attrdb" / "linked.json").symlink_to(tmp_path / "secret.json")
    for path in (
        "../secret.safetensors",
        str(tmp_path / "secret.safetensors"),
        "linked.safetensors",
        "a\0b.safetensors",
    ):
        with pytest.raises(InvalidValue, match="lies outside of it; it is not read"):
            training_record(tmp_path / "my.attrdb", path)


def test_ids_made_from_long_names_can_be_used(empty, exemplar_folder, tiny_base):
    category = "a very long category " * 20
    settings = settings_for(str(tiny_base), "object", category)
    ids.check_id("model", default_model_id(settings, read_exemplars(exemplar_folder)))
    with pytest.raises(InvalidValue, match="212 characters; give its file a name that makes at most 80"):
        empty.writer.add_encoder("torchscript:" + "x" * 200, 2, {}, "")


def test_an_old_database_with_an_encoder_of_a_long_name_is_used_on(empty, monkeypatch):
    spec = "torchscript:" + "x" * 150
    monkeypatch.setattr(writer, "LONGEST_ENCODER_ID", 1000)
    encoder_id = empty.writer.add_encoder(spec, 2, {}, "")
    monkeypatch.undo()
    assert empty.writer.check_encoder(spec, 2, {}, "")
    assert empty.writer.add_encoder(spec, 2, {}, "") == encoder_id
    assert job_folders.encode_job(empty.path, encoder_id).path.parent == empty.path / "jobs"


# --- the settings of a half-done job ----------------------------------------------------------------------------------


def test_a_job_keeps_its_settings(tmp_path):
    job = job_folders.model_job(tmp_path, "vase")
    assert job.read_settings() is None
    job.make()
    job.write_settings({"steps": 3, "name": "väse"})
    assert job.read_settings() == {"steps": 3, "name": "väse"}
    assert [file.name for file in job.path.iterdir()] == ["settings.json"]


@pytest.mark.parametrize("content", [b"", b'{"steps": ', b"[1, 2]", b"\xff\xfe", b"null"])
def test_damaged_settings_are_named(tmp_path, content):
    job = job_folders.model_job(tmp_path, "vase")
    job.make()
    job.settings_file.write_bytes(content)
    with pytest.raises(InvalidValue, match=re.escape(f"settings.json is damaged; delete {job.path} to start again")):
        job.read_settings()


def test_settings_that_differ_are_named_with_both_values():
    job_folders.check_same_settings("mapper", "a", {"lr": 1}, {"lr": 1}, "in my.attrdb")
    with pytest.raises(InvalidValue, match=r"mapper 'a' is in my.attrdb with lr = 1, now it is None; .*--mapper-id"):
        job_folders.check_same_settings("mapper", "a", {"lr": 1}, {}, "in my.attrdb")
