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
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

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

CANDIDATES = "role = 'pretraining' AND image IS NOT NULL"


def choose_names(
    db: Database,
    exemplars: Sequence[Picture],
    category: str,
    settings: CustomizeSettings,
    encoders: Sequence[Encoder],
    *,
    near: Sequence[Picture] | None = None,
    taken: Sequence[str] = (),
) -> list[str]:
    """The ids of `settings.prior_images` images of the corpus, none of them an exemplar.

    near:   whose mean feature they are to be near to, by default all exemplars
    taken:  ids of images that are not chosen
    raises: InvalidValue if there are fewer
    """
    own = ", ".join(literal(picture.sha256) for picture in exemplars)
    apart = f"(sha256 IS NULL OR sha256 NOT IN ({own}))" + (f" AND NOT ({among('image_id', taken)})" if taken else "")
    n = settings.prior_images
    if settings.prior == "caption":
        words = re.findall(r"\w+", category.lower())
        asked = {"words": words, "seed": f"/{settings.seed}", "n": n}
        found = db.sql(
            "SELECT image_id FROM pretraining_images WHERE image IS NOT NULL AND prompt IS NOT NULL "
            f"AND {apart} "
            r"AND list_has_all(regexp_extract_all(lower(prompt), '[\p{L}\p{N}_]+'), $words::VARCHAR[]) "
            "ORDER BY md5(image_id || $seed), image_id LIMIT $n",
            asked,
        )["image_id"].to_pylist()
        what = f"with {' and '.join(map(repr, words))} in their captions"
    else:
        encoder = _first_encoder(db, encoders)
        mean = encode(encoder, [picture.image for picture in near or exemplars]).mean(axis=0)
        gallery = db.features(encoder_id_of(encoder.spec), f"{CANDIDATES} AND {apart}")
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


@dataclass(frozen=True)
class Subject:
    """What a part of the regularization images are to be like: a concept with its exemplars.

    prompt: of images without a caption
    """

    category: str
    exemplars: Sequence[Picture]
    prompt: str


def choose_for_each(
    db: Database, subjects: Sequence[Subject], settings: CustomizeSettings, encoders: Sequence[Encoder]
) -> list[str]:
    """As `choose_names`: for each subject its share of the images, in the order of the subjects, each image once."""
    exemplars = [picture for subject in subjects for picture in subject.exemplars]
    names: list[str] = []
    for subject, n in zip(subjects, shares(settings.prior_images, len(subjects)), strict=True):
        if n:
            wanted = replace(settings, prior_images=n)
            names += choose_names(
                db, exemplars, subject.category, wanted, encoders, near=subject.exemplars, taken=names
            )
    return names


def read_for_each(db: Database, subjects: Sequence[Subject], names: Sequence[str]) -> Regularization:
    """The images of `choose_for_each`. raises: as `read_corpus`"""
    rest = iter(names)
    parts = [
        read_corpus(db, list(islice(rest, n)), subject.prompt)
        for subject, n in zip(subjects, shares(len(names), len(subjects)), strict=True)
        if n
    ]
    images, prompts, ids = (
        [value for part in parts for value in getattr(part, name)] for name in ("images", "prompts", "names")
    )
    return Regularization(images, prompts, ids)


def shares(n: int, n_parts: int) -> list[int]:
    """n divided into parts that differ by one at most, the larger ones first."""
    return [n // n_parts + (number < n % n_parts) for number in range(n_parts)]


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
