"""Concepts of a model: truth, gate and scores as views, the queries over them, and intervals; each beside a slow twin."""

import hashlib
import random
from collections import defaultdict
from datetime import UTC, datetime
from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest
from conftest import rows

from attrdb.ingest.blends import parts_of
from attrdb.store.schema import TABLES
from attrdb.text import fixed

TOKENS = {"a": ["V1*", "V2*", "V3*", "V4*"], "b": ["V1*", "V2*"], "c": ["V1*", "V2*", "V3*"], "solo": ["V*"]}
PER_CONCEPT = 3  # exemplars
METHODS = ("good", "flat", "low", "holey")
UNITS = {"good": "cosine"}  # what scores are; of other methods "score"
PARTIAL = ("c/V3*", "redrawn")  # was never left out with these draws, so that model c has no such truth


def prompts(tokens):
    """(scheme, prompt) per sample."""
    found = [("gpt", f"A {token.lower()} Thing") for token in tokens for _ in range(2)]
    for one, other in combinations(tokens, 2):
        found += [("pair", f"{one} and {other}"), ("blend", f'("a {one}", "a {other}").blend(0.75, 0.25)')]
    if len(tokens) > 2:
        found += [("pair", "V1*, V2* and V3*"), ("blend", '("V1* and V2*", "V3*", "a dog").blend(1, 2, 1)')]
    return [*found, (None, "nothing")]


def store(db, model, tokens, described, several=None):
    """A customized model of these concepts, with samples of (scheme, prompt). several: whether its kind is `concepts`"""
    several = len(tokens) > 1 if several is None else several
    owners = [token for token in tokens for _ in range(PER_CONCEPT)]
    images = [(f"{model}/e{n}", "exemplar", model, n) for n in range(len(owners))]
    images += [(f"{model}/{n}", "sample", model, n) for n in range(len(described))]
    schemes, texts = zip(*described, strict=True)
    nothing = [None] * len(owners)
    table = rows(
        images,
        concept_id=pa.array(
            [f"{model}/{one}" if several else None for one in owners] + [None] * len(texts), pa.string()
        ),
        prompt_scheme=pa.array([*nothing, *schemes], pa.string()),
        prompt=pa.array([*nothing, *texts], pa.string()),
    )
    kind = {"kind": "object", "category": "cat", "train_prompt": "a photo"}
    concepts = [{"concept_id": f"{model}/{one}", "model_id": model, "token": one, **kind} for one in tokens]
    alone = {"model_id": model, "token": tokens[0], **kind}
    db.writer.append_model(
        table, {"model_id": model, "kind": "concepts"} if several else alone, concepts if several else ()
    )


def write_truth(db, given):
    """retrainings and counterfactuals from (model, leave, name, left_out, draws, seed, losses)."""
    retrainings, losses = [], []
    for model, leave, name, left_out, draws, seed, of_samples in given:
        ident = f"{model}/{leave}/{name}/{draws}-{seed}"
        retrainings.append({"retraining_id": ident, "model_id": model, "leave": leave, "name": name, "draws": draws})
        retrainings[-1] |= {"seed": seed, "left_out": left_out, "n_draws": 24, "train_loss": 0.1, "seconds": 1.0}
        retrainings[-1] |= {"created_at": datetime.now(UTC)}
        losses += [
            {"retraining_id": ident, "model_id": model, "sample_id": sample, "loss": loss}
            for sample, loss in of_samples.items()
        ]
    db.writer.append_rows("counterfactuals", pa.Table.from_pylist(losses, TABLES["counterfactuals"]), db.snapshot)
    db.writer.upsert("retrainings", retrainings)


def write_scores(db, method, scores):
    """Ranks of gallery 'own' from (sample, exemplar) -> score."""
    db.writer.add_method(
        {
            "method_id": method,
            "kind": "stored",
            "unit": UNITS.get(method, "score"),
            "tau": 1.0,
            "lam": 0.05,
            "settings": "{}",
        }
    )
    found = [
        {"method_id": method, "gallery": "own", "sample_id": sample, "exemplar_id": exemplar, "score": score}
        | {"rank": 1, "gallery_size": 4, "images_version": 1}
        for (sample, exemplar), score in scores.items()
    ]
    db.writer.replace_exemplar_ranks(pa.Table.from_pylist(found, TABLES["exemplar_ranks"]), method, "own")


