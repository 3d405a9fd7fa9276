"""The experiments on IconAbC: how settings are searched and encoders run, and all of it at tiny sizes."""

import io
import json
import math
import shutil
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import ROOT
from PIL import Image

import attrdb
from attrdb.errors import InvalidValue
from attrdb.ingest.encode import Pixels, encode, load_encoder
from attrdb.ingest.encode.add_encoder import backfill
from attrdb.ingest.read.corpus import image_rows
from attrdb.ingest.read.pictures import read_picture, webp
from attrdb.training.icon_sd.icons import SCHEMA
from attrdb.training.influence_fit import Scores
from attrdb.training.train import TrainSettings

sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "benchmarks" / "iconabc"))
import attribution
import compared
import encoded
import frozen
import measured
import pictures
import run
import tuned
from tuned import CHANCE, PREFERRED, RATES, TEMPERATURES, Method, search

# --- the search of settings -------------------------------------------------------------------------------------------


def searched(figure_of):
    """What the search chooses, and the points that it has tried in their order."""
    chosen, tried = search(lambda point: figure_of(*point))
    return chosen, list(tried)


def test_of_equal_settings_the_preferred_one_is_chosen():
    chosen, tried = searched(lambda temperature, lr: 5.0)
    assert chosen == PREFERRED
    assert tried == [(t, lr) for t in (0.1, 0.32, 1.0) for lr in (1e-4, 3.2e-4, 1e-3)]


def test_a_difference_below_chance_is_not_followed():
    """Neither by choosing the better setting, nor by growing the grid beyond it."""

    def figure(gain):
        return lambda temperature, lr: 5.0 - gain * ((temperature, lr) == (1.0, 1e-4))

    assert searched(figure(0.9 * CHANCE)) == (PREFERRED, searched(figure(0.0))[1])
    chosen, tried = searched(figure(1.1 * CHANCE))
    assert chosen == (1.0, 1e-4)
    assert {(3.2, 1e-4), (1.0, 3.2e-5)} < set(tried)


def test_the_best_of_those_that_are_as_near_to_the_preferred_one_is_chosen():
    figures = {(0.32, 1e-3): 4.99, (0.1, 3.2e-4): 4.98}
    assert searched(lambda *point: figures.get(point, 6.0))[0] == (0.1, 3.2e-4)


@pytest.mark.parametrize(
    ("sign_of_temperature", "sign_of_rate"), [(-1, -1), (-1, 1), (1, -1), (1, 1)], ids=["ll", "lh", "hl", "hh"]
)
def test_the_grid_grows_to_the_ends_of_the_ladders(sign_of_temperature, sign_of_rate):
    chosen, tried = searched(
        lambda temperature, lr: -sign_of_temperature * math.log(temperature) - sign_of_rate * math.log(lr)
    )
    assert chosen == (TEMPERATURES[0 if sign_of_temperature < 0 else -1], RATES[0 if sign_of_rate < 0 else -1])
    assert len(tried) == len(set(tried)) == 16


def test_the_grid_grows_no_further_than_the_best():
    chosen, tried = searched(lambda temperature, lr: abs(math.log(temperature / 0.32)) + abs(math.log(lr / 3.2e-4)))
    assert (chosen, len(tried)) == ((0.32, 3.2e-4), 9)


def test_trainings_that_diverge_do_not_end_the_search():
    chosen, tried = searched(lambda temperature, lr: math.inf if lr > 5e-4 else 5.0)
    assert chosen == (0.1, 3.2e-4)
    assert (0.1, 3.2e-5) not in tried
    chosen, tried = searched(lambda temperature, lr: math.inf if lr > 2e-4 else 5.0)
    assert chosen == (0.1, 1e-4)
    assert (0.1, 3.2e-5) in tried  # the only rate that works is an edge
    with pytest.raises(InvalidValue, match="all 9 trainings diverged"):
        searched(lambda temperature, lr: math.inf)


# --- mappers ----------------------------------------------------------------------------------------------------------

QUICK = TrainSettings(batch=8, epochs=2, patience=2, n_candidates=100)


@pytest.fixture
def db(learnable, tmp_path):
    """A copy that a test may change."""
    return attrdb.open(shutil.copytree(learnable.path, tmp_path / "copy.attrdb"))


def tuner(db):
    return tuned.Tuner(db, "toy:12", "toy_12", lambda line: None)


