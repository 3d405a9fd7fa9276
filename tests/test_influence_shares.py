"""Roll-ups over sets of samples: shares that sum to 1 over a stated denominator, with intervals and what is unattributed."""

import numpy as np
import pyarrow as pa
import pytest
from conftest import TOY, angle, rows

from attrdb.attribution import query as attribution_query
from attrdb.errors import QueryRefused
from attrdb.store.schema import feature_array

SETTINGS = {"tau": 0.1, "lam": 0.01}
COLUMNS = {"creator": "creator", "license": "license", "source": "source", "category": "category", "model": "model_id"}


@pytest.fixture
def painted(empty):
    """Two models with three samples each, one of them without a feature, and twelve candidates of four creators."""
    empty.writer.add_encoder(**TOY)
    corpus = [(f"p{n}", "pretraining", None, 15.0 * n) for n in range(8)]
    names = {
        "creator": pa.array(["ann", "bob", None, "ann", "cy", None, "bob", "ann"]),
        "license": pa.array(["CC0", "CC-BY", "CC0", None, "CC0", "CC-BY", None, "CC0"]),
        "source": pa.array(["a", "b"] * 4),
        "category": pa.array(["vase"] * 8),
    }
    empty.writer.append_images(rows(corpus, **names))
    for model, split, degrees in (("m", "train", (2, 35, 50)), ("n", "test", (80, 95, None))):
        entries = [(f"{model}/e0", "exemplar", model, 0.0), (f"{model}/e1", "exemplar", model, 40.0)]
        entries += [(f"{model}/0/{n}", "sample", model, turn or 0.0) for n, turn in enumerate(degrees)]
        features = [angle(turn) for _, _, _, turn in entries[:2]]
        features += [None if turn is None else angle(turn) for turn in degrees]
        table = rows(entries, creator=pa.array(["dee", None, None, None, None]), split=pa.array([split] * 5))
        table = table.set_column(
            table.schema.get_field_index("toy_2"),
            "toy_2",
            pa.array(features, feature_array(np.zeros((1, 2), np.float32)).type),
        )
        row = {"model_id": model, "kind": "style", "split": split, "n_exemplars": 2, "n_samples": 3}
        empty.writer.append_model(table, row)
    return empty


def expected_shares(db, column, sample_ids):
    """Mean influence per sample, from one attribution after the other."""
    shares = {("unattributed", None): 0.0}
    for sample_id in sample_ids:
        answer = db.sql(f"FROM attribute('{sample_id}', k := NULL, tau := 0.1, lam := 0.01)").to_pylist()
        for row in answer:
            key = ("unnamed", None) if row[column] is None else ("named", row[column])
            shares[key] = shares.get(key, 0.0) + row["influence"] / len(sample_ids)
        if not answer:
            shares["unattributed", None] += 1 / len(sample_ids)
    return shares


ALL = [f"{model}/0/{n}" for model in "mn" for n in range(3)]


@pytest.mark.parametrize("per", COLUMNS)
@pytest.mark.parametrize(
    ("samples", "sample_ids"),
    [(None, ALL), ("model_id = 'm'", ALL[:3]), ("split = 'test'", ALL[3:]), ("image_id = 'n/0/2'", ["n/0/2"])],
)
def test_shares_are_means_over_all_samples_and_sum_to_1(painted, per, samples, sample_ids):
    answer = painted.query("influence_shares", per=per, samples=samples, **SETTINGS).to_pylist()
    shares = {(row["part"], row["name"]): row["share"] for row in answer}
    assert shares == pytest.approx(expected_shares(painted, COLUMNS[per], sample_ids))
    assert sum(shares.values()) == pytest.approx(1)
    assert {row["n_samples"] for row in answer} == {len(sample_ids)}
    assert [row["part"] for row in answer][-1] == "unattributed"
    named = [row["share"] for row in answer if row["part"] == "named"]
    assert named == sorted(named, reverse=True)


def test_a_natural_query_does_not_sum_to_1(painted):
    """Why there is a query: the mean over those samples that owe something to a creator has another denominator for each."""
    natural = painted.sql("""
        SELECT sum(share) AS total FROM (
            SELECT creator, avg(influence) AS share FROM (
                SELECT samples.image_id, found.creator, sum(influence) AS influence
                FROM samples, attribute(samples.image_id, k := NULL, tau := 0.1, lam := 0.01) AS found GROUP BY ALL
            ) GROUP BY creator
        )""")
    assert natural["total"][0].as_py() > 1.05


