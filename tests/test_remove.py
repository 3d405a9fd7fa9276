"""Taking images out: the rows that go and stay, what is left of models and results, and nothing on the disk after a purge."""

import hashlib
import json
import re
import shlex
import shutil

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import ROOT, TOY, rows
from removable import files, settings, sha

import attrdb
from attrdb.attribution.batch import attribute_samples
from attrdb.attribution.query import AttributionRequest
from attrdb.cli import main
from attrdb.errors import InvalidValue
from attrdb.store.schema import feature_array
from attrdb.training.evaluate import evaluate
from attrdb.upkeep import health


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def ids(db, table="images", column="image_id"):
    db.refresh()
    return db.sql(f"SELECT DISTINCT {column} AS id FROM {table} ORDER BY 1")["id"].to_pylist()


def count(db, table):
    return db.sql(f"SELECT count(*) AS n FROM {table}")["n"][0].as_py()


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_pretraining_image_goes_with_what_was_computed_with_it(full):
    removal = full.remove(where="image_id = 'p90'", reason="asked by its creator")
    assert (removal.images, removal.n_features, removal.models) == ({"pretraining": 1}, 1, [])
    # Every rank counts it. It is among the three stored of o/1/3; a fourth of m/0/2 has influence, and may be it; the three
    # of m/0/1 have all influence, so they stay.
    assert removal.results == {"attributions": 6, "exemplar_ranks": 10, "scores": 0}
    assert ids(full) == ["m/0/1", "m/0/2", "m/e0", "m/e40", "o/1/3", "o/e60", "p10", "p20"]
    assert ids(full, "attributions", "sample_id") == ["m/0/1"]
    assert (count(full, "exemplar_ranks"), count(full, "attributions"), count(full, "scores")) == (0, 3, 4)
    [row] = full.sql("FROM removals").to_pylist()
    times = [row.pop(name) for name in ("started_at", "ended_at")]
    assert times == sorted(times)
    assert row == {
        "removal_id": removal.removal_id,
        "state": "done",
        "chosen_by": "where",
        "digest": hashlib.sha256(b"image_id = 'p90'").hexdigest(),
        "reason": "asked by its creator",
        "n_images": 1,
        "n_features": 1,
        "n_models": 0,
        "models": "list",
        "n_results": 16,
        "n_blocked": 0,
        "purged": False,
        "images_version": full.version,
        "attrdb_version": attrdb.__version__,
    }
    assert health.check(full.snapshot) == []
    stays, again = full.sql("FROM attributions ORDER BY rank").to_pylist(), full.attribute("m/0/1", k=3).to_pylist()
    assert [row["candidate_id"] for row in stays] == [row["image_id"] for row in again]
    assert [row["influence"] for row in stays] == pytest.approx([row["influence"] for row in again])


def test_an_exemplar_goes_with_the_ranks_of_its_model_and_of_all_that_it_was_a_candidate_of(full):
    removal = full.remove(ids=["m/e40"])
    assert removal.images == {"exemplar": 1}
    # Of its own model both galleries; of the other only the gallery `all`. It has no stored score.
    assert full.sql("SELECT sample_id, gallery FROM exemplar_ranks").to_pylist() == [
        {"sample_id": "o/1/3", "gallery": "own"}
    ]
    assert ids(full, "attributions", "sample_id") == ["m/0/1"]
    [model] = removal.models
    assert (model.model_id, model.n_exemplars, model.left, model.action) == ("m", 1, (1, 2), "list")
    assert full.sql("SELECT model_id, n_exemplars, n_samples FROM models ORDER BY 1").to_pylist() == [
        {"model_id": "m", "n_exemplars": 1, "n_samples": 2},
        {"model_id": "o", "n_exemplars": 1, "n_samples": 1},
    ]
    assert health.check(full.snapshot) == []


def test_a_sample_goes_alone(full):
    removal = full.remove(ids=["m/0/1"])
    assert (removal.images, removal.results) == (
        {"sample": 1},
        {"attributions": 3, "exemplar_ranks": 4, "scores": 2},
    )
    assert [(one.model_id, one.n_samples, one.action) for one in removal.models] == [("m", 1, None)]
    assert ids(full, "exemplar_ranks", "sample_id") == ids(full, "scores", "sample_id") == ["m/0/2", "o/1/3"]
    assert full.sql("SELECT settings FROM models WHERE model_id = 'm'")["settings"].to_pylist() == [settings()]
    assert health.check(full.snapshot) == []