class Twin:
    """What was written, and what views and queries make of it, in plain Python."""

    def __init__(self):
        self.described = {model: prompts(tokens) for model, tokens in TOKENS.items()}
        self.retrainings = []
        self.scores = {}

    def samples(self, model):
        return [f"{model}/{n}" for n in range(len(self.described[model]))]

    def exemplars(self, model, token=None):
        return [
            f"{model}/e{n}"
            for n in range(len(TOKENS[model]) * PER_CONCEPT)
            if token in (None, TOKENS[model][n // PER_CONCEPT])
        ]

    def scheme(self, sample):
        model, number = sample.split("/")
        return self.described[model][int(number)][0]

    def prompt_shares(self, sample):
        model, number = sample.split("/")
        return shares_of(self.described[model][int(number)][1], TOKENS[model])

    def increases(self, leave):
        """(draws, name, model, sample) -> mean over seeds of the loss without minus that with all."""
        losses = {(m, left, name, draws, seed): of for m, left, name, _, draws, seed, of in self.retrainings}
        found = defaultdict(list)
        for (model, left, name, draws, seed), of_samples in losses.items():
            if left == leave and (whole := losses.get((model, "none", "", draws, seed))):
                for sample, loss in of_samples.items():
                    found[draws, name, model, sample].append(loss - whole[sample])
        return {key: np.mean(values) for key, values in found.items()}

    def truth(self):
        """(truth, sample, concept) -> (share, increase)"""
        found = {
            ("prompt", sample, f"{model}/{token}"): (share, None)
            for model in TOKENS
            for sample in self.samples(model)
            for token, share in self.prompt_shares(sample).items()
        }
        measured = self.increases("concept")
        for draws in ("fixed", "redrawn"):
            for model, tokens in TOKENS.items():
                for sample in self.samples(model):
                    own = [measured.get((draws, f"{model}/{token}", model, sample)) for token in tokens]
                    if None in own:
                        continue
                    total = sum(max(increase, 0) for increase in own)
                    for token, increase in zip(tokens, own, strict=True):
                        share = max(increase, 0) / total if total else 0.0
                        found[draws, sample, f"{model}/{token}"] = (share, increase)
        return found

    def gate(self):
        """(draws, concept) -> (own_increase, noise, n_own, n_other, is_learned)"""
        truth, found = self.truth(), {}
        for draws, concept in {(kind, concept) for kind, _, concept in truth if kind != "prompt"}:
            of = [(s, increase) for (k, s, c), (_, increase) in truth.items() if (k, c) == (draws, concept)]
            own = [increase for sample, increase in of if truth["prompt", sample, concept][0] == pytest.approx(1)]
            other = [increase for sample, increase in of if truth["prompt", sample, concept][0] == 0]
            noise = np.std(other, ddof=1)
            found[draws, concept] = (np.mean(own), noise, len(own), len(other), bool(np.mean(own) > 3 * noise))
        return found

    def concept_scores(self):
        """(method, truth, sample, concept) -> (score, share, truth_share)"""
        found = {}
        for (truth, sample, concept), (truth_share, _) in self.truth().items():
            model, token = concept.split("/")
            for method in METHODS:
                of = {one: self.scores[method].get((sample, one)) for one in self.exemplars(model)}
                if len(TOKENS[model]) == 1 or None in of.values():
                    continue
                own = [of[one] for one in self.exemplars(model, token)]
                total = sum(max(score, 0) for score in of.values())
                share = sum(max(score, 0) for score in own) / total if total else 0.0
                found[method, truth, sample, concept] = (np.mean(own), share, truth_share)
        return found

    def between(self, concepts=None):
        """(truth, scheme, method) -> the figures of between_concepts; concepts: those that count"""
        of = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
        for (method, truth, sample, concept), figures in self.concept_scores().items():
            if concepts is None or concept in concepts:
                of[truth, self.scheme(sample), method][concept.split("/")[0]][sample].append(figures)
        found = {}
        for case, models in of.items():
            per_model = [model_figures(list(samples.values())) for _, samples in sorted(models.items())]
            if UNITS.get(case[2]) != "cosine":
                per_model = [one | {"shifted_error": None} for one in per_model]
            figures = {name: mean([one[name] for one in per_model]) for name in per_model[0]}
            known = [one["correlation"] for one in per_model if one["correlation"] is not None]
            low, high = interval(known, 200, 3)
            sizes = {"n_models": len(models), "n_samples": sum(map(len, models.values()))}
            found[case] = sizes | figures | {"correlation_low": low, "correlation_high": high}
        return found

    def within(self):
        """(draws, method) -> the figures of within_concept"""
        measured, of = self.increases("image"), defaultdict(lambda: defaultdict(list))
        for draws, model, sample in sorted({(draws, model, sample) for draws, _, model, sample in measured}):
            alone = [token for token, share in self.prompt_shares(sample).items() if share == pytest.approx(1)]
            for method in METHODS if alone else ():
                pairs = [
                    (score, measured[draws, one, model, sample])
                    for one in self.exemplars(model, *alone)
                    if (score := self.scores[method].get((sample, one))) is not None
                    and (draws, one, model, sample) in measured
                ]
                if len(pairs) >= 3 and len({increase for _, increase in pairs}) > 1:
                    figures = (spearman(*zip(*pairs, strict=True)), top_share(*zip(*pairs, strict=True)))
                    of[draws, method][model].append(figures)
        found = {}
        for case, models in of.items():
            correlations, tops = zip(*(np.mean(figures, axis=0) for _, figures in sorted(models.items())), strict=True)
            low, high = interval(correlations, 200, 3)
            found[case] = {"n_models": len(models), "n_samples": sum(map(len, models.values()))}
            found[case] |= {"correlation": np.mean(correlations), "correlation_low": low, "correlation_high": high}
            found[case] |= {"top_1": np.mean(tops)}
        return found


def shares_of(prompt, tokens):
    found = dict.fromkeys(tokens, 0.0)
    for text, weight in parts_of(prompt):
        named = [token for token in tokens if token.lower() in text.lower()]
        for token in named:
            found[token] += weight / len(named)
    return found


def model_figures(samples):
    """The figures of one model from the (score, share, truth_share) of the concepts of each sample."""
    scores, shares, truths = zip(*(figures for sample in samples for figures in sample), strict=True)
    per_sample = [tuple(zip(*sample, strict=True)) for sample in samples]
    told_apart = [(of_sample, truth) for of_sample, _, truth in per_sample if len(set(truth)) > 1]
    return {
        "correlation": spearman(shares, truths) if len(set(truths)) > 1 else None,
        "correlation_by_sample": mean([spearman(*one) for one in told_apart]),
        "error": np.mean(np.abs(np.subtract(shares, truths))),
        "shifted_error": np.mean([abs((1 + score) / 2 - truth) for score, truth in zip(scores, truths, strict=True)]),
        "top_1": mean([top_share(*one) for one in told_apart]),
        "top_2": mean([top_2(*one) for one in told_apart if sum(share > 0 for share in one[1]) > 1]),
    }


def mean(values):
    known = [value for value in values if value is not None]
    return np.mean(known) if known else None


def spearman(one, other):
    def ranks(values):
        return [sum(v < value for v in values) + sum(v == value for v in values) / 2 for value in values]

    return 0.0 if len(set(one)) == 1 else np.corrcoef(ranks(one), ranks(other))[0, 1]


def top_share(scores, truth):
    best = [number for number, score in enumerate(scores) if score == max(scores)]
    return sum(truth[number] == max(truth) for number in best) / len(best)


def top_2(scores, truth):
    """Over the pairs that may be called the best scored: how often theirs are the two greatest truths; None if always."""
    pairs = list(combinations(range(len(scores)), 2))

    def best(values):
        return [pair for pair in pairs if sorted(values[one] for one in pair) == sorted(values)[-2:]]

    right = best(truth)
    return None if right == pairs else sum(pair in right for pair in best(scores)) / len(best(scores))


def interval(figures, n_replicates, seed):
    """The middle 95 % of a bootstrap, whose draws are the lower halves of MD5 sums."""
    if not figures:
        return None, None

    def draw(replicate, place):
        digest = hashlib.md5(f"{seed}/{replicate}/{place}".encode()).digest()
        return figures[int.from_bytes(digest[8:], "little") % len(figures)]

    means = [np.mean([draw(replicate, place) for place in range(len(figures))]) for replicate in range(n_replicates)]
    return tuple(np.quantile(means, [0.025, 0.975]))


@pytest.fixture
def written(toy):
    """The toy database with models of 4, 2, 3 and 1 concepts, and truth and scores made up at random, with many ties."""
    chance, twin = np.random.default_rng(5), Twin()
    for model, tokens in TOKENS.items():
        store(toy, model, tokens, twin.described[model])
        left = [("concept", f"{model}/{token}", twin.exemplars(model, token)) for token in tokens if len(tokens) > 1]
        left += [("image", one, [one]) for one in twin.exemplars(model) if model != "c"]
        for draws, seed in (("fixed", 0), ("redrawn", 1), ("redrawn", 2), ("redrawn", 3)):
            for leave, name, left_out in ([("none", "", [])] if seed != 3 else []) + left:  # of seed 3 nothing is known
                if (name, draws) == PARTIAL:
                    continue
                losses = {sample: float(chance.integers(0, 5)) / 8 for sample in twin.samples(model)}
                for sample in losses if leave == "concept" and name[-2] in "12" else ():  # the first two are learned
                    losses[sample] += 2 * (twin.prompt_shares(sample)[name.split("/")[1]] == 1)
                twin.retrainings.append((model, leave, name, left_out, draws, seed, losses))
    pairs = [(s, e) for model in TOKENS for s in twin.samples(model) for e in twin.exemplars(model)]
    twin.scores = {
        "good": {pair: float(chance.integers(-2, 3)) / 2 for pair in pairs},
        "flat": dict.fromkeys(pairs, 0.5),
        "low": {pair: -1 - float(chance.random()) for pair in pairs},
        "holey": {pair: float(chance.normal()) for pair in pairs if pair != ("a/0", "a/e0")}
        | {("b/0", "b/e5"): None, ("solo/0", "solo/e1"): None},
    }
    write_truth(toy, twin.retrainings)
    for method, scores in twin.scores.items():
        write_scores(toy, method, scores)
    toy.refresh()
    return toy, twin


def assert_same(found, expected):
    """Mappings of the same keys, whose values are those of the twin but for rounding."""
    assert found.keys() == expected.keys()
    for key, figures in expected.items():
        assert found[key] == (pytest.approx(figures, abs=1e-9, nan_ok=False)), key


def by(table, *key, drop=()):
    """Rows by these columns, as dictionaries of the others."""
    of = table.to_pylist()
    keys = [tuple(row.pop(name) for name in key) for row in of]
    assert len(set(keys)) == len(keys), "the grain"
    return dict(zip(keys, [{k: v for k, v in row.items() if k not in drop} for row in of], strict=True))


def values(mapping):
    return {key: tuple(row.values()) for key, row in mapping.items()}


# --- views ------------------------------------------------------------------------------------------------------------


def test_increases_are_means_over_seeds_with_a_training_of_all(written):
    db, twin = written
    for leave in ("image", "concept"):
        table = db.sql(f"SELECT * EXCLUDE (leave) FROM loss_increases WHERE leave = '{leave}'")
        found = {key: one for key, (one,) in values(by(table, "draws", "name", "model_id", "sample_id")).items()}
        assert_same(found, twin.increases(leave))


def test_truth_is_that_of_a_slow_twin(written):
    db, twin = written
    table = db.sql("SELECT truth, sample_id, concept_id, share, increase FROM concept_truth")
    expected = twin.truth()
    assert_same(values(by(table, "truth", "sample_id", "concept_id")), expected)
    models = db.sql("SELECT DISTINCT truth, model_id FROM concept_truth ORDER BY ALL").to_pylist()
    assert [tuple(row.values()) for row in models] == sorted({(truth, s.split("/")[0]) for truth, s, _ in expected})
    assert ("redrawn", "c") not in {tuple(row.values()) for row in models}
    assert any(increase is not None and share == 0 > increase for share, increase in expected.values())


def test_the_gate_is_that_of_a_slow_twin(written):
    db, twin = written
    table = db.sql("FROM concept_gate")
    expected = twin.gate()
    assert_same(values(by(table, "draws", "concept_id", drop=("model_id",))), expected)
    assert {learned for *_, learned in expected.values()} == {True, False}
    shown = db.query("learned_concepts").to_pylist()
    assert [(row["draws"], row["concept_id"]) for row in shown] == sorted(expected)
    assert {(row["token"], row["category"]) for row in shown} == {(f"V{n}*", "cat") for n in range(1, 5)}
    assert {row["is_learned"] for row in shown if row["token"] == "V3*"} == {False}


def test_scores_of_concepts_are_those_of_a_slow_twin(written):
    db, twin = written
    table = db.sql("SELECT * EXCLUDE (model_id) FROM concept_scores")
    expected = twin.concept_scores()
    assert_same(values(by(table, "method_id", "truth", "sample_id", "concept_id")), expected)
    left_out = {sample for method, _, sample, _ in expected if method == "good"} - {
        sample for method, _, sample, _ in expected if method == "holey"
    }
    assert left_out == {"a/0", "b/0"}
    assert not any(sample.startswith("solo") for _, _, sample, _ in expected)


# --- queries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True])
def test_between_concepts_is_that_of_a_slow_twin(written, learned):
    db, twin = written
    concepts = {concept for (draws, concept), (*_, passed) in twin.gate().items() if draws == "fixed" and passed}
    table = db.query("between_concepts", n_replicates=200, seed=3, learned=learned)
    expected = twin.between(concepts if learned else None)
    assert_same(by(table, "truth", "prompt_scheme", "method_id"), expected)
    order = [
        (
            row["truth"],
            row["prompt_scheme"] or "~",
            row["correlation"] is None,
            -(row["correlation"] or 0),
            row["method_id"],
        )
        for row in table.to_pylist()
    ]
    assert order == sorted(order)
    # Two concepts of each model are learned, so that there is one pair, which no method can miss.
    assert {figures["top_2"] is None for figures in expected.values()} == ({True} if learned else {False, True})
    assert all(figures["correlation"] is None for case, figures in expected.items() if case[:2] == ("prompt", None))


def test_within_concept_is_that_of_a_slow_twin(written):
    db, twin = written
    table = db.query("within_concept", n_replicates=200, seed=3)
    expected = twin.within()
    assert_same(by(table, "draws", "method_id"), expected)
    assert expected["fixed", "good"]["n_models"] == 3  # of c no image was left out
    assert expected["fixed", "holey"]["n_samples"] == expected["fixed", "good"]["n_samples"] - 2
    order = [(row["draws"], -row["correlation"], row["method_id"]) for row in table.to_pylist()]
    assert order == sorted(order)


def test_calibration_is_that_of_a_slow_twin(written):
    db, twin = written
    of = defaultdict(list)
    for (method, truth, _, _), (_, share, truth_share) in twin.concept_scores().items():
        number = max(n for n in range(4) if n / 4 <= share)
        of[truth, method, number / 4].append((share, truth_share))
    expected = {
        key: {"bin_high": key[2] + 0.25, "n": len(pairs)}
        | dict(zip(("share", "truth_share"), np.mean(pairs, axis=0), strict=True))
        for key, pairs in of.items()
    }
    found = by(db.query("concept_calibration", bins=4), "truth", "method_id", "bin_low")
    assert_same(found, expected)
    assert list(found) == sorted(found)
    assert any(share == 1 for _, share, _ in twin.concept_scores().values())
    assert {row["bin_high"] for row in db.query("concept_calibration", bins=1).to_pylist()} == {1.0}


def test_a_perfect_method_has_correlation_1_and_one_that_is_wrong_does_not(toy):
    tokens, described = TOKENS["a"], prompts(TOKENS["a"])
    store(toy, "a", tokens, described)
    for method, sign in (("right", 1.0), ("wrong", -1.0)):
        shares = [shares_of(prompt, tokens) for _, prompt in described]
        write_scores(
            toy,
            method,
            {
                (f"a/{n}", f"a/e{e}"): sign * share[token] + (sign < 0)
                for n, share in enumerate(shares)
                for e, token in enumerate(token for token in tokens for _ in range(PER_CONCEPT))
            },
        )
    toy.refresh()
    found = by(toy.query("between_concepts"), "prompt_scheme", "method_id")
    figures = ("correlation", "correlation_low", "correlation_by_sample", "error", "top_1", "top_2")
    assert [found["blend", "right"][name] for name in figures[:3]] == pytest.approx([1, 1, 1])
    assert [found["blend", "right"][name] for name in figures[4:]] == [1, 1]
    assert found["gpt", "right"]["error"] == 0
    assert found["gpt", "right"]["shifted_error"] is None  # whose scores are no cosines
    assert found["gpt", "right"]["top_2"] is None  # such a prompt names one concept
    assert [found["gpt", "wrong"][name] for name in figures[:4]] == pytest.approx([-1, -1, -1, 0.5])
    assert [found["gpt", "wrong"][name] for name in figures[4:]] == [0, None]


def test_without_truth_there_are_no_rows(toy):
    for name in ("between_concepts", "within_concept", "concept_calibration", "learned_concepts"):
        assert toy.query(name).num_rows == 0
    store(toy, "a", TOKENS["a"], prompts(TOKENS["a"]))
    write_scores(toy, "some", {("a/0", f"a/e{n}"): 1.0 for n in range(12)})
    toy.refresh()
    assert {row["truth"] for row in toy.query("between_concepts").to_pylist()} == {"prompt"}
    for name, given in (("between_concepts", {"learned": True}), ("within_concept", {}), ("learned_concepts", {})):
        assert toy.query(name, **given).num_rows == 0


def test_with_too_few_samples_nothing_is_known_to_be_learned(toy):
    store(toy, "b", TOKENS["b"], [("gpt", "V1*"), ("gpt", "V2*")])
    left = [("none", "", 0.0), ("concept", "b/V1*", 9.0), ("concept", "b/V2*", 9.0)]
    write_truth(toy, [("b", leave, name, [], "fixed", 0, {"b/0": loss, "b/1": 0.0}) for leave, name, loss in left])
    toy.refresh()
    found = toy.query("learned_concepts").to_pylist()
    assert [(row["own_increase"], row["noise"], row["n_own"], row["n_other"], row["is_learned"]) for row in found] == [
        (9.0, None, 1, 1, None),
        (0.0, None, 1, 1, None),
    ]


@pytest.mark.parametrize(("own", "is_learned"), [(4.2, False), (4.3, True)])
def test_the_gate_is_three_standard_deviations(toy, own, is_learned):
    store(toy, "b", TOKENS["b"], [("gpt", "V1*"), ("gpt", "V2*"), ("gpt", "V2*"), ("pair", "V1* V2*")])
    losses = {"b/0": own, "b/1": -1.0, "b/2": 1.0, "b/3": 100.0}  # of those without V1*: standard deviation 1.414
    nothing = dict.fromkeys(losses, 0.0)
    left = [("none", "", nothing), ("concept", "b/V1*", losses), ("concept", "b/V2*", nothing)]
    write_truth(toy, [("b", leave, name, [], "fixed", 0, of) for leave, name, of in left])
    toy.refresh()
    [found, _] = toy.query("learned_concepts").to_pylist()
    assert (found["own_increase"], found["noise"], found["is_learned"]) == (own, pytest.approx(2**0.5), is_learned)


def test_a_model_of_one_concept_has_nothing_to_tell_apart(toy):
    store(toy, "one", ["V1*"], [("gpt", "V1*")], several=True)
    write_scores(toy, "some", {("one/0", f"one/e{n}"): 1.0 for n in range(PER_CONCEPT)})
    toy.refresh()
    assert toy.sql("SELECT truth, share FROM concept_truth").to_pylist() == [{"truth": "prompt", "share": 1.0}]
    assert toy.sql("FROM concept_scores").num_rows == 0


# --- prompts ----------------------------------------------------------------------------------------------------------

ODD = [
    '("a V1* cat", "a V2* dog").blend(0.75, 0.25)',
    '("V1*", "a V1* V2*", "none").blend(1, 2e0, 0.5)',
    ' \t\n\x0b("v1*"\n,\r"V2*" ) \n.blend( 1 ,\n3 )\n',
    r'("a \"V1*\" \\", "V\u0032* \/ é").blend(1, 1)',
    r'("\ud83d\ude00 V1*", "V2*").blend(1, 3)',
    r'("\ud83d V1*", "V2*").blend(1, 3)',
    r'("\u0000V1*", "V2*").blend(1, 3)',
    r'("\x V1*", "V2*").blend(1, 3)',
    '("", "V2*").blend(1, 3)',
    '("V1*", "V2*",).blend(1, 3)',
    '("V1*", "V2*").blend(1, 3,)',
    '("V1*", "V2*").blend(1, 3) and V1*',
    'V1*\n("V1*", "V2*").blend(1, 3)',
    '("V1*").blend(1)',
    '("V1*", "V2*").blend(1)',
    '("V1*", "V2*").blend()',
    '("V1*", "V2*").blend(1, 0)',
    '("V1*", "V2*").blend(1, 1e-999)',
    '("V1*", "V2*").blend(1, 1e999)',
    '("V1*", "V2*").blend(1e308, 1.5e308)',
    '("V1*", "V2*").blend(1, -1)',
    '("V1*", "V2*").blend(1, NaN)',
    '("V1*", "V2*").blend(1, Infinity)',
    '("V1*", "V2*").blend(1, true)',
    '("V1*", "V2*").blend(1, 01)',
    '("V1*", "V2*").blend(1, .5)',
    '("V1*", "V2*").blend(1, 1.)',
    '("V1*", "V2*").blend("1", "3")',
    '("V1*", 2).blend(1, 3)',
    '("V1*", ["V2*"]).blend(1, 3)',
    "('V1*', 'V2*').blend(1, 3)",
    '("V1*\n", "V2*").blend(1, 3)',
    '("V1*\t", "V2*").blend(1, 3)',
    '("V1*", "V2*").blend(1, 3)", "V2*").blend(1, 3)',
    '("V1* (V2*)", "V2*).blend(1, 3)").blend(1, 3)',
    '\u00a0("V1*", "V2*").blend(1, 3)',
    '("V1*",\u00a0"V2*").blend(1, 3)',
    '("V1*",\x0c"V2*").blend(1, 3)',
    "V1*V2*",
    "",
]
TROUBLE = [
    *"()[]{},.:*\"'\\/ 01eE+-uVv\n\r\t\x0b\x0c\u00a0\u2028\u0661é😀",
    "\\u0031",
    "\\ud800",
    ").blend(",
    "V2*",
    '", "',
]


def altered(prompt, chance):
    """The prompt with one or two characters more, fewer or others."""
    for _ in range(chance.randint(1, 2)):
        place = chance.randrange(len(prompt) + 1)
        prompt = prompt[:place] + chance.choice(["", *TROUBLE]) + prompt[place + chance.randint(0, 1) :]
    return prompt


def test_blends_are_read_in_sql_as_in_python(toy):
    chance = random.Random(1)
    texts = ODD + [altered(chance.choice(ODD[:5]), chance) for _ in range(1500)]
    store(toy, "b", TOKENS["b"], [("user", text) for text in texts])
    toy.refresh()
    found = by(toy.sql("SELECT sample_id, concept_id, share FROM concept_truth"), "sample_id", "concept_id")
    is_blend = [len(parts_of(text)) > 1 for text in texts]
    assert min(sum(is_blend[len(ODD) :]), len(texts) - sum(is_blend)) > 250
    for n, text in enumerate(texts):
        shares = [found[f"b/{n}", f"b/{token}"]["share"] for token in TOKENS["b"]]
        assert shares == pytest.approx(list(shares_of(text, TOKENS["b"]).values())), text


def test_a_sample_without_a_prompt_has_no_prompt_truth(toy):
    store(toy, "b", TOKENS["b"], [("gpt", None), ("gpt", "a V1*")])
    toy.refresh()
    found = by(toy.sql("SELECT sample_id, concept_id, share FROM concept_truth"), "sample_id", "concept_id")
    assert values(found) == {("b/1", "b/V1*"): (1.0,), ("b/1", "b/V2*"): (0.0,)}


# --- ranks and intervals --------------------------------------------------------------------------------------------


def test_an_average_rank_is_that_of_a_group_with_ties_shared(toy):
    chance = random.Random(0)
    rows = [(chance.choice("ab"), chance.choice([None, 1]), chance.randrange(6) / 2) for _ in range(60)]
    table = pa.table(dict(zip(("one", "other", "figure"), map(list, zip(*rows, strict=True)), strict=True)))
    found = toy.sql(
        "SELECT *, average_rank(figure, (one, other)) AS rank FROM rows", relations={"rows": table}
    ).to_pylist()
    for row in found:
        group = [figure for one, other, figure in rows if (one, other) == (row["one"], row["other"])]
        below, same = sum(each < row["figure"] for each in group), group.count(row["figure"])
        assert row["rank"] == below + (same + 1) / 2


@pytest.mark.parametrize("figures", [[0.5], [1.0, 4.0], [0.1, 0.9, 0.4, 0.4, 2.0, -3.0, 8.0]])
def test_an_interval_has_the_draws_of_bootstrap_draws(toy, figures):
    [found] = toy.sql("SELECT bootstrap_interval($figures, 300, 7) AS found", {"figures": figures})["found"].to_pylist()
    assert (found["low"], found["high"]) == pytest.approx(interval(figures, 300, 7))
    statement = """
        WITH means AS (
            SELECT avg($figures[(hash % len($figures))::BIGINT + 1]) AS mean
            FROM bootstrap_draws(len($figures), 300, 7)
            GROUP BY replicate
        )
        SELECT quantile_cont(mean, 0.025) AS low, quantile_cont(mean, 0.975) AS high FROM means
    """
    assert toy.sql(statement, {"figures": figures}).to_pylist() == [pytest.approx(found)]


def test_an_interval_of_nothing_is_null(toy):
    statement = "SELECT bootstrap_interval(list(x), 10, 0) AS found FROM (SELECT 1.0 AS x WHERE false)"
    assert toy.sql(statement)["found"].to_pylist() == [{"low": None, "high": None}]


def test_the_report_shows_truth_and_concepts(written):
    pytest.importorskip("jinja2")
    from attrdb.pages import report

    db, _ = written
    page = report.render(db, report.figures(db))
    for title in ("What models owe to their exemplars", "Between the concepts of a model", "Within a concept"):
        assert f">{title}</h2>" in page
    assert "Without one exemplar, fixed draws" in page
    assert "Truth: what the prompt names" in page
    for row in db.query("within_concept").to_pylist():
        assert fixed(row["correlation"], 3) in page.partition('id="within"')[2]
