"""Indices: built, asked, kept and reported; and what they answer beside an exact search."""

import dataclasses
import json

import lance
import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from conftest import DEVICES

import attrdb
from attrdb.cli import main
from attrdb.errors import InvalidValue, NotFound, QueryRefused, StorageError
from attrdb.search import exact as exact_search
from attrdb.search import index_build, index_tuning, ivf, kmeans, planner
from attrdb.search.mapper import Mapper, stored_mapper
from attrdb.store.ids import lock_file
from attrdb.store.locks import exclusive_lock
from attrdb.store.predicates import CANDIDATES
from attrdb.store.schema import feature_array
from attrdb.upkeep import health, optimize

N, D = 3000, 16


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def clustered(n, seed):
    """Points around 60 centres; the centres are those of seed 0."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((60, D))
    return unit(centres[rng.integers(60, size=n)] + 0.4 * rng.standard_normal((n, D)))


def images(prefix, features, role="pretraining", **columns):
    ids = [f"{prefix}{number:05d}" for number in range(len(features))]
    return pa.table({"image_id": ids, "role": [role] * len(ids), "points_16": feature_array(features), **columns})


def filled(path):
    db = attrdb.create(path)
    db.writer.add_encoder("points:16", D, {}, "none")
    licenses = pa.array([("CC0", "CC-BY")[number % 2] for number in range(N)])
    db.writer.append_images(images("p", clustered(N, 1), license=licenses))
    model = [images("m/e", clustered(2, 2), "exemplar"), images("m/s", clustered(60, 3), "sample")]
    rows = pa.concat_tables(model).append_column("model_id", pa.array(["m"] * 62))
    db.writer.append_model(rows, {"model_id": "m", "kind": "style"})
    return db


@pytest.fixture(scope="module")
def built_once(tmp_path_factory):
    db = filled(tmp_path_factory.mktemp("index") / "points.attrdb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_build, "MIN_ROWS", 100)
        index_build.build(db.writer)
    return db


@pytest.fixture
def indexed(built_once, tmp_path, monkeypatch):
    """An own copy of a database with an index, which galleries of this size are searched by here."""
    import shutil

    monkeypatch.setattr(planner, "EXACT_BELOW_ROWS", 100)
    monkeypatch.setattr(planner, "HIT_COST", 0.01)
    monkeypatch.setattr(index_build, "MIN_ROWS", 100)
    shutil.copytree(built_once.path, tmp_path / "db")
    return attrdb.open(tmp_path / "db")


def affine(seed=0, scale=0.1):
    rng = np.random.default_rng(seed)
    parameters = {
        f"{side}.{name}": value.astype(np.float32)
        for side in ("exemplar", "sample")
        for name, value in (
            ("weight", np.eye(D) + scale * rng.standard_normal((D, D))),
            ("bias", scale * rng.standard_normal(D)),
        )
    }
    return Mapper("some", "points_16", "affine", parameters)


def test_centroids_are_the_means_of_the_features_nearest_to_them():
    features = clustered(500, 4)
    centroids = kmeans.train_centroids(features, 8, 50, 0, "cpu")
    distance = ((features[:, None] - centroids[None]) ** 2).sum(axis=2)
    nearest = kmeans.nearest_centroids(features, centroids, "cpu")
    np.testing.assert_array_equal(nearest, distance.argmin(axis=1))
    for cell in range(8):
        np.testing.assert_allclose(centroids[cell], features[nearest == cell].mean(axis=0), atol=1e-5)


def test_a_cell_that_lost_its_features_takes_part_of_the_largest():
    features = np.repeat(np.eye(3, dtype=np.float32), [10, 10, 10], axis=0)
    centroids = kmeans.train_centroids(features, 5, 3, 0, "cpu")
    assert np.isfinite(centroids).all()
    np.testing.assert_allclose(centroids[kmeans.nearest_centroids(features, centroids, "cpu")], features, atol=0.01)


def test_cells_by_torch_are_those_by_numpy():
    pytest.importorskip("attrdb.search.gemm_cuda")
    features = clustered(500, 4)
    by = [kmeans.train_centroids(features, 8, 5, 0, device) for device in DEVICES]
    np.testing.assert_allclose(*by, atol=1e-5)


def test_an_index_answers_as_an_exact_search(indexed):
    db = indexed
    [row] = db.sql("SELECT * FROM indices").to_pylist()
    assert (row["encoder_id"], row["kind"], row["n_partitions"], row["n_rows"]) == ("points_16", "IVF_RQ", 69, N + 62)
    assert (row["queries"], row["n_queries"], row["device"]) == ("samples", 60, "cpu")
    assert row["recall"] >= index_tuning.RECALL_WANTED
    samples = [f"m/s{number:05d}" for number in range(60)]
    shares = []
    for sample in samples:
        found, exact = (db.attribute(sample, k=10, exact=way) for way in (False, True))
        shares.append(len(set(found["image_id"].to_pylist()) & set(exact["image_id"].to_pylist())) / 10)
        by_id = dict(zip(exact["image_id"].to_pylist(), exact["similarity"].to_pylist(), strict=True))
        for image in found.to_pylist():
            assert image["role"] != "sample"
            if image["image_id"] in by_id:  # compared exactly, whoever found it
                assert image["similarity"] == by_id[image["image_id"]]
    assert np.mean(shares) >= index_tuning.RECALL_WANTED


def test_exact_answers_do_not_depend_on_the_index(indexed, tmp_path):
    plain = filled(tmp_path / "plain")
    for db in (indexed, plain):
        assert (planner.indices(db.snapshot) != {}) == (db is indexed)
    for sample in ("m/s00000", "m/s00007"):
        a, b = (db.attribute(sample, k=25, exact=True) for db in (indexed, plain))
        assert a.to_pylist() == b.to_pylist()


def test_sql_asks_the_index_as_python_does(indexed, monkeypatch):
    asked = []
    ask = ivf.top_k
    monkeypatch.setattr(ivf, "top_k", lambda *args: asked.append(len(args[4])) or ask(*args))
    python = indexed.attribute("m/s00003", k=5)["image_id"].to_pylist()
    assert asked == [1]
    by_sql = indexed.sql("SELECT image_id FROM attribute('m/s00003', k := 5)")["image_id"].to_pylist()
    assert by_sql == python
    asked.clear()
    rows = indexed.sql("SELECT s.image_id, a.image_id AS c FROM samples AS s, attribute(s.image_id, k := 5) AS a")
    assert len(rows) == 60 * 5
    assert sum(asked) == 60
    assert len(asked) <= 2, "one search for the samples of a block"
    asked.clear()
    near = "SELECT n.image_id FROM features AS f, nearest(f.feature, k := 4{}) AS n WHERE f.image_id = 'm/s00003'"
    found, exact = (indexed.sql(near.format(more))["image_id"].to_pylist() for more in ("", ", exact := true"))
    assert found == exact == python[:4]
    assert asked == [1]


def test_the_index_is_asked_where_that_takes_less(tmp_path, monkeypatch):
    """By attrdb's own rule: one query is, hundreds together and few candidates are compared with everything."""
    n, queries = index_build.MIN_ROWS + 4000, clustered(400, 5)
    db = attrdb.create(tmp_path / "points.attrdb")
    db.writer.add_encoder("points:16", D, {}, "none")
    licenses = pa.array([("CC0", "CC-BY")[number % 10 == 0] for number in range(n)])
    db.writer.append_bulk(images("p", clustered(n, 1), license=licenses))
    index_build.build(db.writer)
    asked, ask = [], ivf.top_k
    monkeypatch.setattr(ivf, "top_k", lambda *args: asked.append(len(args[4])) or ask(*args))
    for n_queries, candidates, by_index in ((1, None, [1]), (400, None, []), (1, "license = 'CC-BY'", [])):
        found, exact = (
            planner.nearest(db.snapshot, "points_16", queries[:n_queries], 10, candidates=candidates, exact=exact)
            for exact in (False, True)
        )
        assert asked == by_index
        asked.clear()
        assert exact_search.recall(found, exact, 10, [None] * n_queries) >= 0.9


