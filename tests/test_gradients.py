"""Gradient methods: algebra against slow twins of the weights' size, gradients against autograd, and the command."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from conftest import ToyEncoder
from diffusers import DDPMScheduler
from test_monitored_models import exemplars, ingest  # noqa: F401

import attrdb
from attrdb.cli import main
from attrdb.ingest.customize.augmentation import encode_views
from attrdb.ingest.customize.base_model import load_base_model
from attrdb.ingest.customize.customize import apply_delta, encode_prompts
from attrdb.ingest.customize.denoising import Draws
from attrdb.ingest.gradients import kernels, scorers
from attrdb.ingest.gradients.checkpoints import checkpoints
from attrdb.ingest.gradients.formulas import FORMULAS, Kernels
from attrdb.ingest.gradients.model_gradients import ModelGradients, model_row, opened, pictures
from attrdb.ingest.monitor.files import read_gradients
from attrdb.ingest.score import BUILT_IN, load_scorers, score, score_all

# --- the algebra -------------------------------------------------------------------------------------------------------

SIZES = (5, 12, 3)


@pytest.fixture(scope="module")
def gradients():
    """By layer: 4 images' gradients and a query's."""
    chance = np.random.default_rng(0)
    return [(chance.standard_normal((4, size)), chance.standard_normal(size)) for size in SIZES]


def whole(gradients):
    return np.concatenate([images for images, _ in gradients], axis=1), np.concatenate(
        [query for _, query in gradients]
    )


@pytest.mark.parametrize("damping", [1e-3, 1e-2, 1.0])
def test_the_inverse_is_that_of_a_matrix_of_the_weights_size(gradients, damping):
    g, q = whole(gradients)
    lam = damping * np.trace(g @ g.T) / 4 / 4
    twin = q @ np.linalg.inv(g.T @ g / 4 + lam * np.eye(g.shape[1])) @ g.T
    assert kernels.inverse(g @ g.T, g @ q, damping) == pytest.approx(twin, rel=1e-8)


def test_an_inverse_by_layer_is_that_of_a_matrix_of_blocks(gradients):
    twin = np.zeros(4)
    for g, q in gradients:
        lam = 0.5 * np.trace(g @ g.T) / 4 / 4
        twin += q @ np.linalg.inv(g.T @ g / 4 + lam * np.eye(g.shape[1])) @ g.T
    of_layers = np.stack([images @ images.T for images, _ in gradients])
    queries = np.stack([images @ query for images, query in gradients])
    assert kernels.inverse_by_layer(of_layers, queries, 0.5) == pytest.approx(twin, rel=1e-8)
    lengths = np.array([1.0, 10.0, 0.1])  # of the gradients of a layer
    longer = kernels.inverse_by_layer(of_layers * lengths[:, None, None] ** 2, queries * lengths[:, None] ** 2, 0.5)
    assert longer == pytest.approx(twin, rel=1e-8)


def test_data_inf_is_a_mean_of_inverses_layer_by_layer(gradients):
    twin = np.zeros(4)
    for images, query in gradients:
        lam = 0.1 * (images**2).sum(axis=1).mean() / images.shape[1]
        inverses = [np.linalg.inv(np.outer(g, g) + lam * np.eye(len(g))) for g in images]
        twin += query @ np.mean(inverses, axis=0) @ images.T
    of_layers = np.stack([images @ images.T for images, _ in gradients])
    queries = np.stack([images @ query for images, query in gradients])
    assert kernels.data_inf(of_layers, queries, np.array(SIZES)) == pytest.approx(twin, rel=1e-8)


def test_a_cosine_is_one_and_without_a_direction_it_is_0(gradients):
    g, q = whole(gradients)
    g[1], g[2] = 3 * q, 0
    cosines = kernels.cosine(g @ g.T, g @ q, np.linalg.norm(q))
    assert cosines[1] == pytest.approx(1)
    assert cosines[2] == 0
    assert np.abs(cosines).max() <= 1 + 1e-12


def test_gradients_that_are_all_zero_give_finite_scores():
    nothing = np.zeros((2, 2))
    assert np.isfinite(kernels.inverse(nothing, np.zeros(2))).all()
    assert np.isfinite(kernels.data_inf(nothing[None], np.zeros((1, 2)), np.array([4]))).all()


# --- gradients of a model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["custom-diffusion", "dreambooth-lora", "textual-inversion"])
def db(request, tmp_path_factory, tiny_base, exemplars):  # noqa: F811
    db = attrdb.create(tmp_path_factory.mktemp("gradients") / "some.attrdb")
    ingest(db, exemplars, tiny_base, ToyEncoder(), method=request.param, monitor="changes", precision="float32")
    return db


def ids(db, relation):
    return db.sql(f"SELECT image_id FROM {relation} ORDER BY image_id")["image_id"].to_pylist()


LENGTH = 0.03  # of a move: the loss changes by far more than its last digits, and almost in a straight line


def loss_of(base, draws, image, prompt):
    """Of the customized model as it is used for sampling, by its own pipeline."""
    latents = encode_views(base, [image], "none", seed=0).mean.expand(len(draws.noise), -1, -1, -1)
    scheduler = DDPMScheduler.from_config(base.pipeline.scheduler.config)
    noisy = scheduler.add_noise(latents, draws.noise, draws.timesteps)
    is_v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, draws.noise, draws.timesteps) if is_v else draws.noise
    states = encode_prompts(base, [prompt])[prompt].unsqueeze(0)
    with torch.no_grad():
        return F.mse_loss(base.predict(noisy, draws.timesteps, states), target).item()


def test_gradients_say_how_the_loss_changes(db, tiny_base):
    """Against the difference of two losses of models whose weights were moved by hand along the gradient."""
    row, delta = model_row(db, "vase-1")
    [sample, *_] = ids(db, "samples")
    image, prompt = pictures(db, [sample])[sample]
    base = load_base_model(str(tiny_base))
    with opened(base, row, delta, 6) as model:
        names = list(model.parameters)
        gradients = dict(zip(names, model.of_image(image, prompt, "loss"), strict=True))
        draws = model.draws
    length = sum(float(part.square().sum()) for part in gradients.values())
    losses = []
    for sign in (1, -1):
        step = sign * LENGTH / length**0.5
        moved = {
            name: weight + step * gradients[name].view_as(weight) if name in gradients else weight
            for name, weight in delta.items()
        }
        apply_delta(base, moved, {row["token"]: "vase"}, row["method"])
        losses.append(loss_of(base, draws, image, prompt))
        base.restore()
    assert (losses[0] - losses[1]) / (2 * LENGTH) == pytest.approx(length**0.5, rel=0.03)


def test_draws_are_the_same_for_all_and_spread_over_time(tiny_base):
    base = load_base_model(str(tiny_base))
    one, other = Draws.of(base, 5), Draws.of(base, 5)
    assert one.noise.equal(other.noise)
    assert one.timesteps.tolist() == [100, 300, 500, 700, 900]
    assert not one.noise[0].equal(one.noise[1])


# --- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_sample_has_a_score_of_each_exemplar_of_its_model(db, name):
    result = score(db, f"{name}:2", load_scorers([f"{name}:2"])[f"{name}:2"])
    assert (result.n_done + result.n_stored, result.failures) == (len(ids(db, "samples")), {})
    method_id = f"{name.replace('-', '_')}_2"
    rows = db.sql("FROM scores WHERE method_id = $m ORDER BY ALL", {"m": method_id}).to_pylist()
    assert {(row["sample_id"], row["candidate_id"]) for row in rows} == {
        (sample, exemplar) for sample in ids(db, "samples") for exemplar in ids(db, "exemplars")
    }
    assert all(np.isfinite(row["score"]) for row in rows)
    assert db.query("recall_at_k", k=1) is not None
    again = score(db, f"{name}:2", load_scorers([f"{name}:2"])[f"{name}:2"])
    assert again.n_done == 0


def test_methods_at_once_give_the_same_scores_from_fewer_gradients(db, monkeypatch):
    """Those of the loss and those of the output's square, once each, and those of checkpoints."""
    counted, of_image = [], ModelGradients.of_image
    monkeypatch.setattr(ModelGradients, "of_image", lambda *args: counted.append(args[-1]) or of_image(*args))
    [method] = db.sql("SELECT method FROM models")["method"].to_pylist()
    replayed = method == "custom-diffusion"  # of one method: it takes long
    specs = [f"{name}:3" for name in BUILT_IN if replayed or name != "trac-in"]

    def scored(*groups):
        counted.clear()
        for group in groups:
            loaded = load_scorers(group)
            score_all(db, {f"{spec[:-2]}_of_{len(groups)}": (spec, loaded[spec]) for spec in group})
        rows = db.sql("FROM scores WHERE method_id LIKE '%of_' || $n ORDER BY ALL", {"n": len(groups)}).to_pylist()
        return {(row["method_id"][:-2], row["sample_id"], row["candidate_id"]): row["score"] for row in rows}, len(
            counted
        )

    at_once, n_at_once = scored(specs)
    one_by_one, n_one_by_one = scored(*([spec] for spec in specs))
    n_samples, n_exemplars = len(ids(db, "samples")), len(ids(db, "exemplars"))
    assert at_once == pytest.approx(one_by_one, rel=1e-5, abs=1e-9)
    assert len(at_once) == len(specs) * n_samples * n_exemplars
    at_checkpoints = 5 if replayed else 0
    assert n_at_once == (2 + at_checkpoints) * (n_samples + n_exemplars)
    n_alone = 7 + at_checkpoints
    assert n_one_by_one == n_alone * (n_samples + n_exemplars) - n_exemplars  # those of in-run are stored


