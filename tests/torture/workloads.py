"""The jobs that are disturbed: every command that writes, as a user gives it, on toy-sized inputs."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import learnable
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import ROOT, add_index
from PIL import Image

import attrdb
from attrdb.cli import main as attrdb_command
from attrdb.store.schema import feature_array
from attrdb.store.tables import table_exists

N_PICTURES = 60
N_VECTORS = 320  # a shard
N_MODELS = 6
Rows = dict[str, dict]


Words = list[str | Path]


@dataclass(frozen=True)
class Workload:
    """A job as a user gives it: commands, one after the other.

    commands: of a database and the folder of inputs
    before:   makes the database that it is given, if it needs one
    made:     what it leaves beside the database, to be compared
    """

    name: str
    commands: Callable[[Path, Path], list[Words]]
    before: Callable[[Path, Path], None] | None = None
    made: Callable[[Path], Rows] | None = None

    def run(self, db: Path, inputs: Path) -> None:
        for words in self.commands(db, inputs):
            attrdb_runs(*words)


class Application(Workload):
    """By Python: `commands` does it, and returns none."""


def attrdb_runs(*words: str | Path) -> None:
    """Run one command as the command line does; raises SystemExit if it fails, but for items that were left out."""
    try:
        attrdb_command([str(word) for word in words])
    except SystemExit as end:
        if end.code not in (0, None) and not (words[0] == "ingest" and end.code == LEFT_OUT):
            raise


LEFT_OUT = 1  # the broken picture and the zero vectors; what is lost beside them is found by the comparison


# --- bringing in -----------------------------------------------------------------------------------------------------


def init(db: Path, inputs: Path) -> list[Words]:
    return [] if table_exists(db / "images.lance") else [["init", db]]


def ingest_corpus(db: Path, inputs: Path) -> list[Words]:
    return [["ingest", "corpus", db, inputs / "photos", "--encoder", "pixels:2", "--quiet"]]


def ingest_two(db: Path, inputs: Path) -> list[Words]:
    """Most of it is making the database."""
    return [["ingest", "corpus", db, inputs / "vase", "--encoder", "pixels:2", "--quiet"]]


def ingest_embeddings(db: Path, inputs: Path) -> list[Words]:
    return [["ingest", "corpus", db, inputs / "vectors", "--encoder", "clip:x", "--source", "web", "--quiet"]]


def append_models(db: Path, inputs: Path) -> list[Words]:
    opened = attrdb.open(db)
    for number in range(N_MODELS):
        opened.writer.append_model(*model(f"m{number}", number))
    return []


def ingest_model(db: Path, inputs: Path) -> list[Words]:
    what = "--category vase --kind object --base-model icon-sd --prompts-per-scheme 2 --samples-per-prompt 1"
    small = "--steps 3 --batch 2 --solver-steps 2 --quiet"
    return [["ingest", "model", db, "--exemplars", inputs / "vase", *what.split(), *small.split()]]


def encode(db: Path, inputs: Path) -> list[Words]:
    return [["encode", db, "--encoder", "pixels:3", "--quiet"]]


def corpus_stored(db: Path, inputs: Path) -> None:
    Workload("ingest corpus", ingest_corpus).run(db, inputs)


def model(model_id: str, seed: int) -> tuple[pa.Table, dict]:
    """Rows of a model with two exemplars and five samples, and its row in models."""
    features = np.random.default_rng(seed).normal(size=(7, 12)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1)[:, None]
    names = [f"{model_id}/e{n}" for n in range(2)] + [f"{model_id}/0/{n}" for n in range(5)]
    table = pa.table(
        {
            "image_id": names,
            "role": ["exemplar"] * 2 + ["sample"] * 5,
            "model_id": [model_id] * 7,
            "pixels_2": feature_array(features),
        }
    )
    return table, {"model_id": model_id, "kind": "object", "created_at": datetime(2026, 1, 1, tzinfo=UTC)}


# --- learning and asking ---------------------------------------------------------------------------------------------


def learnable_stored(db: Path, inputs: Path) -> None:
    """90 models that a mapper can learn from; made once, it is copied."""
    made = inputs / "learnable.attrdb"
    if not made.exists():
        learnable.build(made)
    shutil.copytree(made, db)


def evaluate(db: Path, inputs: Path) -> list[Words]:
    return [["evaluate", db, "--gallery", "all", "--quiet"]]


def train(db: Path, inputs: Path) -> list[Words]:
    return [["train", db, "--epochs", "3", "--n-candidates", "100", "--mapper-id", "learned", "--quiet"]]


def calibrate(db: Path, inputs: Path) -> list[Words]:
    return [["calibrate", db, "--split", "val", "--quiet"]]


def attribute(db: Path, inputs: Path) -> list[Words]:
    return [["attribute", db, "--samples", "model_id >= 'm84'", "-k", "3", "--quiet"]]


# --- keeping ---------------------------------------------------------------------------------------------------------


def much_stored(db: Path, inputs: Path) -> None:
    """A corpus, models and features that others made, in many fragments, with a vector index."""
    corpus_stored(db, inputs)
    append_models(db, inputs)
    add_index(db, "pixels_2")
    attrdb.open(db).writer.append_model(*model("late", 99))


def optimize(db: Path, inputs: Path) -> list[Words]:
    return [["optimize", db, "--drop-older-than", "0", "--quiet"]]


def remove(db: Path, inputs: Path) -> list[Words]:
    """A model with all of its images, then a part of the corpus and an exemplar of a model that stays."""
    return [
        ["remove", db, "--where", "image_id = 'm1/e0'", "--models", "remove", "--quiet"],
        ["remove", db, "--ids", inputs / "opt-out.txt", "--models", "mark", "--purge", "--block", "--quiet"],
    ]


def old_stored(db: Path, inputs: Path) -> None:
    """Of schema 5."""
    with zipfile.ZipFile(ROOT / "tests" / "fixtures" / "schema-5.zip") as archive:
        archive.extractall(db)


def upgrade(db: Path, inputs: Path) -> list[Words]:
    return [["upgrade", db]]


def backup(db: Path, inputs: Path) -> list[Words]:
    return [] if beside(db, "backup").exists() else [["backup", db, beside(db, "backup"), "--quiet"]]


def restore(db: Path, inputs: Path) -> list[Words]:
    back = (
        []
        if beside(db, "restored").exists()
        else [["restore", beside(db, "backup"), beside(db, "restored"), "--quiet"]]
    )
    return backup(db, inputs) + back


def export(db: Path, inputs: Path) -> list[Words]:
    return [] if beside(db, "exported").exists() else [["export", db, beside(db, "exported"), "--quiet"]]


def beside(db: Path, name: str) -> Path:
    return db.with_suffix(f".{name}")


def exported_made(db: Path) -> Rows:
    """The Parquet files: rows and columns of each."""
    files = sorted(beside(db, "exported").glob("*.parquet"))
    described = [pq.read_metadata(file) for file in files]
    return {
        file.name: {"rows": each.num_rows, "columns": each.num_columns}
        for file, each in zip(files, described, strict=True)
    }


def backup_made(db: Path) -> Rows:
    """By restoring it, which reads every file."""
    restored = beside(db, "checked")
    shutil.rmtree(restored, ignore_errors=True)
    attrdb_runs("restore", beside(db, "backup"), restored, "--quiet")
    return counts(restored)


def restored_made(db: Path) -> Rows:
    return counts(beside(db, "restored"))


def counts(db: Path) -> Rows:
    with_counts = (
        attrdb.open(db, read_only=True).sql("SELECT role, count(*) AS n FROM images GROUP BY role").to_pylist()
    )
    return {row["role"]: row for row in with_counts}


WORKLOADS = (
    Workload("init", init),
    Workload("new database", ingest_two),
    Workload("ingest corpus", ingest_corpus),
    Workload("ingest embeddings", ingest_embeddings),
    Application("append models", append_models, corpus_stored),
    Workload("encode", encode, corpus_stored),
    Workload("evaluate", evaluate, learnable_stored),
    Workload("train", train, learnable_stored),
    Workload("calibrate", calibrate, learnable_stored),
    Workload("attribute", attribute, learnable_stored),
    Workload("optimize", optimize, much_stored),
    Workload("remove", remove, much_stored),
    Workload("upgrade", upgrade, old_stored),
    Workload("backup", backup, much_stored, backup_made),
    Workload("restore", restore, much_stored, restored_made),
    Workload("export", export, much_stored, exported_made),
)
CUSTOMIZE = Workload("ingest model", ingest_model, corpus_stored)


def make_inputs(folder: Path) -> None:
    """Pictures (one of them broken), vectors (two of them zero) and exemplars."""
    chance = np.random.default_rng(0)
    for name, count in (("photos", N_PICTURES), ("vase", 2)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = chance.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.png")
    (folder / "photos" / "broken.png").write_bytes(b"not a picture")
    (folder / "opt-out.txt").write_text("m0/e1\nphotos/050.png\nnobody\n")
    for part in ("img_emb", "metadata"):
        (folder / "vectors" / part).mkdir(parents=True)
    for shard in range(2):
        vectors = chance.normal(size=(N_VECTORS, 8)).astype(np.float16)
        vectors[3 + shard] = 0
        np.save(folder / "vectors" / "img_emb" / f"img_emb_{shard}.npy", vectors)
        keys = [f"{shard}-{row}" for row in range(N_VECTORS)]
        metadata = pa.table({"key": keys, "caption": [f"picture {key}" for key in keys]})
        pq.write_table(metadata, folder / "vectors" / "metadata" / f"metadata_{shard}.parquet")
