"""How often a model's answers come near the source's pictures, and how often answers of innocent models do.

The share of near keys is that of Zhang et al. 2024 (arXiv 2409.15781), whose text gives one threshold of distance, 0.15, and
no formula. The threshold per key, and the p-value, are ours.
"""

from __future__ import annotations

import numpy as np

NEAR_SHARE = 0.1  # of the models compared, which count as near a key


def near_by_rank(distances: np.ndarray) -> np.ndarray:
    """(n_models, n_keys) bool: whether a model is among the nearest tenth of all models at a key, at least the nearest one.

    distances: (n_models, n_keys); of models that are equally near all are counted, or none
    All models are treated alike. So if the model that is tested answers as innocent ones do, each of them is as likely to
    have the most near keys, whatever their number is; with thresholds from the innocent models alone it would have more.
    """
    n_models = len(distances)
    n_near = max(1, int(NEAR_SHARE * n_models))
    as_near = (distances[None, :, :] <= distances[:, None, :]).sum(axis=1)  # at each key, itself included
    near: np.ndarray = as_near <= n_near
    return near


def p_value(conf: float, null: np.ndarray) -> float:
    """The share of the innocent models and the tested one itself whose conf is at least as high.

    For a model that is exchangeable with n innocent ones it is uniform, or larger; at least 1 / (n + 1).
    """
    return (1 + int((null >= conf).sum())) / (len(null) + 1)
