"""IconAbC: what is chosen, that it comes back from its frozen files, and what the frozen files promise."""

import io
import json
import re
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import attrdb
from attrdb.bundled import SPRITES, sprite_rows
from attrdb.ingest.customize.base_model import BUNDLED, base_model_folder, weights_hash
from attrdb.ingest.read.corpus import image_rows
from attrdb.ingest.read.pictures import read_picture, webp
from attrdb.training.icon_sd.icons import FREE, SCHEMA

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "iconabc"))
import frozen
import gallery
import plan

FROZEN = frozen.HERE / "models.parquet"


def icon(rng, source, number, category=None, creator="someone"):
    image = Image.fromarray(rng.integers(0, 200, (16, 16, 3), np.uint8))
    return {
        "name": f"{source}/{number}",
        "role": "pretraining",
        "source": source,
        "category": category or f"{source} {number}",
        "prompt": category or f"{source} {number}",
        "split": None,
        "creator": creator,
        "license": "MIT",
        "uri": f"test:{source}#{number}",
        "width": 16,
        "height": 16,
        "metadata": "{}",
        "image": webp(image),
    }


ENDINGS = ("", "-flat", "-solid", "-bold", "-filled", "-duotone", "-fill")  # of the names of styles' icons


@pytest.fixture(scope="module")
def small():
    """Icons of every set that the plan names, sprites of 250 things, and what the plan makes of them with 330 candidates."""
    rng = np.random.default_rng(0)
    things = [f"thing {chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(250)]
    sprites = [icon(rng, "noto", n, thing) for n, thing in enumerate(things)]
    scenes = [icon(rng, "icon-scenes", n) for n in range(30)]
    icons = [icon(rng, "fxemoji", n, thing) for n, thing in enumerate(things[:100])]
    icons += [icon(rng, "streamline-emojis", n, thing) for n, thing in enumerate(things)]
    icons += [icon(rng, "openclipart", f"a{a}-{n}", creator=f"artist {a}") for a in range(40) for n in range(9)]
    icons += [icon(rng, "openclipart", f"b{a}-{n}", creator=f"other {a}") for a in range(4) for n in range(4)]
    for source, pattern in (style for styles in plan.STYLES.values() for style in styles.values()):
        ending = next(ending for ending in ENDINGS if re.match(pattern, f"0{ending}"))
        icons += [icon(rng, source, f"{n}{ending}") for n in range(34)]
    icons += [icon(rng, source, n) for source in plan.GALLERY_SETS for n in range(3)]
    icons[0] = icons[0] | {"image": sprites[7]["image"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "N_CANDIDATES", 330)
        patch.setattr(plan, "MIXED_SIZES", (1, 10))
        found = plan.plan(icons, sprites, scenes)
        again = plan.plan(icons[::-1], sprites, scenes)
        with pytest.raises(
            click.ClickException, match=r"280 images of the corpus and 16 others, 330 candidates needed"
        ):
            plan.plan([one for one in icons if one["source"] not in plan.GALLERY_SETS], sprites, scenes)
    assert again == found
    return found


def test_models_are_as_many_as_wanted(small):
    models = small.models
    counts = defaultdict(int)
    for model in models:
        counts[model.kind, model.split] += 1
    assert {split: counts["object", split] for split in plan.N_OBJECTS} == plan.N_OBJECTS
    assert sum(plan.N_OBJECTS.values()) >= 200
    assert counts["style", "train"] == 4 * len(plan.STYLES["train"])
    assert sum(counts["style", split] for split in ("train", "val", "test", "test_artists")) >= 150
    assert counts["style", "test_artists"] == 40
    assert len({model.model_id for model in models}) == len(models)
    assert all(len(model.exemplars) == plan.STYLE_SIZE for model in models if model.kind == "style")


def test_gallery_has_nothing_of_what_models_saw(small):
    candidates, models = small.candidates, small.models
    assert len(candidates) == len({row["name"] for row in candidates}) == 330
    assert {row["role"] for row in candidates} == {"pretraining"}
    used = [row for model in models for row in model.exemplars]
    assert "fxemoji/0" not in {row["name"] for row in used}  # it looks like a sprite
    assert not {row["name"] for row in small.relatives} & {row["name"] for row in [*candidates, *used]}
    related = {json.loads(row["metadata"])["style"] for row in small.relatives}
    assert related == {name for styles in plan.STYLES.values() for name in styles} | {f"artist {a}" for a in range(40)}
    artists = {row["creator"] for row in used if row["source"] == "openclipart"}
    sources = {row["source"] for row in used} - {"openclipart"}
    assert not {row["source"] for row in candidates} & sources
    assert not {row["creator"] for row in candidates if row["source"] == "openclipart"} & artists


def test_splits_share_no_exemplar_and_seen_classes_are_seen(small):
    models = small.models
    names = [row["name"] for model in models if model.kind != "mixed" for row in model.exemplars]
    assert len(names) == len(set(names))
    of_split = defaultdict(set)
    for model in models:
        if model.kind == "object":
            of_split[model.split].add(model.category)
    assert of_split["val"] | of_split["test"] <= of_split["train"]
    assert not of_split["test_unseen"] & (of_split["train"] | of_split["val"] | of_split["test"])
    assert not of_split["val"] & of_split["test"]
    mixed = [row["name"] for model in models if model.kind == "mixed" for row in model.exemplars]
    assert not set(mixed) & {row["name"] for model in models if model.kind == "object" for row in model.exemplars}


def test_captions_do_not_name_the_style(small):
    assert plan.caption({"category": "alarm clock fill"}) == "an alarm clock"
    assert plan.caption({"category": "chevron left duotone"}) == "a chevron left"
    mixed = next(model for model in small.models if model.kind == "mixed" and len(model.exemplars) > 1)
    assert set(mixed.prompts) <= {plan.caption(row) for row in mixed.exemplars}


def test_the_gallery_shows_what_icon_sd_was_trained_on(tmp_path):
    """Scenes come again from their seed, with the credits of their sprites; sprites are on white, mono ones black."""
    sprites = pq.read_table(SPRITES)
    mono = sprites["mono"].to_numpy()
    few = sprites.take(np.concatenate([np.flatnonzero(mono)[:30], np.flatnonzero(~mono)[:30]]))
    file = tmp_path / "sprites.parquet"
    pq.write_table(few, file)
    rows = list(gallery.scene_rows(file, 18))
    assert rows == list(gallery.scene_rows(file, 18))
    assert [row["name"] for row in rows][-1] == "icon-scenes/000017"
    known = {row["name"]: row for row in few.to_pylist()}
    for row in rows:
        used = [known[name] for name in json.loads(row["metadata"])["sprites"]]
        assert row["license"] == " AND ".join(sorted({one["license"] for one in used}))
        assert Image.open(io.BytesIO(row["image"])).size == (64, 64)
    alone = list(sprite_rows(file))
    assert [row["name"] for row in alone] == few["name"].to_pylist()
    for row in alone[:30]:
        red, green, blue = (
            np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB")).astype(int).transpose(2, 0, 1)
        )
        assert max(abs(red - green).max(), abs(red - blue).max()) < 24
    pa.Table.from_pylist(rows + alone, SCHEMA)


def test_what_is_frozen_comes_back(small, tmp_path, monkeypatch):
    candidates, models = small.candidates, small.models
    folder, out = tmp_path / "plan", tmp_path / "frozen"
    chosen = [model for model in models if model.kind != "mixed"][:3] + [m for m in models if m.kind == "mixed"][:1]
    plan.write(folder, replace(small, models=chosen))
    db = attrdb.create(tmp_path / "made.attrdb")
    with pytest.raises(click.ClickException, match="4 of 4 models are not made yet"):
        frozen.freeze(db, folder, out)
    for model in chosen:
        files = sorted((folder / "exemplars" / model.model_id).glob("*.webp"))
        rows, pictures = [], []
        for number, file in enumerate(files):
            rows.append({"image_id": f"{model.model_id}/e{number}", "role": "exemplar", "source": "a folder"})
            pictures.append(read_picture(file.name, file.read_bytes()))
        rows.append({"image_id": f"{model.model_id}/0/7", "role": "sample", "prompt": "V* thing", "seed": 7})
        pictures.append(pictures[0])
        table = image_rows([row | {"model_id": model.model_id} for row in rows], pictures, [])
        db.writer.append_model(table, {"model_id": model.model_id, "kind": model.kind, "weights_path": "weights/x"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen, "AT_MOST", 1000)
        with pytest.raises(click.ClickException, match=r"the frozen files have .* MiB, 0 are allowed"):
            frozen.freeze(db, folder, out)
    assert not list(out.iterdir())
    counts = frozen.freeze(db, folder, out)
    assert {name: counts[name] for name in frozen.TABLES if name != "images"} == {
        "models": 4,
        "candidates": 330,
        "relatives": len(small.relatives),
    }
    icons = tmp_path / "icons.parquet"
    names = set(pq.read_table(out / "candidates.parquet")["name"].to_pylist())
    rendered = [row for row in [*candidates, *small.relatives] if row["name"] in names]
    # Here all are icons: the names of scenes stand for scenes that icon-sd was trained on.
    monkeypatch.setattr(frozen, "scene_rows", lambda file, n: iter(()))
    monkeypatch.setattr(frozen, "sprite_rows", lambda: iter(()))
    loaded = attrdb.create(tmp_path / "loaded.attrdb")
    pq.write_table(pa.Table.from_pylist(rendered[:-1], SCHEMA), icons)
    with pytest.raises(click.ClickException, match=r"icons.parquet lacks 1 of the candidates"):
        frozen.load(loaded, icons, out)
    other = rendered[0] | {"image": webp(Image.new("RGB", (16, 16), "red"))}
    pq.write_table(pa.Table.from_pylist([other, *rendered[1:]], SCHEMA), icons)
    assert frozen.gallery("candidates", icons, tmp_path / "gallery.parquet", out)["otherwise"] == 1
    pq.write_table(pa.Table.from_pylist(rendered, SCHEMA), icons)
    assert frozen.load(loaded, icons, out) == {"pictures": 330, "missing": 0, "otherwise": 0, "models": 4}
    made = (tmp_path / "gallery.parquet").stat().st_mtime_ns
    assert frozen.load(loaded, icons, out)["models"] == 0
    assert (tmp_path / "gallery.parquet").stat().st_mtime_ns == made
    columns = ["image_id", "role", "model_id", "prompt", "seed", "image", "sha256", "width"]
    pairs = zip(
        *(one.images("role <> 'pretraining'", columns).sort_by("image_id").to_pylist() for one in (db, loaded)),
        strict=True,
    )
    for before, after in pairs:
        if before["role"] == "sample":  # stored as lossy pictures
            one, other = (np.asarray(Image.open(io.BytesIO(row["image"])), float) for row in (before, after))
            assert np.abs(one - other).mean() < 20
            before, after = (row | {"image": None, "sha256": None} for row in (before, after))
        assert after | {"prompt": None} == before | {"prompt": None}
    exemplar = loaded.images(f"model_id = '{chosen[0].model_id}' AND role = 'exemplar'", ["source", "license", "uri"])
    assert set(exemplar["license"].to_pylist()) == {"MIT"}
    assert "a folder" not in exemplar["source"].to_pylist()
    [row] = loaded.sql("SELECT weights_path, base_model FROM models LIMIT 1").to_pylist()
    assert row == {"weights_path": None, "base_model": "icon-sd"}


# --- the frozen files -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not FROZEN.exists(), reason="the benchmark is not frozen yet")
def test_frozen_files_are_large_enough_and_small_enough():
    models = pq.read_table(FROZEN).to_pylist()
    kinds = [model["kind"] for model in models]
    assert kinds.count("object") >= 200
    assert kinds.count("style") >= 150
    assert kinds.count("mixed") >= 24
    assert all(model["n_samples"] >= 16 for model in models)
    files = {name: frozen.HERE / f"{name}.parquet" for name in frozen.TABLES}
    assert sum(file.stat().st_size for file in files.values()) <= frozen.AT_MOST
    assert pq.ParquetFile(files["candidates"]).metadata.num_rows == 100_000
    names = {
        name: set(pq.read_table(files[name], columns=["name"])["name"].to_pylist()) for name in files if name[0] in "cr"
    }
    assert not names["candidates"] & names["relatives"]
    assert {row["base_model_hash"] for row in models} == {weights_hash(base_model_folder(BUNDLED))}
    seeds = [json.loads(model["settings"])["synthesize"]["seed"] for model in models]
    assert len(set(seeds)) == len(models)


@pytest.mark.skipif(not FROZEN.exists(), reason="the benchmark is not frozen yet")
def test_frozen_pictures_are_credited_and_free():
    rows = pq.read_table(frozen.HERE / "images.parquet").to_pylist()
    models = {model["model_id"]: model for model in pq.read_table(FROZEN).to_pylist()}
    exemplars = [row for row in rows if row["role"] == "exemplar"]
    assert {row["license"] for row in exemplars} <= FREE | {"CC-PDDC"}
    assert all(row["creator"] and row["uri"] for row in exemplars)
    notice = (Path(__file__).parent.parent / "NOTICE").read_text()
    assert not {row["source"] for row in exemplars} - set(notice.split())
    assert {row["model_id"] for row in rows} == models.keys()
    assert all(json.loads(model["settings"])["customize"]["steps"] for model in models.values())
    for row in rows[::50]:
        assert Image.open(io.BytesIO(row["image"])).size[0] >= 32
