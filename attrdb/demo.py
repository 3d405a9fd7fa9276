"""The demo: the whole path on the bundled pictures, from customizing a model to a page that shows who influenced it."""

from __future__ import annotations

import json
from pathlib import Path

import click
import jinja2
import pyarrow.parquet as pq

import attrdb
from attrdb.bundled import EXEMPLARS, write_corpus
from attrdb.database import Database, open_or_create
from attrdb.errors import InvalidValue
from attrdb.ingest.customize.base_model import BUNDLED, base_model_folder, weights_hash
from attrdb.ingest.encode import load_encoder
from attrdb.ingest.models.exemplars import Exemplar
from attrdb.ingest.models.ingest_one import ingest_model
from attrdb.ingest.models.settings import settings_for
from attrdb.ingest.read.corpus import ingest_corpus
from attrdb.ingest.read.discover import open_corpus
from attrdb.ingest.read.pictures import read_picture
from attrdb.pages.html import data_uri
from attrdb.progress import Progress
from attrdb.store.methods import DEFAULT_LAM, DEFAULT_TAU
from attrdb.store.schema import Row
from attrdb.text import fixed
from attrdb.training.evaluate import evaluate

CONCEPTS = ("clock-by-openclipart", "tent-by-fxemoji", "streamline-kameleon-color", "streamline-cyber-color")
ENCODERS = ("icon-moco", "pixels:8")  # the first is the best of the learned ones at finding exemplars of icon-sd
N_CANDIDATES = 7
SIDE = 256  # pixels; larger pictures are scaled down to it
FIGURES = """\
SELECT
    models.kind,
    samples.prompt_scheme,
    ranks.encoder_id,
    count(DISTINCT samples.image_id) AS n_samples,
    avg(CASE WHEN ranks.rank <= 10 THEN 1.0 ELSE 0.0 END) AS recall_at_10,
    avg(least(1.0, 10 / ranks.gallery_size)) AS chance
FROM models
JOIN samples ON samples.model_id = models.model_id
JOIN exemplar_ranks AS ranks ON ranks.sample_id = samples.image_id
WHERE ranks.gallery = 'own' AND ranks.mapper_id = ''
GROUP BY ALL
ORDER BY ALL
"""


def bundled_exemplars(concept: str) -> tuple[list[Exemplar], str, str]:
    """The exemplars of a bundled concept, its kind and its category."""
    rows = pq.read_table(EXEMPLARS).to_pylist()
    chosen = [row for row in rows if json.loads(row["metadata"])["concept"] == concept]
    columns = ("source", "uri", "creator", "license", "prompt")
    exemplars = [
        Exemplar(read_picture(row["name"], row["image"]), {name: row[name] for name in columns}) for row in chosen
    ]
    kind = json.loads(chosen[0]["metadata"])["kind"]
    return exemplars, kind, chosen[0]["category"] if kind == "object" else concept


def _within(concept: str, report: Progress) -> Progress:
    """Reports the stages of one model."""
    return lambda stage, *units: report(f"{concept}: {stage}", *units)


def build(folder: Path, report: Progress, corpus: Path | None = None, concepts: tuple[str, ...] = CONCEPTS) -> Path:
    """Build `<folder>/icons.attrdb` and `<folder>/index.html`; the path of the page. Stored images and models are kept.

    corpus: a Parquet file for `ingest_corpus`; None for the bundled sprites
    raises: InvalidValue if the folder holds a demo of other weights or settings
    """
    path = folder / "icons.attrdb"
    db = open_or_create(path)
    stored_hashes = set(db.sql("SELECT base_model_hash FROM models")["base_model_hash"].to_pylist())
    if stored_hashes - {weights_hash(base_model_folder(BUNDLED))}:
        raise InvalidValue(f"{folder} holds a demo of another icon-sd; remove it, or name another folder")
    if corpus is None:
        report("draw the bundled sprites", 0, None)
        corpus = write_corpus(folder / "corpus.parquet")
    encoders = [load_encoder(spec) for spec in ENCODERS]
    ingest_corpus(db, open_corpus(corpus), encoders, report=report)
    for concept in concepts:
        exemplars, kind, category = bundled_exemplars(concept)
        settings = settings_for(BUNDLED, kind, category)
        ingest_model(db, exemplars, settings, encoders, model_id=concept, report=_within(concept, report))
    for encoder_id in db.encoders:
        evaluate(db, encoder_id, "own", report)
    page = folder / "index.html"
    page.write_text(render(db, report), encoding="utf-8")
    return page