def test_a_method_that_needs_what_is_missing_stops_no_other(db, tmp_path, tiny_base, exemplars, monkeypatch):  # noqa: F811
    other = attrdb.open(shutil.copytree(db.path, tmp_path / "other.attrdb"))
    ingest(other, exemplars, tiny_base, ToyEncoder(), "unwatched", monitor="off")
    done = CliRunner().invoke(main, ["score", str(other.path), "in-run:5", "d-trak:5", "gradient-dot:5"])
    n = len(ids(other, "samples"))
    assert done.exit_code == 1
    assert f"{n // 2} samples scored by in_run_5, 0 were already, {n // 2} got no score" in done.stderr
    assert f"{n} samples scored by d_trak_5, 0 were already\n" in done.stderr
    assert f"{n} samples scored by gradient_dot_5, 0 were already\n" in done.stderr
    monkeypatch.setattr(ModelGradients, "of_image", None)  # where no method can score, no gradient is computed
    result = score(other, "in-run:6", load_scorers(["in-run:6"])["in-run:6"], "model_id = 'unwatched'")
    assert len(result.failures) == n // 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["d-trak", "in-run", "--method-id", "mine"], "--method-id names one method, and 2 are given"),
        (["d-trak:2", "d-trak_2"], "d-trak:2 and d-trak_2 would both be method 'd_trak_2'"),
    ],
)
def test_methods_that_cannot_be_told_apart(db, words, said):
    done = CliRunner().invoke(main, ["score", str(db.path), *words])
    assert done.exit_code == 1
    assert said in done.stderr


