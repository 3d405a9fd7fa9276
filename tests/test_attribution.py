"""Influence, exact search and attribution against hand-worked values and slow, obvious twins."""

import math
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from conftest import DEVICES, OTHER, rows

from attrdb.attribution import query as attribution
from attrdb.attribution.influence import cut_off, influence
from attrdb.errors import InvalidValue, NotFound
from attrdb.search import exact as exact_search
from attrdb.search import gemm, threads
from attrdb.search.mapper import ARRAYS, FORMS, SIDES, Mapper


def test_influence_by_hand():
    # tau = 1 / ln 2 halves the weight for every step of 1 in similarity: weights 1, 1/2, 1/4 less lambda = 1/4
    shares = influence(np.array([3.0, 2.0, 1.0, 0.0]), tau=1 / math.log(2), lam=0.25)
    np.testing.assert_allclose(shares, [0.75, 0.25, 0.0, 0.0], atol=1e-12)


def test_influence_is_zero_exactly_from_the_cut_off_on():
    similarity = np.linspace(-1, 1, 2001)
    shares = influence(similarity, tau=0.1, lam=0.2)
    assert (shares >= 0).all()
    assert shares.sum() == pytest.approx(1)
    np.testing.assert_array_equal(shares > 0, similarity > cut_off(1.0, 0.1, 0.2) + 1e-12)


def test_influence_of_many_queries_is_that_of_each():
    similarity = np.random.default_rng(0).uniform(-1, 1, (5, 40))
    np.testing.assert_allclose(influence(similarity), [influence(row) for row in similarity])


@pytest.mark.parametrize(("tau", "lam"), [(0, 0.1), (-1, 0.1), (float("nan"), 0.1), (0.1, 1.0), (0.1, -0.1)])
def test_calibration_out_of_range(tau, lam):
    with pytest.raises(InvalidValue, match=r"tau is|lambda is"):
        influence(np.array([0.1, 0.2]), tau, lam)


def random_gallery(n=500, dimension=3, seed=0):
    rng = np.random.default_rng(seed)
    # Few distinct directions, exactly representable: many exact ties.
    features = rng.integers(-2, 3, (n, dimension)).astype(np.float32)
    return np.array([f"i{i:03d}" for i in rng.permutation(n)], dtype=object), features


def blocks(ids, features, size):
    return [(pa.array(ids[at : at + size]), features[at : at + size]) for at in range(0, len(ids), size)]


def slow_order(ids, features, query):
    similarity = features @ query
    return sorted(zip(-similarity, ids, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1, 7, 100, 500])
@pytest.mark.parametrize("k", [1, 10, 499, 600])
def test_top_k_equals_a_full_sort(size, k, device):
    ids, features = random_gallery()
    queries = random_gallery(4, seed=1)[1]
    hits = exact_search.top_k(blocks(ids, features, size), queries, k, device=device)
    for row, query in enumerate(queries):
        expected = slow_order(ids, features, query)[:k]
        assert list(hits.ids[row]) == [image_id for _, image_id in expected]
        np.testing.assert_array_equal(hits.similarity[row], [-s for s, _ in expected])


# Kernels are slow to interpret.
@pytest.mark.parametrize(
    ("size", "device"), [(1, "cpu"), (7, "cpu"), *((size, one) for one in DEVICES for size in (40, 500))]
)
def test_count_above_equals_the_place_in_a_full_sort(size, device):
    ids, features = random_gallery()
    queries = random_gallery(4, seed=1)[1]
    given = np.stack([np.random.default_rng(2).permutation(500)[:6] for _ in queries])
    similarity = np.take_along_axis((queries @ features.T).astype(np.float64), given, axis=1)
    above, n = exact_search.count_above(blocks(ids, features, size), queries, similarity, ids[given], device=device)
    assert n == 500
    for row, query in enumerate(queries):
        order = [image_id for _, image_id in slow_order(ids, features, query)]
        assert list(above[row]) == [order.index(image_id) for image_id in ids[given[row]]]


@pytest.mark.parametrize("device", DEVICES)
def test_more_queries_than_a_product_takes_and_rows_that_differ_in_their_last_digits(monkeypatch, device):
    """Against float64, with a mapper, where float32 alone would put near equal candidates in another order."""
    monkeypatch.setattr(gemm, "QUERIES_PER_PRODUCT", 7)
    rng = np.random.default_rng(0)
    centre = rng.standard_normal((1, 24))
    features = centre + 1e-3 * rng.standard_normal((300, 24))
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    queries = np.roll(features[:20], 1, axis=1)
    ids = np.array([f"i{number:03d}" for number in range(300)], dtype=object)
    parameters = {
        f"{side}.{name}": value.astype(np.float32)
        for side in ("exemplar", "sample")
        for name, value in (("weight", np.eye(24) + 0.1 * rng.standard_normal((24, 24))), ("bias", np.full(24, 0.1)))
    }
    mapper = Mapper("some", "e", "affine", parameters)
    similarity = np.round(
        mapper.samples(queries, np.float64) @ mapper.exemplars(features, np.float64).T, exact_search.DIGITS
    )
    order = np.argsort(-similarity, axis=1, kind="stable")
    hits = exact_search.top_k(blocks(ids, features, 64), queries, 9, mapper=mapper, device=device)
    assert [list(found) for found in hits.ids] == [list(ids[row[:9]]) for row in order]
    given = similarity[:, :1]
    above, _ = exact_search.count_above(
        blocks(ids, features, 64), queries, given, np.full((20, 1), "i000"), mapper=mapper, device=device
    )
    assert list(above[:, 0]) == [list(row).index(0) for row in order]


