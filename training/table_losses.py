"""Losses of an attribution model: how far cosines of samples and exemplars are from the scores in an attribution table.

Every loss sees a batch of samples, the exemplars of their own models, and some of other models, which owe nothing:

    one-hot          one exemplar of the sample's model, drawn at random, against other models' (Wang et al. 2023, Eq. 3)
    soft             the same, with each exemplar's share of the scores in the place of one
    regression       (1 + cosine) / 2 against the score as scaled to [0, 1]
    rank             the order of each two exemplars, weighted by how far their scores are apart (RankNet, Burges et al. 2005)
    rank-bce         the logistic loss of a + b cosine against the exemplar's rank, with few of other models
    soft+regression  soft, and half of regression

Soft and regression are ours; rank-bce is after FastGDA. What MONTRAGE uses is not public.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

OTHER_WEIGHT = 0.5  # of exemplars of other models, in `regression`
OUTLIERS = 0.1  # exemplars of other models for each own one, in `rank-bce`


@dataclass(frozen=True)
class Batch:
    """Samples against exemplars, each (n_samples, n_exemplars) but for `logits`.

    cosines:  with a gradient
    own:      whether the exemplar is of the sample's model
    others:   whether it is one of those of other models that count for this sample
    outliers: few of these, for `rank-bce`
    shares:   of the positive scores of the sample's exemplars; each row sums to 1
    scaled:   scores in [0, 1], see `attrdb.training.attribution_model`
    ranks:    in (0, 1], of the scores within a sample; the greatest is 1
    drawn:    (n_samples,): an exemplar of each sample's model, drawn at random
    models:   (n_samples,): number of each sample's model
    logits:   (2,): a and b of `rank-bce`
    """

    cosines: torch.Tensor
    own: torch.Tensor
    others: torch.Tensor
    outliers: torch.Tensor
    shares: torch.Tensor
    scaled: torch.Tensor
    ranks: torch.Tensor
    drawn: torch.Tensor
    models: torch.Tensor
    logits: torch.Tensor


def one_hot(batch: Batch, temperature: float) -> torch.Tensor:
    """The contrastive loss of pairs, in both directions; other samples of a sample's model are not counted as others."""
    similarity = batch.cosines[:, batch.drawn] / temperature  # (samples, the exemplar drawn for each)
    same = batch.models[:, None] == batch.models
    same.fill_diagonal_(False)
    similarity = similarity.masked_fill(same, -torch.inf)
    pair = torch.arange(len(similarity))
    return F.cross_entropy(similarity, pair) + F.cross_entropy(similarity.T, pair)


def soft(batch: Batch, temperature: float) -> torch.Tensor:
    """Cross-entropy of the shares, over exemplars for each sample, and over samples for each exemplar."""
    counted = batch.own | batch.others
    similarity = (batch.cosines / temperature).masked_fill(~counted, -torch.inf)
    totals = batch.shares.sum(0)
    wanted = totals > 0
    of_exemplars = batch.shares[:, wanted] / totals[wanted]
    return _cross_entropy(similarity, batch.shares, 1) + _cross_entropy(similarity[:, wanted], of_exemplars, 0)


def _cross_entropy(similarity: torch.Tensor, shares: torch.Tensor, over: int) -> torch.Tensor:
    logarithms = similarity.log_softmax(over).masked_fill(shares == 0, 0)  # of what does not count it is -inf
    return -(shares * logarithms).sum(over).mean()


def regression(batch: Batch, _temperature: float) -> torch.Tensor:
    weights = batch.own + OTHER_WEIGHT * batch.others
    errors = ((1 + batch.cosines) / 2 - batch.scaled).square()
    return (weights * errors).sum() / weights.sum()


def rank(batch: Batch, temperature: float) -> torch.Tensor:
    losses, weights = [], []
    for cosines, scaled, own in zip(batch.cosines, batch.scaled, batch.own, strict=True):
        mine, values = cosines[own] / temperature, scaled[own]
        apart = (values[:, None] - values).clamp(min=0)  # of the first over the second
        losses.append((apart * F.softplus(mine - mine[:, None])).sum())
        weights.append(apart.sum())
    return torch.stack(losses).sum() / torch.stack(weights).sum().clamp(min=1e-12)


def rank_bce(batch: Batch, _temperature: float) -> torch.Tensor:
    counted = batch.own | batch.outliers
    start, slope = batch.logits
    losses = F.binary_cross_entropy_with_logits(start + slope * batch.cosines, batch.ranks, reduction="none")
    return losses[counted].mean()


def soft_and_regression(batch: Batch, temperature: float) -> torch.Tensor:
    return soft(batch, temperature) + regression(batch, temperature) / 2


LOSSES: dict[str, Callable[[Batch, float], torch.Tensor]] = {
    "soft": soft,
    "one-hot": one_hot,
    "regression": regression,
    "rank": rank,
    "rank-bce": rank_bce,
    "soft+regression": soft_and_regression,
}
WITH_TEMPERATURE = LOSSES.keys() - {"regression", "rank-bce"}  # the others are the same at every temperature
