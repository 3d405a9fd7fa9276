"""Probes: what the U-Net makes of a concept's prompt, from fixed noise, while it is being trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import Attention

from attrdb.ingest.customize.customize import encode_prompts, token_ids
from attrdb.ingest.customize.observer import Run

N_PROBES = 10  # besides the one before the first step
TIMESTEPS = (0.2, 0.5, 0.8)  # as shares of all
SEEDS = (0, 1)


@dataclass(frozen=True)
class Probe:
    """The U-Net on one noise, by one prompt.

    vector:    (channels,): output of the middle block, mean over positions
    attention: (n_layers,): mean attention to the token, over heads and positions; None without a token
    """

    concept: int
    step: int
    timestep: int
    seed: int
    vector: list[float]
    attention: list[float] | None


class Probes:
    """Takes probes of each concept's first prompt, without a gradient; draws no random number of training's.

    The noise of a probe is what the scheduler makes of a black latent at its timestep: fixed, so that what changes between
    two probes is the model.
    """

    def __init__(self, run: Run, prompts: Sequence[str]):
        self.run, self.prompts = run, prompts
        self.probes: list[Probe] = []
        scheduler = DDPMScheduler.from_config(run.base.pipeline.scheduler.config)
        self.timesteps = [int(share * scheduler.config.num_train_timesteps) for share in TIMESTEPS]
        self.settings = [(timestep, seed) for timestep in self.timesteps for seed in SEEDS]
        shape = (run.base.pipeline.unet.config.in_channels, *[run.base.latent_side] * 2)
        noises = torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for _, seed in self.settings]
        )
        self.times = torch.tensor([timestep for timestep, _ in self.settings], device=run.base.device)
        self.noisy = scheduler.add_noise(torch.zeros_like(noises), noises, self.times.cpu()).to(run.base.device)
        steps = run.settings.steps
        self.due = {round(steps * number / N_PROBES) for number in range(N_PROBES + 1)}

    def take(self, n_steps: int) -> None:
        """Probe all concepts after so many steps, if that is due."""
        if n_steps not in self.due:
            return
        encoded = encode_prompts(self.run.base, self.prompts)
        for concept, prompt in enumerate(self.prompts):
            vectors, attention = self._forward(encoded[prompt], self._positions(prompt))
            for number, (timestep, seed) in enumerate(self.settings):
                of_layers = None if attention is None else attention[number].tolist()
                self.probes.append(Probe(concept, n_steps, timestep, seed, vectors[number].tolist(), of_layers))

    def _positions(self, prompt: str) -> list[int]:
        """Where the prompt's tokens are."""
        tokens = self.run.base.pipeline.tokenizer.convert_tokens_to_ids(list(self.run.tokens))
        return [place for place, token in enumerate(token_ids(self.run.base, [prompt])[0].tolist()) if token in tokens]

    def _forward(self, states: torch.Tensor, positions: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(n, channels) and (n, n_layers) of one forward pass."""
        unet, middle, layers = self.run.base.pipeline.unet, [], []
        hooks = [unet.mid_block.register_forward_hook(lambda _module, _inputs, output: middle.append(output))]
        queries: dict[Attention, torch.Tensor] = {}

        def attend(module: Attention, keys: torch.Tensor) -> None:
            query, key = (
                states.float().unflatten(-1, (module.heads, -1)).transpose(1, 2)
                for states in (queries.pop(module), keys)
            )
            weights = (query @ key.transpose(-1, -2) * module.scale).softmax(dim=-1)
            layers.append(weights[..., positions].sum(dim=-1).mean(dim=(1, 2)))

        if positions:
            for module in unet.modules():
                if isinstance(module, Attention) and module.is_cross_attention:
                    hooks.append(
                        module.to_q.register_forward_hook(
                            lambda _module, _inputs, output, of=module: queries.__setitem__(of, output)
                        )
                    )
                    hooks.append(
                        module.to_k.register_forward_hook(
                            lambda _module, _inputs, output, of=module: attend(of, output)
                        )
                    )
        try:
            self.run.base.predict(self.noisy, self.times, states.unsqueeze(0))
        finally:
            for hook in hooks:
                hook.remove()
        vectors = middle[0].float().mean(dim=(2, 3))
        return vectors, torch.stack(layers, dim=1) if layers else None
