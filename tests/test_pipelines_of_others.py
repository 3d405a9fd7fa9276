"""Base models as a hub has them: variants, several copies of the weights, sizes as lists, paths from elsewhere."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from attrdb.cli import main
from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.customize import base_model as loading
from attrdb.ingest.customize.weight_files import WEIGHTED, loaded_files, variant_of
from attrdb.ingest.models.settings import settings_for

FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def pipeline(tiny_base, tmp_path):
    return shutil.copytree(tiny_base, tmp_path / "pipeline")


def add_variant(folder, variant, parts=WEIGHTED, keep=True, dtype=torch.float16):
    for part in parts:
        plain = folder / part / f"{FILES[part]}.safetensors"
        weights = {name: value.to(dtype) for name, value in load_file(plain).items()}
        save_file(weights, folder / part / f"{FILES[part]}.{variant}.safetensors", metadata={"format": "pt"})
        if not keep:
            plain.unlink()
    return folder


def change(folder, part, **values):
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_copies_that_are_not_loaded_change_nothing(pipeline):
    before = loading.weights_hash(pipeline)
    for variant in ("fp16", "non_ema"):
        add_variant(pipeline, variant)
    (pipeline / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text("{}")
    (pipeline / "unet" / "diffusion_pytorch_model.fp16-00001-of-00002.safetensors").write_bytes(b"x")
    assert variant_of(pipeline) is None
    assert loading.weights_hash(pipeline) == before
    # Weights that are loaded do count, and so do configurations.
    change(pipeline, "unet", note="other")
    assert loading.weights_hash(pipeline) != before


def test_a_hash_from_before_covers_all_copies_and_is_still_known(pipeline):
    add_variant(pipeline, "fp16")
    files = [file for part in loading.NEEDED for file in sorted((pipeline / part).glob("*"))]
    files = [file for file in files if file.suffix in loading.HASHED_BEFORE]
    old = loading._weights_hash(pipeline.resolve(), loading._stamps(files))
    assert old != loading.weights_hash(pipeline)
    assert loading.is_made_from(pipeline, old)
    assert not loading.is_made_from(pipeline, "another")


@pytest.mark.parametrize("parts", [WEIGHTED, ("unet",), ("text_encoder", "vae")])
def test_weights_that_are_there_in_half_precision_alone_are_loaded(pipeline, parts):
    plain = loading.load_base_model(str(pipeline)).pipeline.unet.state_dict()
    before = loading.weights_hash(pipeline)
    add_variant(pipeline, "fp16", parts, keep=False)
    base = loading.load_base_model(str(pipeline))
    assert {value.dtype for value in base.pipeline.unet.state_dict().values()} == {torch.float32}
    for name, value in base.pipeline.unet.state_dict().items():
        torch.testing.assert_close(value, plain[name], atol=1e-3, rtol=1e-2)
    assert loading.weights_hash(pipeline) != before
    names = {file.name for file in loaded_files(pipeline, ("unet",)) if file.suffix == ".safetensors"}
    assert names == {f"diffusion_pytorch_model{'.fp16' if 'unet' in parts else ''}.safetensors"}


def test_the_hash_covers_the_variant_that_is_loaded(pipeline):
    add_variant(pipeline, "fp16", keep=False)
    alone = loading.weights_hash(pipeline)
    for part in WEIGHTED:
        copy = pipeline / part / f"{FILES[part]}.bf16.safetensors"
        shutil.copy(pipeline / part / f"{FILES[part]}.fp16.safetensors", copy)
    assert (variant_of(pipeline), loading.weights_hash(pipeline)) == ("fp16", alone)


def test_variants_that_do_not_go_together_are_refused(pipeline):
    add_variant(pipeline, "fp16", ("unet",), keep=False)
    add_variant(pipeline, "ema", ("vae",), keep=False)
    with pytest.raises(
        InvalidValue, match=r"variants that do not go together \(unet: fp16; vae: ema; text_encoder: \)"
    ):
        loading.base_model_folder(str(pipeline))


def test_weights_under_a_name_that_nothing_loads_are_missing(pipeline, exemplar_folder, tmp_path):
    file = pipeline / "text_encoder" / "model.safetensors"
    file.rename(file.with_name("weights.safetensors"))
    words = ["ingest", "model", tmp_path / "new.attrdb", "--exemplars", exemplar_folder, "--category", "vase"]
    words += ["--kind", "object", "--base-model", pipeline, "--encoder", "pixels:2"]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert "lacks text_encoder/model.safetensors; fetch the whole pipeline folder" in done.stderr
    assert not (tmp_path / "new.attrdb").exists()


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_sizes_as_lists(pipeline, part):
    size = json.loads((pipeline / part / "config.json").read_text())["sample_size"]
    plain = loading.load_base_model(str(pipeline))
    change(pipeline, part, sample_size=[size, size])
    base = loading.load_base_model(str(pipeline))
    assert (base.latent_side, base.resolution) == (plain.latent_side, plain.resolution)


@pytest.mark.parametrize("size", [[8, 12], [], None, "8", 0, [8, 8, 8], [8.5, 8.5], True])
def test_sizes_that_make_no_square_are_refused_before_weights_are_loaded(pipeline, size):
    change(pipeline, "unet", sample_size=size)
    with pytest.raises(
        InvalidValue, match=r"pipeline has a U-Net of sample_size .*; one that makes square pictures is"
    ):
        loading.base_model_folder(str(pipeline))


def test_a_model_is_made_of_a_pipeline_with_lists_and_a_variant(pipeline, exemplar_folder, tmp_path, monkeypatch):
    """Named from one folder, and its samples made again from another."""
    size = json.loads((pipeline / "unet" / "config.json").read_text())["sample_size"]
    change(pipeline, "unet", sample_size=[size, size])
    add_variant(pipeline, "fp16", keep=False)
    db = tmp_path / "new.attrdb"
    monkeypatch.chdir(pipeline.parent)
    words = ["ingest", "model", db, "--exemplars", exemplar_folder, "--category", "vase", "--kind", "object"]
    words += ["--base-model", "pipeline", "--encoder", "pixels:2", "--model-id", "vase"]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    add = shutil.copy(pipeline / "vae" / f"{FILES['vae']}.fp16.safetensors", pipeline / "vae" / "other.safetensors")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = CliRunner().invoke(main, ["models", "show", str(db), "vase", "--regenerate", "1", "--json"])
    assert done.exit_code == 0, done.output
    assert add.exists()
    pipeline.rename(tmp_path / "moved")
    done = CliRunner().invoke(main, ["models", "show", str(db), "vase", "--regenerate", "1", "--json"])
    assert "Model 'vase' was made from it; say where it is now with --base-model" in done.stderr
    done = CliRunner().invoke(
        main,
        ["models", "show", str(db), "vase", "--regenerate", "1", "--json", "--base-model", str(tmp_path / "moved")],
    )
    assert done.exit_code == 0, done.output


def test_a_hub_that_has_half_precision_alone(monkeypatch, pipeline):
    add_variant(pipeline, "fp16", keep=False)

    def download(name, variant=None, **_):
        if variant != "fp16":
            raise OSError(f"Could not find the necessary `safetensors` weights in {name} (variant=None)")
        return str(pipeline)

    monkeypatch.setattr(loading.StableDiffusionPipeline, "download", download)
    assert loading.base_model_folder("org/half") == pipeline


def test_a_name_that_no_hub_has_is_asked_for_once(monkeypatch):
    asked = []

    def download(name, **how):
        asked.append(how.get("variant"))
        raise OSError("404")

    monkeypatch.setattr(loading.StableDiffusionPipeline, "download", download)
    with pytest.raises(NotFound, match="the hub says: 404"):
        loading.base_model_folder("org/none")
    assert asked == [None]


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 10**400])
def test_seeds_that_no_generator_takes(tiny_base, seed, tmp_path, exemplar_folder):
    with pytest.raises(InvalidValue, match=r"seed is -?\d+; it must be below 2\^63 in size"):
        settings_for(str(tiny_base), "object", "vase", {"seed": seed})
    words = [
        "ingest",
        "model",
        tmp_path / "x",
        "--exemplars",
        exemplar_folder,
        "--category",
        "vase",
        "--kind",
        "object",
    ]
    done = CliRunner().invoke(main, [str(word) for word in [*words, "--base-model", tiny_base, "--seed", seed]])
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: seed is ")
    line = {
        "exemplars": str(exemplar_folder),
        "category": "vase",
        "kind": "object",
        "base_model": str(tiny_base),
        "steps": seed,
    }
    (tmp_path / "models.jsonl").write_text(json.dumps(line))
    done = CliRunner().invoke(main, ["ingest", "models", str(tmp_path / "x"), str(tmp_path / "models.jsonl")])
    assert "line 1: steps is" in done.stderr
    assert not (tmp_path / "x").exists()


def test_seeds_at_the_edge(tiny_base):
    for seed in (2**63 - 1, -(2**63), -1):
        assert settings_for(str(tiny_base), "object", "vase", {"seed": seed}).customize.seed == seed