def test_stored_scores_of_a_candidate_go_and_the_ranks_of_their_method(full):
    evaluate(full, "given", gallery="own")
    assert ids(full, "exemplar_ranks", "method_id") == ["given", "toy_2"]
    assert full.remove(ids=["p10"]).results["scores"] == 1
    assert ids(full, "scores", "candidate_id") == ["m/e0", "o/e60"]
    assert ids(full, "exemplar_ranks", "method_id") == []
    evaluate(full, "given", gallery="own")
    full.remove(ids=["p20"])  # which the method has no score of
    assert ids(full, "exemplar_ranks", "method_id") == ["given"]


def test_what_was_computed_again_is_what_a_database_without_the_image_gives(full, tmp_path):
    full.remove(where="image_id IN ('p20', 'm/e40')")
    evaluate(full, gallery="all")
    attribute_samples(full.writer, "true", AttributionRequest(k=3))
    without = attrdb.create(tmp_path / "without.attrdb")
    without.writer.add_encoder(**TOY)
    images = full.sql("FROM images").to_pylist()
    for model_id in (None, "m", "o"):
        some = [row for row in images if row["model_id"] == model_id]
        table = rows(
            [(row["image_id"], row["role"], model_id, 0) for row in some],
        ).drop_columns("toy_2")
        table = table.append_column("toy_2", feature_array(np.array([row["toy_2"] for row in some])))
        if model_id is None:
            without.writer.append_images(table)
        else:
            without.writer.append_model(table, {"model_id": model_id})
    evaluate(without, gallery="all")
    attribute_samples(without.writer, "true", AttributionRequest(k=3))
    for table in ("exemplar_ranks", "attributions"):
        statement = f"SELECT * EXCLUDE (images_version) FROM {table} WHERE method_id = 'toy_2' ORDER BY ALL"
        assert full.sql(statement).to_pylist() == without.sql(statement).to_pylist()


def test_many_at_once(full):
    entries = [(f"w/{n:05d}", "pretraining", None, n / 10) for n in range(3000)]
    full.writer.append_images(rows(entries))
    assert full.remove(ids=[f"w/{n:05d}" for n in range(0, 3000, 2)]).images == {"pretraining": 1500}
    assert full.sql("SELECT count(*) AS n FROM images WHERE image_id LIKE 'w/%'")["n"].to_pylist() == [1500]
    assert health.check(full.snapshot) == []


# --- choosing --------------------------------------------------------------------------------------------------------


def test_a_creator(full):
    assert full.remove(creator="Ada").images == {"pretraining": 1}
    assert full.remove(creator="Ada") == full.remove(creator="A'da")  # nobody: nothing is done
    assert count(full, "removals") == 1


def test_a_list_names_images_by_id_address_or_hash(full, tmp_path):
    listed = tmp_path / "opt-out.txt"
    lines = [
        "p10",
        "",
        "https://pictures.example/p20.png",
        sha("e40").upper(),
        "p10",
        "nobody",
        "https://nowhere.example",
    ]
    listed.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    done = run("remove", full.path, "--ids", listed, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["images"] == {"exemplar": 1, "pretraining": 2}
    assert (said["n_not_found"], said["not_found"]) == (2, ["nobody", "https://nowhere.example"])
    assert ids(full) == ["m/0/1", "m/0/2", "m/e0", "o/1/3", "o/e60", "p90"]


def test_copies_of_a_picture_are_told_and_stay_unless_their_hash_is_given(full):
    full.writer.append_images(rows([("copy", "pretraining", None, 3)], sha256=[sha("e0")]))
    removal = full.remove(ids=["m/e0"])
    assert (removal.n_copies, removal.copies) == (1, ["copy"])
    assert full.remove(ids=[sha("e0")]).images == {"pretraining": 1}


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({}, "0 of where, creator and ids are given"),
        ({"where": "true", "creator": "Ada"}, "2 of where, creator and ids are given"),
        ({"where": "nothing = 1"}, "where is 'nothing = 1'; it must be an SQL predicate on the columns of images"),
        ({"ids": "p10"}, "ids is the text 'p10'; give a list"),
        ({"ids": []}, "ids is empty"),
        ({"where": "true", "models": "keep"}, "models is 'keep'; it must be one of list, mark, remove"),
        ({"where": "true", "drop_tags": True}, "drop_tags goes with purge"),
    ],
)
def test_a_wrong_request_takes_nothing_out(full, chosen, said):
    with pytest.raises(InvalidValue, match=said):
        full.remove(**chosen)
    assert count(full, "removals") == 0