def test_an_accelerator_ranks_as_float64_does(monkeypatch):
    """Features that its product cannot tell apart, more than it can keep; on the device already, and of an odd dimension."""
    torch = pytest.importorskip("torch")
    accelerated = pytest.importorskip("attrdb.search.gemm_cuda")
    monkeypatch.setattr(accelerated, "PAIR_BUFFER", 200)
    rng = np.random.default_rng(0)
    near = rng.standard_normal(21) + 1e-4 * rng.standard_normal((150, 21))
    features = np.concatenate([near, rng.standard_normal((150, 21))])[rng.permutation(300)]
    features = np.float32(features / np.linalg.norm(features, axis=1, keepdims=True))
    features[7] = features[3]
    ids, queries, given = (
        np.array([f"i{number:03d}" for number in range(300)], object),
        features[:9],
        rng.integers(300, size=(9, 4)),
    )
    similarity = np.round(queries.astype(np.float64) @ features.T.astype(np.float64), exact_search.DIGITS)
    order = np.argsort(-similarity, axis=1, kind="stable").argsort(axis=1)
    there = [(ids_, torch.tensor(block, device=OTHER)) for ids_, block in blocks(ids, features, 130)]
    thresholds = np.take_along_axis(similarity, given, 1)
    thresholds[2, 3] = np.inf
    for gallery in (there, blocks(ids, features, 300)):
        above, n = exact_search.count_above(gallery, queries, thresholds, ids[given], device=OTHER)
        expected = np.where(np.isfinite(thresholds), np.take_along_axis(order, given, 1), 0)
        np.testing.assert_array_equal(above, expected)
        assert n == 300
    above, _ = exact_search.count_above(
        [(pa.array(ids[:1]), features[:1])], queries[:1], thresholds[:1, :1], ids[given[:1, :1]], device=OTHER
    )
    assert above[0, 0] == (order[0, 0] < order[0, given[0, 0]])
    hits = exact_search.top_k(there, queries, 5, device=OTHER)
    np.testing.assert_array_equal(np.array(hits.ids), ids[np.argsort(-similarity, axis=1, kind="stable")[:, :5]])


def test_the_margin_of_tf32_covers_what_its_factors_lose():
    """Worst where all elements are of one sign and lose as much as they can, as nothing is made up for then."""
    accelerated = pytest.importorskip("attrdb.search.gemm_cuda")
    rng = np.random.default_rng(0)
    most = 0
    for dimension in (3, 64, 768, 4096):
        for x in (
            rng.standard_normal((50, dimension)),
            np.abs(rng.standard_normal((50, dimension))),
            np.ones((1, dimension)),
        ):
            x = np.float32(x / np.linalg.norm(x, axis=1, keepdims=True))
            x = (x.view(np.uint32) | 0x1FFF).view(np.float32)
            cut = (x.view(np.uint32) & ~np.uint32(0x1FFF)).view(np.float32)
            exact, coarse = (np.einsum("nd,md->nm", one, one, dtype=np.float64) for one in (x, cut))
            off = np.abs(exact - coarse).max()
            assert off <= accelerated.tf32_margin(dimension)
            most = max(most, off)
    assert most > accelerated.tf32_margin(3) / 3  # and is no wider than need be


@pytest.mark.parametrize("form", FORMS)
def test_an_accelerator_maps_as_numpy_does(form):
    pytest.importorskip("attrdb.search.gemm_cuda")
    rng = np.random.default_rng(0)
    shapes = {"weight": (16, 16), "bias": 16, "gain": 16, "up": (8, 16), "up_bias": 8, "down": (16, 8)}
    parameters = {
        f"{side}.{name}": np.float32(rng.standard_normal(shapes[name])) for side in SIDES for name in ARRAYS[form]
    }
    mapper = Mapper("some", "e", form, parameters)
    ids, features = random_gallery(dimension=16)
    queries = random_gallery(20, seed=1, dimension=16)[1]
    given = rng.integers(500, size=20)
    similarity = exact_search.exact_similarity(features, queries, given, np.arange(20), mapper)[:, None]
    found = [
        exact_search.count_above(
            blocks(ids, features, 200), queries, similarity, ids[given][:, None], mapper=mapper, device=one
        )
        for one in DEVICES
    ]
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][0].max() > 0


