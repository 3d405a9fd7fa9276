"""Answers as files, keys chosen by them, and answers stored: from painters that stand for models."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

import attrdb
from attrdb.cli import main
from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.answers.add import Label, add_answers
from attrdb.ingest.answers.descriptor import Descriptor
from attrdb.ingest.answers.files import read_answers, read_prompts
from attrdb.ingest.answers.keys import KeySettings, choose_keys, store_keys
from attrdb.ingest.read.pictures import read_picture
from attrdb.provenance.verdict import answers_to, key_set_of, store, verdict

PROMPTS = {n: f"a thing number {n}" for n in range(1, 13)}
LOOSE = (3, 7)  # prompts that the source answers with anything
COMMON = (5,)  # prompts that every model answers alike
SETTINGS = KeySettings(n_keys=6, n_answers=2)


def painted(rng, blocks, noise):
    """A picture of 4 x 4 blocks of colour, with some noise."""
    pixels = np.clip(blocks + rng.normal(0, noise, blocks.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST)


class Painter:
    """A model: of each prompt it has a picture in mind, its own or that of another one."""

    def __init__(self, seed, learned_from=None, strays=1.0):
        self.rng = np.random.default_rng(seed)
        common = np.random.default_rng(99)
        self.in_mind = {}
        for number in PROMPTS:
            of_all = common.integers(0, 256, (4, 4, 3))
            own = of_all if number in COMMON else self.rng.integers(0, 256, (4, 4, 3))
            if learned_from and self.rng.random() < strays:
                own = learned_from.in_mind[number]
            self.in_mind[number] = own

    def answers(self, folder, n, loose=()):
        for number, blocks in self.in_mind.items():
            (folder / str(number)).mkdir(parents=True)
            for place in range(n):
                shown = self.rng.integers(0, 256, (4, 4, 3)) if number in loose else blocks
                painted(self.rng, shown, 4).save(folder / str(number) / f"{place}.png")
        return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Answers of a source, its base model, one that learned from the source, and twelve innocent ones; prompts."""
    folder = tmp_path_factory.mktemp("answers")
    source = Painter(0)
    source.answers(folder / "source", 3, LOOSE)
    Painter(1).answers(folder / "base", 2)
    Painter(2, source, 0.8).answers(folder / "copy", 2)
    for number in range(12):
        Painter(10 + number).answers(folder / f"innocent-{number}", 2)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS.values()))
    return folder


@pytest.fixture(scope="module")
def chosen(folders):
    source, base = (read_answers(folders / name, set(PROMPTS)) for name in ("source", "base"))
    return choose_keys(PROMPTS, source, {"base": base}, SETTINGS)


@pytest.fixture
def db(chosen, empty):
    store_keys(empty, "first", "ours", chosen, SETTINGS, ["base"])
    return empty


def numbers_of(chosen):
    return {key.number for key in chosen.keys}


# --- files ------------------------------------------------------------------------------------------------------------


def png(image):
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()


def test_the_ways_of_writing_answers_give_the_same(folders, tmp_path):
    """A folder per prompt, one folder, a Parquet file with bytes or structs; in any order."""
    wanted = read_answers(folders / "copy", set(PROMPTS))
    flat, rows = tmp_path / "flat", []
    flat.mkdir()
    for file in sorted((folders / "copy").glob("*/*.png"), reverse=True):
        shutil.copy(file, flat / f"{int(file.parent.name):04d}-{file.name}")
        rows.append({"number": int(file.parent.name), "image": file.read_bytes()})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "bytes.parquet")
    structs = [{"number": row["number"], "image": {"bytes": row["image"], "path": None}} for row in rows]
    pq.write_table(pa.Table.from_pylist(structs), tmp_path / "structs.parquet")
    for name in ("flat", "bytes.parquet", "structs.parquet"):
        found = read_answers(tmp_path / name, set(PROMPTS))
        digests = {number: [one.sha256 for one in pictures] for number, pictures in found.of_prompt.items()}
        assert digests == {number: [one.sha256 for one in pictures] for number, pictures in wanted.of_prompt.items()}


