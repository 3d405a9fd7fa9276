"""Scores that a method must beat, for `attrdb.ingest.score.score`.

random    a number drawn for each sample and exemplar
visits    how often training drew the exemplar
loss      the exemplar's mean training loss, over all its visits
prompt    1 for exemplars of the concepts that the sample's prompt names, by its weights; nothing of the pictures
progress  progress of K and V (`attribution_tables`) of the prompt's concepts, by its weights; nothing of the pictures
latents   cosine of the autoencoder's latents, sample and exemplar; a similarity
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import torch.nn.functional as F

from attrdb.database import Database
from attrdb.ingest.customize.base_model import load_base_model
from attrdb.ingest.customize.denoising import latents_of
from attrdb.ingest.gradients.model_gradients import pictures

PAIRS = """\
SELECT samples.image_id AS sample_id, exemplars.image_id AS candidate_id,
       {score} AS score
FROM samples
JOIN exemplars USING (model_id)
{joined}
WHERE samples.image_id IN (SELECT unnest($ids))
GROUP BY ALL
"""
OF_PROMPT = "LEFT JOIN concept_truth AS named ON named.sample_id = samples.image_id AND named.truth = 'prompt'"
STEPS = "LEFT JOIN monitor_steps AS steps ON steps.model_id = samples.model_id AND steps.image_id = exemplars.image_id"
TABLE = f"""\
{OF_PROMPT}
LEFT JOIN attribution_tables AS progress
    ON progress.image_id = exemplars.image_id AND progress.concept_id = named.concept_id AND progress.measure = 'progress'
"""
QUERIES = {
    "visits": ("count(steps.image_id)::DOUBLE", STEPS),
    "loss": ("coalesce(avg(steps.loss), 0)", STEPS),
    "prompt": ("coalesce(sum(named.share) FILTER (named.concept_id = exemplars.concept_id), 0)", OF_PROMPT),
    "progress": ("coalesce(sum(named.share * progress.value), 0)", TABLE),
}
CONTROLS = ("random", *QUERIES, "latents")


class Control:
    """A `Scorer` that looks at next to nothing."""

    lowest: float | None = None
    highest: float | None = None
    tau, lam = 1.0, 0.0

    def __init__(self, name: str):
        self.name, self.unit, self.settings = name, name, dict[str, Any]()

    def scores(self, db: Database, sample_ids: Sequence[str]) -> Iterable[pa.Table]:
        if self.name in QUERIES:
            score, joined = QUERIES[self.name]
            yield db.sql(PAIRS.format(score=score, joined=joined), {"ids": list(sample_ids)})
            return
        pairs = db.sql(PAIRS.format(score="0.0", joined=""), {"ids": list(sample_ids)}).to_pylist()
        ids = {(row["sample_id"], row["candidate_id"]) for row in pairs}
        yield pa.Table.from_pylist(
            [{"sample_id": one, "candidate_id": other, "score": value} for (one, other), value in self._of(db, ids)]
        )

    def _of(self, db: Database, pairs: set[tuple[str, str]]) -> Iterable[tuple[tuple[str, str], float]]:
        if self.name == "random":
            for pair in sorted(pairs):
                yield pair, int.from_bytes(hashlib.sha256("/".join(pair).encode()).digest()[:4]) / 2**32
            return
        base = load_base_model("icon-sd")
        images = pictures(db, sorted({image_id for pair in pairs for image_id in pair}))
        latents = {image_id: latents_of(base, image).flatten() for image_id, (image, _) in images.items()}
        for one, other in sorted(pairs):
            yield (one, other), float(F.cosine_similarity(latents[one], latents[other], dim=0))
