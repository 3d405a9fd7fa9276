"""Ingesting a model: run twice = run once, killed and rerun = run once, other settings = a clear error."""

import json
import shutil
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import picture
from torture.processes import log_of, run_whole, start
from torture.workloads import attrdb_runs

import attrdb
from attrdb.errors import Busy, InvalidValue, NotFound, OutOfMemory
from attrdb.ingest.customize import base_model, customize, synthesize
from attrdb.ingest.encode import Pixels
from attrdb.ingest.models import ingest_one, stages
from attrdb.ingest.models.exemplars import read_exemplars
from attrdb.ingest.models.settings import default_model_id, settings_for
from attrdb.ingest.prompts import Prompt
from attrdb.ingest.read.pictures import webp
from attrdb.store import job_folders


def ingest(db, folder, base, encoder, **given):
    report = given.pop("report", lambda *_: None)
    settings = settings_for(str(base), "object", "vase", given)
    return ingest_one.ingest_model(db, read_exemplars(folder), settings, [encoder], "vase-1", report)


def images(db):
    return db.sql("SELECT * FROM images ORDER BY image_id").to_pylist()


def test_appends_exemplars_and_samples_in_one_commit(empty, exemplar_folder, tiny_base, toy_encoder):
    result = ingest(empty, exemplar_folder, tiny_base, toy_encoder)
    assert (result.n_exemplars, result.n_samples, result.appended) == (1, 4, True)
    rows = images(empty)
    assert [row["role"] for row in rows].count("sample") == 4
    assert {row["prompt_scheme"] for row in rows} == {"gpt", "procedural", None}
    assert all("V*" in row["prompt"] for row in rows if row["role"] == "sample")
    assert all(abs(np.linalg.norm(row["toy_2"]) - 1) < 1e-6 for row in rows)
    for row in rows:
        if row["role"] == "sample":
            assert row["image_id"] == f"vase-1/{row['image_id'].split('/')[1]}/{row['seed']}"
    stored = empty.sql("SELECT * FROM models").to_pylist()[0]
    assert stored["train_prompt"] == "V* vase"
    assert (empty.path / stored["weights_path"]).exists()
    assert not (empty.path / "jobs" / "vase-1").exists()
    # version 1 is the empty table, 2 has the encoder's column, 3 the model
    assert empty.version == 3


def test_run_twice_is_run_once(empty, exemplar_folder, tiny_base, toy_encoder):
    ingest(empty, exemplar_folder, tiny_base, toy_encoder)
    before, version = images(empty), empty.version
    assert ingest(empty, exemplar_folder, tiny_base, toy_encoder).appended is False
    assert images(empty) == before
    assert empty.version == version


@pytest.mark.parametrize(
    ("stage", "done"), [("customize", 2), ("sample", 1), ("sample", 2), ("sample", 4), ("encode", 0)]
)
def test_killed_and_rerun_is_run_once(tmp_path, exemplar_folder, tiny_base, toy_encoder, stage, done):
    whole, killed = attrdb.create(tmp_path / "whole.attrdb"), attrdb.create(tmp_path / "killed.attrdb")
    ingest(whole, exemplar_folder, tiny_base, toy_encoder)

    def kill(at, units, _total, note=""):
        if (at, units) == (stage, done):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(killed, exemplar_folder, tiny_base, toy_encoder, report=kill)
    assert images(killed) == []
    assert ingest(killed, exemplar_folder, tiny_base, toy_encoder).appended
    assert images(killed) == images(whole)


