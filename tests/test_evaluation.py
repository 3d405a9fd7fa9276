"""Ranks and metrics against a NumPy oracle that sorts the whole gallery."""

import shutil

import numpy as np
import pyarrow as pa
import pytest
from conftest import rows

import attrdb
from attrdb.errors import InvalidValue, NotFound
from attrdb.store.schema import feature_array
from attrdb.training.evaluate import evaluate


def test_ranks_by_hand(toy):
    assert evaluate(toy, gallery="own") == 4
    found = toy.sql("SELECT sample_id, exemplar_id, rank, gallery_size FROM exemplar_ranks ORDER BY ALL").to_pylist()
    # sample at 2: 0, 10, 20, 40, 90; sample at 35: 40, 20, 10, 0, 90
    assert [(row["sample_id"], row["exemplar_id"], row["rank"]) for row in found] == [
        ("m/0/1", "m/e0", 1),
        ("m/0/1", "m/e40", 4),
        ("m/0/2", "m/e0", 4),
        ("m/0/2", "m/e40", 1),
    ]
    assert {row["gallery_size"] for row in found} == {5}


def features(rng, n, dimension=6):
    # Coarse values: exact ties between candidates happen.
    x = rng.integers(-1, 2, (n, dimension)).astype(np.float64) + 0.5
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def random_database(tmp_path_factory):
    """Only to be copied."""
    rng = np.random.default_rng(3)
    db = attrdb.create(tmp_path_factory.mktemp("random") / "random.attrdb")
    db.writer.add_encoder("toy:6", 6, {}, "none")

    def table(ids, role, model_id=None, scheme=None):
        n = len(ids)
        return pa.table(
            {
                "image_id": ids,
                "role": [role] * n,
                "model_id": pa.array([model_id] * n, pa.string()),
                "prompt_scheme": pa.array([scheme] * n, pa.string()),
                "toy_6": feature_array(features(rng, n)),
            }
        )

    db.writer.append_images(table([f"p{i:03d}" for i in range(300)], "pretraining"))
    for m in range(40):
        parts = [table([f"m{m:02d}/e{i}" for i in range(1 + m % 5)], "exemplar", f"m{m:02d}")]
        parts += [
            table([f"m{m:02d}/{s}{i}" for i in range(2)], "sample", f"m{m:02d}", s) for s in ("gpt", "procedural")
        ]
        kind = "object" if m % 2 else "style"
        db.writer.append_model(pa.concat_tables(parts), {"model_id": f"m{m:02d}", "kind": kind})
    return db.path


@pytest.fixture
def random_db(random_database, tmp_path):
    """300 pretraining images, and 40 models of 1 to 5 exemplars and 4 samples."""
    return attrdb.open(shutil.copytree(random_database, tmp_path / "random.attrdb"))


def oracle_ranks(db, gallery):
    images = db.sql("SELECT image_id, role, model_id, toy_6 FROM images").to_pylist()
    found = {}
    for sample in (row for row in images if row["role"] == "sample"):
        candidates = [
            row
            for row in images
            if row["role"] == "pretraining"
            or (row["role"] == "exemplar" and (gallery == "all" or row["model_id"] == sample["model_id"]))
        ]
        x = np.array([row["toy_6"] for row in candidates])
        similarity = np.round(x @ np.array(sample["toy_6"]), 12)
        order = sorted(range(len(candidates)), key=lambda c: (-similarity[c], candidates[c]["image_id"]))
        for place, c in enumerate(order, 1):
            if candidates[c]["role"] == "exemplar" and candidates[c]["model_id"] == sample["model_id"]:
                found[sample["image_id"], candidates[c]["image_id"]] = (place, len(candidates))
    return found


@pytest.mark.parametrize("gallery", ["own", "all"])
def test_ranks_equal_the_oracle(random_db, gallery):
    evaluate(random_db, "toy_6", gallery)
    rows = random_db.sql("SELECT sample_id, exemplar_id, rank, gallery_size FROM exemplar_ranks").to_pylist()
    found = {(row["sample_id"], row["exemplar_id"]): (row["rank"], row["gallery_size"]) for row in rows}
    expected = oracle_ranks(random_db, gallery)
    assert found == expected


