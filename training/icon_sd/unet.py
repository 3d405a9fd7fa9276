"""The U-Net and the text encoder of icon-sd, trained together with v-prediction on latents of scenes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

from attrdb.ingest.devices import is_cpu, resolved_precision
from attrdb.training.icon_sd.parts import IconSdSettings, new_text_encoder, new_unet, noise_levels
from attrdb.training.icon_sd.runs import Stage
from attrdb.training.icon_sd.scenes import Sprites, compose
from attrdb.training.icon_sd.stream import Packed, SceneBatches

REPORT_IMAGES = 12_800
FIRST_BATCHES = 32  # of new scenes, with which a pool begins
POOL = 24_576  # scenes whose latents a CPU keeps
WARM_UP = 300  # steps of each call: the optimizer may begin anew in it
RENEWED = 4  # on a CPU one scene of so many in a batch is new, the others are out of the pool


class Latents:
    """Batches of latents (b, channels, 8, 8) float32, scaled, with their captions' tokens (b, max_tokens).

    Composing and encoding a scene takes a CPU a good third of what learning from it takes. So a CPU keeps a pool of scenes
    and renews one scene of RENEWED in each batch; a scene is seen about RENEWED times. Without a pool every scene is new.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        sprites: Sprites,
        tokenizer: CLIPTokenizer,
        settings: IconSdSettings,
        first: int,
        workers: int,
        pool: int,
    ):
        self.vae, self.sprites, self.settings, self.pool = vae, sprites, settings, pool
        self.new = settings.unet_batch // RENEWED if pool else settings.unet_batch
        self.batches = SceneBatches(sprites, self.new, settings.seed + 1, first, tokenizer).loaded(workers)
        self.latents: Any = None  # tensors, once the first are added
        self.tokens: Any = None
        self.n_added = 0
        self.generator = torch.Generator().manual_seed(settings.seed + first)
        if pool:
            for _ in range(FIRST_BATCHES):
                self._add(*self._encoded(next(self.batches)))

    @torch.no_grad()
    def _encoded(self, packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        x = compose(packed, self.sprites.pixels, self.settings.size) * 2 - 1
        latents = self.vae.encode(x).latent_dist.mean
        return latents.float() * self.vae.config.scaling_factor, packed["tokens"].to(latents.device)

    def _add(self, latents: torch.Tensor, tokens: torch.Tensor) -> None:
        if self.latents is None:
            self.latents = latents.new_zeros(self.pool, *latents.shape[1:])
            self.tokens = tokens.new_zeros(self.pool, tokens.shape[1])
        rows = (torch.arange(len(latents)) + self.n_added) % self.pool
        self.latents[rows], self.tokens[rows] = latents, tokens
        self.n_added += len(latents)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        latents, tokens = self._encoded(next(self.batches))
        if not self.pool:
            return latents, tokens
        self._add(latents, tokens)
        n_old = self.settings.unet_batch - len(latents)
        picks = torch.randint(min(self.n_added, self.pool), (n_old,), generator=self.generator)
        return torch.cat([latents, self.latents[picks]]), torch.cat([tokens, self.tokens[picks]])


def train_unet(
    vae: AutoencoderKL,
    sprites: Sprites,
    tokenizer: CLIPTokenizer,
    settings: IconSdSettings,
    stage: Stage,
    device: str,
    workers: int = 0,
    compiled: bool = False,
    lr_end: float = 1.0,
) -> tuple[UNet2DConditionModel, CLIPTextModel, dict]:
    """The EMA weights of U-Net and text encoder when the stage's time is over, with the figures so far.

    compiled: by torch.compile; on a CPU that multiplies float32 only, 105 images/s instead of 66 (two cores, batch 128)
    lr_end:   the learning rate falls to this share of itself, evenly over the stage's time; 1: it stays
    """
    torch.manual_seed(settings.seed)
    unet = new_unet(settings).to(device)
    text_encoder = new_text_encoder(tokenizer, settings).to(device)
    attention: Callable[[], AbstractContextManager] = nullcontext
    if is_cpu(device):
        # Over 64 positions the fused attention's backward pass takes a third of a step: 67 images/s with it, 118 without.
        unet.set_attn_processor(AttnProcessor())
        attention = partial(sdpa_kernel, SDPBackend.MATH)
    both = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    optimizer = torch.optim.AdamW(
        both.parameters(), lr=settings.unet_lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True
    )
    ema = {name: value.detach().clone() for name, value in both.state_dict().items()}
    step, images, seconds, loss_now = 0, 0, 0.0, float("nan")
    if state := stage.load():
        both.load_state_dict(state["weights"])
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
        ema = {name: value.to(device) for name, value in state["ema"].items()}
        step, images, seconds, loss_now = state["step"], state["images"], state["seconds"], state["loss"]

    current = {name: value for name, value in both.state_dict().items() if value.is_floating_point()}
    averaged = [ema[name] for name in current]  # by name: a checkpoint may have them in another order
    predict = torch.compile(unet) if compiled else unet
    bf16 = resolved_precision("auto", device) == "bf16"
    autocast = partial(torch.autocast, torch.device(device).type, torch.bfloat16, enabled=bf16)
    signals, sigmas = (level.to(device) for level in noise_levels())
    source = Latents(vae, sprites, tokenizer, settings, step, workers, POOL if is_cpu(device) else 0)
    report_steps = max(1, REPORT_IMAGES // settings.unet_batch)
    begun, budget, first = time.monotonic(), stage.deadline - time.monotonic(), step
    losses: list[torch.Tensor] = []
    late = stage.late
    while not late:
        started = time.monotonic()
        generator = torch.Generator(device).manual_seed(settings.seed * 1_000_003 + step)
        x, tokens = source.next()
        t = torch.randint(len(signals), (len(x),), generator=generator, device=device)
        noise = torch.randn(x.shape, generator=generator, device=device)
        signal, sigma = signals[t].view(-1, 1, 1, 1), sigmas[t].view(-1, 1, 1, 1)
        with autocast(), attention():
            states = text_encoder(tokens).last_hidden_state
            v = predict(signal * x + sigma * noise, t, states).sample.float()
        loss = F.mse_loss(v, signal * noise - sigma * x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        spent = (started - begun) / budget
        for group in optimizer.param_groups:
            group["lr"] = settings.unet_lr * min(1.0, (step - first + 1) / WARM_UP) * (1 - (1 - lr_end) * spent)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(settings.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, list(current.values()), 1 - decay)
        losses.append(loss.detach())
        step += 1
        images += len(x)
        seconds += time.monotonic() - started
        late = stage.late
        if step % report_steps == 0 or late:
            loss_now = round(float(torch.stack(losses).mean()), 5)
            losses.clear()
            stage.log(images=images, loss=loss_now, seconds=round(seconds, 1))
        if stage.save_is_due or late:
            figures = {"step": step, "images": images, "seconds": seconds, "loss": loss_now}
            stage.save({"weights": both.state_dict(), "ema": ema, "optimizer": optimizer.state_dict(), **figures})
    both.load_state_dict(ema)
    figures = {"unet_steps": step, "unet_images": images, "unet_seconds": round(seconds), "unet_loss": loss_now}
    return unet.eval(), text_encoder.eval(), figures
