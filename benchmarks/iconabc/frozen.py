"""IconAbC as files: freeze the models that were made, and load them into any database.

    python benchmarks/iconabc/frozen.py freeze DB PLAN       # PLAN: the folder that plan.py wrote
    python benchmarks/iconabc/frozen.py load DB ICONS        # ICONS: the file of `attrdb.training.icon_sd.icons build`

The frozen files are in this script's folder: models.parquet, images.parquet (exemplars and samples), candidates.parquet
(names of the gallery's icons and hashes of their pixels; the pictures are rendered from the packages that they come from).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import defaultdict
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import attrdb
from attrdb.database import Database, open_or_create
from attrdb.demo import bundled_icons
from attrdb.ingest.read.corpus import image_rows, ingest_corpus
from attrdb.ingest.read.discover import open_corpus
from attrdb.ingest.read.pictures import read_picture
from attrdb.training.icon_sd.icons import SCHEMA, lossy

HERE = Path(__file__).parent
PROVENANCE = ("source", "category", "creator", "license", "uri", "prompt")
NOT_FROZEN = ("weights_path", "weights_hash", "base_model")
AT_MOST = 40 * 2**20  # bytes of the frozen files


def pixel_hash(encoded: bytes) -> bytes:
    """The hash of the decoded picture; encoded bytes differ between releases of an encoder."""
    return hashlib.sha256(Image.open(io.BytesIO(encoded)).convert("RGB").tobytes()).digest()[:8]


def freeze(db: Database, plan: Path, out: Path = HERE) -> dict[str, int]:
    """Write the frozen files; the numbers of their models, images and candidates.

    raises: click.ClickException if models of the plan are missing, or the files are too large
    """
    specs = [json.loads(line) for line in (plan / "models.jsonl").read_text().splitlines()]
    wanted = [spec["model_id"] for spec in specs]
    models = {row["model_id"]: row for row in db.sql("SELECT * FROM models").to_pylist()}
    if missing := [model_id for model_id in wanted if model_id not in models]:
        raise click.ClickException(
            f"{len(missing)} of {len(wanted)} models are not made yet, the first is {missing[0]}; make them with: "
            f"attrdb ingest models {db.path} {plan / 'models.jsonl'} --base-model icon-sd"
        )
    origin = {}
    for row in pq.read_table(plan / "exemplars.parquet").to_pylist():
        of_model = json.loads(row["metadata"])["model_id"]
        origin[of_model, hashlib.sha256(row["image"]).hexdigest()] = {name: row[name] for name in PROVENANCE}
    images = db.images("role <> 'pretraining'", list(attrdb.store.schema.IMAGES.names))
    rows = [row for row in images.sort_by("image_id").to_pylist() if row["model_id"] in set(wanted)]
    for row in rows:
        if row["role"] == "exemplar":
            if (row["model_id"], row["sha256"]) not in origin:
                raise click.ClickException(
                    f"model {row['model_id']} was customized on {row['image_id']}, which is not in {plan}; it is from "
                    "another plan: remove it from the database and make it with this one"
                )
            row |= origin[row["model_id"], row["sha256"]]
        del row["sha256"], row["width"], row["height"]  # of the picture, which has them
    models_out = [
        {name: value for name, value in models[model_id].items() if name not in NOT_FROZEN}
        for model_id in sorted(wanted)
    ]
    bundled = set(pq.read_table(bundled_icons(), columns=["name"])["name"].to_pylist())
    candidates = [
        {"name": row["name"], "pixels": pixel_hash(row["image"])}
        for row in pq.read_table(plan / "candidates.parquet").to_pylist()
        if row["name"] not in bundled
    ]
    out.mkdir(parents=True, exist_ok=True)
    tables = {"models": models_out, "images": rows, "candidates": candidates}
    for name, content in tables.items():
        pq.write_table(pa.Table.from_pylist(content), out / f"{name}.parquet", compression="zstd", compression_level=19)
    size = sum((out / f"{name}.parquet").stat().st_size for name in tables)
    if size > AT_MOST:
        raise click.ClickException(f"the frozen files have {size / 2**20:.1f} MiB, {AT_MOST >> 20} are allowed")
    return {name: len(content) for name, content in tables.items()} | {"bytes": size}


def gallery(icons: Path, out: Path, frozen: Path = HERE) -> dict[str, int]:
    """Write the candidates' pictures as one Parquet file for `attrdb ingest corpus`: the corpus, and the frozen names.

    It takes some minutes; files that exist are kept.
    returns: the number of candidates, and of those that are missing or look otherwise than when they were frozen
    """
    counts_file, part = out.with_suffix(".json"), out.with_suffix(".part")
    if out.exists() and counts_file.exists():
        return json.loads(counts_file.read_text())
    wanted = {row["name"]: row["pixels"] for row in pq.read_table(frozen / "candidates.parquet").to_pylist()}
    corpus = pq.read_table(bundled_icons(), filters=[("role", "=", "pretraining")])
    n_rendered, otherwise = 0, 0
    with pq.ParquetWriter(part, SCHEMA) as writer:
        writer.write_table(corpus.cast(SCHEMA))
        for batch in pq.ParquetFile(icons).iter_batches(4096):
            rows = [{**row, "role": "pretraining"} for row in batch.to_pylist() if row["name"] in wanted]
            otherwise += sum(pixel_hash(row["image"]) != wanted[row["name"]] for row in rows)
            n_rendered += len(rows)
            for row in rows:  # as exemplars and corpus are stored; lossless pictures would be recognized by that alone
                row["image"] = lossy(row["image"])
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
    counts = {"candidates": corpus.num_rows + n_rendered, "missing": len(wanted) - n_rendered, "otherwise": otherwise}
    if not counts["missing"]:
        part.replace(out)
        counts_file.write_text(json.dumps(counts))
    return counts


def load_models(db: Database, frozen: Path = HERE) -> int:
    """Append the frozen models that the database lacks, each in one commit; their number."""
    stored = set(db.sql("SELECT model_id FROM models")["model_id"].to_pylist())
    by_model = defaultdict(list)
    for row in pq.read_table(frozen / "images.parquet").to_pylist():
        by_model[row["model_id"]].append(row)
    models = [row for row in pq.read_table(frozen / "models.parquet").to_pylist() if row["model_id"] not in stored]
    for model in models:
        rows = by_model[model["model_id"]]
        pictures = [read_picture(row["image_id"], row.pop("image")) for row in rows]
        db.writer.append_model(image_rows(rows, pictures, []), model | {"base_model": "icon-sd"})
    return len(models)


def load(db: Database, icons: Path, frozen: Path = HERE) -> dict[str, int]:
    """Put gallery, exemplars and samples into a database, without features; what is stored is not stored again."""
    pictures = icons.with_name("gallery.parquet")  # not candidates.parquet, which the plan writes
    counts = gallery(icons, pictures, frozen)
    if counts["missing"]:
        raise click.ClickException(
            f"{icons} lacks {counts['missing']} of the candidates; render it from the packages that the datasheet names"
        )
    ingest_corpus(db, open_corpus(pictures), [])
    return counts | {"models": load_models(db, frozen)}


@click.group()
def main() -> None:
    """Freeze IconAbC, or load it."""


@main.command("freeze")
@click.argument("db", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("plan", type=click.Path(exists=True, file_okay=False, path_type=Path))
def freeze_command(db: Path, plan: Path) -> None:
    """Write models.parquet, images.parquet and candidates.parquet beside this script."""
    for name, count in freeze(attrdb.open(db, read_only=True), plan).items():
        click.echo(f"{name}: {count}")


@main.command("load")
@click.argument("db", type=click.Path(file_okay=False, path_type=Path))
@click.argument("icons", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def load_command(db: Path, icons: Path) -> None:
    """Put gallery, exemplars and samples into a database, without features; rerunning the command resumes it."""
    for name, count in load(open_or_create(db), icons).items():
        click.echo(f"{name}: {count}")


if __name__ == "__main__":
    main()
