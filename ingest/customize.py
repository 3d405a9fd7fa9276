"""Custom Diffusion: fine-tune the cross-attention K and V and one new token on a few exemplars.

Source: Wang et al. 2023, section 3, after Kumari et al. 2023. Differs from them in that no regularization images are
used, and the new token starts at the mean of the category's token embeddings.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from attrdb.errors import InvalidValue
from attrdb.ingest.base_model import BaseModel
from attrdb.ingest.pictures import square

METHOD = "custom-diffusion"
TOKEN_KEY = "text_encoder.token_embedding"

Delta = dict[str, torch.Tensor]
Report = Callable[[int, int], None]  # steps done, steps in all


@dataclass(frozen=True)
class CustomizeSettings:
    """lr and steps are those of Custom Diffusion for Stable Diffusion 1.x; a base model's profile may say otherwise."""

    steps: int = 250
    batch: int = 8
    lr: float = 8e-5
    seed: int = 0


def cross_attention_weights(unet: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The K and V projections of every cross-attention layer, by parameter name."""
    return {
        name: parameter
        for name, parameter in unet.named_parameters()
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }


def add_token(pipeline: StableDiffusionPipeline, token: str, category: str) -> int:
    """Add the modifier token to tokenizer and text encoder; its id. Its embedding starts at the category's mean.

    raises: InvalidValue if the vocabulary has the token already
    """
    tokenizer, text_encoder = pipeline.tokenizer, pipeline.text_encoder
    if not tokenizer.add_tokens(token):
        raise InvalidValue(f"the base model's vocabulary has {token!r} already; choose another modifier token")
    token_id = tokenizer.convert_tokens_to_ids(token)
    like = tokenizer(category, add_special_tokens=False).input_ids or [tokenizer.eos_token_id]
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    text_encoder.requires_grad_(False)
    weight = text_encoder.get_input_embeddings().weight
    weight.data[token_id] = weight.data[like].mean(dim=0)
    return token_id


def check_prompts(pipeline: StableDiffusionPipeline, prompts: Sequence[str], token: str) -> None:
    """raises: InvalidValue for a prompt whose token lies beyond what the text encoder reads"""
    tokenizer = pipeline.tokenizer
    token_id, longest = tokenizer.convert_tokens_to_ids(token), tokenizer.model_max_length
    for prompt in prompts:
        if token_id not in tokenizer(prompt, truncation=True, max_length=longest).input_ids:
            raise InvalidValue(f"the base model reads {longest} tokens, and {token} lies beyond them in {prompt!r}")


@torch.no_grad()
def exemplar_latents(base: BaseModel, exemplars: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the latents, each (n, channels, height, width), scaled as the U-Net sees them."""
    pixels = np.stack([np.asarray(square(image, base.resolution)) for image in exemplars])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(base.device).float() / 127.5 - 1
    # One at a time: the autoencoder's activations, not its weights, are what fills a card.
    posteriors = [base.pipeline.vae.encode(one).latent_dist for one in x.split(1)]
    scale = base.pipeline.vae.config.scaling_factor
    return torch.cat([one.mean for one in posteriors]) * scale, torch.cat([one.std for one in posteriors]) * scale


def customize(
    base: BaseModel,
    exemplars: Sequence[Image.Image],
    prompt: str,
    token: str,
    category: str,
    settings: CustomizeSettings,
    report: Report = lambda done, total: None,
) -> tuple[Delta, dict]:
    """Train a customized model; the delta to the base model in float32, and figures (loss, seconds).

    The base model's pipeline is left customized: load it anew for another model. Nothing but the delta's weights moves.
    """
    started = time.monotonic()
    pipeline, device = base.pipeline, base.device
    token_id = add_token(pipeline, token, category)
    check_prompts(pipeline, [prompt], token)
    mean, deviation = exemplar_latents(base, exemplars)
    input_ids = pipeline.tokenizer(
        prompt,
        padding="max_length",
        truncation=True,
        max_length=pipeline.tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids.to(device)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    n_times = noise_scheduler.config.num_train_timesteps
    is_v = noise_scheduler.config.prediction_type == "v_prediction"

    weights = cross_attention_weights(pipeline.unet)
    for parameter in weights.values():
        parameter.requires_grad_(True)
    embedding = pipeline.text_encoder.get_input_embeddings()
    vector = embedding.weight.data[token_id].clone().requires_grad_(True)

    def with_vector(_module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        # Only the new token's row is trained: the table itself never gets a gradient.
        return torch.where((inputs[0] == token_id).unsqueeze(-1), vector.to(output.dtype), output)

    optimizer = torch.optim.AdamW([vector, *weights.values()], lr=settings.lr, weight_decay=0.01)
    generator = torch.Generator().manual_seed(settings.seed)
    losses: list[float] = []
    hook = embedding.register_forward_hook(with_vector)
    try:
        for step in range(settings.steps):
            picks = torch.randint(len(mean), (settings.batch,), generator=generator)
            shape = (settings.batch, *mean.shape[1:])
            draw, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
            t = torch.randint(n_times, (settings.batch,), generator=generator).to(device)
            x = mean[picks] + deviation[picks] * draw
            noisy = noise_scheduler.add_noise(x, noise, t)
            target = noise_scheduler.get_velocity(x, noise, t) if is_v else noise
            states = pipeline.text_encoder(input_ids).last_hidden_state.expand(settings.batch, -1, -1)
            loss = F.mse_loss(pipeline.unet(noisy, t, states).sample, target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise InvalidValue(f"training diverged at step {step + 1} (loss {losses[-1]}); lower the learning rate")
            report(step + 1, settings.steps)
    finally:
        hook.remove()
    embedding.weight.data[token_id] = vector.detach()
    delta = {f"unet.{name}": parameter.detach().cpu().clone() for name, parameter in weights.items()}
    delta[TOKEN_KEY] = vector.detach().cpu().clone()
    for parameter in weights.values():
        parameter.requires_grad_(False)
    last = losses[-max(1, len(losses) // 10) :]
    return delta, {"customize_seconds": time.monotonic() - started, "loss": sum(last) / len(last)}


def save_delta(delta: Delta, path: Path, token: str, base_hash: str) -> None:
    """Write the delta as safetensors, with what it belongs to in the file's metadata."""
    made = {"method": METHOD, "token": token, "base_model_hash": base_hash}
    # One entry: safetensors writes several in any order, and equal weights would have different hashes.
    save_file(delta, path, metadata={"attrdb": json.dumps(made)})


def load_delta(path: Path) -> Delta:
    """raises: InvalidValue for a file that is no delta"""
    try:
        delta = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InvalidValue(f"customized weights {path} cannot be read: {error}") from error
    if TOKEN_KEY not in delta:
        raise InvalidValue(f"customized weights {path} have no {TOKEN_KEY!r}; they are not from {METHOD}")
    return delta


def apply_delta(base: BaseModel, delta: Delta, token: str, category: str) -> None:
    """Turn a fresh base model into the customized one.

    raises: InvalidValue if the delta was made for another architecture
    """
    weights = cross_attention_weights(base.pipeline.unet)
    given = {name.removeprefix("unet."): value for name, value in delta.items() if name != TOKEN_KEY}
    if given.keys() != weights.keys() or any(given[name].shape != weights[name].shape for name in given):
        raise InvalidValue(
            f"the customized weights do not fit base model {base.name!r}; name the one they were made from"
        )
    for name, value in given.items():
        weights[name].data.copy_(value)
    token_id = add_token(base.pipeline, token, category)
    base.pipeline.text_encoder.get_input_embeddings().weight.data[token_id] = delta[TOKEN_KEY].to(base.device)
