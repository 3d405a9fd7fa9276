"""LanceDB's client for Node reads the directory: examples/node answers as attrdb does."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import rows
from test_index import filled

from attrdb.search import index_build
from attrdb.store.schema import feature_array
from attrdb.upkeep import optimize

EXAMPLE = Path(__file__).parent.parent / "examples" / "node"
LOCK = json.loads((EXAMPLE / "package-lock.json").read_text())


def test_the_lock_file_names_exact_releases_and_no_registry():
    wanted = json.loads((EXAMPLE / "package.json").read_text())["dependencies"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", wanted["@lancedb/lancedb"])
    assert LOCK["packages"]["node_modules/@lancedb/lancedb"]["version"] == wanted["@lancedb/lancedb"]
    for name, package in LOCK["packages"].items():
        assert "resolved" not in package, name
        assert not name or package["integrity"].startswith("sha512-")
    for platform in ("linux-x64-gnu", "linux-arm64-gnu", "darwin-arm64", "win32-x64-msvc"):
        assert f"node_modules/@lancedb/lancedb-{platform}" in LOCK["packages"]


@pytest.fixture
def search(tmp_path):
    """Runs search.mjs beside the packages that are installed."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    modules = Path(os.environ.get("ATTRDB_NODE_MODULES", EXAMPLE / "node_modules"))
    if not (modules / "@lancedb" / "lancedb").is_dir():
        pytest.skip(f"@lancedb/lancedb is not in {modules}: run make node, or name a folder in ATTRDB_NODE_MODULES")
    folder = tmp_path / "node"
    folder.mkdir()
    shutil.copy(EXAMPLE / "search.mjs", folder)
    (folder / "node_modules").symlink_to(modules.resolve())

    def run(*words):
        return subprocess.run(
            ["node", str(folder / "search.mjs"), *map(str, words)], capture_output=True, text=True, timeout=120
        )

    return run


def compare(db, said, sample, k):
    counts = db.sql("SELECT role, count(*) AS n FROM images GROUP BY role").to_pylist()
    assert said["version"] == db.version
    assert said["counts"] == {row["role"]: row["n"] for row in counts}
    exemplars = db.sql("SELECT image_id, model_id FROM exemplars ORDER BY image_id").to_pylist()
    assert said["exemplars"] == exemplars
    assert said["sample_id"] == sample
    ours = db.attribute(sample, k=k)
    same = ["rank", "image_id", "role", "model_id", "creator", "license"]
    assert [{name: row[name] for name in same} for row in said["nearest"]] == ours.select(same).to_pylist()
    similarity = [row["similarity"] for row in said["nearest"]]
    np.testing.assert_allclose(similarity, ours["similarity"].to_numpy(), atol=1e-6)


def test_node_answers_as_attrdb_does(toy, search):
    done = search(toy.path)
    assert done.returncode == 0, done.stderr
    compare(toy, json.loads(done.stdout), "m/0/1", 5)
    done = search(toy.path, "m/0/2", 2, "toy_2")
    compare(toy, json.loads(done.stdout), "m/0/2", 2)


def test_node_reads_what_optimize_made_and_leaves_hidden_models_out(toy, search):
    rng = np.random.default_rng(0)
    for part in range(3):
        features = rng.normal(size=(300, 2)).astype(np.float32)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        ids = [f"many/{part}/{number}" for number in range(300)]
        table = {"image_id": ids, "role": ["pretraining"] * 300, "toy_2": feature_array(features)}
        toy.writer.append_images(pa.table({**table, "license": ["CC0-1.0"] * 300}))
    toy.writer.append_images(rows([("it's/0/1", "sample", "it's", 2), ("it's/e", "exemplar", "it's", 2)]))
    optimize.optimize(toy.writer)
    toy.refresh()
    assert len(toy.status()["indices"]) >= 3
    done = search(toy.path, "m/0/1", 7)
    assert done.returncode == 0, done.stderr
    compare(toy, json.loads(done.stdout), "m/0/1", 7)


def test_node_reads_a_database_whose_features_are_indexed(search, tmp_path, monkeypatch):
    monkeypatch.setattr(index_build, "MIN_ROWS", 100)
    db = filled(tmp_path / "points.attrdb")
    assert index_build.build(db.writer)["kind"] == "IVF_RQ"
    db.refresh()
    done = search(db.path, "m/s00003", 7)
    assert done.returncode == 0, done.stderr
    compare(db, json.loads(done.stdout), "m/s00003", 7)


def test_node_says_what_is_wrong(toy, search, tmp_path):
    for words, says in (
        ([], "usage: node search.mjs"),
        ([toy.path, "m/0/1", "0"], "usage: node search.mjs"),
        ([tmp_path / "nowhere"], "nowhere is not an attrdb database"),
        ([toy.path, "nobody"], "no image nobody with a feature of 'toy_2'"),
        ([toy.path, "m/0/1", "2", "clip"], "no encoder 'clip' in .*; it has: toy_2"),
    ):
        done = search(*words)
        assert done.returncode != 0
        assert re.search(says, done.stderr), done.stderr
    assert not (tmp_path / "nowhere").exists()