def test_the_run_s_sums_are_multiplied_with_the_sample_s_gradient(db, tiny_base):
    [table, *_] = scorers.GradientScorer("in-run", "3").scores(db, ids(db, "samples")[:1])
    kept = read_gradients(db.path, "weights/vase-1.safetensors")
    row, delta = model_row(db, "vase-1")
    [sample] = set(table["sample_id"].to_pylist())
    image, prompt = pictures(db, [sample])[sample]
    with opened(load_base_model(str(tiny_base)), row, delta, 3) as model:
        gradient = dict(zip(model.parameters, model.of_image(image, prompt, "loss"), strict=True))
    for candidate, value in zip(table["candidate_id"].to_pylist(), table["score"].to_pylist(), strict=True):
        number = kept.exemplars.index(candidate)
        by_hand = sum(float(kept.sums[name][number].flatten() @ part) for name, part in gradient.items())
        assert value == pytest.approx(by_hand, rel=1e-4)


def test_checkpoints_are_those_of_the_model_s_own_training(db, tiny_base):
    base = load_base_model(str(tiny_base))
    fresh = base.pipeline.unet.state_dict()
    moments = checkpoints(db, "vase-1", base, 3)
    row, delta = model_row(db, "vase-1")
    assert len(moments) == 3
    assert all(value.equal(moments[-1][name]) for name, value in delta.items())
    assert not any(value.equal(moments[0][name]) for name, value in delta.items())
    assert all(value.equal(fresh[name]) for name, value in base.pipeline.unet.state_dict().items())
    scorer = scorers.GradientScorer("trac-in", "2")
    [sample] = ids(db, "samples")[:1]
    [table] = scorer.scores(db, [sample])
    image, prompt = pictures(db, [sample])[sample]
    exemplar = table["candidate_id"][0].as_py()
    products = []
    for moment in checkpoints(db, "vase-1", base):
        with opened(base, row, moment, 2) as model:
            one = model.of_image(image, prompt, "loss")
            other = model.of_image(pictures(db, [exemplar])[exemplar][0], row["train_prompt"], "loss")
        products.append(sum(float(a @ b) for a, b in zip(one, other, strict=True)))
    assert len(products) == 5
    assert table["score"][0].as_py() == pytest.approx(np.mean(products), rel=1e-4)