def test_a_method_has_a_mapper_per_seed_and_stored_ones_are_kept(db, monkeypatch):
    monkeypatch.setattr(tuned, "BASE", QUICK)
    found = tuner(db).method("object", (0.1, 1e-3), kind="object")
    ids = [f"toy_12-object-v0.1-lr0.001-s{seed}" for seed in (0, 1, 2)]
    assert found == Method("toy:12", "object", tuple(f"toy_12/{mapper_id}" for mapper_id in ids))
    rows = db.sql("SELECT mapper_id, settings, trained_on, created_at FROM mappers ORDER BY mapper_id").to_pylist()
    assert [row["mapper_id"] for row in rows] == ids
    assert [json.loads(row["settings"])["seed"] for row in rows] == [0, 1, 2]
    assert {row["trained_on"] for row in rows} == {"object"}
    assert tuner(db).method("object", (0.1, 1e-3), kind="object") == found
    assert (
        db.sql("SELECT mapper_id, settings, trained_on, created_at FROM mappers ORDER BY mapper_id").to_pylist() == rows
    )


def test_a_mapper_that_diverges_is_recorded_once(db, monkeypatch):
    point = (1e-45, 1e-3)  # similarity over such a temperature is infinite
    monkeypatch.setattr(tuned, "BASE", QUICK)
    first = tuner(db).trial("both", point, 0)
    assert (first.mean_log_rank, first.figure) == (None, math.inf)
    assert first.reason.startswith("the loss of epoch 1 is ")
    assert not list((db.path / "jobs").glob(".train-*/"))
    monkeypatch.setattr(tuned, "train", lambda *given: pytest.fail("trained again"))
    db.refresh()
    again = tuner(db).trial("both", point, 0)
    assert first.reason in again.reason
    monkeypatch.setattr(tuned, "SEEDS", (0,))
    assert tuner(db).method("both", point) is None


def test_other_errors_end_the_run(db, monkeypatch):
    monkeypatch.setattr(tuned, "BASE", replace(QUICK, split="nowhere"))
    with pytest.raises(InvalidValue, match="no models in split 'nowhere'"):
        tuner(db).trial("both", PREFERRED, 0)


