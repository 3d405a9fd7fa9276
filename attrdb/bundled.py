"""The pictures that come with attrdb: sprites, which icon-sd's training scenes show, and exemplars that it never saw."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ASSETS = Path(str(files("attrdb"))) / "assets"
SPRITES = ASSETS / "sprites.parquet"  # made by training/icon_sd/sprites.py
EXEMPLARS = ASSETS / "exemplars.parquet"  # made by training/icon_sd/icons.py
BATCH = 1024  # rows


def sprite_rows(sprites: Path = SPRITES) -> Iterator[dict[str, Any]]:
    """Each sprite alone, on white, as a row for `attrdb ingest corpus`."""
    for batch in pq.ParquetFile(sprites).iter_batches(BATCH):
        for row in batch.to_pylist():
            sprite = Image.open(io.BytesIO(row["image"]))
            cover = sprite.convert("L") if row["mono"] else sprite.convert("RGBA").getchannel("A")
            picture = Image.new("RGB", sprite.size, "white")
            picture.paste(Image.new("RGB", sprite.size) if row["mono"] else sprite.convert("RGB"), mask=cover)
            yield {
                "name": row["name"],
                "role": "pretraining",
                "source": row["source"],
                "category": row["thing"],
                "prompt": f"{row['thing']} in the style of {row['style']} art",
                "split": None,
                "creator": row["creator"],
                "license": row["license"],
                "uri": f"file:attrdb/assets/sprites.parquet#{row['name']}",
                "width": picture.width,
                "height": picture.height,
                "metadata": json.dumps({"style": row["style"]}),
                "image": lossy(picture),
            }


def lossy(picture: Image.Image) -> bytes:
    """WebP of less than half the bytes of a lossless one; bundled pictures, galleries and exemplars are all stored so."""
    encoded = io.BytesIO()
    picture.save(encoded, "WEBP", quality=92)
    return encoded.getvalue()


def write_corpus(out: Path, most: int | None = None) -> Path:
    """Write the sprites, or the first ones, as pictures on white, for `attrdb ingest corpus`; a file that exists is kept."""
    if not out.exists():
        part = out.with_suffix(".part")
        pq.write_table(pa.Table.from_pylist(list(islice(sprite_rows(), most))), part, compression="none")
        part.replace(out)
    return out