def test_killed_between_images_and_models_row(empty, exemplar_folder, tiny_base, toy_encoder, monkeypatch):
    empty.writer.add_encoder(toy_encoder.spec, 2, {}, "none")
    monkeypatch.setattr(type(empty.writer), "upsert", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ingest(empty, exemplar_folder, tiny_base, toy_encoder)
    monkeypatch.undo()
    half = attrdb.open(empty.path)
    assert images(half) == []
    assert half.snapshot.hidden_models == ("vase-1",)
    ingest(empty, exemplar_folder, tiny_base, toy_encoder)
    assert len(images(empty)) == 5
    assert empty.sql("SELECT count(*) AS n FROM models")["n"].to_pylist() == [1]


def test_other_settings_are_refused_by_name(empty, exemplar_folder, tiny_base, toy_encoder):
    ingest(empty, exemplar_folder, tiny_base, toy_encoder)
    with pytest.raises(InvalidValue, match=r"'vase-1' is in .* with customize = .*'steps': 3.*'steps': 5"):
        ingest(empty, exemplar_folder, tiny_base, toy_encoder, steps=5)


def test_other_settings_are_refused_for_a_job_half_done(empty, exemplar_folder, tiny_base, toy_encoder):
    def kill(stage, _done, _total, note=""):
        if stage == "sample":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(empty, exemplar_folder, tiny_base, toy_encoder, report=kill)
    with pytest.raises(InvalidValue, match=r"half done in .* with synthesize"):
        ingest(empty, exemplar_folder, tiny_base, toy_encoder, guidance=2.0)


def test_customizing_moves_only_the_delta(tiny_base):
    base = base_model.load_base_model(str(tiny_base))
    before = {name: value.clone() for name, value in base.pipeline.unet.state_dict().items()}
    text_before = {name: value.clone() for name, value in base.pipeline.text_encoder.state_dict().items()}
    n_tokens = len(base.pipeline.tokenizer)
    vase_tokens = base.pipeline.tokenizer("vase", add_special_tokens=False).input_ids
    red = picture_image((200, 30, 30))
    settings = customize.CustomizeSettings(steps=3, batch=2, lr=0.01)
    delta, figures = customize.customize(base, [red], "V* vase", "V*", "vase", settings)
    moved = {name for name, value in base.pipeline.unet.state_dict().items() if not value.equal(before[name])}
    assert moved == {name.removeprefix("unet.") for name in delta} - {customize.TOKEN_KEY}
    assert not delta[customize.TOKEN_KEY].equal(
        text_before["embeddings.token_embedding.weight"][vase_tokens].mean(dim=0)
    )
    assert all(name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for name in moved)
    for name, value in base.pipeline.text_encoder.state_dict().items():
        assert (
            value[:n_tokens].equal(text_before[name]) if "token_embedding" in name else value.equal(text_before[name])
        )
    assert figures["loss"] > 0


def picture_image(colour):
    from PIL import Image

    return Image.new("RGB", (32, 32), colour)


def test_delta_reloads_into_a_fresh_base_and_regenerates_the_samples(empty, exemplar_folder, tiny_base):
    encoder = Pixels(8)
    ingest(empty, exemplar_folder, tiny_base, encoder)
    stored = empty.sql("SELECT image_id, image, prompt, prompt_scheme, seed FROM samples").to_pylist()
    record = json.loads(empty.sql("SELECT settings FROM models")["settings"][0].as_py())
    settings = synthesize.SynthesizeSettings(**record["synthesize"])
    base = base_model.load_base_model(str(tiny_base))
    base.precision = record["computed_in"]
    delta = customize.load_delta(empty.path / "weights" / "vase-1.safetensors")
    customize.apply_delta(base, delta, {"V*": "vase"})
    synthesize.use_fast_solver(base)
    prompts = [Prompt(n, scheme, text) for n, (scheme, text) in enumerate(schemes_of(record))]
    made = {}
    for batch in synthesize.plan_samples("vase-1", prompts, settings):
        for plan, image in zip(batch, synthesize.synthesize(base, batch, settings), strict=True):
            made[plan.image_id] = webp(image)
    assert made == {row["image_id"]: row["image"] for row in stored}


def schemes_of(record):
    half = len(record["prompts"]) // 2
    return [("gpt" if n < half else "procedural", text) for n, text in enumerate(record["prompts"])]


def customize_vase(base, db, exemplars):
    what = "--category vase --kind object --model-id vase-1 --encoder pixels:4 --steps 12 --quiet"
    attrdb_runs("ingest", "model", db, "--exemplars", exemplars, "--base-model", base, *what.split())


def test_killed_outright_and_rerun_is_run_once(tmp_path, exemplar_folder, tiny_base):
    """SIGKILL at three moments of the command, then the command again: the images of an undisturbed run."""
    run = partial(customize_vase, tiny_base)
    whole, killed = tmp_path / "whole.attrdb", tmp_path / "killed.attrdb"
    assert run_whole(run, whole, exemplar_folder), log_of(whole).read_text()
    for moment in ("settings.json", "figures.json", "batch-0000.parquet"):
        process, _ = start(run, killed, exemplar_folder)
        while not (killed / "jobs" / "vase-1" / moment).exists() and process.is_alive():
            time.sleep(0.002)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            assert images(attrdb.open(killed)) == []
    assert run_whole(run, killed, exemplar_folder), log_of(killed).read_text()
    assert images(attrdb.open(killed)) == images(attrdb.open(whole))


def test_two_processes_do_not_make_the_same_model(empty, exemplar_folder, tiny_base, toy_encoder):
    with (
        stages.leased_job(job_folders.model_job(empty.path, "vase-1")),
        pytest.raises(Busy, match=r"'vase-1' is being made by another process \(\d+ on .*\); wait for it"),
    ):
        ingest(empty, exemplar_folder, tiny_base, toy_encoder)


# --- bad input: a clear error, and nothing written ------------------------------------------------------------------


def test_empty_exemplar_folder(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(InvalidValue, match="has no image; put PNG"):
        read_exemplars(tmp_path / "none")
    with pytest.raises(NotFound, match="no folder"):
        read_exemplars(tmp_path / "nowhere")


def test_the_same_exemplar_twice(empty, exemplar_folder, tiny_base, toy_encoder):
    picture(exemplar_folder / "b.png", (200, 30, 30))
    with pytest.raises(InvalidValue, match=r"a\.png and .*b\.png are the same file"):
        ingest(empty, exemplar_folder, tiny_base, toy_encoder)


@pytest.mark.parametrize(
    ("part", "entry"),
    [("unet", ["my_unet", "MyUNet"]), ("scheduler", ["scheduler_of_mine", "X"]), ("controlnet", ["a.b", "C"])],
)
def test_a_part_with_code_of_its_own_is_refused_in_words_that_can_be_followed(tiny_base, tmp_path, part, entry):
    folder = shutil.copytree(tiny_base, tmp_path / "custom")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {part: entry}))
    with pytest.raises(
        InvalidValue, match=rf"has a {part} of code of its own \({'.'.join(entry)}\), which attrdb never runs"
    ):
        settings_for(str(folder), "object", "vase")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"])