# --- encoders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawings():
    """21 pictures, so that the last batch is not full."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((64, 64)) for _ in range(21)]


def test_a_picture_is_reconstructed_once_for_all_encoders(drawings, tmp_path, monkeypatch):
    seen = []
    reconstruct = encoded.SharedReconstruction.reconstruct

    def counted(self, batch):
        seen.append(len({picture.tobytes() for picture in batch}))
        return reconstruct(self, batch)

    monkeypatch.setattr(encoded.SharedReconstruction, "reconstruct", counted)
    specs = ("vae:icon-sd+pixels:4", "vae:icon-sd+pixels:8")
    shared = [encode(encoded.load_shared(spec, tmp_path), drawings) for spec in specs]
    assert sum(seen) == len(drawings)
    for spec, features in zip(specs, shared, strict=True):
        plain = load_encoder(spec)
        np.testing.assert_allclose(features, encode(plain, drawings), atol=1e-4)
        ours = encoded.load_shared(spec, tmp_path)
        for name in ("spec", "dimension", "preprocessing", "weights_fingerprint", "concurrent"):
            assert getattr(ours, name) == getattr(plain, name)


def test_two_encoders_are_added_at_once(drawings, tmp_path):
    """As by two processes: while one encodes a fragment, the other commits its features of the same fragment."""
    db = attrdb.create(tmp_path / "two.attrdb")
    stored = [read_picture(f"p{number:02d}", webp(drawing)) for number, drawing in enumerate(drawings)]
    rows = [{"image_id": one.name, "role": "pretraining"} for one in stored]
    db.writer.append_images(image_rows(rows, stored, []))
    once, beside = iter([True]), []

    class Interrupted(Pixels):
        def features(self, batch):
            if next(once, False):
                beside.append(backfill(attrdb.open(db.path), Pixels(8)))
            return super().features(batch)

    assert backfill(db, Interrupted(4)).n_done == beside[0].n_done == len(drawings)
    db.refresh()
    for encoder in (Pixels(4), Pixels(8)):
        column = encoder.spec.replace(":", "_")
        features = db.images("true", ["image_id", column]).sort_by("image_id")[column].to_pylist()
        np.testing.assert_allclose(features, encode(encoder, [one.image for one in stored]), atol=1e-6)


def test_batches_are_of_one_size(drawings):
    sizes = []

    def work(batch):
        sizes.append(len(batch))
        return batch.reshape(len(batch), -1)

    batch = np.stack([np.asarray(picture) for picture in drawings])
    np.testing.assert_array_equal(encoded.in_parts(work, batch), batch.reshape(len(batch), -1))
    assert sizes == [16, 16]


def has_compiler():
    return any(map(shutil.which, ("g++", "clang++", "c++")))


@pytest.mark.skipif(not has_compiler(), reason="torch compiles for a CPU with a C++ compiler, and there is none")
def test_compiled_features_are_those_of_the_encoder(drawings, tmp_path):
    lines = []
    compiled = encoded.load_compiled("icon-clip", tmp_path, lines.append)
    plain = load_encoder("icon-clip")
    assert not lines
    assert compiled.features != plain.features
    np.testing.assert_allclose(encode(compiled, drawings), encode(plain, drawings), atol=1e-4)
    assert compiled.weights_fingerprint == plain.weights_fingerprint


def test_where_compiling_fails_the_encoder_runs_as_it_is(drawings, tmp_path, monkeypatch):
    def broken(network):
        raise RuntimeError("no compiler\nand more")

    lines = []
    monkeypatch.setattr(encoded.torch, "compile", broken)
    encoder = encoded.load_compiled("icon-clip", tmp_path, lines.append)
    assert lines == ["icon-clip runs uncompiled (RuntimeError: no compiler)"]
    np.testing.assert_array_equal(encode(encoder, drawings), encode(load_encoder("icon-clip"), drawings))


def test_an_encoder_that_compiling_changes_is_refused(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(encoded.torch, "compile", lambda work: lambda batch: work(batch) + 0.1)
    encoded.load_compiled("icon-clip", tmp_path, lines.append)
    assert lines[0].startswith("icon-clip runs uncompiled (ValueError: features differ by ")
    lines.clear()
    assert isinstance(encoded.load_compiled("pixels:4", tmp_path, lines.append), Pixels)
    assert not lines


# --- what is measured -------------------------------------------------------------------------------------------------


def test_the_worth_of_influence_by_hand():
    """Two samples. A bin holds 1.5 of the exemplars' share and 1.0 of influence, the bin 0 the rest."""
    table = [
        {"least": 0.0, "most": 0.0, "n": 100, "influence": 0.0, "share": 0.005},
        {"least": 0.2, "most": 0.4, "n": 4, "influence": 0.25, "share": 0.375},
    ]
    assert measured.worth(table) == pytest.approx({"misplaced": (0.5 + 0.5) / 2 / 2, "at_zero": 0.25})


def test_sorted_influence_by_hand():
    tail = np.zeros((1, 4096), int)
    tail[0, 0] = 3
    scores = Scores(np.array(["m"]), np.array([[0.5]]), np.array([[0.5, 0.0, -np.inf]]), tail)
    found = measured.sorted_influence(scores, run.measured.Calibrated(0.1, 0.0, 0.2))
    low = math.exp(-5)
    assert found == pytest.approx([0.8 / (2 + low), 0.8 / (2 + low), 0.8 * low / (2 + low)], rel=1e-3)


# --- the whole run ----------------------------------------------------------------------------------------------------

SPECS = ("icon-moco", "pixels:4")
MODELS = [("object", "train", 5), ("object", "val", 2), ("object", "test", 6), ("object", "test_unseen", 2)]
MODELS += [("style", "train", 4), ("style", "val", 2), ("style", "test", 4), ("style", "test_artists", 2)]
MODELS += [("mixed", "test", 2)]
N_CANDIDATES, N_RELATIVES = 110, 12


def picture(rng, like=None):
    """Six blocks of colour; of a picture like another one, the same with noise."""
    blocks = (
        rng.integers(0, 256, (3, 3, 3)) if like is None else np.clip(like + rng.integers(-40, 40, (3, 3, 3)), 0, 255)
    )
    return blocks, webp(Image.fromarray(blocks.astype(np.uint8)).resize((64, 64), Image.Resampling.NEAREST))


def listed(rng, name, source):
    row = dict.fromkeys(SCHEMA.names) | {"name": name, "role": "pretraining", "source": source, "metadata": "{}"}
    return row | {"category": "thing", "license": "MIT", "image": picture(rng)[1], "width": 64, "height": 64}