def test_only_candidates_that_fulfil_a_predicate(indexed):
    where = "license = 'CC0'"
    for exact in (False, True):
        found = indexed.attribute("m/s00003", k=20, candidates=where, exact=exact)
        assert set(found["license"].to_pylist()) == {"CC0"}
        assert sum(found["influence"].to_pylist()) <= 1 + 1e-9
    # few are left: all of them are compared
    few = "image_id IN ('p00001', 'p00002', 'p00003')"
    assert sorted(indexed.attribute("m/s00003", k=3, candidates=few)["image_id"].to_pylist()) == [
        "p00001",
        "p00002",
        "p00003",
    ]
    sql = indexed.sql(
        f"SELECT license FROM attribute('m/s00003', candidates := '{where.replace(chr(39), chr(39) * 2)}')"
    )
    assert set(sql["license"].to_pylist()) == {"CC0"}


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"k": 0}, InvalidValue, "k is 0"),
        (
            {"k": 4000},
            InvalidValue,
            "k is 4000, .* has 3,002 candidates with a 'points_16' feature; ask for 3002 at most",
        ),
        ({"candidates": "license ="}, InvalidValue, "candidates is 'license ='; it must be an SQL predicate"),
        ({"candidates": "true) OR (true"}, InvalidValue, "it must be an SQL predicate"),
        ({"candidates": "license = 'CC0' ORDER BY license"}, InvalidValue, "it must be an SQL predicate"),
        ({"candidates": ""}, InvalidValue, "it must be an SQL predicate"),
        ({"candidates": "colour = 1"}, InvalidValue, "it must be an SQL predicate on the columns of images"),
        ({"candidates": "license = 'none'"}, NotFound, "no candidate with a 'points_16' feature that fulfils"),
        ({"k": 11, "candidates": "image_id < 'p00003'"}, InvalidValue, "k is 11, .* has 5 candidates"),
        ({"mapper_id": "x"}, NotFound, "no mapper 'x'"),
    ],
)
def test_what_cannot_be_asked(indexed, given, error, says):
    with pytest.raises(error, match=says):
        indexed.attribute("m/s00000", **given)


