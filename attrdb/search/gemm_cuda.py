"""Matrix products of queries with blocks of features on an accelerator, as `attrdb.search.gemm` has them for a CPU.

Counting is one kernel, so that scores never leave the processor. It multiplies in TF32, and keeps the number of scores
that surely lie above a threshold, and the pairs too close to decide. A second kernel multiplies these pairs in float64;
only those that float64 cannot decide either come back. Ranks are therefore those of float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import numpy as np
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from attrdb.search import gemm
from attrdb.search.mapper import Mapper

Features: TypeAlias = "np.ndarray | torch.Tensor"  # (n, dimension) float32; a tensor is on the device already

FLOAT64_MARGIN = 1e-11  # as `exact.DIGITS` rounds
PAIR_BUFFER = 1 << 23  # pairs near a threshold that a launch can keep; with more, it is repeated in parts
SPARE = 1.25  # times the parts that should be enough
LARGE, SMALL = (128, 256, 32, 8), (64, 128, 32, 4)  # tiles: queries, features, elements at a time; warps
STAGES = 3
PAIRS, ELEMENTS = 32, 64  # of `_similarity`
ALIGNED = 4  # elements: rows of a tensor that tiles are fetched from begin at multiples of 16 bytes


def tf32_margin(dimension: int) -> float:
    """The largest error of a TF32 product of unit vectors of that dimension.

    Both factors lose their last 13 bits, at most 2^-10 of each; every step of eight elements adds a rounding error.
    """
    return 1.01 * (2**-9 + 2**-20 * math.ceil(dimension / 8))


class ScoreKernel:
    """queries: (n_queries, dimension) float32, unit length, before they are mapped; device: one of CUDA's."""

    def __init__(self, queries: np.ndarray, mapper: Mapper | None, device: str):
        self.device, self.mapper, self.tile = torch.device(device), mapper, _tile(torch.device(device))
        self.queries = _aligned(to_device(mapper.samples(queries) if mapper else queries, self.device))
        exemplar = mapper.arrays("exemplar") if mapper else {}
        self.arrays = {name: to_device(array, self.device) for name, array in exemplar.items()}

    def scores(self, features: Features) -> Iterator[tuple[int, Scores]]:
        """As `gemm.ScoreKernel.scores`, in float32."""
        candidates = self._candidates(features)
        for first in range(0, len(self.queries), gemm.QUERIES_PER_PRODUCT):
            with _whole_float32():
                scores = self.queries[first : first + gemm.QUERIES_PER_PRODUCT] @ candidates.T
            yield first, Scores(scores)

    def count(self, features: Features, thresholds: np.ndarray, counts: np.ndarray) -> Iterator[gemm.Undecided]:
        """As `gemm.ScoreKernel.count`.

        thresholds, counts: (n_queries, m) float64, +inf for none, and int64
        """
        if not thresholds.size:
            return
        candidates, n_columns = self._candidates(features), thresholds.shape[1]
        finite = np.where(np.isfinite(thresholds), thresholds, np.inf)
        exact = torch.tensor(np.ascontiguousarray(finite), device=self.device)
        widest = tf32_margin(candidates.shape[1])
        low, high = ((exact + margin).float() for margin in (-widest, widest))
        least = low.amin(dim=1)
        room = max(PAIR_BUFFER, thresholds.size)
        margin = gemm.MARGIN if self.mapper else FLOAT64_MARGIN
        left = [(0, len(candidates))]
        while left:
            start, stop = left.pop()
            part = candidates[start:stop]
            above, pairs, n_pairs = self._near(part, low, high, least, room)
            if n_pairs > room:
                step = max(1, math.floor(len(part) * room / (SPARE * n_pairs)))
                left += [(at, min(at + step, stop)) for at in range(start, stop, step)]
                continue
            place, candidate = pairs[:n_pairs].T
            gap = self._similarity(part, place // n_columns, candidate) - exact.view(-1)[place]
            sure = above + torch.bincount(place[gap > margin], minlength=thresholds.size)
            counts += sure.view(thresholds.shape).cpu().numpy()
            near = gap.abs() <= margin
            place, candidate = (tensor[near].cpu().numpy().astype(np.int64) for tensor in (place, candidate))
            yield *np.divmod(place, n_columns), start + candidate

    def _candidates(self, features: Features) -> torch.Tensor:
        """(n, dimension) on the device, mapped as training images, and aligned."""
        candidates = to_device(features, self.device)
        if self.mapper:
            with _whole_float32():
                candidates = self.mapper.applied(self.arrays, candidates)
            norms = candidates.norm(dim=1, keepdim=True)
            self.mapper.check_norms(norms.cpu().numpy())
            candidates = candidates / norms
        return _aligned(candidates)

    def _near(
        self, candidates: torch.Tensor, low: torch.Tensor, high: torch.Tensor, least: torch.Tensor, room: int
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(n_queries * m,) counts above high; (room, 2) threshold and candidate of the pairs between; the number of pairs."""
        (n_queries, n_columns), n_candidates = low.shape, len(candidates)
        of_queries, of_candidates, elements, warps = self.tile
        above = torch.zeros(low.numel(), dtype=torch.int32, device=self.device)
        pairs = torch.empty((room, 2), dtype=torch.int32, device=self.device)
        n_pairs = torch.zeros(1, dtype=torch.int64, device=self.device)
        with self._current():
            _count[(triton.cdiv(n_queries, of_queries) * triton.cdiv(n_candidates, of_candidates),)](
                TensorDescriptor.from_tensor(self.queries, [of_queries, elements]),
                TensorDescriptor.from_tensor(candidates, [of_candidates, elements]),
                low,
                high,
                least,
                above,
                pairs,
                n_pairs,
                n_queries,
                n_candidates,
                n_columns,
                room,
                DIMENSION=candidates.shape[1],
                OF_QUERIES=of_queries,
                OF_CANDIDATES=of_candidates,
                ELEMENTS=elements,
                num_warps=warps,
                num_stages=STAGES,
            )
        return above, pairs, int(n_pairs)

    def _similarity(self, candidates: torch.Tensor, query: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
        """(n,) float64: the inner products of pairs, whose factors are float32."""
        similarity = torch.empty(len(query), dtype=torch.float64, device=self.device)
        if len(query):
            with self._current():
                _similarity[(triton.cdiv(len(query), PAIRS),)](
                    self.queries,
                    candidates,
                    query.contiguous(),
                    candidate.contiguous(),
                    similarity,
                    len(query),
                    DIMENSION=candidates.shape[1],
                    PAIRS=PAIRS,
                    ELEMENTS=ELEMENTS,
                )
        return similarity

    def _current(self) -> AbstractContextManager[Any]:
        """Triton launches on the current device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


class Scores:
    """As `gemm.Scores`, on a device; what comes back from it is small."""

    def __init__(self, scores: torch.Tensor):
        self.scores = scores  # (n_queries, n_candidates)
        self.n_queries, self.n_candidates = scores.shape

    def kth_best(self, k: int) -> np.ndarray:
        kth: np.ndarray = self.scores.topk(k, dim=1).values[:, -1].cpu().numpy()
        return kth

    def at_least(self, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pairs = (self.scores >= self.scores.new_tensor(thresholds)[:, None]).nonzero().cpu().numpy()
        return pairs[:, 0], pairs[:, 1]


def to_device(features: Features, device: torch.device | str) -> torch.Tensor:
    """The features on the device, copied from pinned memory, which is several times as fast as from other memory."""
    device = torch.device(device)
    if isinstance(features, torch.Tensor):
        return features.to(device, torch.float32)
    staged = torch.empty(features.shape, dtype=torch.float32, pin_memory=device.type == "cuda")
    np.copyto(staged.numpy(), features)
    return staged.to(device, non_blocking=True)


def _aligned(features: torch.Tensor) -> torch.Tensor:
    if missing := -features.shape[1] % ALIGNED:
        return torch.nn.functional.pad(features, (0, missing))
    if features.stride() != (features.shape[1], 1) or features.data_ptr() % 16:
        return features.clone(memory_format=torch.contiguous_format)
    return features


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Products in float32 inside the block, whatever the application has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _tile(device: torch.device) -> tuple[int, int, int, int]:
    """The largest tile whose stages fit into the shared memory of a multiprocessor."""
    if device.type != "cuda":
        return SMALL
    of_queries, of_candidates, elements, _ = LARGE
    needed = 4 * STAGES * elements * (of_queries + of_candidates)
    return LARGE if needed < torch.cuda.get_device_properties(device).shared_memory_per_block_optin else SMALL


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _count(
    queries,
    candidates,
    low,
    high,
    least,
    above,
    pairs,
    n_pairs,
    n_queries,
    n_candidates,
    n_columns,
    room,
    DIMENSION: tl.constexpr,
    OF_QUERIES: tl.constexpr,
    OF_CANDIDATES: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    # Neighbours share their candidates, which are read once, while all queries stay in the cache.
    tiles = tl.cdiv(n_queries, OF_QUERIES)
    first_query = tl.program_id(0) % tiles * OF_QUERIES
    first_candidate = tl.program_id(0) // tiles * OF_CANDIDATES
    query = first_query + tl.arange(0, OF_QUERIES)
    candidate = first_candidate + tl.arange(0, OF_CANDIDATES)
    scores = tl.zeros((OF_QUERIES, OF_CANDIDATES), tl.float32)
    for at in range(0, DIMENSION, ELEMENTS):
        ours, theirs = queries.load([first_query, at]), candidates.load([first_candidate, at])
        scores = tl.dot(ours, tl.trans(theirs), scores, input_precision="tf32")
    scores = tl.where((candidate < n_candidates)[None, :], scores, float("-inf"))
    exists = query < n_queries
    reached = scores >= tl.load(least + query, mask=exists, other=float("inf"))[:, None]
    if tl.max(tl.max(reached.to(tl.int32), 1), 0) > 0:
        for column in tl.range(n_columns, num_stages=1):
            place = query * n_columns + column
            lowest = tl.load(low + place, mask=exists, other=float("inf"))[:, None]
            highest = tl.load(high + place, mask=exists, other=float("inf"))[:, None]
            tl.atomic_add(above + place, tl.sum((scores > highest).to(tl.int32), 1), mask=exists)
            near = (scores >= lowest) & (scores <= highest)
            if tl.max(tl.max(near.to(tl.int32), 1), 0) > 0:
                every = tl.zeros((OF_QUERIES, OF_CANDIDATES), tl.int32)
                kept = tl.atomic_add(n_pairs + every, 1, mask=near)
                fits = near & (kept < room)
                tl.store(pairs + 2 * kept, place[:, None] + every, mask=fits)
                tl.store(pairs + 2 * kept + 1, candidate[None, :] + every, mask=fits)


@triton.jit
def _similarity(
    queries,
    candidates,
    query,
    candidate,
    similarity,
    n,
    DIMENSION: tl.constexpr,
    PAIRS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    exists = pair < n
    ours = queries + tl.load(query + pair, mask=exists, other=0).to(tl.int64)[:, None] * DIMENSION
    theirs = candidates + tl.load(candidate + pair, mask=exists, other=0).to(tl.int64)[:, None] * DIMENSION
    total = tl.zeros((PAIRS,), tl.float64)
    for first in range(0, DIMENSION, ELEMENTS):
        element = (first + tl.arange(0, ELEMENTS))[None, :]
        inside = exists[:, None] & (element < DIMENSION)
        factor = tl.load(ours + element, mask=inside, other=0.0).to(tl.float64)
        total += tl.sum(factor * tl.load(theirs + element, mask=inside, other=0.0).to(tl.float64), 1)
    tl.store(similarity + pair, total, mask=exists)
