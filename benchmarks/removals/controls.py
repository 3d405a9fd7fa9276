"""What a method must beat: scores of next to nothing, for `attrdb.ingest.score.score`, and the similarity of latents.

random    a number drawn for each sample and exemplar
visits    how often training drew the exemplar
loss      the exemplar's mean training loss, over all its visits
prompt    1 for exemplars of the concepts that the sample's prompt names, by its weights; nothing of the pictures
progress  progress of K and V (`attribution_tables`) of the prompt's concepts, by its weights; nothing of the pictures
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from attrdb.database import Database
from attrdb.ingest.customize.base_model import load_base_model

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
CONTROLS = ("random", *QUERIES)
ID_COLUMNS = ["sample_id", "candidate_id"]


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
        pairs = db.sql(PAIRS.format(score="0.0", joined=""), {"ids": list(sample_ids)}).select(ID_COLUMNS)
        digests = (hashlib.sha256("/".join(pair.values()).encode()).digest() for pair in pairs.to_pylist())
        scores = [int.from_bytes(digest[:4]) / 2**32 for digest in digests]
        yield pairs.append_column("score", pa.array(scores, pa.float64()))


class Latents(torch.nn.Module):
    """The mean of a picture's latents, (n, channels x height x width), of pictures (n, 3, side, side) from -1 to 1."""

    def __init__(self, autoencoder: torch.nn.Module):
        super().__init__()
        self.encoder, self.quant_conv = autoencoder.encoder, autoencoder.quant_conv

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        encoded = self.encoder(pictures)
        moments = encoded if self.quant_conv is None else self.quant_conv(encoded)
        return moments.chunk(2, dim=1)[0].flatten(1)


def latents_encoder(file: Path) -> str:
    """Save the base model's autoencoder as an encoder, see docs/encoders.md; returns its spec."""
    base = load_base_model("icon-sd")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of a tracer that is to go, and of shapes that are constant here
        picture = torch.zeros(1, 3, base.resolution, base.resolution)
        torch.jit.trace(Latents(base.pipeline.vae).eval(), picture).save(str(file))
    return f"torchscript:{file.resolve()}?size={base.resolution}&mean=half&std=half"
