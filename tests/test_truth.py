"""Counterfactual truth: what is left out, draws that stay as they were, the queue, and how methods are compared with it."""

import shutil
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from conftest import ToyEncoder, rows
from test_monitored_models import exemplars, ingest  # noqa: F401

import attrdb
from attrdb.cli import main
from attrdb.errors import InvalidValue, NotFound, QueryRefused
from attrdb.ingest.customize.base_model import load_base_model
from attrdb.ingest.customize.customize import customize
from attrdb.ingest.customize.observer import Observer
from attrdb.ingest.customize.steps import draw_slots
from attrdb.ingest.options import QueueSettings, TruthSettings
from attrdb.ingest.read.pictures import read_picture
from attrdb.ingest.truth import queue
from attrdb.ingest.truth.retrain import Retrained
from attrdb.ingest.truth.subsets import Subset, subsets
from attrdb.store.schema import TABLES
from attrdb.upkeep.removal.choose import RemovalRequest
from attrdb.upkeep.removal.remove import remove

SILENT = lambda *_: None  # noqa: E731


@pytest.fixture(scope="module")
def template(exemplars, tiny_base, tmp_path_factory):  # noqa: F811
    db = attrdb.create(tmp_path_factory.mktemp("template") / "some.attrdb")
    ingest(db, exemplars, tiny_base, ToyEncoder(), monitor="off")
    return db.path


@pytest.fixture
def db(template, tmp_path):
    return attrdb.open(shutil.copytree(template, tmp_path / "some.attrdb"))


# --- subsets ----------------------------------------------------------------------------------------------------------


def rows_of(*concepts, creators=None):
    creators = creators or [None] * len(concepts)
    return [
        {"image_id": f"m/{number}", "concept_id": concept, "creator": creator}
        for number, (concept, creator) in enumerate(zip(concepts, creators, strict=True))
    ]


def test_each_image_concept_and_creator_is_left_out_once():
    four = rows_of("a", "a", "b", "b", creators=["x", None, "y", "y"])
    assert subsets(four, "image", 9, "") == [Subset("image", f"m/{n}", (f"m/{n}",)) for n in range(4)]
    assert subsets(four, "concept", 9, "") == [
        Subset("concept", "a", ("m/0", "m/1")),
        Subset("concept", "b", ("m/2", "m/3")),
    ]
    assert subsets(four, "creator", 9, "") == [
        Subset("creator", "x", ("m/0",)),
        Subset("creator", "y", ("m/2", "m/3")),
    ]


def test_halves_differ_and_more_of_them_begin_with_the_same():
    six = rows_of(*"aaaaaa")
    few, many = subsets(six, "half", 5, "m"), subsets(six, "half", 100, "m")
    assert many[:5] == few
    assert len({half.left_out for half in many}) == len(many) == 20  # of 6 images there are no more
    assert all(len(half.left_out) == 3 for half in many)
    assert subsets(six, "half", 5, "other") != few
    assert {len(half.left_out) for half in subsets(rows_of(*"aaaaa"), "half", 3, "m")} == {3}  # two of five stay


@pytest.mark.parametrize(
    ("given", "leave", "message"),
    [
        (rows_of("a"), "image", "it has 1 exemplar, so that nothing is left without one"),
        (rows_of("a", "a"), "concept", "it has 1 concept, so"),
        (rows_of("a", "b", creators=[None, None]), "creator", "it has 0 creators, so"),
        (rows_of("a"), "half", "it has 1 exemplar, which has no half"),
    ],
)
def test_what_leaves_nothing_is_refused(given, leave, message):
    with pytest.raises(InvalidValue, match=message):
        subsets(given, leave, 4, "")


# --- training without -------------------------------------------------------------------------------------------------


class Seen(Observer):
    """The exemplars, timesteps and noises of every step."""

    def __init__(self):
        self.steps = []

    def start(self, run): ...

    def before_update(self, step):
        self.steps.append((step.images, step.timesteps, step.noise))

    def after_update(self, step): ...

    def end(self, error): ...


def spied(monkeypatch):
    """What `draw_slots` drew and what was kept of it, in the order of the steps."""
    drawn = []

    def spy(*arguments):
        drawn.append(draw_slots(*arguments))
        return drawn[-1]

    monkeypatch.setattr("attrdb.ingest.customize.steps.draw_slots", spy)
    return drawn


