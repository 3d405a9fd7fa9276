"""An observer sees what each step of a customization did, enough to attribute it to images, and changes nothing."""

import hashlib
import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from conftest import Recorder
from diffusers import DDPMScheduler
from test_customize_golden import CASES, EXEMPLARS, PRIOR, STEPS, Case
from test_customizers import same, weights_of

from attrdb.errors import InvalidValue
from attrdb.ingest.customize import augmentation, customize, customizers
from attrdb.ingest.customize.base_model import load_base_model


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base_model(str(tiny_base))


def digest(delta, losses):
    """sha256 of every bit of the trained weights and the losses."""
    sha = hashlib.sha256(json.dumps(losses).encode())
    for name, weight in sorted(delta.items()):
        sha.update(name.encode() + weight.numpy().tobytes())
    return sha.hexdigest()


class Clumsy(Recorder):
    """Does what an observer may do, and overwrites all that it is handed."""

    def start(self, run):
        super().start(run)
        self.use()

    def before_update(self, step):
        super().before_update(step)
        self.spoil(step)

    def after_update(self, step):
        super().after_update(step)
        self.spoil(step)

    def spoil(self, step):
        for name in ("loss", "slot_losses", "images", "views", "timesteps", "latents", "noise"):
            getattr(step, name).fill_(7)
        self.use()

    def use(self):
        run = self.run
        moments = [tensor for pair in run.moments().values() for tensor in pair]
        for tensor in (*run.weights().values(), *run.gradients().values(), *moments):
            tensor.fill_(7)
        run.optimizer_settings["lr"] = 1e9
        torch.manual_seed(3)
        states = torch.stack(list(customize.encode_prompts(run.base, run.prompts).values()))
        run.base.predict(torch.randn(len(states), 4, 8, 8), torch.tensor([500]), states)


@pytest.mark.parametrize("case", [case for case in CASES if case.augment != "mild"], ids=lambda case: case.name)
def test_an_observer_changes_no_bit(base, case):
    """Even one that overwrites what it is handed, predicts, and draws random numbers."""
    clumsy = Clumsy()
    assert digest(*case.customize(base, observer=clumsy)) == digest(*case.customize(base))
    assert len(clumsy.steps) == STEPS


def test_an_observer_is_told_in_order(base):
    recorder = Recorder()
    Case("custom-diffusion", "none", False, True, "shared").customize(base, observer=recorder)
    assert recorder.calls == ["start", *(f"{when} {n}" for n in range(STEPS) for when in ("before", "after")), "end"]
    assert recorder.error is None