@pytest.mark.parametrize("k", [1, 3, 10, 200])
def test_metrics_equal_the_oracle(random_db, k):
    evaluate(random_db, "toy_6", "own")
    rows = random_db.sql(
        "SELECT model_id, kind, prompt_scheme, sample_id, rank FROM exemplar_ranks "
        "JOIN samples ON samples.image_id = sample_id JOIN models USING (model_id)"
    ).to_pylist()
    recall, precision = {}, {}
    by_sample = {}
    for row in rows:
        by_sample.setdefault((row["kind"], row["prompt_scheme"], row["sample_id"]), []).append(row["rank"])
    for (kind, scheme, _), found in by_sample.items():
        recall.setdefault((kind, scheme), []).append(np.mean([rank <= k for rank in found]))
        ap = np.mean([(j + 1) / rank for j, rank in enumerate(sorted(found))])
        precision.setdefault((kind, scheme), []).append(ap)
    got = {(r["kind"], r["prompt_scheme"]): r for r in random_db.query("recall_at_k", k=k).to_pylist()}
    got_ap = {(r["kind"], r["prompt_scheme"]): r for r in random_db.query("mean_average_precision").to_pylist()}
    assert got.keys() == recall.keys() == got_ap.keys()
    for case in recall:
        assert got[case]["recall_at_k"] == pytest.approx(np.mean(recall[case]), abs=1e-12)
        assert got_ap[case]["mean_average_precision"] == pytest.approx(np.mean(precision[case]), abs=1e-12)
        assert got[case]["n_samples"] == len(recall[case])
        assert got[case]["n_models"] == 20


def test_the_average_over_cases_counts_every_case_once(random_db):
    splits = [
        {
            "model_id": row["model_id"],
            "kind": row["kind"],
            "split": split,
            "n_exemplars": row["n_exemplars"],
            "n_samples": 4,
        }
        for number, row in enumerate(random_db.sql("FROM models ORDER BY model_id").to_pylist())
        for split in [("val", "test_unseen", "test", "test")[number % 4] if number < 12 else "test"]
    ]
    random_db.writer.upsert("models", splits)
    evaluate(random_db)
    for test_only in (1, 0):
        cases = [
            row
            for row in random_db.query("recall_at_k", k=3).to_pylist()
            if row["kind"] == "object" and (row["split"] != "val" or not test_only)
        ]
        [found] = [
            row
            for row in random_db.query("average_over_cases", k=3, test_only=test_only).to_pylist()
            if row["kind"] == "object"
        ]
        assert found["n_cases"] == len(cases)
        assert found["recall_at_k"] == pytest.approx(np.mean([row["recall_at_k"] for row in cases]))
        assert found["recall_at_k"] != pytest.approx(
            np.average([row["recall_at_k"] for row in cases], weights=[row["n_samples"] for row in cases])
        )
        assert found["n_models"] == sum(row["n_models"] for row in cases) // 2  # two prompt schemes


def test_evaluating_again_changes_nothing(toy):
    evaluate(toy)
    before = toy.sql("SELECT * EXCLUDE (images_version) FROM exemplar_ranks ORDER BY ALL").to_pylist()
    evaluate(toy)
    assert toy.sql("SELECT * EXCLUDE (images_version) FROM exemplar_ranks ORDER BY ALL").to_pylist() == before


def test_evaluations_that_cannot_be_made(toy, tmp_path):
    with pytest.raises(InvalidValue, match="gallery is 'mine'; it must be own or all"):
        evaluate(toy, gallery="mine")
    with pytest.raises(NotFound, match="no method 'clip'"):
        evaluate(toy, "clip")
    other = attrdb.create(tmp_path / "bare.attrdb")
    other.writer.add_encoder("toy:2", 2, {}, "none")
    with pytest.raises(NotFound, match="has no model whose samples have 'toy_2' features"):
        evaluate(other)
    other.writer.append_model(
        rows([("m/e", "exemplar", "m", 1), ("m/s", "sample", "m", 2)]), {"model_id": "m", "kind": "object"}
    )
    with pytest.raises(NotFound, match="has no pretraining image with a 'toy_2' feature; ingest a corpus first"):
        evaluate(other)
