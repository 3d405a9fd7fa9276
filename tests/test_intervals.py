"""Bootstrap intervals and paired comparisons against NumPy."""

import numpy as np
import pyarrow as pa
import pytest
from conftest import rows

import attrdb
from attrdb.store.methods import similarity_id, similarity_row
from attrdb.store.schema import TABLES

N_MODELS = 12


@pytest.fixture
def ranked(tmp_path):
    """Twelve models of one exemplar and two to five samples, with ranks with and without a mapper, and one apart."""
    rng = np.random.default_rng(0)
    db = attrdb.create(tmp_path / "some.attrdb")
    db.writer.add_encoder("toy:2", 2, {}, "none")
    found = {"": [], "tuned": []}
    for number in range(N_MODELS + 1):
        model_id, n = f"m{number:02d}", 2 + number % 4
        entries = [(f"{model_id}/e", "exemplar", model_id, 1.0)]
        entries += [(f"{model_id}/{one}/0", "sample", model_id, 2.0) for one in range(n)]
        kind = "object" if number < N_MODELS else "style"
        table = rows(entries, prompt_scheme=pa.array([None] + ["gpt"] * n))
        db.writer.append_model(table, {"model_id": model_id, "kind": kind, "split": "test"})
        hard = rng.integers(5, 40)
        for mapper_id, better in (("", 0), ("tuned", 8)):
            for one in range(n):
                found[mapper_id].append(
                    (f"{model_id}/{one}/0", f"{model_id}/e", max(1, int(hard + rng.integers(-4, 5)) - better))
                )
    for mapper_id, entries in found.items():
        shared = {
            "method_id": similarity_id("toy_2", mapper_id),
            "gallery": "own",
            "gallery_size": 50,
            "images_version": 1,
        }
        table = [shared | {"sample_id": a, "exemplar_id": b, "rank": r} for a, b, r in entries]
        db.writer.add_method(similarity_row("toy_2", mapper_id))
        db.writer.replace_exemplar_ranks(
            pa.Table.from_pylist(table, TABLES["exemplar_ranks"]), similarity_id("toy_2", mapper_id), "own"
        )
    return db, found


def by_model(entries, value):
    """Values of the object models' samples, model by model."""
    models = {}
    for sample_id, _, rank in entries:
        models.setdefault(sample_id[:3], []).append(value(rank))
    return [np.array(values, float) for _, values in sorted(models.items())][:N_MODELS]


VALUES = {"recall": lambda rank: rank <= 10, "precision": lambda rank: 1 / rank}


def test_intervals_are_those_of_a_bootstrap_over_models(ranked):
    db, found = ranked
    mine = [row for row in db.query("recall_intervals", n_replicates=4000).to_pylist() if row["kind"] == "object"]
    rng = np.random.default_rng(1)
    for row in mine:
        for what, mean in (("recall", "recall_at_k"), ("precision", "mean_average_precision")):
            models = by_model(found[row["mapper_id"]], VALUES[what])
            assert row[mean] == pytest.approx(np.concatenate(models).mean())
            drawn = [
                np.concatenate([models[n] for n in rng.integers(N_MODELS, size=N_MODELS)]).mean() for _ in range(4000)
            ]
            low, high = np.quantile(drawn, (0.025, 0.975))
            assert (row[f"{what}_low"], row[f"{what}_high"]) == pytest.approx((low, high), abs=0.02)
    assert [row["n_models"] for row in mine] == [N_MODELS] * 2
    plain = {row["mapper_id"]: row for row in db.query("recall_at_k").to_pylist() if row["kind"] == "object"}
    assert all(row["recall_at_k"] == pytest.approx(plain[row["mapper_id"]]["recall_at_k"]) for row in mine)


def test_a_case_of_one_model_has_no_width(ranked):
    db, _ = ranked
    for row in db.query("recall_intervals").to_pylist():
        if row["kind"] == "style":
            assert row["recall_low"] == row["recall_at_k"] == row["recall_high"]


def test_intervals_follow_from_the_seed(ranked):
    db, _ = ranked
    first = db.query("recall_intervals", n_replicates=50)
    assert first.equals(db.query("recall_intervals", n_replicates=50))
    assert not first.equals(db.query("recall_intervals", n_replicates=50, seed=1))


def test_a_comparison_is_paired_by_model(ranked):
    db, found = ranked
    db.writer.upsert(
        "mappers",
        [{"mapper_id": "tuned", "encoder_id": "toy_2", "form": "affine", "parameters": IDENTITY}],
    )
    [row] = [row for row in db.query("compare_mappers", mapper_id="tuned").to_pylist() if row["kind"] == "object"]
    rng = np.random.default_rng(1)
    for what in VALUES:
        before, after = (
            np.array([values.mean() for values in by_model(found[mapper_id], VALUES[what])])
            for mapper_id in ("", "tuned")
        )
        gains = after - before
        assert row[f"{what}_gain"] == pytest.approx(gains.mean())
        low, high = np.quantile(gains[rng.integers(N_MODELS, size=(4000, N_MODELS))].mean(axis=1), (0.025, 0.975))
        assert (row[f"{what}_low"], row[f"{what}_high"]) == pytest.approx((low, high), abs=0.03)
    assert row["precision_low"] > 0
    back = db.query("compare_mappers", mapper_id="tuned", other_id="tuned").to_pylist()
    assert all(row["recall_gain"] == row["recall_low"] == row["recall_high"] == 0 for row in back)


IDENTITY = [
    {"name": f"{side}.{name}", "shape": list(np.shape(value)), "values": np.ravel(value).tolist()}
    for side in ("exemplar", "sample")
    for name, value in (("weight", np.eye(2)), ("bias", np.zeros(2)))
]