def test_a_run_says_what_is_trained(base):
    recorder = Recorder()
    delta, _ = Case("custom-diffusion", "mild", True, True, "each").customize(base, observer=recorder)
    run = recorder.run
    assert (run.method, run.tokens, run.n_exemplars, run.n_views) == ("custom-diffusion", ("V*",), 2, 2)
    assert run.prompts == ("V* vase", "a picture of V* art")
    assert run.prior_prompts == ("a vase", "art")
    assert (run.settings.steps, run.settings.prior_weight) == (STEPS, 0.5)
    assert run.weights().keys() == delta.keys()
    assert run.optimizer_settings["lr"] == 0.01


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.method == "custom-diffusion" and case.token], ids=lambda case: case.name
)
def test_a_step_can_be_computed_again_from_what_its_observer_is_told(tiny_base, monkeypatch, case, prediction):
    """Latents are those of the named views; the U-Net saw them with this noise at these timesteps; the losses add up."""
    base = load_base_model(str(tiny_base))
    base.pipeline.scheduler.register_to_config(prediction_type=prediction)
    scheduler = DDPMScheduler.from_config(base.pipeline.scheduler.config)
    exemplars = augmentation.encode_views(base, EXEMPLARS, case.augment, seed=5)
    prior = augmentation.encode_views(base, PRIOR, "none", seed=5)
    inputs, predict, recorder = [], base.predict, Recorder()

    def watched(noisy, timesteps, states):
        output = predict(noisy, timesteps, states)
        inputs.append((noisy, timesteps, output.detach()))
        return output

    with monkeypatch.context() as patch:
        patch.setattr(base, "predict", watched)
        _, losses = case.customize(base, observer=recorder)
    assert len(inputs) == STEPS  # slot losses cost no forward pass of their own
    for (noisy, timesteps, output), step, loss in zip(inputs, recorder.steps, losses, strict=True):
        assert step.is_exemplar.tolist() == [True] * 3 + [False] * 3 * case.prior
        assert timesteps.equal(step.timesteps)
        assert noisy.equal(scheduler.add_noise(step.latents, step.noise, step.timesteps))
        target = step.noise
        if prediction == "v_prediction":
            target = scheduler.get_velocity(step.latents, step.noise, step.timesteps)
        for slot, is_exemplar in enumerate(step.is_exemplar):
            encoded = exemplars if is_exemplar else prior
            row = step.images[slot] * encoded.n_views + step.views[slot]
            # The posterior's own noise, which has variance 1; the distance to other views is far larger.
            squares = ((step.latents[slot] - encoded.mean) / encoded.deviation).square().mean(dim=(1, 2, 3))
            assert squares.argmin() == row
            assert squares[row].item() == pytest.approx(1, abs=0.5)
            error = (output[slot] - target[slot]).square().mean(dim=0)
            counted = error if encoded.seen is None else error[encoded.seen[row, 0] == 1]
            assert step.slot_losses[slot].item() == pytest.approx(counted.mean().item(), rel=1e-5)
        total = step.slot_losses[:3].mean()
        if case.prior:
            total = total + 0.5 * step.slot_losses[3:].mean()
        assert step.loss.item() == pytest.approx(total.item(), rel=1e-5)
        assert step.loss.item() == loss


class Bookkeeper(Recorder):
    """Keeps weights, gradients and moments of each moment of a step."""

    def start(self, run):
        super().start(run)
        assert run.moments() == {}
        assert run.gradients() == {}
        self.before, self.after = [], []

    def before_update(self, step):
        super().before_update(step)
        self.before.append((self.run.weights(), self.run.gradients(), self.run.moments()))

    def after_update(self, step):
        super().after_update(step)
        self.after.append((self.run.weights(), self.run.gradients(), self.run.moments()))

    def end(self, error):
        super().end(error)
        self.final = self.run.weights()


@pytest.mark.parametrize("method", customizers.BUILT_IN)
def test_every_change_of_the_weights_follows_from_gradients_and_moments(base, method):
    """AdamW by hand: what monitoring needs in order to share a step's change among its images."""
    keeper = Bookkeeper()
    delta, _ = Case(method, "none", False, True, "each").customize(base, observer=keeper)
    settings = keeper.run.optimizer_settings
    (beta1, beta2), lr, eps, decay = (settings[name] for name in ("betas", "lr", "eps", "weight_decay"))
    m, v = defaultdict(float), defaultdict(float)
    for number, ((weights, gradients, _), (updated, same_gradients, moments)) in enumerate(
        zip(keeper.before, keeper.after, strict=True)
    ):
        assert same(gradients, same_gradients)
        assert gradients.keys() == delta.keys()
        for name, gradient in gradients.items():
            m[name] = beta1 * m[name] + (1 - beta1) * gradient
            v[name] = beta2 * v[name] + (1 - beta2) * gradient**2
            torch.testing.assert_close(moments[name], (m[name], v[name]), rtol=1e-5, atol=1e-9)
            direction = (m[name] / (1 - beta1 ** (number + 1))) / ((v[name] / (1 - beta2 ** (number + 1))).sqrt() + eps)
            wanted = weights[name] * (1 - lr * decay) - lr * direction
            torch.testing.assert_close(updated[name], wanted, rtol=1e-5, atol=1e-6)
        if number + 1 < STEPS:
            assert same(updated, keeper.before[number + 1][0])
    assert same(keeper.final, delta)