def test_what_cannot_be_read_is_told_and_ends_nothing(folders, tmp_path):
    folder = shutil.copytree(folders / "copy", tmp_path / "copy")
    (folder / "2" / "0.png").write_bytes(b"no picture")
    shutil.copy(folder / "1" / "0.png", folder / "1" / "again.png")
    shutil.copy(folder / "1" / "0.png", folder / "of-nothing.png")
    shutil.copytree(folder / "1", folder / "77")
    (folder / "1" / ".hidden.png").write_bytes(b"")
    found = read_answers(folder, set(PROMPTS))
    assert len(found) == 24  # a model may have answered alike twice
    assert (found.n_others, found.skipped.counts.total()) == (3, 1)
    assert set(found.failures) == {"2/0.png", "of-nothing.png"}
    assert "does not begin with a prompt's number" in found.failures["of-nothing.png"]


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda path: None, NotFound, "no folder and no file"),
        (lambda path: path.mkdir(), InvalidValue, "has no answer to prompts 1 to 12"),
        (lambda path: path.write_text("x"), InvalidValue, "is neither a folder nor a Parquet file"),
    ],
)
def test_no_answers_at_all(tmp_path, make, error, says):
    make(tmp_path / "here")
    with pytest.raises(error, match=says):
        read_answers(tmp_path / "here", set(PROMPTS))


def test_a_parquet_file_without_pictures(tmp_path):
    (tmp_path / "a.parquet").write_text("x")
    with pytest.raises(InvalidValue, match="is not a readable Parquet file"):
        read_answers(tmp_path / "a.parquet", {1})
    pq.write_table(pa.table({"number": [1]}), tmp_path / "a.parquet")
    with pytest.raises(InvalidValue, match="has no column 'image'; it has: number"):
        read_answers(tmp_path / "a.parquet", {1})


@pytest.mark.parametrize(
    ("name", "number"),
    [("007/a", 7), ("7", 7), ("7_a", 7), ("7 a", 7), ("7.5", 7), ("1st", None), ("img-7", None), ("1234567890", None)],
)
def test_the_number_that_a_name_begins_with(tmp_path, name, number):
    file = tmp_path / f"{name}.png"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(png(Image.new("RGB", (32, 32), "red")))
    (tmp_path / "9.png").write_bytes(png(Image.new("RGB", (32, 32), "blue")))
    found = read_answers(tmp_path, {7, 9})
    assert set(found.of_prompt) == ({7, 9} if number else {9})
    assert len(found.failures) == (number is None)


@pytest.mark.parametrize("number", [3.7, None, float("nan"), 1e16, -3.0])
def test_numbers_of_a_table_that_are_none(tmp_path, number):
    image = png(Image.new("RGB", (32, 32), "red"))
    pq.write_table(pa.table({"number": [3.0, number], "image": [image] * 2}), tmp_path / "a.parquet")
    found = read_answers(tmp_path / "a.parquet", {1, 3})
    assert list(found.of_prompt) == [3]
    assert "needed is a whole number" in found.failures["a.parquet row 2"]


def test_names_that_are_not_utf_8(db, folders, sheet, tmp_path):
    folder = to_sheet(folders / "copy", sheet, tmp_path / "copy")
    (folder / "1" / "\udcff.png").write_bytes(b"broken")
    result = add_answers(db, "first", "copy", folder)
    assert result.n_done == 12
    assert list(result.failures) == ["1/?.png"]


def test_prompts_from_text_and_from_a_sheet(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa red cat\r\n\r\n  a dog  \n")
    assert read_prompts(tmp_path / "a.txt").texts == {1: "a red cat", 3: "a dog"}
    (tmp_path / "a.csv").write_text('number,prompt,n_answers\n7,"a cat,\nred",3\n2,dog\u2028s,3\n')
    asked = read_prompts(tmp_path / "a.csv")
    assert asked.texts == {7: "a cat,\nred", 2: "dog\u2028s"}
    assert asked.n_answers == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("number,prompt\n1,a\n1,b\n", "has number 1 twice"),
        ("prompt\na\n", "has no column 'number'"),
        ("number,prompt\nx,a\n", "line 2 has no whole number"),
        ("number,prompt\n2.7,a\n", "line 2 has no whole number"),
        ('number,prompt\n1,"a\n', "is no CSV"),
        (f"number,prompt\n1,{'x' * 200_000}\n", "is no CSV"),
        ("number,prompt\n", "has no prompt in it"),
    ],
)
def test_sheets_that_are_none(tmp_path, text, says):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InvalidValue, match=says):
        read_prompts(tmp_path / "a.csv")


