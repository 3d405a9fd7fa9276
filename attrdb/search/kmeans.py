"""Partitions: each feature belongs to its nearest centroid, found by matrix products on a CPU or an accelerator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from attrdb.search.gemm import SCORES


def train_centroids(features: np.ndarray, n_centroids: int, n_rounds: int, seed: int, device: str) -> np.ndarray:
    """(n_centroids, dimension) float32: each the mean of the features nearest to it, by Lloyd's rounds from a random start.

    A partition that loses all its features takes half of the largest one.
    features: (n, dimension) float32, with n >= n_centroids
    """
    rng = np.random.default_rng(seed)
    centroids = features[rng.choice(len(features), n_centroids, replace=False)].copy()
    sums = _sums_by_numpy(features) if device == "cpu" else _sums_by_torch(features, device)
    for _ in range(n_rounds):
        partition = nearest_centroids(features, centroids, device)
        n = np.bincount(partition, minlength=n_centroids)
        used = np.flatnonzero(n)
        centroids[used] = sums(partition, n)[used] / n[used][:, None]
        empty = np.flatnonzero(n == 0)
        largest = np.argsort(-n, kind="stable")[: len(empty)]
        nudge = 1e-3 * rng.standard_normal((len(empty), features.shape[1]), np.float32)
        centroids[empty] = centroids[largest] * (1 + nudge)
    return centroids


def _sums_by_numpy(features: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    def sums(partition: np.ndarray, n: np.ndarray) -> np.ndarray:
        """(n_partitions, dimension): the sum of each partition's features, n of them; undefined for an empty partition."""
        order = np.argsort(partition, kind="stable")
        total = np.empty((len(n), features.shape[1]), np.float32)
        used = np.flatnonzero(n)
        total[used] = np.add.reduceat(features[order], np.cumsum(n)[used] - n[used], axis=0)
        return total

    return sums


def _sums_by_torch(features: np.ndarray, device: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    import torch

    from attrdb.search.gemm_cuda import to_device

    rows = to_device(features, device).double()  # float64, so that the order in which a GPU adds them does not show

    def sums(partition: np.ndarray, n: np.ndarray) -> np.ndarray:
        total = rows.new_zeros((len(n), rows.shape[1]))
        total.index_add_(0, torch.tensor(partition, device=device), rows)
        on_host: np.ndarray = total.float().cpu().numpy()
        return on_host

    return sums


def nearest_centroids(features: np.ndarray, centroids: np.ndarray, device: str) -> np.ndarray:
    """(n,) int64: the number of the centroid that is nearest to each feature."""
    nearest = np.empty(len(features), np.int64)
    # The nearest centroid c of x has the largest x . c - |c|^2 / 2.
    half = (centroids * centroids).sum(axis=1) / 2
    product = _by_numpy(centroids, half) if device == "cpu" else _by_torch(centroids, half, device)
    rows = max(1, SCORES // len(centroids))
    for at in range(0, len(features), rows):
        nearest[at : at + rows] = product(features[at : at + rows])
    return nearest


def _by_numpy(centroids: np.ndarray, half: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    def product(features: np.ndarray) -> np.ndarray:
        scores = features @ centroids.T
        scores -= half
        nearest: np.ndarray = scores.argmax(axis=1)
        return nearest

    return product


def _by_torch(centroids: np.ndarray, half: np.ndarray, device: str) -> Callable[[np.ndarray], np.ndarray]:
    import torch

    from attrdb.search.gemm_cuda import to_device

    columns, halves = to_device(centroids, device).T, torch.from_numpy(half).to(device)

    def product(features: np.ndarray) -> np.ndarray:
        scores = torch.addmm(-halves, to_device(features, device), columns)
        nearest: np.ndarray = scores.argmax(dim=1).cpu().numpy()
        return nearest

    return product
