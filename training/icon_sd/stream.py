"""Batches of scenes for training: drawn on the CPU, if wanted by worker processes; the device composes them."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import CLIPTokenizer

from attrdb.training.icon_sd.scenes import Composer, Scene, Sprites, pack

Packed = dict[str, torch.Tensor]  # see `scenes.pack`; with `tokens` (b, max_tokens) int64 where there is a tokenizer


def draw_batch(composer: Composer, size: int, seed: int, step: int) -> list[Scene]:
    """The scenes of a step; seed and step decide them."""
    rng = random.Random(seed * 1_000_003 + step)
    return [composer.draw(rng) for _ in range(size)]


class SceneBatches(IterableDataset):
    """The packed batches of all steps from `first` on; they never end."""

    def __init__(self, sprites: Sprites, size: int, seed: int, first: int, tokenizer: CLIPTokenizer | None = None):
        self.composer, self.tokenizer = Composer(sprites), tokenizer
        self.size, self.seed, self.first = size, seed, first

    def __iter__(self) -> Iterator[Packed]:
        worker = get_worker_info()
        step, stride = (self.first + worker.id, worker.num_workers) if worker else (self.first, 1)
        while True:
            scenes = draw_batch(self.composer, self.size, self.seed, step)
            packed = pack(scenes)
            if self.tokenizer:
                packed["tokens"] = tokens_of(self.tokenizer, [scene.caption for scene in scenes])
            yield packed
            step += stride

    def loaded(self, workers: int) -> Iterator[Packed]:
        """The batches in their order, drawn ahead by so many processes; with 0, by this one."""
        ahead = {}
        if workers:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])  # what all workers import, once
            ahead = {"prefetch_factor": 4, "multiprocessing_context": context}
        return iter(DataLoader(self, batch_size=None, num_workers=workers, **ahead))


def together(batches: Iterator[Packed], n: int) -> Iterator[Packed]:
    """So many batches at a time as one: a GPU composes them in the time that one takes."""
    while True:
        several = [next(batches) for _ in range(n)]
        yield {name: torch.cat([packed[name] for packed in several]) for name in several[0]}


def tokens_of(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """(n, max_tokens) int64: the tokens of captions, padded or cut."""
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