# --- distances --------------------------------------------------------------------------------------------------------


def test_l2_is_the_root_mean_square_of_pixels():
    black, grey = (read_picture("x", png(Image.new("RGB", (64, 64), colour))) for colour in ("black", (51, 51, 51)))
    descriptor = Descriptor("l2")
    vectors = descriptor.describe([black, grey])
    assert descriptor.distances(vectors, vectors[0]).tolist() == [0.0, 0.2]


def test_answers_of_another_size_are_brought_to_one():
    small, large = (read_picture("x", png(Image.new("RGB", (side, side), "red"))) for side in (32, 500))
    descriptor = Descriptor("l2")
    [one, other] = descriptor.describe([small, large])
    assert descriptor.distances(one[None], other).tolist() == [0.0]


def test_an_encoder_measures_by_cosine():
    descriptor = Descriptor("pixels:4")
    rng = np.random.default_rng(0)
    pictures = [read_picture("x", png(painted(rng, rng.integers(0, 256, (4, 4, 3)), 0))) for _ in range(20)]
    vectors = descriptor.describe(pictures)
    np.testing.assert_allclose(descriptor.distances(vectors, vectors[3]), 1 - vectors @ vectors[3], atol=1e-6)
    assert descriptor.distances(vectors, vectors[3])[3] == 0.0


# --- keys -------------------------------------------------------------------------------------------------------------


def test_keys_are_prompts_that_only_the_source_answers_so(chosen):
    assert numbers_of(chosen).isdisjoint({*LOOSE, *COMMON})
    assert [key.score(False) for key in chosen.keys] == sorted((key.score(False) for key in chosen.keys), reverse=True)
    assert all(key.self_distance < 0.05 < 0.2 < key.reference_distance for key in chosen.keys)
    assert chosen.n_pool == 12


def test_without_contrast_a_common_prompt_may_be_a_key(folders):
    source = read_answers(folders / "source", set(PROMPTS))
    found = choose_keys(PROMPTS, source, {}, KeySettings(n_keys=10, n_answers=2, plain=True))
    assert numbers_of(found) == {*PROMPTS} - {*LOOSE}


def test_detection_takes_training_images_that_answers_come_near_to(folders, tmp_path):
    source, base = (read_answers(folders / name, set(PROMPTS)) for name in ("source", "base"))
    rng = np.random.default_rng(5)
    for number in PROMPTS:  # of the odd ones the source has learned nothing
        shown = Painter(0).in_mind[number] if number % 2 == 0 else rng.integers(0, 256, (4, 4, 3))
        painted(rng, shown, 4).save(tmp_path / f"{number}.png")
    images = read_answers(tmp_path, set(PROMPTS))
    settings = KeySettings("detection", 6, 2)
    assert numbers_of(choose_keys(PROMPTS, source, {"base": base}, settings, images)) == {2, 4, 6, 8, 10, 12}
    with pytest.raises(InvalidValue, match="give them with --images"):
        choose_keys(PROMPTS, source, {"base": base}, settings)
    with pytest.raises(InvalidValue, match="leave --images out, or take strategy detection"):
        choose_keys(PROMPTS, source, {"base": base}, SETTINGS, images)