def test_with_nothing_left_out_the_stored_weights_come_again(db):
    model = Retrained(db, "vase-1")
    truth = model.without(load_base_model(model.row["base_model"]), (), None, SILENT)
    assert model.is_stored(truth.delta)
    assert truth.losses.keys() == {sample["image_id"] for sample in model.samples}
    assert all(loss > 0 for loss in truth.losses.values())


def test_the_others_are_drawn_as_before(db, monkeypatch):
    """The same slots, timesteps and noises, but for those of the exemplar that is left out."""
    model = Retrained(db, "vase-1")
    base = load_base_model(model.row["base_model"])
    drawn = spied(monkeypatch)
    model.without(base, (), None, SILENT)
    whole = drawn.copy()
    drawn.clear()
    gone = model.exemplars[1]["image_id"]
    truth = model.without(base, (gone,), None, SILENT)
    assert len(whole) == len(drawn) == 8
    for one, other in zip(whole, drawn, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.noise, other.noise)
        assert 1 not in other.without({1}).images
    assert not model.is_stored(truth.delta)


def test_a_step_without_a_slot_that_is_left_is_skipped(tiny_base, db):
    model, base = Retrained(db, "vase-1"), load_base_model(str(tiny_base))
    settings, pictures = model.settings.customize, [row["picture"].image for row in model.exemplars]
    seen = Seen()
    customize(base, pictures, "a V* vase", "V*", "vase", settings, observer=seen)
    base.restore()
    empty_steps = [set(images.tolist()) <= {0, 1} for images, _, _ in seen.steps]
    _, figures = customize(base, pictures, "a V* vase", "V*", "vase", settings, left_out={0, 1})
    assert any(empty_steps)
    assert len(figures["losses"]) == settings.steps - sum(empty_steps)


def test_an_image_that_was_never_drawn_changes_nothing(tiny_base, db):
    model = Retrained(db, "vase-1")
    pictures = [row["picture"].image for row in model.exemplars]
    settings = model.settings.customize
    seen, base = Seen(), load_base_model(str(tiny_base))
    for seed in range(50):
        settings = type(settings)(**{**vars(settings), "seed": seed, "steps": 2})
        seen = Seen()
        whole, _ = customize(base, pictures, "a V* vase", "V*", "vase", settings, observer=seen)
        base.restore()
        never = set(range(3)) - {image for images, _, _ in seen.steps for image in images.tolist()}
        if never:
            break
    assert never
    without, _ = customize(base, pictures, "a V* vase", "V*", "vase", settings, left_out=never)
    assert all(torch.equal(whole[name], without[name]) for name in whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"left_out": {0, 1, 2}}, "every exemplar is left out; keep one or more"),
        ({"left_out": {1}, "observer": Seen()}, "cannot be observed"),
    ],
)
def test_what_cannot_be_trained_is_refused(tiny_base, db, options, message):
    model = Retrained(db, "vase-1")
    pictures = [row["picture"].image for row in model.exemplars]
    with pytest.raises(InvalidValue, match=message):
        customize(
            load_base_model(str(tiny_base)), pictures, "a V* vase", "V*", "vase", model.settings.customize, **options
        )


def test_redrawn_training_sees_only_what_is_left(db, monkeypatch):
    model = Retrained(db, "vase-1")
    base = load_base_model(model.row["base_model"])
    drawn = spied(monkeypatch)
    first = model.without(base, (model.exemplars[0]["image_id"],), 1, SILENT)
    assert {image for draw in drawn for image in draw.images.tolist()} <= {0, 1}
    again = model.without(base, (model.exemplars[0]["image_id"],), 1, SILENT)
    other = model.without(base, (model.exemplars[0]["image_id"],), 2, SILENT)
    assert first.losses == again.losses != other.losses


@pytest.mark.parametrize(
    "options", [{"prior_images": 2, "prior": "generated"}, {"augment": "strong"}, {"augment": "placed"}]
)
def test_regularization_and_augmentation_come_again(empty, exemplars, tiny_base, toy_encoder, options):  # noqa: F811
    ingest(empty, exemplars, tiny_base, toy_encoder, "other", monitor="off", **options)
    model = Retrained(empty, "other")
    base = load_base_model(model.row["base_model"])
    assert model.is_stored(model.without(base, (), None, SILENT).delta)
    assert not model.is_stored(model.without(base, (model.exemplars[2]["image_id"],), None, SILENT).delta)


