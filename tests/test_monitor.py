"""Monitoring a customization: rows that add up to what the model became, and a model that is the same, bit for bit."""

from collections import defaultdict
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Recorder
from diffusers.models.attention_processor import Attention
from test_customize_golden import CASES, EXEMPLARS, PRIOR, STEPS, Case
from test_customize_observer import digest

from attrdb.errors import InvalidValue
from attrdb.ingest.customize import customize, customizers
from attrdb.ingest.customize.base_model import load_base_model
from attrdb.ingest.customize.customize import TOKEN_KEY
from attrdb.ingest.monitor.changes import CAUSES, Changes, Momentum
from attrdb.ingest.monitor.flat import Flat
from attrdb.ingest.monitor.monitor import Monitor, Names
from attrdb.ingest.monitor.slot_gradients import SlotGradients
from attrdb.ingest.options import MONITOR_LEVELS

METHODS = tuple(customizers.BUILT_IN)


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base_model(str(tiny_base))


def prompts_of(case):
    return ["V* vase", "a picture of V* art"] if case.prompts == "each" else ["V* vase"]


@pytest.mark.parametrize("case", [case for case in CASES if case.augment != "strong"], ids=lambda case: case.name)
def test_a_monitored_model_is_the_same(base, case):
    assert digest(*case.customize(base, observer=Monitor("probes"))) == digest(*case.customize(base))
    networks = (base.pipeline.unet, base.pipeline.text_encoder)
    assert not any(module._forward_hooks for network in networks for module in network.modules())


@pytest.mark.parametrize("level", MONITOR_LEVELS[1:3])
def test_it_is_the_same_at_every_level(base, level):
    case = Case("custom-diffusion", "placed", True, True, "each")
    assert digest(*case.customize(base, observer=Monitor(level))) == digest(*case.customize(base))


@pytest.mark.parametrize("method", METHODS)
def test_in_bf16_it_is_the_same_and_adds_up(base, method):
    """The frozen weights are in bf16 then, and what is booked is not."""
    case = Case(method, "none", True, True, "each")
    base.precision = "bf16"
    try:
        monitor = Monitor("probes")
        assert digest(*case.customize(base, observer=monitor)) == digest(*case.customize(base))
        assert sum(row.progress for row in monitor.rows) == pytest.approx(1, abs=1e-4)
        assert max(abs(row.progress) for row in monitor.rows if row.cause == "rest") < 0.05
    finally:
        base.precision = "float32"


def test_captions_that_are_the_same_to_the_tokenizer(base):
    """And more of them than are looked at."""
    captions = [f"a {'Vase' if number % 2 else 'vase'} {'very ' * (number // 2)}" for number in range(20)]
    images = [EXEMPLARS[0].rotate(9 * number) for number in range(20)]
    settings = customize.CustomizeSettings(steps=4, batch=2, lr=0.01)
    monitor = Monitor("probes")
    customize.customize(base, images, captions, None, "vase", settings, observer=monitor)
    base.restore()
    assert sum(row.progress for row in monitor.rows) == pytest.approx(1, abs=1e-5)