def test_a_dry_run_says_what_would_go_and_changes_no_byte(full):
    before = files(full.path)
    dry = full.remove(where="role = 'pretraining'", models="remove", dry_run=True)
    assert files(full.path) == before
    real = full.remove(where="role = 'pretraining'", models="remove")
    assert (dry.images, dry.results, dry.models) == (real.images, real.results, real.models)
    assert real.images == {"exemplar": 2, "pretraining": 3, "sample": 2}


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_model_that_stays_no_longer_names_the_image(full):
    full.remove(ids=["m/e40", "p10"])
    [row] = full.sql("SELECT settings FROM models WHERE model_id = 'm'").to_pylist()
    assert json.loads(row["settings"]) == {"exemplars": [sha("e0"), None], "regularization": [None, "p20"]}
    assert count(full, "marked_models") == 0


def test_a_model_of_a_release_names_its_exemplars_by_path(full):
    [row] = full.snapshot.rows("models", "model_id = 'm'")
    full.writer.upsert("models", [row | {"settings": json.dumps({"exemplars": ["m/e0.png", "m/e40.png"]})}])
    full.remove(ids=["m/e40"])
    [row] = full.snapshot.rows("models", "model_id = 'm'")
    assert json.loads(row["settings"]) == {"exemplars": ["m/e0.png", None]}


def test_models_are_marked(full):
    full.remove(ids=["m/e40"], models="mark")
    second = full.remove(ids=["p20", "o/1/3"], models="mark")
    assert {model.model_id: model.action for model in second.models} == {"m": "mark", "o": None}
    [row] = full.sql("SELECT * EXCLUDE (marked_at) FROM marked_models").to_pylist()
    assert row == {"model_id": "m", "removal_id": second.removal_id, "n_exemplars": 1, "n_regularization": 1}


def test_a_model_is_removed_with_its_samples_and_weights(full):
    weights = full.path / "weights"
    weights.mkdir()
    for name in ("m.safetensors", "m.json", "o.safetensors"):
        (weights / name).write_bytes(b"weights")
    full.writer.upsert(
        "models",
        [row | {"weights_path": f"weights/{row['model_id']}.safetensors"} for row in full.snapshot.rows("models")],
    )
    full.remove(ids=["p20"], models="mark")
    removal = full.remove(ids=["m/e0"], models="remove")
    assert removal.images == {"exemplar": 2, "sample": 2}
    assert ids(full) == ["o/1/3", "o/e60", "p10", "p90"]
    assert ids(full, "models", "model_id") == ["o"]
    assert count(full, "marked_models") == 0
    assert [path.name for path in weights.iterdir()] == ["o.safetensors"]
    assert health.check(full.snapshot) == []


def test_weights_outside_the_database_are_left_alone(full, tmp_path):
    outside = tmp_path / "precious.safetensors"
    outside.write_bytes(b"weights")
    [row] = full.snapshot.rows("models", "model_id = 'm'")
    full.writer.upsert("models", [row | {"weights_path": "../precious.safetensors"}])
    full.remove(ids=["m/e0"], models="remove")
    assert outside.exists()


def test_an_unfinished_model_is_given_up(full):
    full.writer.append_images(rows([("h/e", "exemplar", "h", 5), ("h/0/1", "sample", "h", 6)], sha256=["x", "y"]))
    full.refresh()
    assert full.snapshot.hidden_models == ("h",)
    removal = full.remove(ids=["h/e"])
    assert (removal.images, removal.unfinished_models) == ({"exemplar": 1, "sample": 1}, ["h"])
    assert full.snapshot.hidden_models == ()