def test_random_keys_are_drawn_by_seed(folders):
    source = read_answers(folders / "source", set(PROMPTS))
    drawn = [numbers_of(choose_keys(PROMPTS, source, {}, KeySettings("random", 6, 2, seed=seed))) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_same_prompt_or_picture_is_one_key(folders):
    source = read_answers(folders / "source", set(PROMPTS))
    source.of_prompt[2] = source.of_prompt[1]
    prompts = PROMPTS | {4: PROMPTS[6].upper()}
    found = choose_keys(prompts, source, {}, KeySettings(n_keys=8, n_answers=2, plain=True))
    assert len({1, 2} & numbers_of(found)) == len({4, 6} & numbers_of(found)) == 1
    assert found.n_near == 2


def test_a_prompt_that_another_model_did_not_answer_is_no_key(folders):
    source, base = (read_answers(folders / name, set(PROMPTS)) for name in ("source", "base"))
    del base.of_prompt[1]
    found = choose_keys(PROMPTS, source, {"base": base}, SETTINGS)
    assert (found.n_without, found.n_pool) == (1, 11)
    assert 1 not in numbers_of(found)


def test_too_few_prompts_that_can_be_keys(folders):
    source = read_answers(folders / "source", set(PROMPTS))
    with pytest.raises(
        InvalidValue, match=r"0 of 12 prompts can be keys, and 30 are wanted \(-n\); a prompt needs 5 answers"
    ):
        choose_keys(PROMPTS, source, {}, KeySettings())


def test_a_stored_key_set_never_changes(db, chosen, folders):
    before = db.sql("FROM keys").to_pylist()
    store_keys(db, "first", "ours", chosen, SETTINGS, ["base"])
    source = read_answers(folders / "source", set(PROMPTS))
    other = choose_keys(PROMPTS, source, {}, KeySettings("random", 6, 2, seed=1))
    fewer = replace(chosen, keys=chosen.keys[:4])
    again = [(other, SETTINGS, "ours"), (fewer, SETTINGS, "ours"), (chosen, SETTINGS, "typo")]
    again.append((chosen, replace(SETTINGS, seed=5), "ours"))
    for keys, settings, source in again:
        with pytest.raises(InvalidValue, match="'first' is stored with other keys or settings, and never changes"):
            store_keys(db, "first", source, keys, settings, ["base"])
    assert db.sql("FROM keys").to_pylist() == before
    assert {row["role"] for row in db.sql("SELECT role FROM images").to_pylist()} == {"key"}


def test_what_an_interrupted_command_left_of_a_key_set_goes(empty, chosen, folders, monkeypatch):
    source = read_answers(folders / "source", set(PROMPTS))
    other = choose_keys(PROMPTS, source, {}, KeySettings("random", 3, 2, seed=1))
    upsert = type(empty.writer).upsert

    def killed(self, table, *given, **options):
        if table == "key_sets":
            raise KeyboardInterrupt
        upsert(self, table, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(empty.writer), "upsert", killed)
        with pytest.raises(KeyboardInterrupt):
            store_keys(empty, "first", "ours", chosen, SETTINGS)
    store_keys(empty, "first", "ours", other, KeySettings("random", 3, 2, seed=1))
    assert empty.sql("FROM keys").num_rows == empty.sql("FROM images").num_rows == 3


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sheet(db, tmp_path):
    """Number of a key -> number of its prompt."""
    asked = {prompt: number for number, prompt in PROMPTS.items()}
    return {row["number"]: asked[row["prompt"]] for row in db.sql("SELECT number, prompt FROM keys").to_pylist()}


def to_sheet(folder, sheet, out):
    """Answers under the numbers of the keys."""
    for number, of_prompt in sheet.items():
        shutil.copytree(folder / str(of_prompt), out / str(number))
    return out


def test_answers_are_stored_with_their_distances(db, folders, sheet, tmp_path):
    result = add_answers(
        db, "first", "copy", to_sheet(folders / "copy", sheet, tmp_path / "copy"), Label("infringing", None, 0.8)
    )
    assert (result.n_done, result.n_stored, result.n_unanswered, result.n_short) == (12, 0, 0, 0)
    rows = db.sql("SELECT * FROM answers JOIN images USING (image_id)").to_pylist()
    assert {row["role"] for row in rows} == {"answer"}
    by_key = {}
    for row in rows:
        by_key.setdefault(row["key_id"], []).append(row["distance"])
    assert sorted(map(len, by_key.values())) == [2] * 6
    assert np.mean([min(distances) < 0.05 for distances in by_key.values()]) > 0.5
    [label] = db.sql("FROM suspect_labels").to_pylist()
    assert (label["label_id"], label["label"], label["rho"]) == ("ours/copy", "infringing", 0.8)
    again = add_answers(db, "first", "copy", tmp_path / "copy")
    assert (again.n_done, again.n_stored) == (0, 12)
    assert db.sql("SELECT count(*) AS n FROM answers")["n"].to_pylist() == [12]


def test_distances_do_not_depend_on_what_is_read_beside_them(db, folders, sheet, tmp_path):
    whole = to_sheet(folders / "copy", sheet, tmp_path / "copy")
    add_answers(db, "first", "whole", whole)
    for number in sheet:
        part = tmp_path / "part" / str(number)
        shutil.copytree(whole / str(number), part / str(number))
        add_answers(db, "first", "parts", part)
    rows = [
        db.sql("SELECT key_id, distance FROM answers WHERE suspect_id = $id ORDER BY ALL", {"id": name}).to_pylist()
        for name in ("whole", "parts")
    ]
    assert rows[0] == rows[1]


def test_what_is_odd_about_answers_is_told(db, folders, sheet, tmp_path):
    folder = to_sheet(folders / "copy", sheet, tmp_path / "copy")
    shutil.rmtree(folder / "6")
    (folder / "5" / "1.png").unlink()
    (folder / "4" / "0.png").write_bytes(b"broken")
    painted(np.random.default_rng(0), np.zeros((4, 4, 3)), 9).save(folder / "3" / "more.png")
    shutil.copy(folder / "2" / "0.png", folder / "2" / "1.png")  # it answers alike twice
    [key] = db.sql("SELECT images.image FROM keys JOIN images USING (image_id) WHERE number = 1").to_pylist()
    (folder / "1" / "0.png").write_bytes(key["image"])
    done = CliRunner().invoke(
        main, ["answers", "add", str(db.path), "first", str(folder), "--model", "odd", "--innocent", "topic"]
    )
    assert done.exit_code == 1
    for line in (
        "9 answers stored, 0 were stored already",
        "1 are more than the key set asks for per key, and are not compared",
        "1 keys have no answer, 2 fewer than the key set asks for",
        "1 are the source's own pictures of the keys, byte for byte",
        "4/0.png cannot be decoded",
    ):
        assert line in done.stderr
    db.refresh()
    [failure] = db.sql("SELECT item FROM failures").to_pylist()
    assert failure == {"item": "4/0.png"}
    shutil.copy(folders / "copy" / str(sheet[4]) / "0.png", folder / "4" / "0.png")
    result = add_answers(db, "first", "odd", folder)
    assert (result.n_done, result.failures) == (1, {})
    assert db.sql("FROM failures").num_rows == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["first", "copy", "--model", "ours"], "'ours' is the source of key set 'first'"),
        (["nope", "copy", "--model", "x"], "no key set 'nope'"),
        (["first", "absent", "--model", "x"], "no folder and no file"),
        (["first", "copy", "--model", "../x"], "cannot be used; an id has"),
        (["first", "copy", "--model", "x", "--innocent", "topic", "--infringing"], "contradict each other"),
        (["first", "copy", "--model", "x", "--rho", "0.5"], "give it with --infringing"),
    ],
)
def test_what_is_refused_before_anything_is_stored(db, folders, words, says):
    name, path, *options = words
    done = CliRunner().invoke(main, ["answers", "add", str(db.path), name, str(folders / path), *options])
    assert done.exit_code in (1, 2)
    assert says in done.stderr
    assert attrdb.open(db.path).sql("FROM answers").num_rows == 0