def test_a_monitor_that_fails_leaves_no_hook(base, monkeypatch):
    for place in ("_begin", "finish"):
        monkeypatch.setattr(Changes, place, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Case("custom-diffusion", "none", False, True, "shared").customize(base, observer=Monitor("changes"))
        monkeypatch.undo()
        networks = (base.pipeline.unet, base.pipeline.text_encoder)
        assert not any(module._forward_hooks for network in networks for module in network.modules())


def of_each_slot(slots, flat, n_slots):
    """(n_slots, *shape) by parameter"""
    gradients = torch.zeros(n_slots, flat.size)
    for slot, row in enumerate(gradients):
        slots.add([slot], [(row, 1.0)])
    return flat.views(gradients)


class Slots(Recorder):
    """Keeps the gradients of every slot, and those of the step."""

    def start(self, run):
        super().start(run)
        self.watched, self.pairs = SlotGradients(run), []

    def before_update(self, step):
        super().before_update(step)
        slots = self.watched.take(step)
        of_slots = of_each_slot(slots, self.watched.flat, len(step.images))
        self.pairs.append((of_slots, slots.norms(), self.run.gradients()))

    def end(self, error):
        super().end(error)
        self.watched.remove()


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("prompts", ["shared", "each"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_slots_add_up_to_those_of_the_step(base, method, prompts, prior):
    slots = Slots()
    Case(method, "none", prior, True, prompts).customize(base, observer=slots)
    assert len(slots.pairs) == STEPS
    for of_slots, norms, gradients in slots.pairs:
        squares = sum(gradient.flatten(1).square().sum(dim=1) for gradient in of_slots.values())
        torch.testing.assert_close(norms, squares.sqrt(), rtol=1e-4, atol=0)
        watched = gradients.keys() - {TOKEN_KEY} or {TOKEN_KEY}
        assert of_slots.keys() == watched
        for name in watched:
            gradient = gradients[name]
            scale = gradient.abs().max().item()
            torch.testing.assert_close(of_slots[name].sum(dim=0), gradient, rtol=1e-4, atol=1e-5 * scale)


def r_of(base, prompts):
    """K and V of the prompts' tokens, as the U-Net computes them now, by its own layers."""
    states = customize.encode_prompts(base, prompts)
    rows = [state[: len(base.pipeline.tokenizer(prompt).input_ids)] for prompt, state in states.items()]
    layers = [
        layer
        for module in base.pipeline.unet.modules()
        if isinstance(module, Attention) and module.is_cross_attention
        for layer in (module.to_k, module.to_v)
    ]
    with torch.no_grad():
        return torch.cat([layer(torch.cat(rows)) for layer in layers], dim=-1)


class Watched(Monitor):
    """Notes K and V of the prompts, too, as the layers compute them, before the first step and after the last."""

    def start(self, run):
        super().start(run)
        self.run, self.r = run, [r_of(run.base, list(dict.fromkeys(run.prompts)))]

    def end(self, error):
        self.r.append(r_of(self.run.base, list(dict.fromkeys(self.run.prompts))))
        super().end(error)


@pytest.mark.parametrize("case", [case for case in CASES if case.augment == "none"], ids=lambda case: case.name)
def test_rows_add_up_to_what_the_model_became(base, case):
    watched = Watched("changes")
    case.customize(base, observer=watched)
    changes = watched.changes
    torch.testing.assert_close(changes.start[0], watched.r[0])
    torch.testing.assert_close(changes.at_ends[max(changes.at_ends)][0], watched.r[1])
    rows = watched.rows
    assert sum(row.progress for row in rows) == pytest.approx(1, abs=1e-5)
    rest = [row.progress for row in rows if row.cause == "rest"]
    assert len(rest) == min(STEPS, 4)
    assert max(map(abs, rest)) < 1e-5
    # Not along one direction alone: the changes themselves add up.
    booked = sum(changes.by_weights[0]).sum(dim=0) + sum(changes.by_token[0]).sum(dim=0)
    whole = watched.r[1] - watched.r[0]
    assert (booked - whole).norm() < 1e-5 * whole.norm()
    causes = {row.cause for row in rows}
    assert causes <= set(CAUSES)
    assert ("token" in causes) == (TOKEN_KEY in changes.run.parameters)
    assert ("regularization" in causes) == case.prior
    exemplars = [row for row in rows if row.image is not None]
    assert {row.image for row in exemplars} == {0, 1}
    assert sum(row.n_visits for row in exemplars) == STEPS * 3


def test_the_token_s_own_part_is_shared_by_how_far_each_image_moved_it(base):
    """A model that trains the token alone: K and V change by nothing else."""
    monitor = Monitor("changes")
    Case("textual-inversion", "none", False, True, "shared").customize(base, observer=monitor)
    by_cause = defaultdict(float)
    for row in monitor.rows:
        by_cause[row.cause] += row.progress
    assert by_cause.keys() == {"token", "decay", "rest"}
    assert by_cause["token"] + by_cause["decay"] == pytest.approx(1, abs=1e-5)
    assert {row.image for row in monitor.rows if row.progress and row.cause == "token"} == {0, 1}


class OneImageAtATime(Recorder):
    """The slots' gradients, summed by image, by hand."""

    def start(self, run):
        super().start(run)
        self.changes = Changes(run, [list(run.prompts)])
        self.by_image = defaultdict(lambda: defaultdict(float))

    def before_update(self, step):
        super().before_update(step)
        slots = self.changes.gradients.take(step)
        self.changes.gradients.take = lambda step: slots
        taken = of_each_slot(slots, self.changes.flat, len(step.images))
        for slot, (image, is_exemplar) in enumerate(zip(step.images.tolist(), step.is_exemplar.tolist(), strict=True)):
            for name, of_slots in taken.items():
                self.by_image[name][image if is_exemplar else None] += of_slots[slot]
        self.changes.before_update(step)
        del self.changes.gradients.take

    def after_update(self, step):
        self.changes.after_update(step)

    def end(self, error):
        super().end(error)
        self.changes.close()


def monitored(base, prompts):
    monitor = Monitor("changes")
    Case("custom-diffusion", "none", True, True, prompts).customize(base, observer=monitor)
    return monitor


@pytest.mark.parametrize("prompts", ["shared", "each"])
def test_gradients_that_are_made_at_once_give_the_same_rows(base, prompts, monkeypatch):
    """As they are for methods that train other layers than K and V."""
    factored = monitored(base, prompts)
    monkeypatch.setattr("attrdb.ingest.monitor.slot_gradients.all_read_prompt", lambda *_: False)
    dense = monitored(base, prompts)
    assert (factored.changes.gradients.is_factored, dense.changes.gradients.is_factored) == (True, False)
    for one, other in zip(factored.rows, dense.rows, strict=True):
        assert (one.cause, one.image, one.quarter) == (other.cause, other.image, other.quarter)
        assert one.progress == pytest.approx(other.progress, abs=1e-5)
        assert (one.norm or 0) == pytest.approx(other.norm or 0, rel=1e-4, abs=1e-7)
    norms = [[row["gradient_norm"] for row in monitor.steps] for monitor in (factored, dense)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    for name, sums in factored.gradient_sums.items():
        torch.testing.assert_close(sums, dense.gradient_sums[name], rtol=1e-4, atol=1e-7)


def test_a_step_may_pass_over_the_layers_more_than_once_or_never():
    torch.manual_seed(0)
    watched = object.__new__(SlotGradients)
    watched.n_slots, watched.is_factored, watched.passes = 2, True, []
    watched.flat = Flat({"k": torch.zeros(3, 4), "v": torch.zeros(2, 4)})
    watched.dense = torch.empty(0, watched.flat.size)
    first, second = torch.randn(2, 5, 4), torch.randn(1, 7, 4)  # the second prompt is shown to both slots
    k, v, later = torch.randn(2, 5, 3), torch.randn(2, 5, 2), torch.randn(2, 7, 2)
    for name, gradients, given in (("k", k, first), ("v", v, first), ("v", later, second)):
        watched._keep(name, gradients, given)
    slots = watched.take(None)
    found = of_each_slot(slots, watched.flat, 2)
    torch.testing.assert_close(found["k"], k.mT @ first)
    torch.testing.assert_close(found["v"], v.mT @ first + later.mT @ second)
    squares = sum(gradients.flatten(1).square().sum(dim=1) for gradients in found.values())
    torch.testing.assert_close(slots.norms(), squares.sqrt())
    assert not watched.take(None).norms().any()


def test_momentum_is_a_running_mean_of_each_image_s_gradients(monkeypatch):
    """Rescaled every few steps, and with places for two of four images besides the regularization images'."""
    monkeypatch.setattr("attrdb.ingest.monitor.changes.MEMORY", 0)
    monkeypatch.setattr("attrdb.ingest.monitor.changes.LEAST_FACTOR", 0.5)
    run = SimpleNamespace(settings=SimpleNamespace(batch=1), n_exemplars=4, prior_prompts=("a vase",))
    run.base = SimpleNamespace(device="cpu")
    momentum, beta, expected = Momentum(run, 3), 0.9, {}
    chance = np.random.default_rng(0)
    for _ in range(60):
        drawn = {int(chance.integers(4)): torch.randn(3), 4: torch.randn(3)}
        for row, (vector, factor) in momentum.decayed(drawn, beta).items():
            vector.add_(drawn[row], alpha=factor)
        expected = {row: beta * expected.get(row, torch.zeros(3)) for row in momentum.rows}
        for row, gradient in drawn.items():
            expected[row] = expected[row] + (1 - beta) * gradient
        for row, factor, vector in zip(momentum.rows, momentum.factors, momentum.of_images, strict=True):
            torch.testing.assert_close(factor * vector, expected[row])
    assert len(momentum.rows) == 3


@pytest.mark.parametrize("method", METHODS)
def test_sums_of_gradients_are_those_of_the_image_s_slots(base, method):
    by_hand = OneImageAtATime()
    Case(method, "none", True, True, "each").customize(base, observer=by_hand)
    for name, sums in by_hand.changes.gradient_sums.items():
        for image in (0, 1):
            torch.testing.assert_close(sums[image], by_hand.by_image[name][image])


def test_images_that_there_is_no_memory_for_are_the_rest(base, monkeypatch):
    """Still everything adds up, and what was let go of is said."""
    monkeypatch.setattr("attrdb.ingest.monitor.changes.MEMORY", 0)
    images = [EXEMPLARS[0].rotate(angle) for angle in range(0, 90, 5)]
    settings = customize.CustomizeSettings(steps=12, batch=2, lr=0.01)
    monitor = Monitor("changes")
    customize.customize(base, images, "V* vase", "V*", "vase", settings, observer=monitor)
    base.restore()
    assert len(monitor.changes.momentum.rows) == 4
    assert sum(row.progress for row in monitor.rows) == pytest.approx(1, abs=1e-5)
    assert sum(abs(row.progress) for row in monitor.rows if row.cause == "rest") > 1e-3


def names_of(case):
    return Names("m", ["m/a", "m/b"], ["corpus/1"] * len(PRIOR), ["m/V*" if case.token else None])


def test_tables_of_a_run(base):
    case = Case("custom-diffusion", "mild", True, True, "each")
    monitor = Monitor("probes")
    _, losses = case.customize(base, observer=monitor)
    tables = monitor.tables(names_of(case))
    steps = tables["monitor_steps"].to_pylist()
    assert len(steps) == STEPS * 6
    assert {row["image_id"] for row in steps if row["is_exemplar"]} == {"m/a", "m/b"}
    assert {row["image_id"] for row in steps if not row["is_exemplar"]} == {"corpus/1"}
    for number, loss in enumerate(losses):
        slots = [row for row in steps if row["step"] == number]
        parts = [np.mean([row["loss"] for row in slots if row["is_exemplar"] is kind]) for kind in (True, False)]
        assert parts[0] + 0.5 * parts[1] == pytest.approx(loss, rel=1e-5)
        assert all(row["gradient_norm"] > 0 for row in slots)
    table = tables["attribution_tables"].to_pylist()
    assert [(row["measure"], row["image_id"]) for row in table] == [
        (measure, image_id)
        for measure in ("progress", "progress per visit", "change norm")
        for image_id in ("m/a", "m/b")
    ]
    changes = tables["monitor_changes"].to_pylist()
    for row in table[:2]:
        mine = [one for one in changes if one["image_id"] == row["image_id"]]
        assert row["value"] == pytest.approx(sum(one["progress"] for one in mine))
        assert row["n_visits"] == sum(one["n_visits"] for one in mine)
    for first, second in (table[:2], table[2:4], table[4:]):
        assert first["share"] + second["share"] == pytest.approx(1)
    mean_visits = np.mean([row["n_visits"] for row in table[:2]])
    assert table[2]["value"] == pytest.approx(table[0]["value"] / table[0]["n_visits"] * mean_visits)


def test_probes_follow_the_model(base):
    """At the same step two runs have the same probes; from step to step they move; the token is attended to."""
    case = Case("custom-diffusion", "none", False, True, "shared")
    tables = []
    for _ in range(2):
        monitor = Monitor("probes")
        case.customize(base, observer=monitor)
        tables.append(monitor.tables(names_of(case))["monitor_probes"])
    assert tables[0].equals(tables[1])
    rows = tables[0].to_pylist()
    n_settings = 6
    assert sorted({row["step"] for row in rows}) == sorted({round(STEPS * number / 10) for number in range(11)})
    of_one = [row for row in rows if (row["timestep"], row["seed"]) == (500, 0)]
    assert len(of_one) == len(rows) / n_settings
    for before, after in pairwise(of_one):
        assert before["vector"] != after["vector"]
        assert before["attention"] != after["attention"]
    assert all(0 < value < 1 for row in rows for value in row["attention"])


def test_without_a_token_there_is_no_attention_to_it(base):
    case = next(case for case in CASES if not case.token)
    monitor = Monitor("probes")
    case.customize(base, observer=monitor)
    tables = monitor.tables(names_of(case))
    assert set(tables["monitor_probes"]["attention"].to_pylist()) == {None}
    assert set(tables["monitor_changes"]["concept_id"].to_pylist()) == {None}
    assert sum(tables["monitor_changes"]["progress"].to_pylist()) == pytest.approx(1, abs=1e-5)


class TrainsANorm(customizers.CustomDiffusion):
    name = "norms"

    def attach(self, unet):
        return {name: weight for name, weight in unet.named_parameters() if "norm" in name}


def test_a_method_that_cannot_be_watched_is_refused_before_the_first_step(base, monkeypatch):
    monkeypatch.setitem(customizers.BUILT_IN, "norms", TrainsANorm)
    case = Case("norms", "none", False, True, "shared")
    told = []
    with pytest.raises(InvalidValue, match=r"method 'norms' trains unet\..*norm.*; give --monitor steps"):
        case.customize(base, observer=Monitor("changes"), report=lambda *words: told.append(words))
    assert not [words for words in told if words[0] == "customize" and words[1]]
    monitor = Monitor("steps")
    case.customize(base, observer=monitor)
    assert len(monitor.tables(names_of(case))["monitor_steps"]) == STEPS * 3


# --- several concepts -------------------------------------------------------------------------------------------------

PROMPTS_OF_TWO = [["V1* vase"], ["a picture of V2* art"]]


def customize_two(base, method, observer):
    images = [*EXEMPLARS, *(image.rotate(90) for image in EXEMPLARS)]
    prompts = [PROMPTS_OF_TWO[number % 2][0] for number in range(4)]
    settings = customize.CustomizeSettings(steps=6, batch=3, lr=0.01, seed=2)
    delta, figures = customize.customize(
        base, images, prompts, ["V1*", "V2*"], ["vase", "art"], settings, method=method, observer=observer
    )
    base.restore()
    return delta, figures["losses"]


@pytest.mark.parametrize("method", METHODS)
def test_each_concept_of_a_model_of_several_adds_up(base, method):
    monitor = Monitor("probes", PROMPTS_OF_TWO)
    assert digest(*customize_two(base, method, monitor)) == digest(*customize_two(base, method, None))
    for concept in (0, 1):
        rows = [row for row in monitor.rows if row.concept == concept]
        assert sum(row.progress for row in rows) == pytest.approx(1, abs=1e-5)
        assert max(abs(row.progress) for row in rows if row.cause == "rest") < 1e-5
    assert {probe.concept for probe in monitor.probes.probes} == {0, 1}


def test_a_token_that_is_trained_alone_is_moved_by_its_own_images(base):
    """The images of one concept do not touch the token of the other."""
    monitor = Monitor("changes", PROMPTS_OF_TWO)
    customize_two(base, "textual-inversion", monitor)
    moved = defaultdict(float)
    for row in monitor.rows:
        if row.image is not None:
            moved[row.concept, row.image] += abs(row.progress)
    assert {key for key, value in moved.items() if value} == {(0, 0), (0, 2), (1, 1), (1, 3)}
