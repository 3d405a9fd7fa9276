"""The loss and its gradients against a plain double loop in float64; the maps with torch and without."""

import numpy as np
import pytest
import torch

from attrdb.errors import InvalidValue
from attrdb.search.mapper import Mapper
from attrdb.training.objective import STORED_FORMS, Maps, contrastive_loss, regularizer


def unit(rng, n, dimension):
    x = rng.standard_normal((n, dimension))
    return torch.tensor(x / np.linalg.norm(x, axis=1, keepdims=True), requires_grad=True)


def slow_loss(t, s, v):
    """Eq. 3, term by term."""
    n = len(t)
    total = 0.0
    for i in range(n):
        own = torch.exp(torch.dot(t[i], s[i]) / v)
        over_samples = sum(torch.exp(torch.dot(t[i], s[j]) / v) for j in range(n))
        over_exemplars = sum(torch.exp(torch.dot(t[j], s[i]) / v) for j in range(n))
        total = total - (torch.log(own / over_samples) + torch.log(own / over_exemplars))
    return total / n


@pytest.mark.parametrize("v", [1.0, 0.1])
@pytest.mark.parametrize("n", [2, 7])
def test_the_loss_and_its_gradients_are_those_of_a_double_loop(n, v):
    rng = np.random.default_rng(n)
    t, s = unit(rng, n, 5), unit(rng, n, 5)
    fast, slow = contrastive_loss(t, s, v), slow_loss(t, s, v)
    assert fast.item() == pytest.approx(slow.item(), rel=1e-12)
    for one, other in zip(torch.autograd.grad(fast, (t, s)), torch.autograd.grad(slow, (t, s)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_loss_by_hand():
    """Two pairs at right angles: each own term is e, each other one 1."""
    t = s = torch.eye(2, dtype=torch.float64)
    assert contrastive_loss(t, s, 1.0).item() == pytest.approx(-2 * np.log(np.e / (np.e + 1)))


def slow_deviation(w):
    """||W^T W - I||_F, entry by entry."""
    n, total = len(w), 0.0
    for i in range(n):
        for j in range(n):
            entry = sum(w[k, i] * w[k, j] for k in range(n)) - float(i == j)
            total = total + entry**2
    return torch.sqrt(total)


def test_the_regularizer_and_its_gradients_are_those_of_a_double_loop():
    maps = Maps("affine", 4).double()
    rng = np.random.default_rng(0)
    for side in maps.values():
        side.weight.data += torch.tensor(rng.standard_normal((4, 4)))
    weights = [maps[side].weight for side in ("exemplar", "sample")]
    fast, slow = regularizer(maps), (slow_deviation(weights[0]) + slow_deviation(weights[1])) / 2
    assert fast.item() == pytest.approx(slow.item(), rel=1e-12)
    for one, other in zip(torch.autograd.grad(fast, weights), torch.autograd.grad(slow, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", [form for form in STORED_FORMS if form != "released-mlp"])
def test_a_mapper_starts_at_the_identity(form):
    maps = Maps(form, 6)
    x = unit(np.random.default_rng(0), 5, 6).detach().float()
    for side in maps.values():
        torch.testing.assert_close(side(x), x)
    assert regularizer(maps).item() == 0
    assert torch.isfinite(torch.autograd.grad(regularizer(maps), list(maps.parameters()), allow_unused=True)[0]).all()


@pytest.mark.parametrize("form", STORED_FORMS)
def test_what_torch_trains_numpy_applies(form):
    maps = Maps(form, 6)
    torch.manual_seed(1)
    for side in maps.values():
        for _ in range(3):
            side(torch.randn(20, 6) + 1)  # sets the running means of a batch normalization
    for parameter in maps.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    mapper = Mapper("m", "toy_6", maps.eval().form, maps.arrays())
    x = unit(np.random.default_rng(0), 5, 6).detach().float()
    for side, mapped in (("exemplar", mapper.exemplars), ("sample", mapper.samples)):
        np.testing.assert_allclose(mapped(x.numpy()), maps[side](x).detach().numpy(), atol=1e-6)
    [(ids, features)] = mapper.candidates([(np.array(["a"]), x.numpy()[:1])])
    np.testing.assert_array_equal(features, mapper.exemplars(x.numpy()[:1]))
    assert ids == ["a"]


def test_the_released_forms():
    """A gain without a bias, and the two layers of the authors' code, 512 and 256 wide, written out."""
    gain = Maps("released-gain", 6)
    assert [name for name, _ in gain.named_parameters()] == ["exemplar.gain", "sample.gain"]
    assert not gain.arrays()["sample.bias"].any()
    maps, x = Maps("released-mlp", 300).eval(), unit(np.random.default_rng(0), 5, 300).detach().float()
    layers = maps["sample"]
    assert (layers.first.out_features, layers.second.out_features) == (512, 256)
    wanted = layers.second(torch.relu(layers.norm(layers.first(x))))
    found = Mapper("m", "toy_300", maps.form, maps.arrays()).samples(x.numpy())
    assert not found[:, 256:].any()
    np.testing.assert_allclose(found[:, :256], torch.nn.functional.normalize(wanted).detach(), atol=1e-6)
    assert regularizer(maps).item() == 0


def test_a_linear_map_of_a_gain_is_regularized_as_its_matrix():
    gain, affine = Maps("gain", 3).double(), Maps("affine", 3).double()
    values = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    for one, other in zip(gain.values(), affine.values(), strict=True):
        one.gain.data.copy_(values)
        other.weight.data.copy_(torch.diag(values))
    assert regularizer(gain).item() == pytest.approx(regularizer(affine).item())


def test_mappers_that_cannot_be():
    with pytest.raises(
        InvalidValue, match="form is 'cubic'; it must be affine, gain, mlp, released-gain, released-mlp"
    ):
        Maps("cubic", 3)
    arrays = Maps("affine", 3).arrays()
    with pytest.raises(
        InvalidValue, match=r"of form 'gain' has the arrays .*; it must have exemplar\.bias, exemplar\.gain"
    ):
        Mapper("m", "toy", "gain", arrays)
    mapper = Mapper("m", "toy", "affine", {name: 0 * value for name, value in arrays.items()})
    with pytest.raises(InvalidValue, match="makes a feature that is zero or not finite; retrain it"):
        mapper.samples(np.ones((1, 3), np.float32))