def test_a_model_that_is_not_made_again_as_it_was_has_no_checkpoints(db, tmp_path, tiny_base):
    other = attrdb.open(shutil.copytree(db.path, tmp_path / "other.attrdb"))
    row, _ = model_row(other, "vase-1")
    record = json.loads(row["settings"])
    record["customize"]["lr"] *= 1.01
    other.writer.upsert("models", [row | {"settings": json.dumps(record)}])
    other.refresh()
    scorer = scorers.GradientScorer("trac-in", "2")
    assert not list(scorer.scores(other, ids(other, "samples")))
    assert set(scorer.unscored) == set(ids(other, "samples"))
    assert "trained again, model 'vase-1' gets other weights here" in next(iter(scorer.unscored.values()))


def test_an_exemplar_scores_highest_for_itself_by_cosine(db, tiny_base):
    """The gradient of a picture with its own training prompt is its own."""
    row, delta = model_row(db, "vase-1")
    stored = pictures(db, ids(db, "exemplars"))
    with opened(load_base_model(str(tiny_base)), row, delta, 4) as model:
        of_exemplars = [model.of_image(image, row["train_prompt"], "loss") for image, _ in stored.values()]
    matrix = np.array(
        [[sum(float(a @ b) for a, b in zip(x, y, strict=True)) for y in of_exemplars] for x in of_exemplars]
    )
    for number in range(len(matrix)):
        found = FORMULAS["gradient-cosine"].scores(
            Kernels(matrix[None], matrix[None, number], matrix[number, number], np.array([1]))
        )
        assert found.argmax() == number
        assert found.max() == pytest.approx(1, abs=1e-6)


def test_the_command(db):
    done = CliRunner().invoke(main, ["score", str(db.path), "gradient-dot:2", "--method-id", "dots"])
    assert done.exit_code == 0, done.output
    assert "samples scored by dots" in done.stderr
    [row] = attrdb.open(db.path).sql("FROM methods WHERE method_id = 'dots'").to_pylist()
    assert (row["kind"], row["unit"], json.loads(row["settings"])) == (
        "stored",
        "gradient product",
        {"draws": 2, "spec": "gradient-dot:2"},
    )


@pytest.mark.parametrize("argument", ["many", "0", "-1", "1001", "²"])
def test_a_number_of_draws_that_cannot_be_used(db, argument):
    done = CliRunner().invoke(main, ["score", str(db.path), f"d-trak:{argument}"])
    assert done.exit_code == 1
    assert f"d-trak:{argument} must have a number of draws after the colon, from 1 to 1000" in done.stderr


def test_a_model_that_cannot_be_scored_is_named_and_stops_no_other(db, tmp_path, tiny_base, exemplars):  # noqa: F811
    other = attrdb.open(shutil.copytree(db.path, tmp_path / "other.attrdb"))
    ingest(other, exemplars, tiny_base, ToyEncoder(), "unwatched", monitor="off")
    n_samples = len(ids(other, "samples"))

    def scored(spec):
        result = score(other, spec, load_scorers([spec])[spec])
        reasons = {row["reason"] for row in other.sql("FROM failures").to_pylist()}
        return result.n_done + result.n_stored, reasons

    n_scored, [reason] = scored("in-run:4")
    assert n_scored == n_samples / 2
    assert re.match(
        r"there are no gradients beside .*unwatched.*; they are kept for models made with --monitor", reason
    )
    other.writer.update("models", "model_id = 'unwatched'", {"base_model_hash": "another"})
    other.refresh()
    n_scored, reasons = scored("gradient-dot:4")
    assert n_scored == n_samples / 2
    assert any("is not the one that model 'unwatched' was made from" in reason for reason in reasons)
    other.writer.update("models", "model_id = 'unwatched'", {"base_model": str(tmp_path / "moved")})
    other.writer.delete("images", "model_id = 'vase-1' AND role = 'exemplar'")
    other.refresh()
    n_scored, reasons = scored("d-trak:4")
    assert n_scored == 0
    assert any("moved" in reason for reason in reasons)
    assert "model 'vase-1' has no exemplar whose picture is stored" in reasons
