"""The AbC release: its entries become models, each whole or not at all."""

import json

import pytest
from conftest import picture

import attrdb
from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.read import abc
from attrdb.ingest.read.abc import ingest_abc, read_release


def entry(root, source, name, shade, word, category=None, n_exemplars=1):
    """An entry as the release has it, two samples a scheme, and its files."""
    exemplars = [f"dataset/exemplar/{source}/images/{name}/{number}.png" for number in range(n_exemplars)]
    synth = {
        scheme: [f"dataset/synth/{source}/{scheme}/{name}/samples/0000{number}.png" for number in range(2)]
        for scheme in (word, "gpt")
    }
    paths = [*exemplars, *synth[word], *synth["gpt"]]
    for number, path in enumerate(paths):
        picture(root / path, (shade, 10 + number, 30))
    return {"exemplar": exemplars, "synth": synth, "class_id": name, "category": category}


def write(root, name, entries):
    path = root / "dataset" / "json" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture
def styles(tmp_path):
    root = tmp_path / "release"
    entries = [
        entry(root, "artchive", name, shade, "object", n_exemplars=2) for name, shade in (("ardon", 9), ("bosch", 99))
    ]
    return write(root, "test_artchive.json", entries), root


@pytest.fixture
def objects(tmp_path):
    """Two models of one class, told apart by their exemplars only."""
    root = tmp_path / "release"
    entries = [entry(root, "imagenet", f"n0/{number}", 50 * number, "media", category="bird") for number in (1, 2)]
    for one in entries:
        one["class_id"] = "n01518878"
    return write(root, "test_unobserved_imagenet.json", entries), root


def rows(db):
    db.refresh()
    stored = db.sql("SELECT * EXCLUDE created_at FROM models ORDER BY model_id").to_pylist()
    return db.sql("SELECT * FROM images ORDER BY image_id").to_pylist(), stored


def summary(result):
    return result.n_done, result.n_stored, result.failures


# --- what becomes of an entry -----------------------------------------------------------------------------------------


def test_an_entry_is_a_model(empty, styles, toy_encoder):
    release = read_release(*styles)
    reports = []
    result = ingest_abc(empty, release, [toy_encoder], lambda *units: reports.append(units))
    assert summary(result) == (2, 0, {})
    assert reports == [(f"ingest {release.name}", done, 2) for done in (0, 1, 2)]
    images, models = rows(empty)
    ardon = release.models[0].model_id
    assert ardon.startswith("artchive-ardon-")
    model = models[0]
    assert json.loads(model.pop("settings")) == {
        "release": "test_artchive.json",
        "class_id": "ardon",
        "exemplars": [f"dataset/exemplar/artchive/images/ardon/{number}.png" for number in (0, 1)],
        "synth": {"gpt": 2, "object": 2},
    }
    assert model.pop("settings_hash") == release.models[0].settings_hash
    assert {name: value for name, value in model.items() if value is not None} == {
        "model_id": ardon,
        "base_model": "CompVis/stable-diffusion-v1-4",
        "method": "custom-diffusion",
        "kind": "style",
        "split": "test",
        "train_prompt": "A picture in the style of V* art",
        "token": "V*",
        "n_exemplars": 2,
        "n_samples": 4,
    }
    own = [row for row in images if row["model_id"] == ardon]
    exemplars = [row for row in own if row["role"] == "exemplar"]
    assert [row["image_id"] for row in exemplars] == [f"{ardon}/{row['sha256'][:16]}" for row in exemplars]
    assert {(row["source"], row["split"], row["width"]) for row in exemplars} == {("artchive", "test", 32)}
    samples = [row for row in own if row["role"] == "sample"]
    assert [(row["image_id"], row["prompt_scheme"], row["metadata"]) for row in samples] == [
        (f"{ardon}/gpt/00000", "gpt", '{"release_scheme": "gpt"}'),
        (f"{ardon}/gpt/00001", "gpt", '{"release_scheme": "gpt"}'),
        (f"{ardon}/procedural/00000", "procedural", '{"release_scheme": "object"}'),
        (f"{ardon}/procedural/00001", "procedural", '{"release_scheme": "object"}'),
    ]
    assert {(row["source"], row["prompt"], row["seed"]) for row in samples} == {("synthesized", None, None)}
    assert samples[3]["uri"] == (styles[1] / "dataset/synth/artchive/object/ardon/samples/00001.png").as_uri()


def test_objects_of_one_class_are_models_of_their_own(empty, objects, toy_encoder):
    ingest_abc(empty, read_release(*objects), [toy_encoder])
    models = rows(empty)[1]
    assert len({model["model_id"] for model in models}) == 2
    for model in models:
        assert model["model_id"].startswith("imagenet-n01518878-")
        assert (model["kind"], model["category"], model["train_prompt"]) == ("object", "bird", "V* bird")
        assert model["split"] == "test_unseen"