def test_a_mixed_model_that_stays_would_keep_captions_as_prompts(full):
    [row] = full.snapshot.rows("models", "model_id = 'm'")
    captions = ["caption of m/e0", "caption of m/e40"]
    full.writer.upsert("models", [row | {"kind": "mixed", "settings": settings(captions=captions, prompts=captions)}])
    with pytest.raises(InvalidValue, match="model 'm' of kind 'mixed' was sampled with captions"):
        full.remove(ids=["m/e0"], purge=True)
    full.remove(ids=["m/e0"])
    [row] = full.snapshot.rows("models", "model_id = 'm'")
    assert json.loads(row["settings"])["captions"] == [None, "caption of m/e40"]
    assert full.remove(ids=["m/e40"], models="remove", purge=True).purged


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_what_went_and_what_is_to_be_done(full):
    done = run("remove", full.path, "--ids", listed(full, "m/e40", "p20", "nobody"), "--models", "mark", "--block")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        "took out 2 images (1 exemplar, 1 pretraining), 2 features",
        "  1 line names no image: nobody",
        "  model m was customized on 1 exemplar and 1 regularization image of these: it stays and is marked",
        "  9 rows of attributions",
        "  10 rows of exemplar_ranks",
        "  4 digests of pictures and addresses blocked",
        "  to compute results again: attrdb evaluate, attrdb attribute --samples",
        "  older versions still hold them; rerun the command with --purge to delete those",
    ]
    assert run("remove", full.path, "--creator", "Ada", "--dry-run").stdout.splitlines() == [
        "would take out 1 image (1 pretraining), 1 feature",
    ]
    assert run("remove", full.path, "--creator", "Ada", "--purge").stdout.splitlines() == [
        "took out 1 image (1 pretraining), 1 feature",
        "  older versions and their files deleted",
    ]
    assert run("remove", full.path, "--creator", "Ada", "--purge").stdout == "nothing to take out: no image is named\n"


def listed(db, *lines):
    file = db.path.with_name("list.txt")
    file.write_text("\n".join(lines))
    return file


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give one of --where, --creator and --ids, which say what is taken out; found none"),
        (["--where", "true", "--creator", "Ada"], "found --where and --creator"),
        (["--where", "true", "--drop-tags"], "--drop-tags goes with --purge"),
        (["--where", "nothing = 1"], "where is 'nothing = 1'; it must be an SQL predicate on the columns of images"),
        (["--ids", "nowhere.txt"], "no file nowhere.txt; write one image id, address or sha256 per line"),
    ],
)
def test_a_wrong_command_takes_nothing_out(full, words, said):
    before = files(full.path)
    done = run("remove", full.path, *words)
    assert done.exit_code == 1
    assert said in done.stderr
    assert files(full.path) == before


def test_a_list_that_is_no_text_or_empty_is_refused(full, tmp_path):
    file = tmp_path / "list.txt"
    for content, said in ((b"\xff\xfe\x00", "is not UTF-8 text"), (b" \n\n", "has no line")):
        file.write_bytes(content)
        done = run("remove", full.path, "--ids", file)
        assert (done.exit_code, said in done.stderr) == (1, True)


def test_what_was_fitted_with_the_image_stays_and_is_told(full):
    fitted = {"calibration_id": "toy_2", "method_id": "toy_2", "tau": 0.1, "lam": 0.1, "gallery_size": 3}
    full.writer.upsert("calibrations", [fitted | {"images_version": full.version}])
    before = full.attribute("m/0/1", k=2)
    assert full.remove(ids=["p90"]).fitted == {"mappers": [], "calibrations": ["toy_2"]}
    assert full.attribute("m/0/1", k=2).to_pylist() == before.to_pylist()  # the same temperature
    [row] = full.query("fitted_before_removals").to_pylist()
    assert (row["kind"], row["id"], row["n_removals"], row["n_images"]) == ("calibration", "toy_2", 1, 1)
    assert "calibration toy_2 was fitted on images that were taken out since (1)" in run("status", full.path).stdout
    full.writer.upsert("calibrations", [fitted | {"images_version": full.version}])
    assert full.query("fitted_before_removals").num_rows == 0


