"""Regularization images: what keeps a customized model's idea of the category where the base model has it.

    caption      pretraining images of the database whose caption has every word of the category, drawn by seed
    image        the pretraining images nearest to the exemplars' mean feature, by the database's first encoder
    generated    drawn by the base model itself, before it is customized

Source: Kumari et al. 2023, section 3.2 (retrieved by caption), Ruiz et al. 2023, section 3.2 (generated). Retrieval by image
is ours.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from attrdb.database import Database
from attrdb.errors import InvalidValue
from attrdb.ingest.customize.base_model import BaseModel
from attrdb.ingest.customize.customize import Regularization
from attrdb.ingest.customize.synthesize import plan_samples, synthesize, use_fast_solver
from attrdb.ingest.encode import Encoder, encode, load_encoder
from attrdb.ingest.options import PRIORS, CustomizeSettings, SynthesizeSettings
from attrdb.ingest.prompts import Prompt
from attrdb.ingest.read.pictures import Picture, read_picture
from attrdb.progress import Progress
from attrdb.search.exact import top_k
from attrdb.store.predicates import among, literal
from attrdb.store.schema import encoder_id_of

if TYPE_CHECKING:
    pass

CANDIDATES = "role = 'pretraining' AND image IS NOT NULL"


def choose_names(
    db: Database,
    exemplars: Sequence[Picture],
    category: str,
    settings: CustomizeSettings,
    encoders: Sequence[Encoder],
) -> list[str]:
    """The ids of `settings.prior_images` images of the corpus, none of them an exemplar.

    raises: InvalidValue if there are fewer
    """
    own = ", ".join(literal(picture.sha256) for picture in exemplars)
    others = f"{CANDIDATES} AND (sha256 IS NULL OR sha256 NOT IN ({own}))"
    n = settings.prior_images
    if settings.prior == "caption":
        words = re.findall(r"\w+", category.lower())
        asked = {"words": words, "seed": f"/{settings.seed}", "n": n}
        found = db.sql(
            "SELECT image_id FROM pretraining_images WHERE image IS NOT NULL AND prompt IS NOT NULL "
            f"AND (sha256 IS NULL OR sha256 NOT IN ({own})) "
            r"AND list_has_all(regexp_extract_all(lower(prompt), '[\p{L}\p{N}_]+'), $words::VARCHAR[]) "
            "ORDER BY md5(image_id || $seed), image_id LIMIT $n",
            asked,
        )["image_id"].to_pylist()
        what = f"with {' and '.join(map(repr, words))} in their captions"
    else:
        encoder = _first_encoder(db, encoders)
        mean = encode(encoder, [picture.image for picture in exemplars]).mean(axis=0)
        gallery = db.features(encoder_id_of(encoder.spec), others)
        found = top_k(gallery, (mean / np.linalg.norm(mean)).astype(np.float32)[None], n).ids[0].tolist()
        what = f"with a feature of {encoder.spec}"
    if len(found) < n:
        raise InvalidValue(
            f"{n} regularization images wanted, {db.path} has {len(found)} pretraining images {what} whose pictures are "
            "stored, the exemplars left out; ask for fewer (prior_images), ingest a corpus that has more, or take another "
            f"prior ({', '.join(PRIORS)})"
        )
    return found


def _first_encoder(db: Database, encoders: Sequence[Encoder]) -> Encoder:
    encoder_id = db.encoder_id()
    for encoder in encoders:
        if encoder_id_of(encoder.spec) == encoder_id:
            return encoder
    return load_encoder(db.encoders[encoder_id]["spec"])


def read_corpus(db: Database, names: Sequence[str], prompt: str) -> Regularization:
    """Images of the corpus by their ids; prompt: of those without a caption.

    raises: InvalidValue if one is gone or cannot be read
    """
    table = db.images(among("image_id", names), ["image_id", "image", "prompt"])
    rows = {row["image_id"]: row for row in table.to_pylist()}
    if missing := [name for name in names if name not in rows]:
        raise InvalidValue(
            f"regularization image {missing[0]!r} is no longer in {db.path}; delete the half-done job to start again"
        )
    images = [read_picture(name, rows[name]["image"]).image for name in names]
    return Regularization(images, [rows[name]["prompt"] or prompt for name in names], list(names))


def generate(
    base: BaseModel,
    prompts: Sequence[str],
    settings: CustomizeSettings,
    sampling: SynthesizeSettings,
    report: Progress,
) -> Regularization:
    """Images that the base model, a fresh one, draws of the prompts in turn, from seeds drawn by seed; it is left fresh."""
    draw = random.Random(f"{settings.seed}/prior")
    asked = [Prompt(n, "prior", prompts[n % len(prompts)]) for n in range(settings.prior_images)]
    once = SynthesizeSettings(1, sampling.solver_steps, sampling.guidance, sampling.sample_batch, draw.randrange(2**31))
    images: list[Image.Image] = []
    encoded: dict[str, Any] = {}
    use_fast_solver(base)
    try:
        for batch in plan_samples("prior", asked, once):
            drawn = len(images)
            images += synthesize(
                base,
                batch,
                once,
                lambda *_, drawn=drawn: report("regularization", drawn, settings.prior_images),
                encoded,
            )
            report("regularization", len(images), settings.prior_images)
    finally:
        base.restore()
    names = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    return Regularization(images, [one.text for one in asked], names)