@pytest.mark.parametrize("feature", [np.full(D, np.nan), np.zeros(D), np.ones(D + 1)])
def test_a_feature_that_is_none(indexed, feature):
    with pytest.raises(InvalidValue, match="the feature has"):
        indexed.attribute(feature)
    with pytest.raises(QueryRefused, match="the feature has"):
        indexed.sql("FROM nearest($feature)", {"feature": feature.tolist()})


def test_a_feature_from_outside_has_the_same_similarity_in_sql_and_python_to_the_last_digit(indexed):
    features = 3 * clustered(300, 8) + np.float32(0.1)
    by_python = [indexed.attribute(feature, k=1)["score"][0].as_py() for feature in features]
    statement = (
        "SELECT q.row, n.similarity FROM (SELECT unnest($rows) AS q), nearest(q.feature, k := 1) AS n ORDER BY ALL"
    )
    rows = [{"row": row, "feature": feature} for row, feature in enumerate(features.tolist())]
    assert indexed.sql(statement, {"rows": rows})["similarity"].to_pylist() == by_python


def test_a_mapper_is_folded_into_the_query(indexed):
    mapper = affine()
    queries = clustered(40, 5)
    x = np.concatenate([features for _, features in indexed.snapshot.features("points_16", CANDIDATES)])
    # METHODS A5: similarity = (x . q + c) / n(x), and the folded query has the direction of q
    s = mapper.samples(queries, np.float64)
    q = s @ mapper.parameters["exemplar.weight"]
    n = np.linalg.norm(x @ mapper.parameters["exemplar.weight"].T + mapper.parameters["exemplar.bias"], axis=1)
    np.testing.assert_allclose(
        (q @ x.T + (s @ mapper.parameters["exemplar.bias"])[:, None]) / n,
        s @ mapper.exemplars(x, np.float64).T,
        atol=1e-6,
    )
    np.testing.assert_allclose(ivf.folded(queries, mapper), unit(q), atol=1e-5)
    norm_correction = np.linspace(-1, 1, D, dtype=np.float32)
    np.testing.assert_allclose(ivf.folded(queries, mapper, norm_correction), unit(q - norm_correction), atol=1e-5)