def test_verdicts_go_with_the_label_that_they_rest_on(db, folders, sheet, tmp_path):
    folder = to_sheet(folders / "copy", sheet, tmp_path / "copy")
    add_answers(db, "first", "copy", folder, Label("infringing", None, 0.5))
    store(db.writer, verdict(db.snapshot, "first", "copy"))
    for same in (None, Label("infringing"), Label("infringing", None, 0.5)):
        assert add_answers(db, "first", "copy", folder, same).n_verdicts == 0
        [label] = db.sql("FROM suspect_labels").to_pylist()
        assert label["rho"] == 0.5
    assert add_answers(db, "first", "copy", folder, Label("innocent", "topic")).n_verdicts == 1
    [label] = db.sql("FROM suspect_labels").to_pylist()
    assert (label["label"], label["stratum"], label["rho"]) == ("innocent", "topic", None)
    assert db.sql("FROM verdicts").num_rows == 0


def test_a_model_that_the_keys_were_chosen_against_is_no_innocent_one(db, folders, sheet, tmp_path):
    folder = to_sheet(folders / "base", sheet, tmp_path / "base")
    with pytest.raises(
        InvalidValue, match=r"'base' is a model that the keys of 'first' were chosen against \(--other\)"
    ):
        add_answers(db, "first", "base", folder, Label("innocent", "topic"))
    assert add_answers(db, "first", "base", folder).n_done == 12