@pytest.fixture(scope="module")
def frozen_files(tmp_path_factory):
    """A folder with frozen files and icons.parquet: some models of every case, and candidates that are noise."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("frozen")
    icons = [listed(rng, f"mdi/{n}", "mdi") for n in range(N_CANDIDATES)]
    related = [listed(rng, f"lucide/{n}", "lucide") for n in range(N_RELATIVES)]
    pq.write_table(pa.Table.from_pylist(icons + related, SCHEMA), folder / "icons.parquet")
    for name, rows in (("candidates", icons), ("relatives", related)):
        # As they come back from `pictures_of`, which stores them lossy.
        again = frozen.pictures_of({row["name"] for row in rows}, folder / "icons.parquet")
        looks = [{"name": row["name"], "look": frozen.look(row["image"])} for row in again]
        pq.write_table(pa.Table.from_pylist(looks), folder / f"{name}.parquet")
    models, images = [], []
    for kind, split, n in MODELS:
        for number in range(n):
            model_id, of = f"{kind}-{split}-{number}", len(images)
            blocks = []
            for place in range({"object": 1, "style": 3, "mixed": 1 + 3 * number}[kind]):
                block, image = picture(rng)
                blocks.append(block)
                images.append({"image_id": f"{model_id}/e{place}", "role": "exemplar", "image": image})
            for place in range(4):
                scheme = None if kind == "mixed" else ("gpt", "procedural")[place % 2]
                image = picture(rng, blocks[place % len(blocks)])[1]
                row = {"image_id": f"{model_id}/{place}", "role": "sample", "image": image, "prompt_scheme": scheme}
                images.append(row | {"prompt": "V* thing", "seed": place})
            for row in images[of:]:
                row |= {"model_id": model_id, "split": split}
            category = f"set {number // 2}" if kind == "style" else model_id
            models.append({"model_id": model_id, "kind": kind, "split": split, "category": category})
    names = sorted({name for row in images for name in row})
    pq.write_table(pa.Table.from_pylist([dict.fromkeys(names) | row for row in images]), folder / "images.parquet")
    pq.write_table(pa.Table.from_pylist(models), folder / "models.parquet")
    return folder


@pytest.fixture(scope="module")
def done(frozen_files, tmp_path_factory):
    """The folder in which the run has worked, in two calls, and its figures."""
    work = tmp_path_factory.mktemp("work")
    shutil.copy(frozen_files / "icons.parquet", work)
    out = work / "results" / "iconabc.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "FROZEN", frozen_files)
        patch.setattr(run, "load_compiled", lambda spec, folder, log: encoded.load_shared(spec, folder))
        patch.setattr(tuned, "BASE", replace(QUICK, epochs=1, patience=1))
        patch.setattr(tuned, "SEEDS", (0, 1))
        patch.setattr(tuned, "TEMPERATURES", (0.1, 1.0))
        patch.setattr(tuned, "RATES", (1e-3, 3.2e-3))
        patch.setattr(tuned, "FIRST", range(2))
        few = {name: tuned.ABLATIONS[name] for name in ("no-regularizer", "released-mlp")}
        for module in (tuned, run, compared):
            patch.setattr(module, "ABLATIONS", few)
        call(work, "--encoder", SPECS[1])
        before = stored(run.Run(work).db)
        call(work, "--encoder", SPECS[0], "--encoder", SPECS[1], "--json", out)
        assert before
        assert stored(run.Run(work).db).items() >= before.items()
        db = run.Run(work).db
    return work, json.loads(out.read_text()), db


def call(*words):
    result = CliRunner().invoke(run.main, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def stored(db):
    """When each mapper and calibration was made, and on which version of the images each method was ranked."""
    made = db.sql("SELECT mapper_id AS id, created_at::VARCHAR AS made FROM mappers").to_pylist()
    made += db.sql("SELECT calibration_id AS id, created_at::VARCHAR AS made FROM calibrations").to_pylist()
    made += db.sql(
        "SELECT 'r ' || method_id AS id, max(images_version)::VARCHAR AS made FROM exemplar_ranks GROUP BY 1"
    ).to_pylist()
    return {row["id"]: row["made"] for row in made}


def test_every_method_is_there(done):
    _, results, db = done
    methods = {(row["encoder"], row["variant"]): row["method_ids"] for row in results["methods"]}
    variants = {"plain", "both", "object", "style"}
    assert {variant for spec, variant in methods if spec == "pixels:4"} == variants
    extra = variants | {"no-regularizer", "released-mlp"}
    assert {variant for spec, variant in methods if spec == "icon-moco"} - {"paper-temperature"} == extra
    for spec in SPECS:
        assert {variant for other, variant in methods if other == f"vae:icon-sd+{spec}"} == {"plain", "both"}
    assert {len(ids) for (_, variant), ids in methods.items() if variant == "plain"} == {1}
    assert {len(ids) for (_, variant), ids in methods.items() if variant != "plain"} == {2}
    chosen = {row["encoder"]: row for row in results["chosen"]}
    for spec in SPECS:  # a control takes the settings of its encoder
        for name in (spec, f"vae:icon-sd+{spec}"):
            for method_id in methods[name, "both"]:
                assert f"-v{chosen[spec]['temperature']:g}-lr{chosen[spec]['lr']:g}-" in method_id
    tried = [row for row in results["trials"] if row["encoder"].startswith("vae:")]
    assert len(tried) == 2 * len(SPECS)
    ranked = set(db.sql("SELECT DISTINCT method_id FROM exemplar_ranks")["method_id"].to_pylist())
    assert ranked == {method_id for ids in methods.values() for method_id in ids}


def test_cases_are_means_over_models_and_seeds(done):
    _, results, db = done
    rows = {
        (row["kind"], row["split"], row["prompt_scheme"], row["encoder"], row["variant"]): row
        for row in results["cases"]
    }
    assert len(rows) == len(results["cases"]) == 4 * 3 * 8
    ids = next(m["method_ids"] for m in results["methods"] if (m["encoder"], m["variant"]) == ("icon-moco", "both"))
    truth = db.sql(
        "SELECT avg(ln(rank)) AS log_rank, avg((rank <= 5)::INT) AS recall FROM exemplar_ranks "
        "JOIN samples ON samples.image_id = sample_id JOIN models USING (model_id) "
        "WHERE models.split = 'test' AND kind = 'style' AND prompt_scheme = 'gpt' AND list_contains($ids, method_id)",
        {"ids": ids},
    ).to_pylist()[0]
    row = rows["style", "test", "gpt", "icon-moco", "both"]
    assert row["log_rank"][0] == pytest.approx(truth["log_rank"])
    assert row["recall_5"][0] == pytest.approx(truth["recall"])
    assert (row["n_models"], row["n_samples"], row["n_seeds"]) == (4, 8, 2)
    assert row["chance"]["recall_5"] == pytest.approx(5 / (N_CANDIDATES + 3))
    assert row["chance"]["log_rank"] == pytest.approx(math.log(N_CANDIDATES + 3) - 1)
    assert row["ceiling"]["recall_5"] == 1.0
    assert row["ceiling"]["log_rank"] == pytest.approx(math.log(6) / 3)
    both, schemes = (
        rows["object", "test", "both", "pixels:4", "plain"],
        [rows["object", "test", scheme, "pixels:4", "plain"] for scheme in ("gpt", "procedural")],
    )
    assert both["map"][0] == pytest.approx(np.mean([scheme["map"][0] for scheme in schemes]))
    for row in rows.values():
        assert all(low - 1e-9 <= mean <= high + 1e-9 for mean, low, high in (row[name] for name in compared.FIGURES))
    # Candidates are noise and samples are like their exemplars.
    assert rows["object", "test", "both", "pixels:4", "plain"]["recall_10"][0] > 0.9


def test_comparisons_are_planned_and_corrected(done):
    _, results, _ = done
    questions = {row["question"] for row in results["comparisons"]}
    assert questions == {
        "tuned against plain",
        "tuned against plain, control",
        "control against stored",
        "control against stored, tuned",
        "one kind against both",
        "ablation against chosen",
        "released form against affine",
        "best learned encoder against pixels",
    }
    keys = [
        (r["question"], r["kind"], r["split"], *r["one"].values(), *r["other"].values()) for r in results["comparisons"]
    ]
    assert len(keys) == len(set(keys))
    for row in results["comparisons"]:
        if row["question"] == "one kind against both":
            assert row["one"]["variant"] == row["kind"]
        # Six models of objects are enough for a test; two styles of two models each are not.
        assert (
            (row["p"] is not None) == (row["p_holm"] is not None) == ((row["kind"], row["split"]) == ("object", "test"))
        )
        if row["p"] is not None:
            assert row["p"] <= row["p_holm"] <= 1
    cases = {(r["kind"], r["split"], r["prompt_scheme"], r["encoder"], r["variant"]): r for r in results["cases"]}
    row = next(r for r in results["comparisons"] if r["question"] == "control against stored" and r["kind"] == "style")
    one, other = (cases["style", row["split"], "both", *row[side].values()] for side in ("one", "other"))
    assert row["log_rank"][0] == pytest.approx(one["log_rank"][0] - other["log_rank"][0])


def test_calibrations_are_per_kind_and_measured_on_test_models(done):
    work, results, _ = done
    rows = {(row["encoder"], row["variant"], row["kind"]): row for row in results["calibrations"]}
    assert len(rows) == 8 * 2
    for (_, _, kind), row in rows.items():
        assert [test["split"] for test in row["tests"]] == [split for of, split in compared.TEST_CASES if of == kind]
        for of in (row["validation"], *row["tests"]):
            assert 0 <= of["misplaced"] <= 1
            assert 0 <= of["at_zero"] <= 1
        for test in row["tests"]:
            assert test["sorted"] == sorted(test["sorted"], reverse=True)
            assert test["sorted"][0] > test["sorted_before"][0]
    assert len(list((work / "held-out").glob("*.json"))) == 8


def test_general_attribution_and_relatives(done):
    work, results, db = done
    assert {row["n_exemplars"] for row in results["general"]} == {1, 4}
    assert all(row["n_models"] == 1 for row in results["general"])
    [copy] = work.glob("iconabc-*-relatives.attrdb")
    related = attrdb.open(copy)
    assert related.snapshot.count("role = 'pretraining'") == N_CANDIDATES + N_RELATIVES
    assert db.snapshot.count("role = 'pretraining'") == N_CANDIDATES
    sizes = related.sql(
        "SELECT DISTINCT gallery_size - n_exemplars AS n FROM exemplar_ranks JOIN samples ON "
        "samples.image_id = sample_id JOIN models USING (model_id)"
    )
    assert sizes["n"].to_pylist() == [N_CANDIDATES + N_RELATIVES]
    assert {(row["encoder"], row["variant"]) for row in results["relatives"]} == {
        (spec, variant) for spec in SPECS for variant in ("plain", "both")
    }
    for row in results["relatives"]:
        assert row["log_rank_with"][0] >= row["log_rank_without"][0]
        assert row["recall_10_with"][0] <= row["recall_10_without"][0]


def test_pictures_are_written(done):
    work, _, _ = done
    for kind in ("object", "style"):
        file = work / "results" / f"attributed-{kind}.webp"
        assert file.stat().st_size <= pictures.AT_MOST
        sheet = Image.open(io.BytesIO(file.read_bytes())).convert("RGB")
        green = np.abs(np.asarray(sheet).astype(int) - (0x15, 0x80, 0x3D)).sum(axis=2) < 90
        assert green.sum() > 200  # frames of exemplars that were found


def test_the_section_shows_the_figures(done, tmp_path, monkeypatch):
    work, results, _ = done
    monkeypatch.setattr(attribution, "HERE", work)
    monkeypatch.setattr(attribution, "PLOTS", tmp_path / "plots")
    text = attribution.section(results)
    for title in (*attribution.CASES.values(), "Planned comparisons", "Calibration", "Styles among their relatives"):
        assert f"### {title}\n" in text
    row = next(r for r in results["cases"] if (r["kind"], r["split"], r["prompt_scheme"]) == ("style", "test", "both"))
    assert attribution.value(row["map"]) in text
    assert "![Samples of object models" in text
    assert "(results/attributed-style.webp)" in text
    attribution.write_plots(results)
    drawn = {file.stem for file in (tmp_path / "plots").glob("*.svg")}
    assert drawn == set(attribution.CAPTIONS)
    widths = {
        line.count("|") for block in text.split("\n\n") if block.startswith("|") for line in block.splitlines()[:2]
    }
    assert all(
        len({line.count("|") for line in block.strip().splitlines()}) == 1
        for block in text.split("\n\n")
        if block.startswith("|")
    )
    assert widths


def test_a_star_needs_a_small_corrected_p():
    row = {"log_rank": [math.log(0.5), math.log(0.25), 0.0], "recall_10": [0.1, 0.0, 0.2], "p_holm": 0.04}
    assert attribution.compared(row) == "0.50 (0.25 to 1.00) *, +0.100"
    for p in (0.06, None):
        assert attribution.compared(row | {"p_holm": p}) == "0.50 (0.25 to 1.00), +0.100"


def test_without_figures_the_page_says_so(tmp_path, monkeypatch):
    import report

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    text = report.page()
    assert "## Attribution on IconAbC\n\nThe experiments on the second edition have not been run yet." in text
    assert "To run: `python benchmarks/iconabc/run.py" in text