def sloping():
    """A mapper whose n(x) is a plane over unit features, but for its square: W = I, and a bias that is not small."""
    flat = affine(scale=0.0)
    bias = {"exemplar.bias": np.linspace(0, 0.5, D, dtype=np.float32)}
    return dataclasses.replace(flat, parameters=flat.parameters | bias)


def stored(db, mapper):
    db.writer.upsert("mappers", [mapper.row() | {"trained_on": "both"}])
    db.refresh()
    return stored_mapper(db.snapshot, mapper.mapper_id)


def test_the_tilt_of_a_query_is_the_slope_of_the_mapped_lengths(indexed):
    mapper = stored(indexed, sloping())
    x = np.concatenate([features for _, features in indexed.snapshot.features("points_16", "true")])
    exact = exact_search.top_k(indexed.snapshot.features("points_16", CANDIDATES), clustered(40, 5), 11, mapper=mapper)
    norm_correction = index_tuning._norm_correction(indexed.snapshot, mapper, exact)
    t = np.mean([similarity[9] for similarity in exact.similarity])
    n = mapper.norms(x)
    left = n - x @ (norm_correction / t)
    assert left.std() < 0.1 * n.std()


@pytest.mark.parametrize("form", ["affine", "gain"])
def test_a_mapper_is_searched_by_index_once_that_is_measured(indexed, monkeypatch, form):
    mapper = affine()
    if form == "gain":
        parameters = {
            f"{side}.{name}": np.linspace(0.8, low, D, dtype=np.float32)
            for side in ("exemplar", "sample")
            for name, low in (("gain", 1.2), ("bias", 0.9))
        }
        mapper = dataclasses.replace(mapper, form="gain", parameters=parameters)
    mapper = stored(indexed, mapper)
    queries = clustered(40, 5)
    asked = []
    ask = ivf.top_k
    monkeypatch.setattr(ivf, "top_k", lambda *args: asked.append(1) or ask(*args))

    def nearest(exact=False):
        return planner.nearest(indexed.snapshot, "points_16", queries, 10, mapper=mapper, exact=exact)

    exact = nearest(exact=True)
    assert [list(ids) for ids in nearest().ids] == [list(ids) for ids in exact.ids]
    assert asked == [], "not measured yet: all candidates are compared"
    index_tuning.measure_missing(indexed.writer)
    [row] = indexed.sql("SELECT * FROM mapper_searches").to_pylist()
    assert (row["mapper_id"], row["used"], row["n_queries"]) == ("some", True, 60)
    assert row["recall"] >= index_tuning.RECALL_WANTED
    asked.clear()
    indexed.refresh()
    found = nearest()
    assert asked == [1]
    shares = [len({*a} & {*b}) / 10 for a, b in zip(found.ids, exact.ids, strict=True)]
    assert np.mean(shares) >= 0.95
    assert indexed.status()["mappers"][0]["recall"] == row["recall"]
    said = CliRunner().invoke(main, ["status", str(indexed.path)]).stdout
    assert f"mapper some: {form}, on points_16, of both; searched by index, recall@10" in said
    # with other cells it is measured again
    done = CliRunner().invoke(main, ["index", str(indexed.path), "--quiet"])
    assert "mapper some: searched by index, recall@10" in done.stderr
    indexed.refresh()
    again = indexed.sql("SELECT created_at, used FROM mapper_searches").to_pylist()
    assert (again[0]["used"], again[0]["created_at"] > row["created_at"]) == (True, True)


def test_a_mapper_that_the_index_does_not_serve_is_searched_exactly(indexed, monkeypatch):
    monkeypatch.setattr(index_tuning, "MAPPER_TRIES", ((1, 1),))
    rng = np.random.default_rng(1)
    wild = {
        name: value + 3 * rng.standard_normal(value.shape).astype(np.float32)
        for name, value in affine().parameters.items()
    }
    mapper = stored(indexed, dataclasses.replace(affine(), parameters=wild))
    row = index_tuning.measure_mapper(indexed.writer, "some")
    assert row["recall"] < index_tuning.RECALL_WANTED
    assert not row["used"]
    monkeypatch.setattr(ivf, "top_k", None)
    hits = planner.nearest(indexed.snapshot, "points_16", clustered(2, 5), 3, mapper=mapper)
    exact = exact_search.top_k(indexed.snapshot.features("points_16", CANDIDATES), clustered(2, 5), 3, mapper=mapper)
    assert [list(ids) for ids in hits.ids] == [list(ids) for ids in exact.ids]
    said = CliRunner().invoke(main, ["status", str(indexed.path)]).stdout
    assert "mapper some: affine, on points_16, of both; searched exactly, its index finds 0." in said