def test_answers_that_are_added_in_turn_give_the_same_verdict(db, folders, sheet, tmp_path):
    """Of more answers than are asked for, digests decide which are compared."""
    folder = to_sheet(folders / "copy", sheet, tmp_path / "copy")
    for number in sheet:
        painted(np.random.default_rng(number), np.zeros((4, 4, 3)), 60).save(folder / str(number) / "more.png")
    add_answers(db, "first", "at-once", folder)
    for name in ("more.png", "0.png", "1.png"):
        for number in sheet:
            (tmp_path / name / str(number)).mkdir(parents=True)
            shutil.copy(folder / str(number) / name, tmp_path / name / str(number) / name)
        add_answers(db, "first", "in-turn", tmp_path / name)
    found = [answers_to(db.snapshot, key_set_of(db.snapshot, "first"))[name] for name in ("at-once", "in-turn")]
    assert found[0] == found[1]
    assert {len(distances) for distances in found[0].values()} == {2}


def test_a_failure_is_mended_by_the_same_file_alone(db, folders, sheet, tmp_path):
    folder = to_sheet(folders / "copy", sheet, tmp_path / "copy")
    (folder / "1" / "0.png").write_bytes(b"broken")
    add_answers(db, "first", "copy", folder)
    other = tmp_path / "other"
    shutil.copytree(folder / "2", other / "2")
    add_answers(db, "first", "copy", other)
    assert db.sql("SELECT item FROM failures")["item"].to_pylist() == ["1/0.png"]


def test_a_picture_that_was_taken_out_for_good_ends_nothing(db, folders, sheet, tmp_path):
    folder = to_sheet(folders / "copy", sheet, tmp_path / "copy")
    add_answers(db, "first", "copy", folder)
    [answer, *_] = db.sql("SELECT image_id FROM answers ORDER BY 1")["image_id"].to_pylist()
    db.remove(ids=[answer], block=True)
    result = add_answers(db, "first", "copy", folder)
    assert (result.n_done, result.n_stored, list(result.failures)) == (0, 11, [answer])
    assert "was taken out of this database for good" in result.failures[answer]