# --- the queue --------------------------------------------------------------------------------------------------------


def find(db, *leave, **given):
    settings = TruthSettings(**{name: given.pop(name) for name in ("halves", "draws", "seed") if name in given})
    return queue.find_truth(db.path, given.pop("models", "true"), leave, settings=settings, **given)


def stored(db):
    db.refresh()
    kept = "retraining_id, leave, name, left_out, draws, seed, n_draws, train_loss, same_weights"
    return (
        db.sql(f"SELECT {kept} FROM retrainings ORDER BY ALL").to_pylist(),
        db.sql("FROM counterfactuals ORDER BY ALL").to_pylist(),
    )


def test_every_retraining_is_stored_with_the_losses_of_all_samples(db):
    result = find(db, "image", "half", halves=2)
    assert (result.n_done, result.n_stored, result.failures) == (1, 0, {})
    retrainings, losses = stored(db)
    assert [row["leave"] for row in retrainings] == ["half"] * 2 + ["image"] * 3 + ["none"]
    assert retrainings[-1]["same_weights"] is True
    assert retrainings[-1]["retraining_id"] == "vase-1/none/fixed"
    assert {row["same_weights"] for row in retrainings[:-1]} == {None}
    samples = set(db.sql("SELECT image_id FROM samples")["image_id"].to_pylist())
    assert len(losses) == 6 * len(samples)
    assert {row["sample_id"] for row in losses} == samples
    reports = []
    assert find(db, "image", "half", halves=2, report=lambda *units: reports.append(units)).n_stored == 1
    assert reports == [("models", 1, 1, "")] * 2
    assert stored(db) == (retrainings, losses)


def test_what_is_to_be_left_out_twice_is_left_out_once(db):
    once, twice = (queue.tasks(db, "true", leave, "true", TruthSettings()) for leave in (["image"], ["image", "image"]))
    assert once == twice


def test_interrupted_it_resumes(db, template, tmp_path):
    find(db, "image")
    killed = attrdb.open(shutil.copytree(template, tmp_path / "killed.attrdb"))

    def kill(stage, done, _total, _note=""):
        if stage == "vase-1 3/4 customize" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find(killed, "image", report=kill)
    assert len(stored(killed)[0]) == 2
    find(killed, "image")
    assert stored(killed) == stored(db)


def test_losses_without_their_retraining_do_not_count_and_are_replaced(db):
    stray = {"retraining_id": "vase-1/none/fixed", "model_id": "vase-1", "sample_id": "vase-1/0/0", "loss": 9.0}
    db.writer.append_rows("counterfactuals", pa.Table.from_pylist([stray], TABLES["counterfactuals"]), db.snapshot)
    find(db, "image")
    assert all(row["loss"] != 9.0 for row in stored(db)[1])


def test_two_workers_do_what_one_does(db, exemplars, tiny_base, toy_encoder, tmp_path):  # noqa: F811
    ingest(db, exemplars, tiny_base, toy_encoder, "vase-2", monitor="off", seed=3)
    alone = attrdb.open(shutil.copytree(db.path, tmp_path / "alone.attrdb"))
    assert find(db, "image", queue_settings=QueueSettings(workers=2)).n_done == 2
    find(alone, "image")
    losses, others = (stored(one)[1] for one in (db, alone))
    assert [row["sample_id"] for row in losses] == [row["sample_id"] for row in others]
    assert [row["loss"] for row in losses] == pytest.approx([row["loss"] for row in others], rel=1e-5)


def test_a_model_that_fails_stops_no_other(db, exemplars, tiny_base, toy_encoder):  # noqa: F811
    ingest(db, exemplars, tiny_base, toy_encoder, "vase-2", monitor="off", seed=3)
    (db.path / "weights" / "vase-1.safetensors").write_bytes(b"other weights")
    result = find(db, "image")
    assert result.n_done == 1
    assert "cannot be read" in result.failures["vase-1"]