def test_a_tilt_with_which_less_is_found_is_not_taken(indexed, monkeypatch):
    stored(indexed, sloping())
    assert np.any(index_tuning.measure_mapper(indexed.writer, "some")["norm_correction"])
    monkeypatch.setattr(index_tuning, "_norm_correction", lambda *_: np.full(D, 9, np.float32))
    row = index_tuning.measure_mapper(indexed.writer, "some")
    assert row["used"]
    assert not np.any(row["norm_correction"])


def test_a_mapper_that_cannot_be_folded_is_not_measured(indexed):
    mapper = affine()
    parameters = mapper.parameters | {
        f"{side}.{name}": np.ones(shape, np.float32)
        for side in ("exemplar", "sample")
        for name, shape in (("up", (3, D)), ("up_bias", 3), ("down", (D, 3)))
    }
    stored(indexed, dataclasses.replace(mapper, form="mlp", parameters=parameters))
    assert index_tuning.measure_mapper(indexed.writer, "some") is index_tuning.Unmeasured.NOT_FOLDABLE


def test_a_mapper_without_an_index_is_not_measured(toy):
    mapper = affine()
    two = {name: np.ones((2, 2) if name.endswith("weight") else 2, np.float32) for name in mapper.parameters}
    stored(toy, dataclasses.replace(mapper, encoder_id="toy_2", parameters=two))
    assert index_tuning.measure_mapper(toy.writer, "some") is index_tuning.Unmeasured.NO_INDEX


def test_a_mapper_is_not_measured_while_the_index_lacks_rows(indexed):
    stored(indexed, affine())
    indexed.writer.append_images(images("new", clustered(5, 31)))
    assert index_tuning.measure_mapper(indexed.writer, "some") is index_tuning.Unmeasured.INDEX_BEHIND
    optimize.optimize(indexed.writer)
    assert indexed.snapshot.rows("mapper_searches")[0]["mapper_id"] == "some"


def test_a_mapper_that_makes_zeros_is_not_measured(indexed):
    mapper = affine()
    zeros = {name: np.zeros_like(array) for name, array in mapper.parameters.items()}
    stored(indexed, dataclasses.replace(mapper, parameters=zeros))
    assert index_tuning.measure_mapper(indexed.writer, "some") is index_tuning.Unmeasured.BROKEN


def test_a_mapper_is_not_measured_where_no_query_has_an_answer(indexed):
    stored(indexed, affine())
    indexed.writer.delete("images", CANDIDATES)  # samples, which are the queries, stay
    assert index_tuning.measure_mapper(indexed.writer, "some") is index_tuning.Unmeasured.NO_ANSWERS
    assert not indexed.snapshot.rows("mapper_searches")


def test_rows_after_the_index_are_compared_for_all_queries_together(indexed):
    mapper = stored(indexed, affine())
    index_tuning.measure_missing(indexed.writer)
    indexed.writer.append_images(images("later", clustered(500, 31)))
    snapshot = indexed.snapshot
    assert len(planner.indices(snapshot)["points_16"].uncovered_fragments) == 1
    queries = clustered(50, 5)
    for one in (None, mapper):
        found, exact = (
            planner.nearest(snapshot, "points_16", queries, 10, mapper=one, exact=way) for way in (False, True)
        )
        shares = [len({*a} & {*b}) / 10 for a, b in zip(found.ids, exact.ids, strict=True)]
        assert np.mean(shares) >= 0.95
        for ids, best in zip(found.ids, exact.ids, strict=True):
            assert {name for name in best if name.startswith("later")} <= {*ids}
    optimize.optimize(indexed.writer)
    assert planner.indices(indexed.snapshot)["points_16"].uncovered_fragments == ()