def test_progress_is_reported_before_anything_is_read(full):
    stages = []
    full.remove(
        where="role = 'pretraining'", purge=True, report=lambda stage, done, total, note="": stages.append(stage)
    )
    assert stages[0] == "find images"
    assert list(dict.fromkeys(stages)) == ["find images", "find features", "take out", "purge"]


def test_the_commands_of_the_pages_parse_and_their_sql_runs(full):
    for page in ("removing.md", "backup.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        commands = re.findall(r"^    attrdb (.+)", text, re.MULTILINE)
        assert commands
        for command in commands:
            name, *words = shlex.split(command, comments=True)
            main.commands[name].make_context(name, words, parent=click.Context(main, **main.context_settings))
        for statement in re.findall(r"```sql\n(.*?)```", text, re.DOTALL):
            assert full.sql(statement).num_rows == 0


# --- a stranger's database -------------------------------------------------------------------------------------------


@pytest.fixture
def precious(tmp_path):
    """A folder outside of the database, which looks like a job's."""
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({"exemplars": [sha("e0")]}))
    pq.write_table(pa.table({"image_id": ["m/e0"]}), folder / "mine.parquet")
    return folder


def test_an_id_in_a_row_is_no_path_that_is_deleted(full, precious):
    """Of a model without a row, all images go, and its folder; here its id leads out of `jobs`, or to a table."""
    for model_id in ("../../precious", str(precious), "../images.lance"):
        full.writer.append_images(rows([(f"{model_id}/e0", "exemplar", model_id, 5)]))
        removal = full.remove(ids=[f"{model_id}/e0"])
        assert removal.unfinished_models == [model_id]
    assert sorted(file.name for file in precious.iterdir()) == ["mine.parquet", "settings.json"]
    assert health.check(full.snapshot) == []


def test_weights_are_deleted_among_the_weights_alone(full):
    [model] = full.snapshot.rows("models", "model_id = 'm'")
    kept = full.path / "jobs" / "notes.txt"
    kept.write_text("mine")
    full.writer.upsert("models", [model | {"weights_path": "jobs/notes.txt"}])
    full.remove(ids=["m/e0"], models="remove")
    assert kept.exists()


@pytest.mark.parametrize("name", ["half", ".train-half", ".encode-half"])
def test_a_link_among_the_jobs_is_left_alone_with_what_it_points_to(full, precious, name):
    (full.path / "jobs").mkdir(exist_ok=True)
    (full.path / "jobs" / name).symlink_to(precious)
    full.remove(ids=["m/e0"])
    assert sorted(file.name for file in precious.iterdir()) == ["mine.parquet", "settings.json"]


def test_jobs_that_are_a_link_out_of_the_database_are_refused(full, precious):
    shutil.rmtree(full.path / "jobs", ignore_errors=True)
    (full.path / "jobs").symlink_to(precious.parent)
    with pytest.raises(InvalidValue, match="jobs is a link that leaves the database"):
        full.remove(ids=["m/e0"])
    assert precious.exists()


def change_plan(folder, **changes):
    file = folder / "plan.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: change_plan(folder, unfinished=["../../precious"]),
        lambda folder: change_plan(folder, unfinished=3),
        lambda folder: change_plan(folder, more=1),
        lambda folder: (folder / "plan.json").write_text("{"),
        lambda folder: (folder / "plan.json").write_text("[]"),
        lambda folder: (folder / "images.parquet").write_bytes(b"PAR1"),
        lambda folder: (folder / "images.parquet").unlink(),
    ],
)
def test_a_plan_that_was_changed_or_is_damaged_deletes_nothing_else(full, precious, monkeypatch, damage):
    monkeypatch.setattr("attrdb.upkeep.removal.remove._delete", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        full.remove(ids=["m/e0"])
    monkeypatch.undo()
    damage(full.path / "jobs" / ".remove")
    done = CliRunner().invoke(main, ["remove", str(full.path), "--where", "image_id = 'm/e0'"])
    assert precious.exists()
    if done.exit_code:
        assert "is damaged" in done.output
        assert "Traceback" not in done.output
        shutil.rmtree(full.path / "jobs" / ".remove")
        assert full.remove(ids=["m/e0"]).n_images == 1
