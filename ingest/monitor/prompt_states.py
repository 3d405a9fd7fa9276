"""The states of the concepts' prompts as they are now, taken from training where it has just encoded them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attrdb.ingest.customize.customize import encode_prompts, token_ids
from attrdb.ingest.customize.observer import Run
from attrdb.ingest.monitor.projections import trained_tokens


class PromptStates:
    """States of each concept's prompts, while the token in them is trained.

    prompts: of each concept, one or more
    """

    def __init__(self, run: Run, prompts: Sequence[Sequence[str]]):
        self.run = run
        self.prompts = [list(dict.fromkeys(of_concept)) for of_concept in prompts]
        distinct = list(dict.fromkeys(prompt for of_concept in self.prompts for prompt in of_concept))
        ids = token_ids(run.base, distinct)
        self.ids_of = {prompt: tuple(row) for prompt, row in zip(distinct, ids.tolist(), strict=True)}
        self.known = set(self.ids_of.values())
        tokenizer = run.base.pipeline.tokenizer
        longest = tokenizer.model_max_length
        self.n_tokens = {
            prompt: len(tokenizer(prompt, truncation=True, max_length=longest).input_ids) for prompt in distinct
        }
        self.encoded: dict[tuple[int, ...], torch.Tensor] = {}  # by ids: prompts may differ in letters alone
        self.hook = run.base.pipeline.text_encoder.register_forward_hook(self._keep, with_kwargs=True)

    def remove(self) -> None:
        self.hook.remove()

    def _keep(self, _encoder: torch.nn.Module, inputs: tuple, named: dict, output: Any) -> None:
        """Keep what training encodes: it does so with the token as the last step has left it."""
        if not torch.is_grad_enabled():
            return
        for ids, states in zip(inputs[0].tolist(), output.last_hidden_state.detach(), strict=True):
            if tuple(ids) in self.known:
                self.encoded[tuple(ids)] = states

    def now(self) -> list[torch.Tensor]:
        """Of each concept, (tokens, width) float32: its prompts' states, padding left out, one below the other."""
        missing = [prompt for prompt, ids in self.ids_of.items() if ids not in self.encoded]
        for prompt, states in encode_prompts(self.run.base, missing).items():
            self.encoded[self.ids_of[prompt]] = states
        return [
            torch.cat([self.encoded[self.ids_of[prompt]][: self.n_tokens[prompt]] for prompt in of_concept])
            for of_concept in self.prompts
        ]

    def forget(self) -> None:
        """After an update of the weights."""
        if trained_tokens(self.run):
            self.encoded = {}