def test_all_are_compared_where_that_takes_less(indexed, monkeypatch):
    monkeypatch.undo()
    index = dataclasses.replace(planner.indices(indexed.snapshot)["points_16"], oversampling=4)
    asked = {(n, k): planner._pays(index, 1_000_000, n, k) for n in (1, 128, 10_000) for k in (10, 257)}
    assert asked == {
        (1, 10): True,
        (1, 257): True,
        (128, 10): True,
        (128, 257): True,
        (10_000, 10): True,
        (10_000, 257): False,
    }
    assert not planner._pays(index, 100_000, 128, 257)
    assert not planner._pays(index, 10**9, 1, ivf.FETCHED)


def test_other_indices_may_cover_less_or_more(indexed):
    """Lance's fast search leaves out what a scalar index does not cover: samples and hidden models must not come through."""

    def right():
        indexed.refresh()
        for predicate in (None, "image_id >= 'a'", "model_id IS NULL", "license = 'CC0'"):
            found, exact = (
                planner.nearest(indexed.snapshot, "points_16", clustered(40, 5), 10, candidates=predicate, exact=way)
                for way in (False, True)
            )
            ids = {name for one in found.ids for name in one}
            assert not {name for name in ids if name.startswith(("m/s", "n/s", "hidden"))}
            shares = [len({*a} & {*b}) / 10 for a, b in zip(found.ids, exact.ids, strict=True)]
            assert np.mean(shares) >= 0.95, predicate

    def more(prefix, role, seed, n=300, **columns):
        indexed.writer.append_images(images(prefix, clustered(n, seed), role, **columns))

    one = planner.indices(indexed.snapshot)["points_16"]
    assert (one.uncovered_fragments, one.filter_indexed) == ((), True)
    more("late", "pretraining", 41)
    indexed.writer.append_images(images("hidden", clustered(300, 42), "sample", model_id=["hidden"] * 300))
    right()  # neither covers them
    table = lance.dataset(str(indexed.path / "images.lance"))
    table.optimize.optimize_indices(num_indices_to_merge=10, index_names=["points_16_idx"])
    right()  # the features' index does, the others do not
    more("later", "pretraining", 43)
    indexed.writer.append_images(images("n/s", clustered(300, 44), "sample", model_id=["n"] * 300))
    indexed.refresh()
    one = planner.indices(indexed.snapshot)["points_16"]
    assert (len(one.uncovered_fragments), one.filter_indexed) == (2, False)
    right()  # and some come after both
    optimize.optimize(indexed.writer)
    right()


def test_rows_that_come_and_go_are_honoured_at_once(indexed):
    [new] = clustered(1, 9)
    near = unit(new + 0.01 * np.random.default_rng(0).standard_normal((3, D)))
    indexed.writer.append_images(images("new", near))
    found = indexed.attribute(new, k=3)["image_id"].to_pylist()
    assert sorted(found) == ["new00000", "new00001", "new00002"]
    indexed.writer.delete("images", f"image_id = '{found[0]}'")
    assert sorted(indexed.attribute(new, k=2)["image_id"].to_pylist()) == sorted(found[1:])
    optimize.optimize(indexed.writer)
    assert health.status(indexed.snapshot)["indices"][-1]["n_unindexed"] == 0
    assert sorted(indexed.attribute(new, k=2)["image_id"].to_pylist()) == sorted(found[1:])


def test_status_says_how_features_are_searched(indexed):
    def state():
        indexed.refresh()
        return indexed.status()["encoders"]["points_16"]["index"]

    assert state()["state"] == "ready"
    assert state()["recall"] >= index_tuning.RECALL_WANTED
    indexed.writer.append_images(images("q", clustered(N, 11)))
    assert state()["state"] == "behind"
    optimize.optimize(indexed.writer)
    assert state()["state"] == "ready"
    indexed.writer.append_images(images("r", clustered(N, 12)))
    optimize.optimize(indexed.writer)
    assert state()["state"] == "outgrown"
    said = CliRunner().invoke(main, ["status", str(indexed.path)]).stdout
    assert "outgrown: build it again with attrdb index" in said
    lance.dataset(str(indexed.path / "images.lance")).drop_index("points_16_idx")
    assert state() == {"state": "dropped"}
    assert indexed.attribute("m/s00000", k=3).to_pylist() == indexed.attribute("m/s00000", k=3, exact=True).to_pylist()
    lance.dataset(str(indexed.path / "images.lance")).create_index(
        "points_16", "IVF_FLAT", num_partitions=2, metric="cosine"
    )
    assert state() == {"state": "unknown"}
    index_build.build(indexed.writer)
    assert state()["state"] == "ready"
    assert list(health.index_self_test(indexed.snapshot)) == []


