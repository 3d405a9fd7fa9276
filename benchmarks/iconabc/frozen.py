"""IconAbC as files: freeze the models that were made, and load them into any database.

    python benchmarks/iconabc/frozen.py freeze DB PLAN       # PLAN: the folder that plan.py wrote
    python benchmarks/iconabc/frozen.py load DB ICONS        # ICONS: the file of `attrdb.training.icon_sd.icons build`

The frozen files are in this script's folder: models.parquet, images.parquet (exemplars and samples), candidates.parquet and
relatives.parquet (names of the gallery's pictures and of those that are kept apart, and how they look; the pictures are
rendered again: scenes and sprites by attrdb, icons from the packages that they come from).
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
from gallery import SCENES, scene_rows
from PIL import Image

import attrdb
from attrdb.bundled import SPRITES, lossy, sprite_rows
from attrdb.database import Database, open_or_create
from attrdb.ingest.read.corpus import image_rows, ingest_corpus
from attrdb.ingest.read.discover import open_corpus
from attrdb.ingest.read.pictures import read_picture
from attrdb.training.icon_sd.icons import SCHEMA

HERE = Path(__file__).parent
TABLES = ("models", "images", "candidates", "relatives")
PROVENANCE = ("source", "category", "creator", "license", "uri", "prompt")
NOT_FROZEN = ("weights_path", "weights_hash", "base_model")
AT_MOST = 12 * 2**20  # bytes of the frozen files
SIDE, SAME = 3, 12  # pixels of a look, and the grey levels by which looks of the same picture may differ


def look(encoded: bytes) -> bytes:
    """How a picture looks: SIDE x SIDE grey levels. Releases of an encoder differ in single pixels."""
    picture = Image.open(io.BytesIO(encoded)).convert("L")
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX).tobytes()


def looks_alike(first: bytes, second: bytes) -> bool:
    return all(abs(one - other) <= SAME for one, other in zip(first, second, strict=True))


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
        if row["role"] == "sample":
            row["image"] = lossy(Image.open(io.BytesIO(row["image"])))
        else:
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
    tables = {"models": models_out, "images": rows}
    for name in ("candidates", "relatives"):
        pictures = pq.read_table(plan / f"{name}.parquet", columns=["name", "image"]).to_pylist()
        tables[name] = [{"name": row["name"], "look": look(row["image"])} for row in pictures]
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        parts = {name: Path(folder) / f"{name}.parquet" for name in TABLES}
        for name, part in parts.items():
            pq.write_table(pa.Table.from_pylist(tables[name]), part, compression="zstd", compression_level=19)
        size = sum(part.stat().st_size for part in parts.values())
        if size > AT_MOST:
            raise click.ClickException(f"the frozen files have {size / 2**20:.1f} MiB, {AT_MOST >> 20} are allowed")
        for part in parts.values():
            part.replace(out / part.name)
    return {name: len(content) for name, content in tables.items()} | {"bytes": size}


def pictures_of(names: set[str], icons: Path) -> Iterator[dict]:
    """The pictures of these names, each once, as they are stored: scenes and sprites of the base model, and icons."""
    n_scenes = sum(name.startswith(f"{SCENES}/") for name in names)
    left = set(names)

    def rows() -> Iterator[dict]:
        if n_scenes:
            yield from scene_rows(SPRITES, n_scenes)
            yield from sprite_rows()
        for batch in pq.ParquetFile(icons).iter_batches(4096):
            for row in batch.to_pylist():
                if row["name"] in left:  # lossless pictures would be recognized by that alone
                    yield row | {"role": "pretraining", "image": lossy(Image.open(io.BytesIO(row["image"])))}

    for row in rows():
        if row["name"] in left:
            left.discard(row["name"])
            yield row


def gallery(name: str, icons: Path, out: Path, frozen: Path = HERE) -> dict[str, int]:
    """Write the pictures of a frozen list, `candidates` or `relatives`, as one Parquet file for `attrdb ingest corpus`.

    It takes some minutes. A file of the same list is kept if its pictures look as they did when they were frozen.
    returns: the number of pictures, and of those that are missing or look otherwise
    """
    listed = frozen / f"{name}.parquet"
    digest = hashlib.sha256(listed.read_bytes()).hexdigest()
    counts_file, part = out.with_suffix(".json"), out.with_suffix(".part")
    if out.exists() and counts_file.exists():
        stored = json.loads(counts_file.read_text())
        if stored.pop("digest") == digest and not stored["otherwise"]:
            return stored
    wanted = {row["name"]: row["look"] for row in pq.read_table(listed).to_pylist()}
    n_rendered, otherwise = 0, 0
    with pq.ParquetWriter(part, SCHEMA) as writer:
        for rows in batched(pictures_of(set(wanted), icons), 4096):
            otherwise += sum(not looks_alike(look(row["image"]), wanted[row["name"]]) for row in rows)
            n_rendered += len(rows)
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
    counts = {"pictures": n_rendered, "missing": len(wanted) - n_rendered, "otherwise": otherwise}
    if counts["missing"]:
        raise click.ClickException(
            f"{icons} lacks {counts['missing']} of the {name}; render it from the packages that the datasheet names"
        )
    part.replace(out)
    counts_file.write_text(json.dumps(counts | {"digest": digest}))
    return counts


def batched(rows: Iterator[dict], size: int) -> Iterator[list[dict]]:
    while some := list(itertools.islice(rows, size)):
        yield some


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


def load_gallery(db: Database, name: str, icons: Path, file: str, frozen: Path) -> dict[str, int]:
    """Put the pictures of a frozen list into a database, by way of a file beside `icons`; what `gallery` returns."""
    pictures = icons.with_name(file)  # the plan, which may be in this folder, has files with the names of the lists
    counts = gallery(name, icons, pictures, frozen)
    ingest_corpus(db, open_corpus(pictures), [])
    return counts


def load(db: Database, icons: Path, frozen: Path = HERE) -> dict[str, int]:
    """Put gallery, exemplars and samples into a database, without features; what is stored is not stored again."""
    counts = load_gallery(db, "candidates", icons, "gallery.parquet", frozen)
    return counts | {"models": load_models(db, frozen)}


def load_relatives(db: Database, icons: Path, frozen: Path = HERE) -> dict[str, int]:
    """Put the further icons of the styles' sets into a database, without features."""
    return load_gallery(db, "relatives", icons, "gallery-relatives.parquet", frozen)


@click.group()
def main() -> None:
    """Freeze IconAbC, or load it."""


@main.command("freeze")
@click.argument("db", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("plan", type=click.Path(exists=True, file_okay=False, path_type=Path))
def freeze_command(db: Path, plan: Path) -> None:
    """Write the frozen files beside this script."""
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