def render(db: Database, report: Progress) -> str:
    """The page, as one HTML text with its pictures inside."""
    rows = db.sql("SELECT image_id, image, prompt, prompt_scheme, seed FROM images").to_pylist()
    images = {row["image_id"]: row for row in rows}
    models = db.sql("SELECT model_id, kind, category, train_prompt FROM models ORDER BY kind, model_id").to_pylist()
    entries = []
    for done, model in enumerate(models):
        report("attribute samples", done, len(models))
        entries.append(_model_entry(db, model, images))
    report("attribute samples", len(models), len(models))
    environment = jinja2.Environment(loader=jinja2.PackageLoader("attrdb.pages"), autoescape=True, trim_blocks=True)
    environment.filters["fixed"] = fixed
    roles = db.status()["images_by_role"]
    return environment.get_template("demo.html").render(
        title="Who shaped these pictures?",
        models=entries,
        figures=db.sql(FIGURES).to_pylist(),
        statement=FIGURES,
        encoder_id=db.encoder_id(),
        tau=DEFAULT_TAU,
        lam=DEFAULT_LAM,
        n_candidates=roles["exemplar"] + roles["pretraining"],
        n_pretraining=roles["pretraining"],
        version=attrdb.__version__,
        database=db.path,
        images_version=db.version,
    )


def _model_entry(db: Database, model: Row, images: dict[str, Row]) -> Row:
    """A model as the template shows it: its title, exemplars, samples with their candidates, and the credit.

    images: the rows of images, by image_id
    """
    model_id = {"id": model["model_id"]}
    exemplars = db.sql(
        "SELECT image_id, creator, license FROM exemplars WHERE model_id = $id ORDER BY image_id", model_id
    ).to_pylist()
    sample_ids = db.sql(
        "SELECT image_id FROM samples WHERE model_id = $id ORDER BY prompt_scheme DESC, prompt, image_id", model_id
    )["image_id"].to_pylist()
    exemplar_ids = [row["image_id"] for row in exemplars]
    name = model["category"] if model["kind"] == "object" else model["model_id"]
    return {
        **model,
        "title": f"{model['kind'].capitalize()}: {name}",
        "exemplars": [_uri(images[image_id]) for image_id in exemplar_ids],
        "samples": [_sample_entry(db, images[sample_id], images, exemplar_ids) for sample_id in sample_ids],
        "credit": "; ".join(sorted({f"{row['creator']}, {row['license']}" for row in exemplars})),
    }


def _sample_entry(db: Database, sample: Row, images: dict[str, Row], exemplar_ids: list[str]) -> Row:
    """A sample as the template shows it, with its first candidates; those that are exemplars of its model are marked."""
    candidates = [
        {
            "image": _uri(images[row["image_id"]]),
            "influence": row["influence"],
            "label": " · ".join(dict.fromkeys(filter(None, (row["category"], row["source"])))),
            "true": row["image_id"] in exemplar_ids,
        }
        for row in db.attribute(sample["image_id"], k=N_CANDIDATES).to_pylist()
    ]
    return {**sample, "image": _uri(sample), "candidates": candidates}


def _uri(image: Row) -> str:
    return data_uri(image["image"], SIDE)[0]


def tell(folder: Path, page: Path) -> None:
    """Print the demo's figures with the SQL that makes them."""
    from attrdb.cli.output import print_table

    db = attrdb.open(folder / "icons.attrdb")
    click.echo("How often are the true exemplars among the first 10 of the gallery (own exemplars + corpus)?\n")
    click.echo(f'attrdb sql {db.path} "{FIGURES}"\n')
    print_table(db.sql(FIGURES), "table")
    click.echo(
        f"The same with every column, and mean average precision:\n\n    attrdb query {db.path} recall_at_k -p k=10"
    )
    click.echo(f"    attrdb query {db.path} mean_average_precision\n")
    click.echo(f"Look at {page}: every sample beside its prompt, its exemplars and what attrdb found.")