def test_rows_that_come_while_it_is_built_are_found(indexed):
    [new] = clustered(1, 21)

    def report(stage, done, total, note=""):
        if (stage, done) == ("index", 0):
            attrdb.open(indexed.path).writer.append_images(images("meanwhile", new[None]))

    index_build.build(indexed.writer, report=report)
    indexed.refresh()
    assert indexed.attribute(new, k=1)["image_id"].to_pylist() == ["meanwhile00000"]
    assert indexed.status()["encoders"]["points_16"]["index"]["state"] == "ready"
    assert [file.name for file in indexed.path.glob(".index-*")] == []


def test_cells_that_hold_nothing(indexed):
    """Where no cell that is looked into holds a candidate that fulfils a predicate, all candidates are compared."""
    index = planner.indices(indexed.snapshot)["points_16"]
    queries = clustered(3, 5)
    for n in (1, 3):
        found = ivf.top_k(indexed.snapshot.tables["images"], index, "image_id = 'none'", N, queries[:n], 4)
        assert [list(ids) for ids in found.ids] == [[]] * n
    assert (
        exact_search.top_k([], queries[:0], 4).ids
        == ivf.top_k(indexed.snapshot.tables["images"], index, "true", N, queries[:0], 4).ids
    )


def test_wide_answers_are_exact(indexed, monkeypatch):
    """Influence of a flat profile needs more hits than an index is worth asking for."""
    monkeypatch.setattr(ivf, "FETCHED", 5_000)
    found, exact = (
        indexed.attribute("m/s00000", k=1500, tau=5.0, lam=0.0, exact=way)["influence"].to_pylist()
        for way in (False, True)
    )
    assert found == exact