@pytest.mark.parametrize(
    ("name", "split"),
    [("test_observed_imagenet", "test"), ("train_imagenet", "train"), ("val_unobserved_imagenet", "val_unseen")],
)
def test_the_name_of_the_file_says_the_split(objects, name, split):
    path, root = objects
    renamed = path.rename(path.with_name(f"{name}.json"))
    assert {model.split for model in read_release(renamed, root).models} == {split}


def test_a_model_id_does_not_depend_on_where_the_release_lies(styles, tmp_path):
    path, root = styles
    before = [model.model_id for model in read_release(path, root).models]
    moved = root.rename(tmp_path / "elsewhere")
    assert [one.model_id for one in read_release(moved / path.relative_to(root), moved).models] == before


def test_a_class_id_of_any_letters_gives_a_usable_model_id(styles):
    path, root = styles
    entries = json.loads(path.read_text())
    entries[0]["class_id"] = "../Dürer & co"
    write(root, path.name, entries)
    assert read_release(path, root).models[0].model_id.startswith("artchive-..-D-rer-co-")


# --- again ------------------------------------------------------------------------------------------------------------


def test_run_twice_is_run_once_and_stored_files_are_not_read(empty, styles, toy_encoder):
    release = read_release(*styles)
    ingest_abc(empty, release, [toy_encoder])
    before, version = rows(empty), empty.version
    for path in styles[1].rglob("*.png"):
        path.unlink()
    assert summary(ingest_abc(empty, read_release(*styles), [toy_encoder])) == (0, 2, {})
    assert rows(empty) == before
    assert empty.version == version


def test_interrupted_and_rerun_is_run_once(tmp_path, styles, toy_encoder):
    whole, broken = attrdb.create(tmp_path / "whole.attrdb"), attrdb.create(tmp_path / "broken.attrdb")
    release = read_release(*styles)
    ingest_abc(whole, release, [toy_encoder])

    def interrupt(_stage, done, _total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest_abc(broken, release, [toy_encoder], interrupt)
    assert len(rows(broken)[1]) == 1
    assert summary(ingest_abc(broken, release, [toy_encoder])) == (1, 1, {})
    assert rows(broken) == rows(whole)


def test_models_without_their_files_are_left_out_until_these_come(tmp_path, styles, toy_encoder):
    path, root = styles
    whole, parts = attrdb.create(tmp_path / "whole.attrdb"), attrdb.create(tmp_path / "parts.attrdb")
    ingest_abc(whole, read_release(path, root), [toy_encoder])
    gone = [
        root / "dataset/synth/artchive/gpt/bosch/samples/00001.png",
        root / "dataset/exemplar/artchive/images/bosch/0.png",
    ]
    kept = [file.read_bytes() for file in gone]
    for file in gone:
        file.unlink()
    release = read_release(path, root)
    bosch = release.models[1].model_id
    relative = tuple(str(file.relative_to(root)) for file in reversed(gone))
    assert release.missing == list(relative)
    missing = f"2 files are missing, the first is {relative[0]}"
    assert summary(ingest_abc(parts, release, [toy_encoder])) == (1, 0, {bosch: missing})
    for file, content in zip(gone, kept, strict=True):
        file.write_bytes(content)
    assert summary(ingest_abc(parts, read_release(path, root), [toy_encoder])) == (1, 1, {})
    assert rows(parts) == rows(whole)


def test_a_picture_that_cannot_be_decoded_leaves_its_model_out(empty, styles, toy_encoder):
    path, root = styles
    (root / "dataset/synth/artchive/gpt/ardon/samples/00001.png").write_bytes(b"torn")
    release = read_release(path, root)
    result = ingest_abc(empty, release, [toy_encoder])
    assert result.n_done == 1
    ((model_id, reason),) = result.failures.items()
    assert model_id == release.models[0].model_id
    assert "gpt/ardon/samples/00001.png cannot be decoded" in reason
    assert {row["model_id"] for row in rows(empty)[0]} == {release.models[1].model_id}


def test_a_model_that_is_stored_otherwise_is_listed(empty, styles, toy_encoder):
    path, root = styles
    ingest_abc(empty, read_release(path, root), [toy_encoder])
    other = path.rename(path.with_name("val_artchive.json"))
    result = ingest_abc(empty, read_release(other, root), [toy_encoder])
    assert (result.n_done, result.n_stored, len(result.failures)) == (0, 0, 2)
    assert (
        "stored already, with other samples, another category or another split; import val_artchive.json into another"
        in next(iter(result.failures.values()))
    )


def test_exemplars_with_the_same_content_are_one(empty, styles, toy_encoder):
    path, root = styles
    folder = root / "dataset/exemplar/artchive/images/ardon"
    (folder / "1.png").write_bytes((folder / "0.png").read_bytes())
    ingest_abc(empty, read_release(path, root), [toy_encoder])
    assert [model["n_exemplars"] for model in rows(empty)[1]] == [1, 2]


def test_samples_of_one_name_are_not_mixed_up(empty, styles, toy_encoder):
    path, root = styles
    entries = json.loads(path.read_text())
    entries[0]["synth"]["gpt"].append(entries[0]["synth"]["object"][0])
    result = ingest_abc(empty, read_release(write(root, path.name, entries), root), [toy_encoder])
    assert "would have the same id" in next(iter(result.failures.values()))


# --- bad input --------------------------------------------------------------------------------------------------------

SOUND = {"exemplar": ["e.png"], "synth": {"gpt": ["s.png"]}, "class_id": "x", "category": None}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ([], "entry 1: the keys must be category, class_id, exemplar, synth; found list"),
        ({"exemplar": ["a"]}, r"entry 1: the keys must be .*; found \['exemplar'\]"),
        (SOUND | {"weights": 1}, r"entry 1: the keys must be .*'weights'"),
        (SOUND | {"exemplar": []}, r"entry 1: exemplar must be a list of paths with at least one in it, found \[\]"),
        (SOUND | {"exemplar": "e.png"}, "entry 1: exemplar must be a list of paths"),
        (SOUND | {"exemplar": ["a", 3]}, "entry 1: exemplar must be a list of paths"),
        (SOUND | {"exemplar": ["a", "a"]}, "entry 1: exemplar has 'a' twice"),
        (SOUND | {"synth": {}}, "entry 1: synth must have lists under gpt, object, media"),
        (SOUND | {"synth": {"gtp": ["a"]}}, r"entry 1: synth must have lists under .* found \['gtp'\]"),
        (SOUND | {"synth": {"gpt": []}}, "entry 1: synth gpt must be a list of paths with at least one"),
        (SOUND | {"class_id": 3}, "entry 1: class_id must be text, found 3"),
        (SOUND | {"category": 3}, "entry 1: category must be text or null, found 3"),
        (SOUND | {"exemplar": ["/etc/passwd"]}, "entry 1: path '/etc/passwd' leads out of the release's root"),
        (SOUND | {"exemplar": ["a/../../b"]}, "entry 1: path 'a/../../b' leads out of the release's root"),
        (
            SOUND | {"exemplar": ["dataset/exemplar/bamfg/images/a.png"]},
            "entry 1: exemplar path .* belongs to bamfg, and the file's name to artchive",
        ),
        (SOUND, "entry 1: entry 0 has the same exemplars"),
    ],
)
def test_entries_that_cannot_be_used(tmp_path, wrong, says):
    with pytest.raises(InvalidValue, match=says):
        read_release(write(tmp_path, "test_artchive.json", [SOUND, wrong]), tmp_path)