def test_a_search_gives_the_threads_of_products_back():
    """Also where searches overlap: one begins before another ends, and ends after it."""

    def n_threads():
        return {one["num_threads"] for one in threads._blas().info()}

    before = n_threads()
    first, second = (threads.one_thread_per_product() for _ in range(2))
    first.__enter__()
    second.__enter__()
    assert n_threads() == {1}
    first.__exit__(None, None, None)
    assert n_threads() == {1}
    second.__exit__(None, None, None)
    assert n_threads() == before

    def broken():
        yield pa.array(["a"]), np.ones((1, 4), np.float32)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        exact_search.top_k(broken(), np.ones((1, 4), np.float32), 1)
    assert n_threads() == before


def test_attribute_by_hand(toy):
    found = toy.attribute("m/0/1", k=3, tau=0.05, lam=0.05).to_pylist()
    assert [row["image_id"] for row in found] == ["m/e0", "p10", "p20"]
    assert [row["rank"] for row in found] == [1, 2, 3]
    similarity = [math.cos(math.radians(d)) for d in (2, 8, 18, 38, 88)]
    weights = [max(0, math.exp((s - similarity[0]) / 0.05) - 0.05) for s in similarity]
    for row, s, weight in zip(found, similarity, weights, strict=False):
        assert row["similarity"] == pytest.approx(s, abs=1e-6)
        assert row["influence"] == pytest.approx(weight / sum(weights), abs=1e-5)
        assert row["complete"]
        assert row["missing_influence"] == 0


def test_an_image_is_not_a_candidate_of_itself(toy):
    assert [row["image_id"] for row in toy.attribute("m/e0", k=2).to_pylist()] == ["p10", "p20"]


def many(toy, n=3000):
    degrees = np.random.default_rng(0).uniform(-60, 60, n)
    toy.writer.append_images(rows([(f"c{i:04d}", "pretraining", None, d) for i, d in enumerate(degrees)]))
    return toy


@pytest.mark.parametrize("lam", [0.0, 0.05, 0.9])
def test_influence_does_not_depend_on_k(toy, lam):
    many(toy)
    found = [toy.attribute("m/0/1", k=k, tau=0.2, lam=lam) for k in (1, 10, 700)]
    for short, long in pairwise(found):
        n = len(short)
        assert short["image_id"].to_pylist() == long["image_id"].to_pylist()[:n]
        np.testing.assert_allclose(short["influence"], long["influence"].to_numpy()[:n], rtol=1e-9)
    assert all(found[-1]["complete"].to_pylist())


def test_an_incomplete_answer_says_what_may_be_missing(toy, monkeypatch):
    many(toy)
    whole = toy.attribute("m/0/1", k=5, tau=0.2, lam=0.0)["influence"].to_numpy()
    monkeypatch.setattr(attribution, "MAX_WIDTH", 256)
    cut = toy.attribute("m/0/1", k=5, tau=0.2, lam=0.0)
    assert not any(cut["complete"].to_pylist())
    bound = cut["missing_influence"][0].as_py()
    assert 0 < bound < 1
    assert (cut["influence"].to_numpy() <= whole + 1e-12).all()


def test_sql_and_python_agree(toy):
    many(toy)
    python = toy.attribute("m/0/2", k=40).to_pylist()
    ranked = toy.query("top_candidates", image_id="m/0/2", encoder_id="toy_2", k=40).to_pylist()
    assert [row["image_id"] for row in python] == [row["image_id"] for row in ranked]
    shares = toy.query("influence", image_id="m/0/2", encoder_id="toy_2").to_pylist()
    assert sum(row["influence"] for row in shares) == pytest.approx(1)
    assert all(row["influence"] > 0 for row in shares)
    by_id = {row["image_id"]: row["influence"] for row in shares}
    for row in python:
        assert by_id.get(row["image_id"], 0) == pytest.approx(row["influence"], abs=1e-12)


def test_questions_that_cannot_be_answered(toy):
    with pytest.raises(NotFound, match="no image 'nobody'"):
        toy.attribute("nobody")
    with pytest.raises(NotFound, match=r"no encoder 'clip' in .*; it has: toy_2"):
        toy.attribute("m/0/1", encoder_id="clip")
    with pytest.raises(InvalidValue, match="k is 0"):
        toy.attribute("m/0/1", k=0)
    for nowhere in ([0.0, 0.0], [float("nan"), 0.0]):
        with pytest.raises(InvalidValue, match="it must be finite and not zero"):
            toy.attribute(np.array(nowhere))
    with pytest.raises(InvalidValue, match=r"the feature has shape \(3,\), encoder 'toy_2' makes \(2,\)"):
        toy.attribute(np.ones(3))


def test_an_empty_database_has_nothing_to_attribute_to(tmp_path):
    import attrdb

    db = attrdb.create(tmp_path / "db")
    with pytest.raises(NotFound, match="has no encoder yet"):
        db.attribute("x")
    db.writer.add_encoder("toy:2", 2, {}, "none")
    with pytest.raises(NotFound, match="has no candidate with a 'toy_2' feature"):
        db.attribute(np.array([1.0, 0.0]))