def test_counts(painted):
    answer = painted.query("influence_shares", samples="image_id IN ('m/0/0', 'n/0/2')", **SETTINGS).to_pylist()
    by_name = {row["name"] or row["part"]: row for row in answer}
    assert (by_name["unattributed"]["share"], by_name["unattributed"]["n_influenced"]) == (0.5, 1)
    assert by_name["dee"]["n_influenced"] == 1
    assert by_name["dee"]["n_candidates"] == 2  # m/e0 and n/e0


def test_what_was_not_examined_is_unattributed(painted, monkeypatch):
    monkeypatch.setattr(attribution_query, "FIRST_WIDTH", 3)
    monkeypatch.setattr(attribution_query, "MAX_WIDTH", 3)
    answer = painted.query("influence_shares", samples="image_id = 'm/0/1'", tau=10, lam=0).to_pylist()
    shares = {row["part"]: row["share"] for row in answer}
    assert shares["unattributed"] == pytest.approx(8 / 12, abs=0.01)  # four of twelve alike were
    assert sum(row["share"] for row in answer) == pytest.approx(1)


def test_an_interval_is_that_of_a_bootstrap_over_samples(painted):
    answer = painted.query("influence_shares", per="creator", n_replicates=2000, seed=3, **SETTINGS).to_pylist()
    generator = np.random.default_rng(0)
    draws = generator.integers(0, 6, (20_000, 6))
    for row in answer:
        key = (row["part"], row["name"])
        per_sample = np.array([expected_shares(painted, "creator", [one]).get(key, 0.0) for one in ALL])
        low, high = np.quantile(per_sample[draws].mean(axis=1), [0.025, 0.975])
        assert row["share_low"] == pytest.approx(low, abs=0.03)
        assert row["share_high"] == pytest.approx(high, abs=0.03)
        assert row["share_low"] <= row["share"] <= row["share_high"]
    assert answer == painted.query("influence_shares", n_replicates=2000, seed=3, **SETTINGS).to_pylist()


def test_a_single_sample_has_no_interval(painted):
    answer = painted.query("influence_shares", samples="image_id = 'm/0/1'").to_pylist()
    assert {(row["share_low"], row["share_high"]) for row in answer} == {(None, None)}


def test_candidates_can_be_limited(painted):
    answer = painted.query("influence_shares", per="role", candidates="role = 'exemplar'").to_pylist()
    assert [(row["part"], row["name"]) for row in answer] == [("named", "exemplar"), ("unattributed", None)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"per": "color"}, "per is 'color'; it must be creator, license, source, category, model or role"),
        ({"samples": "model_id = 'nope'"}, "no sample of .* fulfils \"model_id = 'nope'\""),
        ({"samples": "role = 'exemplar'"}, "no sample of"),
        ({"samples": "modl = 'm'"}, "samples is .*; it must be an SQL predicate on the columns of images"),
        ({"samples": "true) OR (true"}, "samples is"),
        ({"candidates": "modl = 'm'"}, "it must be an SQL predicate on the columns of images"),
    ],
)
def test_wrong_arguments_are_named(painted, arguments, says):
    with pytest.raises(QueryRefused, match=says):
        painted.query("influence_shares", **arguments)


# --- ids that are mistyped ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("relation", "says"),
    [
        ("attribute('nope')", "no image 'nope'"),
        ("samples, attribute(samples.image_id || 'x')", r"no image 'm/0/\dx'"),
        ("attribute('m/0/0', method := 'nope')", "no method 'nope'"),
        ("attribute('m/0/0', encoder_id := 'nope')", "no encoder 'nope'"),
        ("attribute('m/0/0', mapper_id := 'nope')", "no mapper 'nope'"),
        ("influence_shares('creator', method := 'nope')", "no method 'nope'"),
        ("nearest([1, 0], encoder_id := 'nope')", "no encoder 'nope'"),
        ("method_gains('nope', 'toy_2', 3, 10, 0)", "no method 'nope'"),
        ("method_gains('toy_2', 'nope', 3, 10, 0)", "no method 'nope'"),
    ],
)
def test_a_mistyped_id_is_an_error_and_not_an_empty_result(painted, relation, says):
    with pytest.raises(QueryRefused, match=says):
        painted.sql(f"FROM {relation}")


def test_a_sample_without_a_feature_has_no_row_and_stops_no_other(painted):
    found = painted.sql("SELECT DISTINCT samples.image_id FROM samples, attribute(samples.image_id) ORDER BY ALL")
    assert found["image_id"].to_pylist() == ALL[:5]
    assert painted.sql("FROM attribute(NULL)").num_rows == 0
