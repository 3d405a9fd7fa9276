"""Attributed pictures: samples of test models, their exemplars, and the first candidates with their influence."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageDraw

from attrdb.database import Database
from attrdb.store.files import write_whole
from attrdb.store.predicates import among, literal

N_SAMPLES, N_EXEMPLARS, N_CANDIDATES = 6, 3, 6
SIDE, GAP, TEXT = 64, 8, 14  # pixels of a picture, between two, and of a line of text below
OWN, INK = "#15803d", "#334155"  # the frame of an exemplar of the sample's own model; text
QUALITIES = (90, 80, 70, 60, 50)
AT_MOST = 150 * 1024  # bytes

# By their ids' hashes, so that no one has chosen them; one per model.
SAMPLES = """\
SELECT samples.image_id, samples.model_id, samples.image
FROM samples JOIN models ON models.model_id = samples.model_id
WHERE models.kind = $kind AND starts_with(models.split, 'test')
QUALIFY row_number() OVER (PARTITION BY samples.model_id ORDER BY md5(samples.image_id)) = 1
ORDER BY md5(samples.image_id) LIMIT $n
"""


def write_pictures(db: Database, method_id: str, kind: str, file: Path) -> None:
    """Write one picture with a row per sample: the sample, its exemplars, and the candidates by influence."""
    samples = db.sql(SAMPLES, {"kind": kind, "n": N_SAMPLES}).to_pylist()
    columns = 1 + N_EXEMPLARS + N_CANDIDATES
    sheet = Image.new(
        "RGB", (columns * (SIDE + GAP) + 3 * GAP, TEXT + len(samples) * (SIDE + TEXT + GAP) + GAP), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for column, title in ((0, "sample"), (1, "exemplars"), (1 + N_EXEMPLARS, "first candidates, influence")):
        pen.text((_left(column), 2), title, INK)
    for number, sample in enumerate(samples):
        top = TEXT + GAP + number * (SIDE + TEXT + GAP)
        _paste(sheet, sample["image"], (_left(0), top))
        own = f"role = 'exemplar' AND model_id = {literal(sample['model_id'])}"
        exemplars = db.images(own, ["image_id", "image"]).sort_by("image_id").to_pylist()
        for column, exemplar in enumerate(exemplars[:N_EXEMPLARS], 1):
            _paste(sheet, exemplar["image"], (_left(column), top))
        answer = db.attribute(sample["image_id"], k=N_CANDIDATES, method=method_id).to_pylist()
        shown = db.images(among("image_id", [row["image_id"] for row in answer]), ["image_id", "image"]).to_pylist()
        pictures = {row["image_id"]: row["image"] for row in shown}
        for column, row in enumerate(answer, 1 + N_EXEMPLARS):
            place = (_left(column), top)
            _paste(sheet, pictures[row["image_id"]], place)
            if row["model_id"] == sample["model_id"]:
                pen.rectangle((place[0] - 2, place[1] - 2, place[0] + SIDE + 1, place[1] + SIDE + 1), None, OWN, 2)
            pen.text((place[0], top + SIDE + 2), f"{row['influence']:.1%}", INK)
    _write(sheet, file)


def _left(column: int) -> int:
    """Groups of columns are a little apart."""
    return GAP + column * (SIDE + GAP) + GAP * ((column > 0) + (column > N_EXEMPLARS))


def _paste(sheet: Image.Image, encoded: bytes, place: tuple[int, int]) -> None:
    picture = Image.open(io.BytesIO(encoded)).convert("RGB")
    sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), place)


def _write(sheet: Image.Image, file: Path) -> None:
    """With the best quality that keeps to AT_MOST bytes, or the lowest one."""
    for quality in QUALITIES:
        encoded = io.BytesIO()
        sheet.save(encoded, "WEBP", quality=quality)
        if len(encoded.getvalue()) <= AT_MOST:
            break
    write_whole(file, lambda part: part.write_bytes(encoded.getvalue()))