class PerImage(Bookkeeper):
    """Gradients of K and V for each slot, from hooks on these layers.

    The states of one prompt for all are expanded over the batch behind the layer, so that each slot has a copy of its own.
    """

    def start(self, run):
        super().start(run)
        self.slot_gradients = [defaultdict(list) for _ in range(run.settings.steps)]
        self.hooks = [
            module.register_forward_hook(lambda module, inputs, output, name=name: self.keep(name, inputs[0], output))
            for name, module in run.base.pipeline.unet.named_modules()
            if name.endswith(("attn2.to_k", "attn2.to_v"))
        ]

    def keep(self, name, states, output):
        n_slots = self.run.settings.batch * (2 if self.run.prior_prompts else 1)
        states, output = (tensor.expand(n_slots, -1, -1) for tensor in (states.detach(), output))
        step = len(self.steps)

        def add(gradient):
            self.slot_gradients[step][f"unet.{name}.weight"] = gradient.transpose(1, 2) @ states  # (slots, out, in)

        output.register_hook(add)
        return output

    def end(self, error):
        super().end(error)
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("prompts", ["shared", "each"])
def test_hooks_of_an_observer_share_the_gradients_of_k_and_v_among_the_slots(base, prompts, prior):
    """They add up to the gradients of the step, and the weights are those without an observer, bit for bit."""
    case, per_image = Case("custom-diffusion", "mild", prior, True, prompts), PerImage()
    assert digest(*case.customize(base, observer=per_image)) == digest(*case.customize(base))
    for slot_gradients, (_, gradients, _) in zip(per_image.slot_gradients, per_image.before, strict=True):
        assert slot_gradients.keys() == gradients.keys() - {customize.TOKEN_KEY}
        for name, of_slots in slot_gradients.items():
            torch.testing.assert_close(of_slots.sum(dim=0), gradients[name], rtol=1e-4, atol=1e-7)
            assert not of_slots[0].allclose(of_slots[1], rtol=1e-3)
    assert not any(module._forward_hooks for module in base.pipeline.unet.modules())


@pytest.mark.parametrize(
    ("method", "moment"),
    [
        ("custom-diffusion", "start"),
        ("custom-diffusion", "before_update"),
        ("custom-diffusion", "after_update"),
        ("custom-diffusion", "end"),
        ("dreambooth-lora", "before_update"),
        ("textual-inversion", "before_update"),
    ],
)
def test_an_observer_that_raises_ends_the_training_and_leaves_the_base_model_fresh(base, method, moment, monkeypatch):
    before, recorder, case = weights_of(base), Recorder(), Case(method, "none", True, True, "each")
    wanted = digest(*case.customize(base))
    told = getattr(recorder, moment)

    def fails(argument):
        told(argument)
        if len(recorder.steps) >= 2 or moment in ("start", "end"):
            raise ZeroDivisionError("the observer's own error")

    monkeypatch.setattr(recorder, moment, fails)
    with pytest.raises(ZeroDivisionError, match="the observer's own error") as raised:
        case.customize(base, observer=recorder)
    assert recorder.calls[-1] == "end"
    assert recorder.calls.count("end") == 1
    assert recorder.error is (None if moment == "end" else raised.value)
    assert same(weights_of(base), before)
    assert "V*" not in base.pipeline.tokenizer.get_vocab()
    networks = (base.pipeline.unet, base.pipeline.text_encoder)
    assert not any(weight.requires_grad for network in networks for weight in network.parameters())
    assert not any(module._forward_hooks for network in networks for module in network.modules())
    assert digest(*case.customize(base)) == wanted


def test_an_observer_is_told_of_training_that_diverges(base):
    recorder = Recorder()
    settings = customize.CustomizeSettings(steps=12, batch=2, lr=1e30)
    with pytest.raises(InvalidValue, match="training diverged") as raised:
        customize.customize(base, EXEMPLARS, "V* vase", "V*", "vase", settings, observer=recorder)
    assert recorder.error is raised.value
    assert not np.isfinite(recorder.steps[-1].loss.item())


def test_an_observer_cannot_add_to_the_gradients_by_accident(base):
    """Its predictions carry no gradient, so that a backward pass from them fails instead of adding to the step's."""

    class Backward(Recorder):
        def before_update(self, step):
            self.run.base.predict(step.latents, step.timesteps, torch.zeros(3, 32, 32)).sum().backward()

    with pytest.raises(RuntimeError, match="does not require grad"):
        Case("custom-diffusion", "none", False, True, "shared").customize(base, observer=Backward())