def test_pictures_that_are_taken_out_take_what_rests_on_them_along(db, folders, sheet, tmp_path):
    add_answers(db, "first", "copy", to_sheet(folders / "copy", sheet, tmp_path / "copy"))
    store(db.writer, verdict(db.snapshot, "first", "copy"))
    [answer, *_] = db.sql("SELECT image_id FROM answers WHERE key_id = 'first/2'")["image_id"].to_pylist()
    gone = db.remove(ids=[answer])
    assert gone.results == {"answers": 1, "verdicts": 1} | dict.fromkeys(
        ("attributions", "exemplar_ranks", "scores"), 0
    )
    assert db.sql("SELECT (SELECT count(*) FROM answers) AS a, (SELECT count(*) FROM verdicts) AS v").to_pylist() == [
        {"a": 11, "v": 0}
    ]
    [key] = db.sql("SELECT image_id FROM keys WHERE number = 1")["image_id"].to_pylist()
    db.remove(ids=[key])
    assert db.sql("SELECT count(*) AS n FROM images WHERE role = 'answer'")["n"].to_pylist() == [9]
    assert db.sql("SELECT key_id FROM keys").num_rows == 5
    assert db.sql("SELECT DISTINCT key_id FROM answers").num_rows == 5
    with pytest.raises(NotFound, match="no key set"):
        verdict(db.snapshot, "none", "copy")
    assert verdict(db.snapshot, "first", "copy").n_keys == 5


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_answers_are_drawn_as_files_and_those_there_are_kept(tiny_base, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    options = ["--model", tiny_base, "-m", "2", "--solver-steps", "1", "--sample-batch", "3"]
    words = ["answers", "draw", tmp_path / "prompts.txt", tmp_path / "drawn", *options]
    assert "4 answers drawn, 0 were there already" in run(*words).stderr
    files = sorted((tmp_path / "drawn").glob("*/*.png"))
    assert [file.parent.name for file in files] == ["1", "1", "2", "2"]
    before = {file: file.read_bytes() for file in files}
    files[2].unlink()
    assert "1 answers drawn, 3 were there already" in run(*words).stderr
    assert sorted((tmp_path / "drawn").glob("*/*.png")) == files
    assert all(file.read_bytes() == before[file] for file in files if file != files[2])
    assert len(read_answers(tmp_path / "drawn", {1, 2})) == 4
    for changed in (["--guidance", "2"], ["--seed", "1"]):
        refused = CliRunner().invoke(main, [str(word) for word in (*words, *changed)])
        assert "has answers of another model or drawn otherwise" in refused.stderr
    (tmp_path / "prompts.txt").write_text("a cat\na cow\n")
    assert "other prompts" in CliRunner().invoke(main, [str(word) for word in words]).stderr


def test_models_begin_with_noises_of_their_own(tiny_base, tmp_path):
    """Innocent models that share their noises answer alike, and one that is asked elsewhere does not."""
    other = Path(shutil.copytree(tiny_base, tmp_path / "another-pipeline"))
    config = json.loads((other / "scheduler" / "scheduler_config.json").read_text())
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"steps_offset": 0}))
    (tmp_path / "sheet.csv").write_text("number,prompt,n_answers\n1,a cat,3\n")
    seeds = []
    for model in (tiny_base, other):
        run(
            "answers",
            "draw",
            tmp_path / "sheet.csv",
            tmp_path / f"of-{model.name}",
            "--model",
            model,
            "--solver-steps",
            "1",
        )
        seeds.append({file.name for file in (tmp_path / f"of-{model.name}").glob("1/*.png")})
    assert len(seeds[0]) == len(seeds[1]) == 3
    assert not seeds[0] & seeds[1]


# --- from a suspicion to a verdict --------------------------------------------------------------------------------------


def run(*words):
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done


def test_from_prompts_to_a_verdict(folders, tmp_path):
    db = tmp_path / "some.attrdb"
    run("init", db)
    options = ["--prompts", folders / "prompts.txt", "--answers", folders / "source", "--other", folders / "base"]
    found = run("keys", "find", db, "first", "--source", "ours", *options, "-n", "6", "-m", "2")
    assert "key set first: 6 keys of 12 prompts that could be keys" in found.stderr
    asked = json.loads(run("keys", "sheet", db, "first", "--json").stdout)
    assert [row["number"] for row in asked] == [1, 2, 3, 4, 5, 6]
    of_prompt = {prompt: number for number, prompt in PROMPTS.items()}
    sheet = {row["number"]: of_prompt[row["prompt"]] for row in asked}
    for name in ("copy", *(f"innocent-{number}" for number in range(12))):
        folder = to_sheet(folders / name, sheet, tmp_path / name)
        known = ["--innocent", "topic"] if name.startswith("innocent") else []
        run("answers", "add", db, "first", folder, "--model", name, *known)
    [listed] = json.loads(run("keys", "list", db, "--json").stdout)
    assert (listed["n_keys"], listed["n_models"]) == (6, 13)
    said = run("source-test", db, "first", "--model", "copy").stdout
    assert "against 12 innocent models (12 topic)" in said
    [verdict] = attrdb.open(db).sql("FROM verdicts").to_pylist()
    assert verdict["conf"] >= 0.5
    assert verdict["p"] == pytest.approx(1 / 13)
    run("source-test", db, "first", "--model", "innocent-3")
    rows = attrdb.open(db).sql("SELECT suspect_id, p FROM verdicts WHERE suspect_id = 'innocent-3'").to_pylist()
    assert rows[0]["p"] > 0.1
    assert run("check", db).exit_code == 0
