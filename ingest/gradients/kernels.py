"""Attribution by gradients, as algebra on inner products of n training images and one query.

    K[i, j] = <g_i, g_j>   (n, n)    of the images' gradients
    k[i]    = <g_q, g_i>   (n,)      with the query's

n is small beside the number of weights, so that no gradient has to be projected: an inverse of the weights' size becomes one
of the images'. A layer's kernels add up to those of the model.
"""

from __future__ import annotations

import numpy as np

DAMPING = 1e-2  # of the mean diagonal of K / n
LAYER_DAMPING = 1.0  # the same, of one layer; of 0.001 to 1 the best on four models that nothing else is measured on
DATAINF_DAMPING = 0.1  # of the mean square of a layer's gradients; Kwon et al. 2024, section 5


def cosine(kernel: np.ndarray, query: np.ndarray, query_norm: float) -> np.ndarray:
    """(n,): <g_q, g_i> / |g_q| |g_i|; 0 for a gradient without a direction."""
    norms = np.sqrt(np.diagonal(kernel)) * query_norm
    return np.divide(query, norms, out=np.zeros_like(query), where=norms > 0)


def inverse(kernel: np.ndarray, query: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """(n,): g_q^T (G^T G / n + lambda I)^-1 g_i, lambda the damping times the mean diagonal of K / n.

    With gradients of the loss: the influence function (Koh and Liang 2017, with the empirical Fisher matrix in place
    of the Hessian). With gradients of the output's square: D-TRAK (Zheng et al. 2024), without its random projection.
    It is n k (K + n lambda I)^-1, by the identity of Woodbury.
    """
    n = len(kernel)
    damped = kernel + np.eye(n) * max(damping * np.trace(kernel) / n, np.finfo(kernel.dtype).tiny)
    return n * np.linalg.solve(damped, query)


def inverse_by_layer(kernels: np.ndarray, queries: np.ndarray, damping: float = LAYER_DAMPING) -> np.ndarray:
    """(n,): the sum over layers of their `inverse`: weights of different layers are taken to have nothing in common.

    kernels: (n_layers, n, n); queries: (n_layers, n)
    source:  ours, after the blocks of influence functions by EK-FAC (Grosse et al. 2023); every layer counts alike, however
             long its gradients are
    """
    return np.sum([inverse(kernel, query, damping) for kernel, query in zip(kernels, queries, strict=True)], axis=0)


def data_inf(kernels: np.ndarray, queries: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(n,): DataInf (Kwon et al. 2024, Eq. 5): the inverse of a mean as the mean of inverses, layer by layer.

    kernels: (n_layers, n, n); queries: (n_layers, n); sizes: (n_layers,), weights of each layer
    """
    n = kernels.shape[1]
    squares = np.diagonal(kernels, axis1=1, axis2=2)  # (n_layers, n)
    damping = DATAINF_DAMPING * squares.mean(axis=1) / sizes
    damping = np.maximum(damping, np.finfo(kernels.dtype).tiny)
    weights = queries / (damping[:, None] + squares)
    per_layer = queries - np.einsum("li,lik->lk", weights, kernels) / n
    return (per_layer / damping[:, None]).sum(axis=0)
