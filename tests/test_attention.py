"""Attention that shares prompts equals that of diffusers, in what it computes and in its gradients."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.normalization import RMSNorm

from attrdb.ingest.customize.attention import PromptAttention, use_prompt_attention
from attrdb.ingest.customize.base_model import load_base_model


@pytest.fixture
def unet(tiny_base):
    return load_base_model(str(tiny_base)).pipeline.unet


def given(n, n_states):
    torch.manual_seed(0)
    return torch.randn(n, 4, 8, 8), torch.randint(1000, (n,)), torch.randn(n_states, 7, 32, requires_grad=True)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("n_states", [1, 3])
def test_it_computes_what_diffusers_does(unet, fused, n_states):
    slow = copy.deepcopy(unet)
    slow.set_attn_processor(AttnProcessor2_0())
    assert use_prompt_attention(unet, fused)
    noisy, times, states = given(3, n_states)
    found = []
    for net, shown in ((unet, states), (slow, states.expand(3, -1, -1))):
        weight = net.up_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight.requires_grad_(True)
        out = net(noisy, times, shown).sample
        found.append((out, *torch.autograd.grad(out.square().sum(), (weight, states))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_kept_keys_and_values_are_used_again(unet):
    noisy, times, states = given(3, 3)
    projected = {}
    with torch.no_grad():
        first = unet(noisy, times, states, cross_attention_kwargs={"projected": projected}).sample
        n_layers = sum(name.endswith("attn2") for name, _ in unet.named_modules())
        assert len(projected) == n_layers
        # The states are not looked at again: nothing else would be right, were they others.
        again = unet(noisy, times, torch.zeros_like(states), cross_attention_kwargs={"projected": projected}).sample
        assert torch.equal(first, again)
        assert torch.equal(first, unet(noisy, times, states).sample)


def test_layers_of_another_make_are_left_alone(unet):
    unet.set_attn_processor(AttnProcessor2_0())
    layer = unet.up_blocks[0].attentions[0].transformer_blocks[0].attn2
    layer.norm_q = RMSNorm(8, 1e-5, True)
    assert not use_prompt_attention(unet, True)
    assert not any(isinstance(one, PromptAttention) for one in unet.attn_processors.values())