def test_base_model_with_a_part_missing(tiny_base, tmp_path, part):
    copy = tmp_path / "base"
    shutil.copytree(tiny_base, copy)
    shutil.rmtree(copy / part) if (copy / part).is_dir() else (copy / part).unlink()
    with pytest.raises(InvalidValue, match=rf"base model .*(lacks|has no) {part}"):
        settings_for(str(copy), "object", "vase")


def test_base_model_with_weights_missing(tiny_base, tmp_path):
    copy = tmp_path / "base"
    shutil.copytree(tiny_base, copy)
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InvalidValue, match=r"lacks unet/diffusion_pytorch_model\.safetensors"):
        settings_for(str(copy), "object", "vase")


def test_a_base_model_whose_weights_are_pickled(tiny_base, tmp_path):
    copy = tmp_path / "base"
    shutil.copytree(tiny_base, copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    says = r"lacks unet/\w+\.safetensors; unet/\w+\.bin is a pickle, which attrdb never reads: load the"
    with pytest.raises(InvalidValue, match=says):
        settings_for(str(copy), "object", "vase")


def test_customized_weights_that_are_pickled_are_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").mkdir, ())

    torch.save({"unet.x": Trap()}, tmp_path / "delta.safetensors")
    with pytest.raises(InvalidValue, match=r"customized weights .*delta\.safetensors cannot be read"):
        customize.load_delta(tmp_path / "delta.safetensors")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("token", ["<|endoftext|>", "a", "V*"])
def test_a_token_that_the_vocabulary_has_already(empty, exemplar_folder, tiny_base, toy_encoder, tmp_path, token):
    """One of the vocabulary, and the modifier token of a customized pipeline that was saved whole."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    if token == "V*":
        base = base_model.load_base_model(str(tiny_base))
        base.pipeline.tokenizer.add_tokens(token)
        base.pipeline.tokenizer.save_pretrained(folder / "tokenizer")
        with pytest.raises(InvalidValue, match=r"vocabulary has 'V\*' already; choose another modifier token"):
            ingest(empty, exemplar_folder, folder, toy_encoder)
    base, settings = base_model.load_base_model(str(folder)), customize.CustomizeSettings(steps=1, batch=1)
    with pytest.raises(InvalidValue, match=r"vocabulary has '.*' already; choose another modifier token"):
        customize.customize(base, [picture_image((9, 9, 9))], f"{token} vase", token, "vase", settings)


def test_no_such_base_model():
    with pytest.raises(NotFound, match="neither a folder nor a hub id"):
        settings_for("nowhere", "object", "vase")


def test_another_kind_of_pipeline(tiny_base, tmp_path):
    copy = tmp_path / "base"
    shutil.copytree(tiny_base, copy)
    index = copy / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionXLPipeline"))
    with pytest.raises(InvalidValue, match=r"is a StableDiffusionXLPipeline; a StableDiffusionPipeline .* is needed"):
        settings_for(str(copy), "object", "vase")
    index.write_text("{")
    with pytest.raises(InvalidValue, match=r"model_index\.json is not JSON"):
        settings_for(str(copy), "object", "vase")


def test_a_base_model_with_broken_weights_leaves_nothing(empty, exemplar_folder, tiny_base, tmp_path, toy_encoder):
    copy = tmp_path / "base"
    shutil.copytree(tiny_base, copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(InvalidValue, match="does not load as a Stable Diffusion pipeline"):
        ingest(empty, exemplar_folder, copy, toy_encoder)
    assert not (empty.path / "jobs").exists()
    assert attrdb.open(empty.path).encoders == {}
    weights.write_bytes(whole)
    assert ingest(empty, exemplar_folder, copy, toy_encoder).appended


def test_training_that_diverges_is_not_stored_and_its_last_good_step_is_kept(
    empty, exemplar_folder, tiny_base, toy_encoder, monkeypatch
):
    predict = base_model.BaseModel.predict
    steps = []

    def predict_nan_once(self, *inputs):
        steps.append(1)
        return predict(self, *inputs) * (float("nan") if len(steps) == 24 else 1)

    monkeypatch.setattr(base_model.BaseModel, "predict", predict_nan_once)
    kept = empty.path / "jobs" / "vase-1" / "diverged.safetensors"
    says = rf"diverged at step 24 \(loss nan\); lower the .* \(0.01 now\); what it was after 19 steps is kept in {kept}"
    with pytest.raises(InvalidValue, match=says):
        ingest(empty, exemplar_folder, tiny_base, toy_encoder, steps=30, precision="float32")
    assert images(empty) == []
    monkeypatch.undo()
    base = base_model.load_base_model(str(tiny_base))
    settings = customize.CustomizeSettings(steps=19, batch=2, lr=0.01)
    wanted, _ = customize.customize(base, [picture_image((200, 30, 30))], "V* vase", "V*", "vase", settings)
    found = customize.load_delta(kept)
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(wanted[name]) for name in wanted)
    assert ingest(empty, exemplar_folder, tiny_base, toy_encoder).appended
    assert not kept.exists()


def test_weights_that_the_last_step_has_spoiled_are_not_stored(empty, exemplar_folder, tiny_base, toy_encoder):
    with pytest.raises(InvalidValue, match=r"training diverged .*lower the learning rate"):
        ingest(empty, exemplar_folder, tiny_base, toy_encoder, lr=1e38, steps=1)
    assert images(empty) == []


def test_gradient_checkpointing_makes_the_same_model(empty, exemplar_folder, tiny_base, toy_encoder):
    """And is no other setting: a model that was half done without it goes on with it."""

    def kill(stage, _done, _total, note=""):
        if stage == "sample":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(empty, exemplar_folder, tiny_base, toy_encoder, report=kill)
    assert ingest(empty, exemplar_folder, tiny_base, toy_encoder, gradient_checkpointing=True).appended
    base = base_model.load_base_model(str(tiny_base))
    settings = customize.CustomizeSettings(steps=3, batch=2, lr=0.01)
    given = (base, [picture_image((200, 30, 30))], "V* vase", "V*", "vase", settings)
    plain, _ = customize.customize(*given)
    base.restore()
    again, _ = customize.customize(*given, gradient_checkpointing=True)
    assert all(again[name].equal(plain[name]) for name in plain)
    assert not base.pipeline.unet.is_gradient_checkpointing
    assert not ingest(empty, exemplar_folder, tiny_base, toy_encoder).appended


def test_more_than_the_memory_holds_is_told_with_advice(empty, exemplar_folder, tiny_base, toy_encoder):
    with pytest.raises(
        OutOfMemory, match=r"training 10000000000 pictures of 32 pixels .* turn gradient checkpointing on"
    ):
        ingest(empty, exemplar_folder, tiny_base, toy_encoder, batch=10**10)
    prompts = [Prompt(0, "gpt", "a vase")]
    base, many = base_model.load_base_model(str(tiny_base)), synthesize.SynthesizeSettings(1)
    [[plan]] = synthesize.plan_samples("m", prompts, many)
    base.predict = lambda *given: torch.empty(10**13)
    synthesize.use_fast_solver(base)
    with pytest.raises(
        OutOfMemory, match=r"out of memory while drawing 1 pictures of 32 pixels .* a smaller sample batch"
    ):
        synthesize.synthesize(base, [plan], many)
    assert images(empty) == []


def test_a_prompt_whose_token_is_never_read(empty, exemplar_folder, tiny_base, toy_encoder, tmp_path):
    """It is refused before training begins."""
    prompts = tmp_path / "long.txt"
    prompts.write_text("word " * 80 + "V* vase\n")
    with pytest.raises(InvalidValue, match=r"the base model reads 77 tokens, and V\* lies beyond them"):
        ingest(empty, exemplar_folder, tiny_base, toy_encoder, prompts=str(prompts), report=lambda *_: 1 / 0)
    assert images(empty) == []


@pytest.mark.parametrize("category", ["", " ", "V* cat"])
def test_categories_that_say_nothing(tiny_base, category):
    with pytest.raises(InvalidValue, match="it must say what is shown, without the modifier token"):
        settings_for(str(tiny_base), "object", category)


def test_a_category_in_another_script_has_an_id(tiny_base, exemplar_folder):
    settings = settings_for(str(tiny_base), "object", "猫")
    assert default_model_id(settings, read_exemplars(exemplar_folder)).startswith("object-")


def test_unknown_encoder():
    from attrdb.ingest.encode import load_encoder

    with pytest.raises(InvalidValue, match="no encoder 'resnet:9'; there are: efficientnet-lite0, pixels:N"):
        load_encoder("resnet:9")


def test_encoder_of_another_dimension_is_refused_before_training(toy, exemplar_folder, tiny_base, toy_encoder):
    toy_encoder.dimension = 3
    before = toy.version
    with pytest.raises(InvalidValue, match="encoder 'toy_2' has dimension 3, its stored features were made with 2"):
        ingest(toy, exemplar_folder, tiny_base, toy_encoder, report=lambda *_: 1 / 0)
    toy.refresh()
    assert toy.version == before
    assert not (toy.path / "jobs").exists()


def test_prompt_without_the_modifier_token(empty, exemplar_folder, tiny_base, toy_encoder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A photo of V* vase\nA photo of a vase\n")
    with pytest.raises(InvalidValue, match=r"line 2 lacks the modifier token V\*: 'A photo of a vase'"):
        ingest(empty, exemplar_folder, tiny_base, toy_encoder, prompts=str(prompts))
    assert list(empty.path.glob("jobs/*")) == []


@pytest.mark.parametrize("model_id", ["../escape", "a/b", "", ".hidden"])
def test_model_id_cannot_leave_the_directory(empty, exemplar_folder, tiny_base, toy_encoder, model_id):
    settings = settings_for(str(tiny_base), "object", "vase")
    exemplars = read_exemplars(exemplar_folder)
    if model_id:
        with pytest.raises(InvalidValue, match="cannot be used"):
            ingest_one.ingest_model(empty, exemplars, settings, [toy_encoder], model_id)
    else:
        assert default_model_id(settings, exemplars).startswith("vase-")
