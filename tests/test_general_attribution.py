"""Recall on sets of unrelated images, and how benchmarks correlate, against hand-worked ranks."""

import numpy as np
import pyarrow as pa
import pytest
from conftest import rows

import attrdb
from attrdb.store.methods import similarity_id, similarity_row
from attrdb.store.schema import TABLES

# By features, the ranks of: the two exemplars of a set for its two samples; the one of an object model for its two.
RANKS = {
    "": ([(1, 2), (3, None)], [1, 40]),
    "worse": ([(2, 9), (3, 4)], [40, 40]),
    "better": ([(1, 2), (1, 5)], [3, 10]),
}


@pytest.fixture
def ranked(tmp_path):
    db = attrdb.create(tmp_path / "some.attrdb")
    db.writer.add_encoder("toy:2", 2, {}, "none")
    for model_id, kind, n_exemplars in (("set", "mixed", 2), ("bell", "object", 1)):
        entries = [(f"{model_id}/e{n}", "exemplar", model_id, 1.0 + n) for n in range(n_exemplars)]
        entries += [(f"{model_id}/{n}/0", "sample", model_id, 5.0 + n) for n in range(2)]
        scheme = pa.array([None] * n_exemplars + ["gpt"] * 2)
        db.writer.append_model(
            rows(entries, prompt_scheme=scheme), {"model_id": model_id, "kind": kind, "split": "test"}
        )
    for mapper_id, (of_set, of_bell) in RANKS.items():
        pairs = [(f"set/{n}/0", f"set/e{e}", rank) for n, both in enumerate(of_set) for e, rank in enumerate(both)]
        pairs += [(f"bell/{n}/0", "bell/e0", rank) for n, rank in enumerate(of_bell)]
        shared = {"method_id": similarity_id("toy_2", mapper_id), "gallery": "own", "gallery_size": 50}
        table = [
            shared | {"sample_id": sample, "exemplar_id": exemplar, "rank": rank, "images_version": 1}
            for sample, exemplar, rank in pairs
            if rank
        ]
        db.writer.add_method(similarity_row("toy_2", mapper_id))
        db.writer.replace_exemplar_ranks(
            pa.Table.from_pylist(table, TABLES["exemplar_ranks"]), similarity_id("toy_2", mapper_id), "own"
        )
    return db


def test_recall_at_the_size_of_the_set(ranked):
    found = ranked.query("general_attribution").to_pylist()
    assert {row["mapper_id"]: row["recall_at_size"] for row in found} == {"": 0.5, "worse": 0.25, "better": 0.75}
    assert {(row["n_exemplars"], row["n_models"], row["n_samples"]) for row in found} == {(2, 1, 2)}
    assert {row["chance"] for row in found} == {2 / 50}


def test_correlation_of_the_benchmarks(ranked):
    [row] = ranked.query("benchmark_correlation").to_pylist()
    assert (row["kind"], row["n_exemplars"], row["n_features"], row["n_encoders"]) == ("object", 2, 3, 1)
    assert row["of_encoders"] is None
    assert row["correlation"] == pytest.approx(np.corrcoef([0.5, 0.0, 1.0], [0.5, 0.25, 0.75])[0, 1])


def test_no_correlation_of_two(ranked):
    ranked.writer.delete("exemplar_ranks", "method_id = 'toy_2/worse'")
    [row] = ranked.query("benchmark_correlation").to_pylist()
    assert (row["n_features"], row["correlation"]) == (2, None)