def test_what_cannot_be_left_out_of_a_model_is_passed_over(db):
    [task] = queue.tasks(db, "true", ("creator", "image"), "true", TruthSettings())
    assert [subset.leave for subset in task.left] == ["none", "image", "image", "image"]


def test_a_model_without_one_of_its_exemplars_is_refused(db):
    [gone, *_] = db.sql("SELECT image_id FROM exemplars ORDER BY ALL")["image_id"].to_pylist()
    find(db, "image")
    remove(db.writer, RemovalRequest(ids=(gone,), models="mark"))
    assert stored(db) == ([], [])
    result = find(db, "image")
    assert "1 of the 3 exemplars of model 'vase-1' have no picture" in result.failures["vase-1"]


def test_a_sample_takes_its_losses_with_it(db):
    find(db, "image")
    [gone, *_] = db.sql("SELECT image_id FROM samples ORDER BY ALL")["image_id"].to_pylist()
    remove(db.writer, RemovalRequest(ids=(gone,)))
    retrainings, losses = stored(db)
    assert len(retrainings) == 4
    assert losses
    assert gone not in {row["sample_id"] for row in losses}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--leave", "creator"], "model 'vase-1' cannot be trained without creator: it has 0 creators"),
        (["--leave", "image", "--models", "kind = 'style'"], "no model of"),
        (["--leave", "image", "--models", "bogus = 1"], "models is 'bogus = 1'; it must be an SQL predicate"),
        (["--leave", "image", "--samples", "1) OR (1"], "samples is"),
        (["--leave", "image", "--halves", "0"], "0 is not in the range"),
        ([], "Missing option '--leave'"),
    ],
)
def test_the_command_refuses_what_cannot_be_done(db, words, message):
    done = CliRunner().invoke(main, ["truth", str(db.path), *words])
    assert done.exit_code
    assert message in " ".join(done.output.split())
    assert stored(db) == ([], [])


def test_the_command_and_its_queries(db):
    done = CliRunner().invoke(main, ["truth", str(db.path), "--leave", "image", "--models", "kind = 'object'"])
    assert done.exit_code == 0, done.output
    assert "1 models trained again, 0 were already" in done.output
    db.writer.append_images(rows([("p10", "pretraining", None, 10)]))
    done = CliRunner().invoke(main, ["evaluate", str(db.path), "--gallery", "own"])
    assert done.exit_code == 0, done.output
    shown = attrdb.open(db.path).query("removal_scores", leave="image").to_pylist()
    assert [(row["method_id"], row["n_retrainings"]) for row in shown] == [("toy_2", 3)]


def test_pictures_of_a_base_model_that_has_changed_are_refused(db):
    db.writer.update("models", "true", {"base_model_hash": "0" * 64})
    with pytest.raises(InvalidValue, match="is not the one that model 'vase-1' was made from"):
        Retrained(attrdb.open(db.path), "vase-1")
    with pytest.raises(NotFound, match="no customized model 'other'"):
        Retrained(db, "other")


# --- the queries ------------------------------------------------------------------------------------------------------


def spearman(one, other):
    """Pearson's correlation of mean ranks; the slow twin of the query."""

    def ranks(values):
        return [sorted(values).index(value) + (list(values).count(value) - 1) / 2 for value in values]

    return np.corrcoef(ranks(one), ranks(other))[0, 1]


