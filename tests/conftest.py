"""Fixtures: a toy database whose numbers can be worked out by hand, and a tiny pipeline of real architecture."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from dataclasses import replace
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import duckdb
import lance
import numpy as np
import pyarrow as pa
import pytest
from learnable import build

import attrdb
from attrdb.search.exact import accelerator
from attrdb.store.schema import feature_array

ROOT = Path(__file__).parent.parent

# The test modules that need the core alone: no torch, no Pillow. Where torch is
# not installed, the others are left out; without prompt_toolkit, the shell's too.
LIGHT = (
    "test_application",
    "test_architecture",
    "test_attribution",
    "test_backup",
    "test_between_concepts",
    "test_checksums",
    "test_contributing",
    "test_database",
    "test_dictionary",
    "test_evaluation",
    "test_export",
    "test_general_attribution",
    "test_golden",
    "test_import_export",
    "test_index",
    "test_influence_shares",
    "test_ingest_embeddings",
    "test_intervals",
    "test_maintenance",
    "test_models_set",
    "test_node",
    "test_purge",
    "test_hostile_arguments",
    "test_predicates",
    "test_one_statement",
    "test_pylance_quirks",
    "test_questions",
    "test_remove",
    "test_remove_beside",
    "test_shell",
    "test_site",
    "test_sql",
    "test_odd_values",
    "test_sql_limits",
    "test_sql_page",
    "test_upgrades",
    "test_user_queries",
    "test_user_tables",
    "test_version",
)
NEEDS = dict.fromkeys(LIGHT, "lance") | {"test_shell": "prompt_toolkit"}
collect_ignore = [
    path.name for path in Path(__file__).parent.glob("test_*.py") if find_spec(NEEDS.get(path.stem, "torch")) is None
]

# The core runs on both releases of DuckDB; what its plans say is tested on the newer one.
of_duckdb_2 = pytest.mark.skipif(
    duckdb.__version__ < "2", reason="DuckDB 1.5 passes fewer filters on to Lance, and words its plans otherwise"
)

# A shell that runs the tests in the background lets them, and the commands that they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What goes the way of an accelerator is run on one, or else by torch on the CPU with its kernels interpreted.
OTHER = {"cuda": "cuda", "cpu": "cpu:0"}[accelerator("auto")]
DEVICES = ("cpu", OTHER) if find_spec("triton") else ("cpu",)
if OTHER == "cpu:0":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

TOY = {"spec": "toy:2", "dimension": 2, "preprocessing": {}, "weights_fingerprint": "none"}


def docs_script(name: str) -> ModuleType:
    """The module docs/NAME.py, which is in no package."""
    spec = spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = sys.modules[spec.name] = module_from_spec(spec)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def angle(degrees: float) -> list[float]:
    """A feature of unit length; the similarity of two is the cosine of the angle between them."""
    return [float(np.cos(np.radians(degrees))), float(np.sin(np.radians(degrees)))]


def rows(entries: list[tuple[str, str, str | None, float]], **columns: list) -> pa.Table:
    """Images from (image_id, role, model_id, degrees)."""
    ids, roles, models, degrees = zip(*entries, strict=True)
    return pa.table(
        {
            "image_id": list(ids),
            "role": list(roles),
            "model_id": pa.array(models, pa.string()),
            "toy_2": feature_array(np.array([angle(d) for d in degrees])),
            **columns,
        }
    )


def add_index(database: Path, encoder_id: str, **options) -> None:
    """A vector index of two partitions, with its row in `indices`."""
    images = lance.dataset(str(database / "images.lance"))
    images.create_index(encoder_id, "IVF_FLAT", metric="cosine", num_partitions=2, **options)
    search = {"n_partitions": 2, "n_probes": 2, "oversampling": 1, "recall": 1.0, "n_rows": images.count_rows()}
    attrdb.open(database).writer.upsert("indices", [{"encoder_id": encoder_id, "kind": "IVF_FLAT", **search}])


@pytest.fixture(scope="session")
def learnable(tmp_path_factory):
    """Only to be read, or copied."""
    return build(tmp_path_factory.mktemp("learnable") / "some.attrdb")


@pytest.fixture(scope="session")
def removable_database(tmp_path_factory):
    """Only to be read, or copied."""
    from removable import build  # which imports this module

    return build(tmp_path_factory.mktemp("removable") / "full.attrdb")


@pytest.fixture
def full(removable_database, tmp_path):
    return attrdb.open(shutil.copytree(removable_database, tmp_path / "full.attrdb"))


@pytest.fixture
def empty(tmp_path: Path):
    return attrdb.create(tmp_path / "toy.attrdb")


@pytest.fixture(scope="session")
def toy_database(tmp_path_factory):
    """Only to be copied."""
    db = attrdb.create(tmp_path_factory.mktemp("toy") / "toy.attrdb")
    db.writer.add_encoder(**TOY)
    corpus = [("p10", "pretraining", None, 10), ("p20", "pretraining", None, 20), ("p90", "pretraining", None, 90)]
    db.writer.append_images(rows(corpus))
    model = [("m/e0", "exemplar", "m", 0), ("m/e40", "exemplar", "m", 40), ("m/0/1", "sample", "m", 2)]
    model += [("m/0/2", "sample", "m", 35)]
    table = rows(model, prompt_scheme=pa.array([None, None, "gpt", "gpt"]))
    db.writer.append_model(table, {"model_id": "m", "kind": "style", "n_exemplars": 2, "n_samples": 2})
    return db.path


@pytest.fixture
def toy(toy_database, tmp_path):
    """Three pretraining images at 10, 20 and 90 degrees, and a model with exemplars at 0 and 40 and samples at 2 and 35."""
    return attrdb.open(shutil.copytree(toy_database, tmp_path / "toy.attrdb"))


class ToyEncoder:
    """The mean red and the mean green of a picture."""

    def __init__(self):
        self.spec, self.dimension = "toy:2", 2
        self.preprocessing, self.weights_fingerprint = {}, "none"

    def prepare(self, image):
        return np.asarray(image, np.float32)[..., :2].mean(axis=(0, 1)) + 1

    def features(self, batch):
        return batch


@pytest.fixture
def toy_encoder():
    return ToyEncoder()


def picture(path: Path, colour: tuple[int, int, int], size: int = 32) -> Path:
    from PIL import Image  # not in the light core

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path)
    return path


@pytest.fixture
def exemplar_folder(tmp_path: Path) -> Path:
    picture(tmp_path / "exemplars" / "a.png", (200, 30, 30))
    return tmp_path / "exemplars"


class Recorder:
    """An observer of a customization that keeps what it is told, and the order in which."""

    def __init__(self):
        self.calls, self.steps, self.run, self.error = [], [], None, None

    def start(self, run):
        self.calls.append("start")
        self.run = run

    def before_update(self, step):
        self.calls.append(f"before {step.number}")
        self.steps.append(step)

    def after_update(self, step):
        self.calls.append(f"after {step.number}")
        assert step is self.steps[-1]

    def end(self, error):
        self.calls.append("end")
        self.error = error


def make_tiny_base(parent: Path, max_tokens: int = 77) -> Path:
    """A Stable Diffusion pipeline folder, randomly initialised and as small as its parts allow."""
    import torch

    from attrdb.training.icon_sd import parts

    torch.manual_seed(0)
    folder = parent / "tiny-sd"
    settings = replace(parts.TINY, vocabulary=600, max_tokens=max_tokens)
    tokenizer = parts.train_tokenizer(["a picture of a vase in the style of art"] * 3, settings, parent / "tokens")
    vae, unet = parts.new_vae(settings), parts.new_unet(settings)
    parts.export(vae, unet, parts.new_text_encoder(tokenizer, settings), tokenizer, {}, folder)
    profile = '{"steps": 3, "batch": 2, "lr": 0.01, "prompts": "icon", "prompts_per_scheme": 2, "samples_per_prompt": 1'
    (folder / "customize.json").write_text(profile + ', "solver_steps": 2, "sample_batch": 2}')
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("base"))