@pytest.mark.parametrize("link", ["file", "folder"])
def test_links_out_of_the_root_are_refused(styles, tmp_path, link):
    path, root = styles
    secret = picture(tmp_path / "secret" / "0.png", (1, 1, 1))
    folder = root / "dataset/exemplar/artchive/images/ardon"
    if link == "file":
        (folder / "0.png").unlink()
        (folder / "0.png").symlink_to(secret)
    else:
        folder.rename(tmp_path / "ardon")
        folder.symlink_to(secret.parent)
    with pytest.raises(InvalidValue, match=r"entry 0: path .*ardon/0\.png' is a link to .*secret/0\.png, outside"):
        read_release(path, root)


def test_release_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InvalidValue, match=r"mine\.json has a name without split and data set"):
        read_release(write(tmp_path, "mine.json", []), tmp_path)
    with pytest.raises(InvalidValue, match="must be a JSON list with an entry for every model"):
        read_release(write(tmp_path, "test_bamfg.json", {}), tmp_path)
    (tmp_path / "test_artchive.json").write_text("[")
    with pytest.raises(InvalidValue, match=r"test_artchive\.json is not JSON"):
        read_release(tmp_path / "test_artchive.json", tmp_path)
    with pytest.raises(NotFound, match=r"no release file .*val_bamfg\.json"):
        read_release(tmp_path / "val_bamfg.json", tmp_path)
    with pytest.raises(NotFound, match=r"no release root folder .*nowhere"):
        read_release(tmp_path / "test_artchive.json", tmp_path / "nowhere")


def test_all_missing_files_are_known_before_any_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(abc, "read_picture_file", lambda *_: 1 / 0)
    release = read_release(write(tmp_path, "test_artchive.json", [SOUND]), tmp_path)
    assert release.missing == ["e.png", "s.png"]