@pytest.fixture
def compared(toy):
    """The toy database with 3 models of 4 exemplars, two methods, and truth made up at random."""
    chance = np.random.default_rng(3)
    ranks, retrainings, losses = [], [], []
    for model in ("a", "b", "c"):
        own = [f"{model}/e{number}" for number in range(4)]
        samples = [f"{model}/{number}" for number in range(2)]
        for method in ("good", "bad"):
            for sample in samples:
                for exemplar in own:
                    score = float(chance.integers(0, 3)) if method == "bad" else float(chance.normal())
                    ranks.append({"method_id": method, "gallery": "own", "sample_id": sample, "exemplar_id": exemplar})
                    ranks[-1] |= {"score": score, "rank": 1, "gallery_size": 4, "images_version": 1}
        chosen = [("image", one, (one,)) for one in own]
        chosen += [("half", str(n), pair) for n, pair in enumerate([own[:2], own[1:3], own[2:], [own[0], own[3]]])]
        for leave, name, left_out in [("none", "", ()), *chosen]:
            for draws, seed in (("fixed", 0), ("redrawn", 1), ("redrawn", 2)):
                ident = f"{model}/{leave}/{name}/{draws}-{seed}"
                retrainings.append({"retraining_id": ident, "model_id": model, "leave": leave, "name": name})
                retrainings[-1] |= {"draws": draws, "seed": seed, "left_out": list(left_out), "n_draws": 24}
                retrainings[-1] |= {"train_loss": 0.1, "seconds": 1.0, "created_at": datetime.now(UTC)}
                for sample in samples:
                    losses.append({"retraining_id": ident, "model_id": model, "sample_id": sample})
                    losses[-1] |= {"loss": float(chance.normal())}
    for method in ("good", "bad"):
        meaning = {"unit": "score", "tau": 1.0, "lam": 0.05, "settings": "{}"}
        toy.writer.add_method({"method_id": method, "kind": "stored", **meaning})
        own_ranks = [row for row in ranks if row["method_id"] == method]
        toy.writer.replace_exemplar_ranks(pa.Table.from_pylist(own_ranks, TABLES["exemplar_ranks"]), method, "own")
    toy.writer.append_rows("counterfactuals", pa.Table.from_pylist(losses, TABLES["counterfactuals"]), toy.snapshot)
    toy.writer.upsert("retrainings", retrainings)
    toy.refresh()
    return toy, ranks, retrainings, losses


def twin_scores(ranks, retrainings, losses, leave, draws):
    """(method, model, sample) -> correlation and top-1, in plain Python."""
    score = {(row["method_id"], row["sample_id"], row["exemplar_id"]): row["score"] for row in ranks}
    of = {}
    by_id = {row["retraining_id"]: row for row in retrainings}
    for row in losses:
        training = by_id[row["retraining_id"]]
        if training["leave"] == leave and training["draws"] == draws:
            key = (row["model_id"], row["sample_id"], training["name"])
            of.setdefault(key, (training["left_out"], []))[1].append(row["loss"])
    found = {}
    for method in ("good", "bad"):
        for model, sample in sorted({key[:2] for key in of}):
            pairs = [
                (sum(score[method, sample, one] for one in left_out), np.mean(values))
                for (m, s, _), (left_out, values) in of.items()
                if (m, s) == (model, sample)
            ]
            sums, means = zip(*pairs, strict=True)
            top = [number for number, value in enumerate(sums) if value == max(sums)]
            hit = float(int(np.argmax(means)) in top) / len(top)
            constant = len(set(sums)) == 1
            found[method, model, sample] = (0.0 if constant else spearman(sums, means), hit)
    return found


@pytest.mark.parametrize("draws", ["fixed", "redrawn"])
@pytest.mark.parametrize("leave", ["image", "half"])
def test_correlations_are_those_of_a_slow_twin(compared, leave, draws):
    db, *given = compared
    twin = twin_scores(*given, leave, draws)
    where = f"WHERE leave = '{leave}' AND draws = '{draws}'"
    rows = db.sql(f"FROM truth_scores {where}").to_pylist()
    assert {(row["method_id"], row["model_id"], row["sample_id"]) for row in rows} == twin.keys()
    for row in rows:
        correlation, top_1 = twin[row["method_id"], row["model_id"], row["sample_id"]]
        assert row["correlation"] == pytest.approx(correlation, abs=1e-12)
        assert row["top_1"] == pytest.approx(top_1)
        assert row["n_retrainings"] == 4
    shown = {
        (row["method_id"], row["model_id"]): row["correlation"]
        for row in db.query("removal_scores", leave=leave).to_pylist()
        if row["draws"] == draws
    }
    for method, model in shown:
        own = [value for key, (value, _) in twin.items() if key[:2] == (method, model)]
        assert shown[method, model] == pytest.approx(np.mean(own))