def test_building_again_and_an_encoder_of_odd_length(tmp_path, monkeypatch):
    monkeypatch.setattr(index_build, "MIN_ROWS", 100)
    db = attrdb.create(tmp_path / "db")
    db.writer.add_encoder("points:15", 15, {}, "none")
    features = unit(np.random.default_rng(0).standard_normal((1200, 15)))
    ids = [f"p{number}" for number in range(1200)]
    db.writer.append_images(
        pa.table({"image_id": ids, "role": ["pretraining"] * 1200, "points_15": feature_array(features)})
    )
    done = CliRunner().invoke(main, ["index", str(db.path), "--quiet", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "IVF_SQ of some 1,200 features of points_15, 15-d: 43 partitions, on cpu" in done.stderr
    assert "recall@10" in done.stderr
    again = index_build.build(attrdb.open(db.path).writer)
    assert (again["queries"], again["n_queries"]) == ("candidates", 200)
    assert again["recall"] >= index_tuning.RECALL_WANTED


def test_a_build_can_be_repeated(indexed):
    """Lance by itself rotates features at random before it takes their signs: answers of few probes then differ."""
    queries = clustered(50, 9)
    answers = []
    for _ in range(2):
        index_build.build(indexed.writer)
        indexed.refresh()
        index = dataclasses.replace(planner.indices(indexed.snapshot)["points_16"], n_probes=2, oversampling=1)
        found = ivf.top_k(
            indexed.snapshot.tables["images"], index, "true", planner.count(indexed.snapshot), queries, 10
        )
        answers.append([list(ids) for ids in found.ids])
    assert answers[0] == answers[1]


def test_what_cannot_be_indexed(toy, indexed, monkeypatch):
    with pytest.raises(InvalidValue, match="has 7 features of 'toy_2'; an index is of use from 100 on"):
        index_build.build(toy.writer)
    with pytest.raises(NotFound, match="no encoder 'x'"):
        index_build.build(indexed.writer, "x")
    monkeypatch.setattr(index_build, "free_memory", lambda: 1000)
    version = lance.dataset(str(indexed.path / "images.lance")).version
    with pytest.raises(StorageError, match=r"needs \d+\.\d\d MiB of memory, 1,000 bytes are free; nothing was changed"):
        index_build.build(indexed.writer)
    assert lance.dataset(str(indexed.path / "images.lance")).version == version


def test_without_a_gpu_the_cpu_is_taken(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: no such file")

    monkeypatch.setattr(exact_search.ctypes, "CDLL", missing)
    with pytest.raises(InvalidValue, match=r"device is 'cuda', and there is no GPU .*libcuda.so.1: no such file"):
        exact_search.accelerator("cuda")
    assert exact_search.accelerator("auto") == exact_search.accelerator("cpu") == "cpu"


def test_attributions_of_many_samples_are_stored(indexed, monkeypatch):
    monkeypatch.setattr("attrdb.attribution.batch.SAMPLES_PER_COMMIT", 25)
    command = ["attribute", str(indexed.path), "--samples", "image_id < 'm/s00040'", "-k", "3", "--quiet"]
    done = CliRunner().invoke(main, command)
    assert (done.exit_code, done.stderr) == (0, "40 samples attributed, 0 were already\n"), done.output
    indexed.refresh()
    stored = indexed.sql("SELECT * FROM attributions WHERE sample_id = 'm/s00030' ORDER BY rank").to_pylist()
    found = indexed.attribute("m/s00030", k=3).to_pylist()
    for row, one in zip(stored, found, strict=True):
        assert row["candidate_id"] == one["image_id"]
        assert [row[name] for name in ("rank", "similarity", "influence", "complete", "missing_influence")] == [
            one[name] for name in ("rank", "similarity", "influence", "complete", "missing_influence")
        ]
    assert CliRunner().invoke(main, command).stderr == "0 samples attributed, 40 were already\n"
    more = [word if word != "image_id < 'm/s00040'" else "true" for word in command]
    assert CliRunner().invoke(main, more).stderr == "20 samples attributed, 40 were already\n"
    # with other settings they are replaced, not added
    assert CliRunner().invoke(main, [*more, "--tau", "0.2"]).stderr == "60 samples attributed, 0 were already\n"
    indexed.refresh()
    assert indexed.sql("SELECT count(*) AS n, min(tau) AS tau FROM attributions").to_pylist() == [
        {"n": 180, "tau": 0.2}
    ]
    assert CliRunner().invoke(main, [*more, "--tau", "0.2"]).stderr == "0 samples attributed, 60 were already\n"
    # and once the images have changed, or all candidates are to be compared, they are made again
    indexed.writer.append_images(images("late", clustered(1, 13)))
    assert CliRunner().invoke(main, [*more, "--tau", "0.2"]).stderr == "60 samples attributed, 0 were already\n"
    assert (
        CliRunner().invoke(main, [*more, "--tau", "0.2", "--exact"]).stderr == "60 samples attributed, 0 were already\n"
    )
    with exclusive_lock(lock_file(indexed.path, "attribute", "points_16"), "held"):
        busy = CliRunner().invoke(main, more)
    assert "are being attributed by points_16 by another process" in busy.stderr
    indexed.refresh()
    job = json.loads(indexed.sql("SELECT settings FROM jobs")["settings"][0].as_py())
    assert job == {"samples": "true", "k": 3, "exact": True, "tau": 0.2, "lam": None}  # as given


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--samples", "colour = 1"], "samples is 'colour = 1'; it must be an SQL predicate on the columns of images"),
        (["--samples", "true) OR (true"], "it must be an SQL predicate"),
        (["--samples", "image_id = 'x'"], "no sample of"),
        ([], "give an IMAGE, or --samples with a predicate"),
        (["m/s00001", "--samples", "true"], "give an IMAGE, or --samples with a predicate"),
        (["--samples", "true", "--candidates", "true"], "--samples stores attributions to all candidates"),
    ],
)
def test_samples_that_cannot_be_attributed(indexed, words, says):
    done = CliRunner().invoke(main, ["attribute", str(indexed.path), *words])
    assert done.exit_code != 0
    assert says in done.stderr
