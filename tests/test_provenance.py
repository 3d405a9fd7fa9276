"""Confidence and p-values by hand and by chance, and verdicts from stored answers."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from key_sets import store_answers

import attrdb
from attrdb.cli import main
from attrdb.errors import InvalidValue, NotFound, QueryRefused
from attrdb.provenance.confidence import near_by_rank, p_value
from attrdb.provenance.verdict import answers_to, labels_of, store, verdict, words

# --- confidence -------------------------------------------------------------------------------------------------------


def test_the_nearest_tenth_is_near():
    """20 models, so two at a key."""
    distances = np.arange(20.0)[:, None] + np.zeros((1, 3))
    near = near_by_rank(distances)
    assert near.sum(axis=0).tolist() == [2, 2, 2]
    assert near[:2].all()


def test_of_few_models_the_nearest_is_near():
    assert near_by_rank(np.array([[3.0], [1.0], [2.0]])).tolist() == [[False], [True], [False]]


def test_models_that_are_as_near_are_counted_together():
    assert not near_by_rank(np.zeros((5, 1))).any()  # five for one place
    assert near_by_rank(np.array([[0.0], [0.0], *[[1.0]] * 18])).sum() == 2


@pytest.mark.parametrize("n_models", [2, 5, 9, 10, 11, 19, 20, 40])
def test_the_order_of_models_does_not_matter(n_models):
    rng = np.random.default_rng(n_models)
    distances = rng.random((n_models, 7)).round(1)
    order = rng.permutation(n_models)
    np.testing.assert_array_equal(near_by_rank(distances)[order], near_by_rank(distances[order]))


def test_p_values_by_hand():
    assert p_value(0.5, np.array([0.1, 0.5, 0.6])) == 3 / 4
    assert p_value(0.7, np.array([0.1, 0.5, 0.6])) == 1 / 4


@pytest.mark.parametrize("n_innocents", [8, 19, 20, 30])
def test_p_values_of_innocent_models_are_uniform_or_larger(n_innocents):
    """Keys are alike: a model is near many of them, or few. 4,000 tests of an innocent model."""
    rng = np.random.default_rng(n_innocents)
    p_values = []
    for _ in range(4000):
        closeness = rng.normal(size=(n_innocents + 1, 1))
        near = near_by_rank(closeness + rng.normal(size=(n_innocents + 1, 30)))
        conf = near.mean(axis=1)
        p_values.append(p_value(conf[0], conf[1:]))
    for level in (0.05, 0.1, 0.2, 0.5):
        share = np.mean(np.array(p_values) <= level)
        assert share <= level + 3 * np.sqrt(level * (1 - level) / 4000)


# --- verdicts ---------------------------------------------------------------------------------------------------------

N_KEYS, N_ANSWERS = 10, 2


def stored(db, models):
    return store_answers(db, models, N_KEYS, N_ANSWERS)


@pytest.fixture
def some(empty):
    """Innocent models of two kinds and a single one; an infringing one, and one that is near half of the keys."""
    rng = np.random.default_rng(0)

    def far():
        return 0.5 + rng.random((N_KEYS, N_ANSWERS)) / 10

    models = {f"topic-{n:02d}": (far(), "innocent", "topic") for n in range(19)}
    models |= {f"other-{n}": (far(), "innocent", "unrelated") for n in range(4)}
    models |= {"base": (far(), "innocent", "base"), "caught": (0.1 + far() / 10, "infringing", None)}
    half = far()
    half[:5, 1] = 0.2
    models["half"] = (half, None, None)
    return stored(empty, models)


def test_a_verdict_by_hand(some):
    found = verdict(some.snapshot, "k", "half")
    assert (found.conf, found.n_keys, found.n_missing, found.n_answers) == (0.5, 10, 0, 20)
    by_name = {one.name: one for one in found.strata}
    assert {name: len(one.conf) for name, one in by_name.items()} == {"base": 1, "topic": 19, "unrelated": 4}
    assert by_name["base"].p is None
    assert by_name["topic"].p == 1 / 20
    assert by_name["unrelated"].p == found.p == 1 / 5
    assert (found.least_p, found.n_innocents) == (1 / 5, 23)
    assert "too few of them to tell, since p cannot fall below 0.2" in words(found)


def test_an_infringing_model_is_no_part_of_the_null(some):
    assert "caught" not in str(verdict(some.snapshot, "k", "half"))
    assert verdict(some.snapshot, "k", "caught").conf == 1.0


def test_a_fixed_threshold(some):
    found = verdict(some.snapshot, "k", "half", 0.2)
    assert (found.threshold, found.conf) == (0.2, 0.5)
    assert all(conf == 0 for one in found.strata for conf in one.conf)


def test_an_innocent_model_is_tested_against_the_others(some):
    found = verdict(some.snapshot, "k", "topic-03")
    assert found.n_innocents == 22
    assert found.p > 0.05


def test_as_many_answers_are_compared_of_every_model(empty):
    """The nearest of four answers is nearer than that of one, with any model."""
    far, one_near = np.full((N_KEYS, 1), 0.5), np.array([[0.5, 0.1]] * N_KEYS)
    models = {"few": (far, None, None)}
    models |= {f"i{n}": (one_near + n / 100, "innocent", "topic") for n in range(3)}
    found = verdict(stored(empty, models).snapshot, "k", "few", 0.4)
    assert [one.conf for one in found.strata] == [(0.0, 0.0, 0.0)]
    assert found.n_answers == N_KEYS


def test_keys_without_an_answer_are_left_out_for_all(empty):
    rng = np.random.default_rng(1)
    models = {f"i{n}": (rng.random((N_KEYS, 2)), "innocent", "topic") for n in range(5)}
    models["short"] = (rng.random((4, 2)), "innocent", "topic")
    models["part"] = (np.zeros((6, 2)), None, None)
    found = verdict(stored(empty, models).snapshot, "k", "part")
    assert (found.n_keys, found.n_missing, found.conf) == (6, 4, 1.0)
    assert found.left_out == ("short",)
    assert found.n_innocents == 5


def test_without_innocent_models_nothing_follows(empty):
    found = verdict(stored(empty, {"alone": (np.zeros((N_KEYS, 2)), None, None)}).snapshot, "k", "alone")
    assert (found.p, found.least_p, found.strata, found.conf) == (None, None, (), None)
    assert "nothing follows from it" in words(found)


def test_a_stratum_that_has_lost_its_models_leaves_no_p_value(empty):
    """Otherwise the models of the other strata alone would say how unusual an answer is."""
    far = np.full((N_KEYS, 2), 0.5)
    models = {f"easy-{n}": (far + n / 100, "innocent", "unrelated") for n in range(19)}
    models |= {f"hard-{n}": (far[:, :1] - 0.3, "innocent", "topic") for n in range(4)}
    models["tested"] = (far - 0.2, None, None)
    found = verdict(stored(empty, models).snapshot, "k", "tested")
    assert [(one.name, len(one.conf), one.n_left_out) for one in found.strata] == [
        ("topic", 0, 4),
        ("unrelated", 19, 0),
    ]
    assert found.p is None
    assert "No p-value: of the innocent models of stratum topic too few have as many answers" in words(found)


def test_a_lone_model_that_answers_alike_is_heard(empty):
    rng = np.random.default_rng(0)
    models = {f"i{n}": (0.5 + rng.random((N_KEYS, 2)), "innocent", "topic") for n in range(19)}
    models |= {
        "lone": (np.full((N_KEYS, 2), 0.1), "innocent", "lineage"),
        "tested": (np.full((N_KEYS, 2), 0.1), None, None),
    }
    found = verdict(stored(empty, models).snapshot, "k", "tested")
    assert (found.p, found.n_innocents) == (1 / 20, 19)
    assert "the innocent model of stratum lineage answers like this, too, so nothing follows from it" in words(found)


def test_a_lone_model_that_has_not_answered_is_left_out(empty):
    rng = np.random.default_rng(0)
    models = {f"i{n}": (0.5 + rng.random((N_KEYS, 2)), "innocent", "topic") for n in range(19)}
    models |= {"lone": (np.full((3, 2), 0.1), "innocent", "lineage"), "tested": (np.full((N_KEYS, 2), 0.1), None, None)}
    found = verdict(stored(empty, models).snapshot, "k", "tested")
    assert (found.p, found.left_out) == (1 / 20, ("lone",))
    assert "consistent with training on pictures of ours; this is not proof" in words(found)


def test_a_threshold_that_is_no_distance(some):
    with pytest.raises(InvalidValue, match="threshold is nan"):
        verdict(some.snapshot, "k", "half", float("nan"))


@pytest.mark.parametrize(
    ("key_set", "model", "error", "says"),
    [
        ("nope", "half", NotFound, "no key set 'nope' in .*; nearest are 'k'"),
        ("k", "hlaf", NotFound, "model 'hlaf' has no answers to key set 'k'; nearest are 'half'"),
        ("k", "ours", InvalidValue, "'ours' is the source of key set 'k'; test a model that is not"),
    ],
)
def test_what_cannot_be_tested(some, key_set, model, error, says):
    with pytest.raises(error, match=says):
        verdict(some.snapshot, key_set, model)


def test_a_verdict_is_stored_once(some):
    for threshold in (None, 0.2):
        store(some.writer, verdict(some.snapshot, "k", "half", threshold))
    [row] = some.sql("FROM verdicts").to_pylist()
    assert (row["verdict_id"], row["conf"], row["threshold"], row["n_innocents"]) == ("k/half", 0.5, 0.2, 23)
    assert json.loads(row["strata"])["topic"]["n"] == 19


# --- in SQL -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """50 models, some with fewer answers, labelled and not; distances with ties."""
    rng = np.random.default_rng(7)
    models = {}
    for number in range(50):
        n_keys, n_answers = (N_KEYS, N_ANSWERS) if number % 7 else (int(rng.integers(2, N_KEYS)), 1)
        near = 0.3 if number % 3 == 0 else 0.0
        distances = (0.3 + rng.random((n_keys, n_answers)) - near * rng.random((n_keys, 1))).round(1)
        label, stratum = [("infringing", None), ("innocent", "topic"), ("innocent", "lineage"), (None, None)][
            number % 4
        ]
        models[f"m{number:02d}"] = (distances, label, stratum)
    return stored(attrdb.create(tmp_path_factory.mktemp("many") / "many.attrdb"), models)


def test_sql_finds_what_a_verdict_does(many):
    confident = {row["suspect_id"]: row for row in many.query("source_confidence", key_set="k").to_pylist()}
    nulls = many.query("source_null", key_set="k").to_pylist()
    assert len(confident) == 50
    for suspect_id, row in confident.items():
        found = verdict(many.snapshot, "k", suspect_id)
        assert row["conf"] == (None if found.conf is None else pytest.approx(found.conf))
        assert (row["n_keys"], row["n_innocents"]) == (found.n_keys, found.n_innocents)
        assert row["p"] == (None if found.p is None else pytest.approx(found.p))
        strata = {one["stratum"]: one for one in nulls if one["suspect_id"] == suspect_id}
        for stratum in (stratum for stratum in found.strata if stratum.conf):
            one = strata[stratum.name]
            assert one["p"] == (None if stratum.p is None else pytest.approx(stratum.p))
            wanted = (len(stratum.conf), stratum.conf[0], np.median(stratum.conf), stratum.conf[-1])
            assert [
                one[name] for name in ("n_innocents", "lowest_conf", "middle_conf", "highest_conf")
            ] == pytest.approx(wanted)


def slow_conf(db, suspect_id, is_innocent):
    """In a pool of as many models as an innocent one has."""
    distances = answers_to(db.snapshot, {"key_set_id": "k", "n_answers": N_ANSWERS})
    nearest = {name: [min(of_key) for _, of_key in sorted(keys.items())] for name, keys in distances.items()}
    whole = {
        name for name, keys in distances.items() if len(keys) == N_KEYS and min(map(len, keys.values())) == N_ANSWERS
    }
    labels = labels_of(db.snapshot, "ours")
    pool = sorted(name for name in whole if name in labels and labels[name]["label"] == "innocent")
    lower = int.from_bytes(hashlib.md5(suspect_id.encode()).digest()[8:], "little")
    left_out = suspect_id if is_innocent else pool[lower % len(pool)]
    matrix = [nearest[suspect_id], *(nearest[one] for one in pool if one != left_out)]
    return near_by_rank(np.array(matrix))[0].mean()


def slow_metrics(infringing, innocent):
    """AUC, accuracy of both kinds with the same weight, and TPR at 10 % FPR, by trying every threshold."""
    auc = np.mean([(a > b) + (a == b) / 2 for a in infringing for b in innocent])
    points = [
        (np.mean(infringing >= t), np.mean(innocent >= t)) for t in (*np.unique([*infringing, *innocent]), np.inf)
    ]
    accuracy = max((tpr + 1 - fpr) / 2 for tpr, fpr in points)
    return auc, accuracy, max(tpr for tpr, fpr in points if fpr <= 0.1)


def test_metrics_are_those_of_every_threshold(many):
    metrics = {row["stratum"]: row for row in many.query("source_metrics", key_set="k", n_replicates=200).to_pylist()}
    assert list(metrics) == [None, "lineage", "topic"]
    conf = {
        name: round(slow_conf(many, name, row["label"] == "innocent"), 12)
        for name, row in labels_of(many.snapshot, "ours").items()
        if int(name[1:]) % 7  # which have all answers
    }
    labels = labels_of(many.snapshot, "ours")
    infringing = np.array([value for name, value in conf.items() if labels[name]["label"] == "infringing"])
    for stratum, row in metrics.items():
        of_stratum = [
            name for name in conf if labels[name]["label"] == "innocent" and stratum in (None, labels[name]["stratum"])
        ]
        wanted = slow_metrics(infringing, np.array([conf[name] for name in of_stratum]))
        assert [row["auc"], row["accuracy"], row["tpr_at_10_fpr"]] == pytest.approx(wanted)
        assert (row["n_infringing"], row["n_innocents"]) == (len(infringing), len(of_stratum))
        for name in ("auc", "accuracy", "tpr"):
            value = row["tpr_at_10_fpr"] if name == "tpr" else row[name]
            assert row[f"{name}_low"] <= value <= row[f"{name}_high"]
        assert row["auc_low"] < row["auc"] < row["auc_high"]


@pytest.mark.parametrize("n_innocents", [9, 19, 29])
def test_labels_without_meaning_have_an_auc_of_a_half(tmp_path, n_innocents):
    """The mean of 12 databases of noise. With pools of unequal size it would be 0.69 for 19 innocent models."""
    rng, found = np.random.default_rng(n_innocents), []
    for number in range(12):
        models = {
            f"m{n}": (rng.random((N_KEYS, N_ANSWERS)), "infringing" if n >= n_innocents else "innocent", "topic")
            for n in range(n_innocents + 12)
        }
        db = stored(attrdb.create(tmp_path / f"{number}.attrdb"), models)
        found.append(db.query("source_metrics", key_set="k", n_replicates=1).to_pylist()[0]["auc"])
    assert abs(np.mean(found) - 0.5) < 0.06


def test_the_two_sides_of_a_bootstrap_draw_apart(empty):
    """With as many models on both sides, and the same figures, the AUC of pairs that are drawn alike would vary less."""
    rng = np.random.default_rng(3)
    models = {
        f"{side}{n}": (rng.random((N_KEYS, N_ANSWERS)), label, None)
        for n in range(12)
        for side, label in (("a", "infringing"), ("b", "innocent"))
    }
    db = stored(empty, models)
    row = db.query("source_metrics", key_set="k", n_replicates=2000).to_pylist()[0]
    sides = [
        np.array([slow_conf(db, name, label == "innocent") for name, (_, label, _) in models.items() if label == side])
        for side, label in (("infringing", "infringing"), ("innocent", "innocent"))
    ]
    drawn = [slow_metrics(*(rng.choice(side, len(side)) for side in sides))[0] for _ in range(2000)]
    assert [row["auc_low"], row["auc_high"]] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.03)


def test_without_a_model_of_either_kind_there_are_no_metrics(empty):
    db = stored(empty, {"a": (np.zeros((N_KEYS, 1)), "infringing", None)})
    assert db.query("source_metrics", key_set="k").num_rows == 0
    assert db.query("source_confidence", key_set="k").to_pylist()[0]["p"] is None
    assert db.query("source_null", key_set="k").num_rows == 0


@pytest.mark.parametrize("name", ["source_confidence", "source_null", "source_metrics"])
def test_a_mistyped_key_set_is_an_error_and_not_an_empty_result(some, name):
    with pytest.raises(QueryRefused, match="no key set 'kk'; list them with: FROM key_sets"):
        some.query(name, key_set="kk")


def test_keys_that_two_sets_share(some):
    keys = [("l/1", "l", 1, "P1", "keys/k/3"), ("l/2", "l", 2, "other", "keys/k/5"), ("l/3", "l", 3, "new", "keys/l/3")]
    some.writer.upsert(
        "keys", [dict(zip(("key_id", "key_set_id", "number", "prompt", "image_id"), key, strict=True)) for key in keys]
    )
    pictures = [{"image_id": name, "role": "key", "sha256": name} for name in ("keys/k/3", "keys/k/5", "keys/l/3")]
    some.writer.append_images(pa.Table.from_pylist(pictures))
    rows = some.query("key_set_overlap").to_pylist()
    assert [
        (row["key_set_id"], row["other_id"], row["n_keys"], row["n_prompts"], row["n_references"]) for row in rows
    ] == [
        ("k", "l", 10, 1, 2),
        ("l", "k", 3, 1, 2),
    ]


def test_the_command(some):
    done = CliRunner().invoke(main, ["source-test", str(some.path), "k", "--model", "caught"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith(
        "caught: conf 1.00 on 10 keys of ours, p = 0.2 against 23 innocent models (19 topic, 4 unr"
    )
    lines = done.output.splitlines()
    assert lines[1] == "  base: one innocent model, conf 0.10; no distribution"
    assert lines[2].startswith("  topic: 19 innocent models, conf 0.00 to 0.")
    assert lines[2].endswith("p = 0.05")
    done = CliRunner().invoke(main, ["source-test", str(some.path), "k", "--model", "caught", "--json"])
    rows = json.loads(done.output)
    assert [(row["stratum"], row["n_models"]) for row in rows] == [("base", 1), ("topic", 19), ("unrelated", 4)]


def test_pictures_of_tests_are_never_candidates(toy):
    """Nor do they belong to a model."""
    before = toy.attribute("m/0/1", k=5)["image_id"].to_pylist()
    feature = toy.images("image_id = 'm/0/1'", ["toy_2"])["toy_2"].combine_chunks()
    for role in ("key", "answer"):
        row = pa.table({"image_id": [f"{role}s/k/1"], "role": [role], "toy_2": feature})
        toy.writer.append_images(row)
    assert toy.attribute("m/0/1", k=5)["image_id"].to_pylist() == before
    assert toy.snapshot.hidden_models == ()
    assert [toy.query(name).num_rows for name in ("wrong_roles", "unfinished_models")] == [0, 0]
    with pytest.raises(InvalidValue, match="exemplars and samples belong to a model, other images to none"):
        toy.writer.append_images(pa.table({"image_id": ["x"], "role": ["answer"], "model_id": ["m"]}))
    assert attrdb.open(toy.path).attribute("m/0/1", k=5)["image_id"].to_pylist() == before