def test_intervals_and_gains_are_means_over_models(compared):
    db, *given = compared
    twin = twin_scores(*given, "half", "fixed")

    def model_means(method):
        return [np.mean([v for (m, o, _), (v, _) in twin.items() if (m, o) == (method, one)]) for one in "abc"]

    rows = {
        row["method_id"]: row
        for row in db.query("removal_intervals").to_pylist()
        if (row["leave"], row["draws"]) == ("half", "fixed")
    }
    for method, row in rows.items():
        means = model_means(method)
        assert row["correlation"] == pytest.approx(np.mean(means))
        assert row["correlation_low"] <= row["correlation"] <= row["correlation_high"]
        assert min(means) - 1e-12 <= row["correlation_low"] <= row["correlation_high"] <= max(means) + 1e-12
        assert row["chance_sd"] == pytest.approx(1 / np.sqrt(3))
        assert row["detectable"] == pytest.approx(2.8 * np.std(means, ddof=1) / np.sqrt(3))
    [gain] = [
        row
        for row in db.query("compare_removals", method="good").to_pylist()
        if (row["leave"], row["draws"]) == ("half", "fixed")
    ]
    assert gain["other"] == "bad"
    assert gain["n_models"] == 3
    assert gain["gain"] == pytest.approx(np.mean(model_means("good")) - np.mean(model_means("bad")))
    with pytest.raises(NotFound, match="no method 'other' in"):
        db.query("compare_removals", method="other")
    with pytest.raises(QueryRefused, match="leave is 'all'; it must be image, concept, creator or half"):
        db.query("removal_scores", leave="all")


def test_a_perfect_method_has_correlation_1_and_names_what_was_missed_most(compared):
    """Scores that are the losses themselves, and their negatives."""
    db, ranks, retrainings, losses = compared
    names = {row["retraining_id"]: row["name"] for row in retrainings if row["leave"] == "image" and not row["seed"]}
    effect = {
        (row["sample_id"], names[row["retraining_id"]]): row["loss"] for row in losses if row["retraining_id"] in names
    }
    for method, sign in (("good", 1), ("bad", -1)):
        own = [row | {"score": sign * effect[row["sample_id"], row["exemplar_id"]]} for row in ranks]
        own = [row for row in own if row["method_id"] == method]
        db.writer.replace_exemplar_ranks(pa.Table.from_pylist(own, TABLES["exemplar_ranks"]), method, "own")
    db.refresh()
    rows = db.sql("FROM truth_scores WHERE leave = 'image' AND draws = 'fixed'").to_pylist()
    assert {(row["method_id"], round(row["correlation"], 9), row["top_1"]) for row in rows} == {
        ("good", 1.0, 1.0),
        ("bad", -1.0, 0.0),
    }


def test_retrainings_without_a_score_for_what_they_left_out_are_not_counted(compared):
    db, ranks, _, _ = compared
    own = [row for row in ranks if row["method_id"] == "good" and row["exemplar_id"] != "a/e0"]
    db.writer.replace_exemplar_ranks(pa.Table.from_pylist(own, TABLES["exemplar_ranks"]), "good", "own")
    db.refresh()
    counts = db.sql(
        "SELECT DISTINCT leave, n_retrainings FROM truth_scores "
        "WHERE method_id = 'good' AND model_id = 'a' AND draws = 'fixed'"
    ).to_pylist()
    assert counts == [{"leave": "image", "n_retrainings": 3}]  # of the halves only two are left, too few


def test_the_ceiling_is_that_of_a_mean_of_two_seeds(compared):
    db, _, retrainings, losses = compared
    seeds = {row["retraining_id"]: row for row in retrainings if row["leave"] == "half" and row["draws"] == "redrawn"}
    values = {}
    for row in losses:
        if training := seeds.get(row["retraining_id"]):
            values.setdefault((row["model_id"], row["sample_id"], training["seed"]), []).append(row["loss"])
    for row in db.query("truth_ceiling").to_pylist():
        if row["leave"] != "half":
            continue
        model = row["model_id"]
        r = np.mean([spearman(values[model, f"{model}/{n}", 1], values[model, f"{model}/{n}", 2]) for n in range(2)])
        assert row["n_seeds"] == 2
        assert row["reliability"] == pytest.approx(r)
        assert row["ceiling"] == pytest.approx(np.sqrt(max(0, 2 * r / (1 + r))))


def test_a_picture_reads_as_it_did(db):
    """Exemplars are trained on from their stored bytes."""
    for row in db.sql("SELECT image_id, sha256, image FROM exemplars").to_pylist():
        assert read_picture(row["image_id"], row["image"]).sha256 == row["sha256"]
