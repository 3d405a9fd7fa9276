"""What an attribution model learns from: samples, the exemplars of their models, and the scores between them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from attrdb.database import Database
from attrdb.errors import InvalidValue
from attrdb.search.mapper import Mapper
from attrdb.store.predicates import among
from attrdb.store.schema import feature_matrix

SCALED_TO = (5, 95)  # percentiles of a model's scores that are 0 and 1


class Table:
    """The samples of a split with the scores of their models' exemplars, and the features of both.

    The exemplars of a model are next to each other. Scores take memory for the widest model's exemplars by sample, and not
    for all exemplars.

    samples:   (n_samples, dimension) float32
    exemplars: (n_exemplars, dimension) float32, of all models
    models:    (n_samples,) int64: number of each sample's model
    columns:   (n_samples, width) int64: number of each exemplar of the sample's model; -1 behind the last
    held:      (n_samples, width) bool: where there is one
    values:    (n_samples, width) float32: scores; 0 where there is none

    raises: InvalidValue if there is no such sample, or an image has no feature
    """

    def __init__(self, db: Database, encoder_id: str, target: str, split: str):
        rows = db.query("attribution_targets", method=target, split=split)
        if not len(rows):
            raise InvalidValue(
                f"{db.path} has no sample in split {split!r} whose exemplars all have a score by {target!r}; score them "
                f"first: attrdb score {db.path} {target.replace('_', '-')}"
            )
        # The rows are by model, sample and exemplar, so that numbers rise in this order.
        samples, exemplars, models = (rows[name].combine_chunks().dictionary_encode() for name in _KEYS)
        sample, exemplar, model = (_numbers(part.indices) for part in (samples, exemplars, models))
        counts = sample.bincount()
        place = torch.arange(len(sample)) - (counts.cumsum(0) - counts)[sample]
        shape = len(counts), int(counts.max())
        self.held, self.values = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
        self.columns = torch.full(shape, -1)
        self.held[sample, place], self.columns[sample, place] = True, exemplar
        self.values[sample, place] = torch.from_numpy(rows["value"].to_numpy().astype(np.float32))
        self.models = torch.zeros(shape[0], dtype=torch.int64)
        self.models[sample] = model
        self.n_models = len(models.dictionary)
        self.samples, self.exemplars = (_features(db, encoder_id, part.dictionary) for part in (samples, exemplars))

    def shares(self) -> torch.Tensor:
        """Of the positive scores of a sample; a sample without one has equal shares."""
        positive = self.values.clamp(min=0)
        none = positive.sum(1) == 0
        positive[none] = self.held[none].float()
        return positive / positive.sum(1, keepdim=True)

    def scaled(self) -> torch.Tensor:
        """Scores in [0, 1], by the middle of all scores of a model."""
        scaled = torch.zeros_like(self.values)
        for rows in self._by_model():
            values, held = self.values[rows], self.held[rows]
            low, high = np.percentile(values[held].numpy(), SCALED_TO)
            scaled[rows] = ((values - low) / max(high - low, 1e-12)).clamp(0, 1) * held
        return scaled

    def ranks(self) -> torch.Tensor:
        """In (0, 1]: of a score among those of the sample."""
        ranks = torch.zeros_like(self.values)
        for row, held in enumerate(self.held):
            ranks[row, held] = torch.from_numpy(average_ranks(self.values[row, held].numpy())).float() / held.sum()
        return ranks

    def correlation(self, mapper: Mapper | None) -> float:
        """Mean over models of the mean rank correlation, over a sample's own exemplars, of cosines and scores."""
        s, t = self.samples.numpy(), self.exemplars.numpy()
        s, t = (mapper.samples(s), mapper.exemplars(t)) if mapper else (s, t)
        of_models = []
        for rows in self._by_model():
            held = self.held[rows.start]
            cosines = s[rows] @ t[self.columns[rows.start, held]].T
            values = self.values[rows][:, held].numpy()
            of_models.append(np.mean([rank_correlation(*pair) for pair in zip(cosines, values, strict=True)]))
        return float(np.mean(of_models))

    def _by_model(self) -> Iterator[slice]:
        """The samples of each model."""
        ends = self.models.bincount().cumsum(0).tolist()
        yield from (slice(start, end) for start, end in pairwise([0, *ends]))


def _numbers(indices: pa.Array) -> torch.Tensor:
    return torch.from_numpy(indices.to_numpy().astype(np.int64))


_KEYS = ("sample_id", "exemplar_id", "model_id")


def _features(db: Database, encoder_id: str, image_ids: pa.Array) -> torch.Tensor:
    """(n, dimension) float32, in the order of the ids. raises: InvalidValue if an image has none"""
    where = f"{among('image_id', image_ids.to_pylist())} AND `{encoder_id}` IS NOT NULL"
    found = db.images(where, ["image_id", encoder_id])
    places = pc.index_in(image_ids, found["image_id"].combine_chunks())
    if places.null_count:
        missing = image_ids.filter(places.is_null())
        raise InvalidValue(
            f"{len(missing):,} images of scored models have no {encoder_id!r} feature, such as {missing[0].as_py()!r}; "
            f"encode them first: attrdb encode {db.path} --encoder {db.encoders[encoder_id]['spec']}"
        )
    return torch.from_numpy(feature_matrix(found[encoder_id])[places.to_numpy()].astype(np.float32))


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (counts.cumsum() - (counts - 1) / 2)[places]
    return ranks


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's; 0 where either is constant."""
    first, second = (ranks - ranks.mean() for ranks in map(average_ranks, (one, other)))
    scale = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / scale) if scale else 0.0
