"""Methods of customization: each moves what it says and nothing else, and its delta brings the same model back."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import Recorder, picture
from PIL import Image
from safetensors.torch import save_file
from test_ingest_model import images, ingest
from transformers import CLIPTokenizer

import attrdb
from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest import devices
from attrdb.ingest.customize import augmentation, base_model, customize, customizers, synthesize
from attrdb.ingest.encode import Pixels
from attrdb.ingest.gradients.shared import EXEMPLARS
from attrdb.ingest.models import ingest_one
from attrdb.ingest.models.exemplars import read_exemplars
from attrdb.ingest.models.settings import check_model, filled_prompt, settings_for
from attrdb.ingest.models.stages import exemplar_prompts
from attrdb.ingest.models.stored import stored_delta, stored_settings
from attrdb.ingest.options import KINDS
from attrdb.ingest.prompts import Prompt, train_prompt, with_caption
from attrdb.ingest.read.corpus import ingest_corpus
from attrdb.ingest.read.discover import open_corpus
from attrdb.ingest.read.pictures import webp

METHODS = tuple(customizers.BUILT_IN)
RED = Image.new("RGB", (32, 32), (200, 30, 30))


@pytest.fixture
def base(tiny_base):
    return base_model.load_base_model(str(tiny_base))


def weights_of(base):
    """Every weight and buffer of the three networks, copied, by name."""
    parts = {name: getattr(base.pipeline, name) for name in base_model.WEIGHTED}
    return {f"{part}.{name}": value.clone() for part, net in parts.items() for name, value in net.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(value.equal(other[name]) for name, value in one.items())


def train(base, method, **given):
    settings = customize.CustomizeSettings(**{"steps": 3, "batch": 2, "lr": 0.01} | given)
    return customize.customize(base, [RED], "V* vase", "V*", "vase", settings, method=method)


ENDINGS = {
    "custom-diffusion": ("attn2.to_k.weight", "attn2.to_v.weight"),
    "dreambooth-lora": ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"),
    "textual-inversion": (),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_moves_what_it_trains_and_nothing_else(base, method):
    before, n_tokens = weights_of(base), len(base.pipeline.tokenizer)
    vase = base.pipeline.tokenizer("vase", add_special_tokens=False).input_ids
    start = base.pipeline.text_encoder.get_input_embeddings().weight[vase].mean(dim=0)
    delta, figures = train(base, method)
    after = weights_of(base)
    table = "text_encoder.embeddings.token_embedding.weight"
    [table] = [name for name in after if name.endswith("token_embedding.weight")] or [table]
    assert after.keys() == before.keys()
    assert after[table][:n_tokens].equal(before[table])
    moved = {name for name in before if name != table and not after[name].equal(before[name])}
    assert moved == {name for name in before if name.startswith("unet.") and name.endswith(ENDINGS[method])}
    assert after[table][n_tokens].equal(start) == (method == "dreambooth-lora")
    assert (customize.TOKEN_KEY in delta) == (method != "dreambooth-lora")
    assert figures["loss"] > 0
    assert not any(weight.requires_grad for weight in base.pipeline.unet.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_delta_brings_the_same_model_back(base, tiny_base, tmp_path, method):
    delta, _ = train(base, method)
    customize.save_delta(delta, tmp_path / "delta.safetensors", ["V*"], "hash", method)
    fresh = base_model.load_base_model(str(tiny_base))
    loaded = customize.load_delta(tmp_path / "delta.safetensors", method)
    customize.apply_delta(fresh, loaded, {"V*": "vase"}, method)
    assert same(weights_of(fresh), weights_of(base))


@pytest.mark.parametrize("method", METHODS)
def test_a_base_model_is_given_back_bit_for_bit(base, tiny_base, method):
    fresh = base_model.load_base_model(str(tiny_base))
    train(base, method)
    synthesize.use_fast_solver(base)
    base.restore()
    assert same(weights_of(base), weights_of(fresh))
    assert len(base.pipeline.tokenizer) == len(fresh.pipeline.tokenizer)
    assert type(base.pipeline.scheduler) is type(fresh.pipeline.scheduler)
    assert [name for name, _ in base.pipeline.unet.named_modules()] == [
        name for name, _ in fresh.pipeline.unet.named_modules()
    ]
    again, _ = train(base, method)
    assert same(again, train(fresh, method)[0])


@pytest.mark.parametrize("method", METHODS)
def test_training_that_fails_leaves_the_base_model_as_it_was(base, method):
    before = weights_of(base)
    with pytest.raises(InvalidValue, match="training diverged"):
        train(base, method, lr=1e30, steps=5)
    assert same(weights_of(base), before)


@pytest.mark.parametrize("method", ["dreambooth-lora", "custom-diffusion"])
def test_a_method_that_breaks_while_it_attaches_leaves_nothing_behind(base, tiny_base, method, monkeypatch):
    """Such as by a full memory: the next model of another method is the one it would have been."""
    customizer = type(customizers.load_customizer(method))
    attach = customizer.attach

    def breaks(self, unet):
        attach(self, unet)
        raise RuntimeError("out of memory")

    before = weights_of(base)
    with monkeypatch.context() as patch:
        patch.setattr(customizer, "attach", breaks)
        with pytest.raises(RuntimeError, match="out of memory"):
            train(base, method)
    assert same(weights_of(base), before)
    fresh = base_model.load_base_model(str(tiny_base))
    assert same(train(base, "custom-diffusion")[0], train(fresh, "custom-diffusion")[0])


def test_a_network_without_cross_attention_is_refused(base):
    with pytest.raises(InvalidValue, match="the U-Net has no K and V of a cross-attention"):
        customizers.load_customizer("custom-diffusion").attach(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("prediction", base_model.PREDICTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_both_predictions_learn(base, method, prediction):
    """The loss on one picture falls."""
    base.pipeline.scheduler.register_to_config(prediction_type=prediction)
    losses = []

    def loss_after(steps):
        base.restore()
        settings = customize.CustomizeSettings(steps=steps, batch=8, lr=0.02)
        return customize.customize(base, [RED], "V* vase", "V*", "vase", settings, method=method)[1]["loss"]

    losses = [loss_after(1), loss_after(40)]
    if method == "textual-inversion":  # one vector cannot bend a random network far
        assert np.isfinite(losses).all()
    else:
        assert losses[1] < losses[0]


def test_a_folded_lora_computes_what_its_layers_did(base):
    unet, method = base.pipeline.unet, customizers.load_customizer("dreambooth-lora")
    given = (torch.randn(2, 4, 8, 8), torch.tensor([5, 500]), torch.randn(2, 32, 32))
    trained = method.attach(unet)
    torch.manual_seed(1)
    for weight in trained.values():
        weight.data.normal_(std=0.3)
    delta = {name: weight.detach().clone() for name, weight in trained.items()}
    with torch.no_grad():
        slow = unet(*given).sample
        method.detach(unet)
        plain = unet(*given).sample
        base.replace(method.changed(unet, delta))
        folded = unet(*given).sample
    assert torch.allclose(folded, slow, atol=1e-4)
    assert not torch.allclose(plain, slow, atol=1e-2)


def test_a_delta_of_another_method_is_refused(base, tmp_path):
    delta, _ = train(base, "textual-inversion")
    customize.save_delta(delta, tmp_path / "delta.safetensors", ["V*"], "hash", "textual-inversion")
    with pytest.raises(InvalidValue, match="are of method 'textual-inversion'; needed is 'custom-diffusion'"):
        customize.load_delta(tmp_path / "delta.safetensors", "custom-diffusion")
    save_file(delta, tmp_path / "nameless.safetensors")
    with pytest.raises(InvalidValue, match="are of method None"):
        customize.load_delta(tmp_path / "nameless.safetensors", "textual-inversion")


@pytest.mark.parametrize("method", METHODS)
def test_a_delta_of_another_architecture_is_refused(base, method):
    delta, _ = train(base, method)
    other = base_model.load_base_model("icon-sd")
    before = weights_of(other)
    with pytest.raises(InvalidValue, match="do not fit base model 'icon-sd'"):
        customize.apply_delta(other, delta, {"V*": "vase"}, method)
    assert same(weights_of(other), before)


# --- the registry -----------------------------------------------------------------------------------------------------


class Bias:
    """Trains the last layer's bias; here for a package that adds a method."""

    name, steps, lr, trains_token = "bias", 2, 0.01, False

    def attach(self, unet):
        return {"conv_out.bias": unet.conv_out.bias}

    def detach(self, unet):
        pass

    def changed(self, unet, delta):
        return {"conv_out.bias": delta["conv_out.bias"]}


def install(tmp_path, monkeypatch, name, *packages, target="Bias"):
    for package in packages:
        folder = tmp_path / f"{package}-1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
        (folder / "entry_points.txt").write_text(f"[{customizers.GROUP}]\n{name} = test_customizers:{target}\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_package_adds_a_method(tmp_path, monkeypatch, empty, exemplar_folder, tiny_base, toy_encoder):
    install(tmp_path, monkeypatch, "bias", "biased")
    assert customizers.names() == [*METHODS, "bias"]
    ingest(empty, exemplar_folder, tiny_base, toy_encoder, method="bias")
    assert empty.sql("SELECT method FROM models")["method"].to_pylist() == ["bias"]
    made = dict(ingest_one.regenerate(empty, "vase-1"))
    assert {name: webp(image) for name, image in made.items()} == samples(empty)


def test_two_packages_with_one_method(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "bias", "one", "two")
    with pytest.raises(InvalidValue, match="packages one and two both add a method 'bias'"):
        customizers.load_customizer("bias")


def test_a_package_with_a_method_of_attrdb(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "custom-diffusion", "grab")
    with pytest.raises(InvalidValue, match="package grab adds a method 'custom-diffusion', which attrdb has itself"):
        customizers.load_customizer("custom-diffusion")


def test_a_package_whose_method_is_none(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "bias", "broken", target="RED")
    with pytest.raises(InvalidValue, match=r"method 'bias' of package broken fails with TypeError"):
        customizers.load_customizer("bias")


def test_an_unknown_method(tiny_base):
    with pytest.raises(InvalidValue, match="no method 'hypernetwork'; there are: custom-diffusion, dreambooth-lora"):
        settings_for(str(tiny_base), "object", "vase", {"method": "hypernetwork"})


def test_the_profile_is_of_the_default_method(tiny_base, tmp_path):
    assert settings_for(str(tiny_base), "object", "vase").customize.lr == 0.01
    other = settings_for(str(tiny_base), "object", "vase", {"method": "textual-inversion", "batch": 4})
    assert (other.customize.steps, other.customize.lr, other.customize.batch) == (3000, 4e-3, 4)
    assert other.synthesize.solver_steps == 2


def with_profile(tiny_base, folder, **profile):
    """A copy of the base model with a customize.json of its own."""
    shutil.copytree(tiny_base, folder)
    (folder / "customize.json").write_text(json.dumps(profile))
    return str(folder)


def test_a_profile_has_settings_for_a_kind_and_for_a_method(tiny_base, tmp_path):
    kinds = {"style": {"token_from": "flat", "lr": 0.02, "train_prompt": "{caption} V*"}, "object": {"augment": "mild"}}
    base = with_profile(
        tiny_base, tmp_path / "base", lr=0.01, batch=4, kinds=kinds, methods={"textual-inversion": {"lr": 0.03}}
    )
    style, thing = settings_for(base, "style", "flat"), settings_for(base, "object", "vase")
    assert (style.customize.token_from, style.customize.lr, style.customize.batch) == ("flat", 0.02, 4)
    assert (style.train_prompt, style.customize.augment) == ("{caption} V*", "none")
    assert (thing.customize.token_from, thing.customize.lr, thing.customize.augment) == ("", 0.01, "mild")
    assert settings_for(base, "style", "flat", {"lr": 0.5, "token_from": "art"}).customize.lr == 0.5
    by_token = settings_for(base, "style", "flat", {"method": "textual-inversion"})
    assert (by_token.customize.lr, by_token.customize.token_from) == (0.03, "flat")
    by_lora = settings_for(base, "style", "flat", {"method": "dreambooth-lora"})
    assert by_lora.customize.lr == 1e-4  # a kind's lr, too, is for the default method
    assert settings_for(base, "mixed", "picture").customize.batch == 4


@pytest.mark.parametrize("part", ["kinds", "methods"])
@pytest.mark.parametrize("value", [[], "style", {"style": 1}, {"custom-diffusion": ["lr"]}, None])
def test_a_profile_whose_parts_are_no_settings(tiny_base, tmp_path, part, value):
    base = with_profile(tiny_base, tmp_path / "base", **{part: value})
    with pytest.raises(InvalidValue, match=rf'"{part}" in customize.json of base model .* it must be an object'):
        settings_for(base, "object", "vase")


def test_a_profile_for_a_kind_that_there_is_not(tiny_base, tmp_path):
    base = with_profile(tiny_base, tmp_path / "base", kinds={"styles": {"lr": 0.1}, "object": {}})
    with pytest.raises(InvalidValue, match=r"\"kinds\" in customize.json of base model .* has 'styles'; a kind is "):
        settings_for(base, "object", "vase")


# --- whole jobs -------------------------------------------------------------------------------------------------------


def samples(db):
    return {row["image_id"]: row["image"] for row in images(db) if row["role"] == "sample"}


@pytest.mark.parametrize("method", METHODS)
def test_regenerates_the_stored_samples(empty, exemplar_folder, tiny_base, method):
    ingest(empty, exemplar_folder, tiny_base, Pixels(4), method=method, steps=3, lr=0.01)
    stored = samples(empty)
    assert {name: webp(image) for name, image in ingest_one.regenerate(empty, "vase-1")} == stored
    wanted = sorted(stored)[-1]
    assert [(name, webp(image)) for name, image in ingest_one.regenerate(empty, "vase-1", [wanted])] == [
        (wanted, stored[wanted])
    ]


def test_what_cannot_be_regenerated(exemplar_folder, tiny_base, toy_encoder, toy):
    with pytest.raises(NotFound, match="no customized model 'vase-9'"):
        next(ingest_one.regenerate(toy, "vase-9"))
    with pytest.raises(InvalidValue, match="'m' was imported without its weights"):
        next(ingest_one.regenerate(toy, "m"))
    ingest(toy, exemplar_folder, tiny_base, toy_encoder)
    with pytest.raises(NotFound, match="'vase-1' has no sample 'x'"):
        next(ingest_one.regenerate(toy, "vase-1", ["x"]))
    with pytest.raises(InvalidValue, match="is not the one that model 'vase-1' was made from"):
        next(ingest_one.regenerate(toy, "vase-1", base_model="icon-sd"))
    hashes = toy.sql("SELECT base_model_hash FROM models WHERE model_id = 'vase-1'")["base_model_hash"].to_pylist()
    first_edition = next(iter(base_model.EDITIONS))
    toy.writer.update("models", "model_id = 'vase-1'", {"base_model_hash": first_edition})
    with pytest.raises(
        InvalidValue,
        match=r"the first edition of icon-sd, in .* of commit \w+ of .*; give the folder .* with --base-model",
    ):
        next(ingest_one.regenerate(attrdb.open(toy.path), "vase-1"))
    toy.writer.update("models", "model_id = 'vase-1'", {"base_model_hash": hashes[0]})
    file = toy.path / "weights" / "vase-1.safetensors"
    delta = customize.load_delta(file)
    delta[customize.TOKEN_KEY] += 1
    customize.save_delta(delta, file, ["V*"], "hash")
    with pytest.raises(InvalidValue, match="have changed since model 'vase-1' was stored"):
        next(ingest_one.regenerate(toy, "vase-1"))


def test_one_loaded_base_model_makes_the_models_of_fresh_ones(tmp_path, exemplar_folder, tiny_base, toy_encoder):
    found, kept = {}, base_model.OneBaseModel()
    settings = {
        method: settings_for(str(tiny_base), "object", "vase", {"method": method, "steps": 3}) for method in METHODS
    }
    exemplars = read_exemplars(exemplar_folder)
    for name, load in (("fresh", base_model.load_base_model), ("kept", kept.load)):
        db = attrdb.create(tmp_path / f"{name}.attrdb")
        for method in METHODS:
            ingest_one.ingest_model(db, exemplars, settings[method], [toy_encoder], method, load=load)
        found[name] = images(db)
    assert found["kept"] == found["fresh"]
    assert kept.load(str(tiny_base)) is kept.load(str(tiny_base))


def test_rows_of_an_earlier_attrdb_are_the_same_model(empty, exemplar_folder, tiny_base, toy_encoder):
    ingest(empty, exemplar_folder, tiny_base, toy_encoder)
    row = empty.sql("SELECT * FROM models").to_pylist()[0]
    record = json.loads(row["settings"])
    for name in ("precision", "computed_in"):
        del record[name]
    for name in ("augment", "prior", "prior_images", "prior_weight", "token_from"):
        del record["customize"][name]
    empty.writer.upsert("models", [{**row, "settings": json.dumps(record)}])
    assert ingest(empty, exemplar_folder, tiny_base, toy_encoder).appended is False
    for given, name in (
        ({"augment": "mild"}, "customize"),
        ({"prior_images": 2}, "customize"),
        ({"token_from": "art"}, "customize"),
        ({"precision": "float32"}, "precision"),
        ({"method": "dreambooth-lora", "steps": 3, "lr": 0.01}, "method"),
    ):
        with pytest.raises(InvalidValue, match=f"'vase-1' is in .* with {name} = "):
            ingest(empty, exemplar_folder, tiny_base, toy_encoder, **given)


def test_the_hash_of_a_base_model_is_read_once_and_again_when_a_file_changes(tiny_base, tmp_path, monkeypatch):
    import hashlib
    import shutil

    folder, read = tmp_path / "base", []
    shutil.copytree(tiny_base, folder)
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: read.append(1) or real(*given))
    first = base_model.weights_hash(folder)
    assert base_model.weights_hash(folder) == first
    n_files = len(read)
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    assert base_model.weights_hash(folder) != first
    assert len(read) == 2 * n_files


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_samples_are_those_of_the_pipeline(base, guidance):
    settings = synthesize.SynthesizeSettings(samples_per_prompt=2, solver_steps=4, guidance=guidance, sample_batch=3)
    prompts = [Prompt(0, "gpt", "a vase"), Prompt(1, "gpt", "a picture of art")]
    synthesize.use_fast_solver(base)
    for batch in synthesize.plan_samples("m", prompts, settings):
        slow = base.pipeline(
            prompt=[plan.prompt.text for plan in batch],
            generator=[torch.Generator().manual_seed(plan.seed) for plan in batch],
            num_inference_steps=4,
            guidance_scale=guidance,
        ).images
        for one, other in zip(synthesize.synthesize(base, batch, settings), slow, strict=True):
            assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_auto_precision_is_what_the_device_multiplies(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False}, raising=False)
    assert devices.resolved_precision("auto", "cpu") == "float32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert devices.resolved_precision("auto", "cpu") == "bf16"
    with pytest.raises(InvalidValue, match="precision is 'fp8'; it must be auto, float32 or bf16"):
        devices.resolved_precision("fp8")


# --- augmentation -----------------------------------------------------------------------------------------------------


def test_views_of_a_picture():
    half = Image.new("RGB", (32, 32), (255, 0, 0))
    half.paste((0, 0, 255), (16, 0, 32, 32))
    [plain] = augmentation.views(half, "none", 32, random.Random(0))
    assert (np.asarray(plain.picture) == np.asarray(half)).all()
    assert plain.box == (0, 0, 32, 32)
    first, second = augmentation.views(half, "mild", 32, random.Random(0))
    assert (np.asarray(second.picture) == np.asarray(first.picture)[:, ::-1]).all()
    for augment in ("strong", "placed"):  # the border of `half` has two colours, so `placed` too puts it on grey
        drawn = augmentation.views(half, augment, 32, random.Random(0))
        assert len(drawn) == augmentation.VIEWS[augment]
        for view in drawn:
            left, top, right, bottom = view.box
            grey = np.ones((32, 32), bool)
            grey[top:bottom, left:right] = False
            assert view.picture.size == (32, 32)
            assert (np.asarray(view.picture)[grey] == 128).all()
        assert any(view.box[2] - view.box[0] < 32 for view in drawn)
        again = augmentation.views(half, augment, 32, random.Random(0))
        assert [view.picture.tobytes() for view in drawn] == [view.picture.tobytes() for view in again]


def test_placed_views_are_where_their_words_say():
    """A black square on red: where its centre is, and how large it is, as the words say."""
    exemplar = Image.new("RGB", (64, 64), (250, 10, 10))
    exemplar.paste((0, 0, 0), (8, 8, 56, 56))
    sides = {
        "small": (0.23, 0.36),
        "": (0.32, 0.55),
        "large": (0.51, 0.77),
    }  # of the square: three quarters of the exemplar's
    drawn = [view for seed in range(20) for view in augmentation.views(exemplar, "placed", 64, random.Random(seed))]
    assert {view.words.size for view in drawn} == set(sides)
    assert {view.words.spot for view in drawn} == {"", *augmentation.SPOTS}
    for view in drawn:
        pixels = np.asarray(view.picture).astype(int)
        assert view.box == (0, 0, 64, 64)  # the red goes on around it, so that all of the view counts
        assert (np.abs(pixels[[0, 0, -1, -1], [0, -1, 0, -1]] - (250, 10, 10)) < 60).all()
        rows, columns = np.nonzero(pixels[..., 0] < 125)
        low, high = sides[view.words.size]
        assert low <= (columns.max() - columns.min() + 1) / 64 <= high
        if not view.words.spot:
            continue
        for centre, words in ((columns.mean(), ("left", "right")), (rows.mean(), ("top", "bottom"))):
            share = centre / 63
            named = [word for word in words if word in view.words.spot.split()]
            wanted = (0.35, 0.65) if not named else (0, 0.5) if named[0] in ("left", "top") else (0.5, 1)
            assert wanted[0] <= share <= wanted[1], view.words


@pytest.mark.parametrize(
    ("prompt", "placed"),
    [
        ("V* bell", "small V* bell on the left"),
        ("a V* bell", "a small V* bell on the left"),
        ("an owl in the style of V* art", "a small owl on the left in the style of V* art"),
        ("a V* bell, on a white ground", "a small V* bell on the left, on a white ground"),
        (train_prompt("style", "x"), "A small picture on the left in the style of V* art"),
        ("the V*", "the small V* on the left"),
    ],
)
def test_words_of_a_view_in_a_prompt(prompt, placed):
    assert augmentation.Words("small", "on the left").added_to(prompt) == placed
    assert augmentation.Words().added_to(prompt) == prompt


def test_the_prompt_of_a_placed_view_says_where_it_is(base):
    recorder = Recorder()
    settings = customize.CustomizeSettings(steps=2, batch=2, lr=0.01, augment="placed")
    customize.customize(base, [RED, RED.rotate(45)], ["V* a", "V* b"], "V*", "vase", settings, observer=recorder)
    base.restore()
    run, n = recorder.run, augmentation.VIEWS["placed"]
    assert len(run.view_prompts) == 2 * n
    assert all("V* a" in prompt for prompt in run.view_prompts[:n])
    assert all("V* b" in prompt for prompt in run.view_prompts[n:])
    assert len(set(run.view_prompts)) > 8
    long = "V* " + "a " * (base.pipeline.tokenizer.model_max_length - 4)
    with pytest.raises(InvalidValue, match="reads"):
        customize.customize(base, [RED], f"{long[3:]} V*", "V*", "vase", settings)


def test_grey_around_a_small_view_is_not_learned(base):
    latents = augmentation.encode_views(base, [RED], "strong", 0)
    n, side = augmentation.VIEWS["strong"], latents.mean.shape[-1]
    assert latents.seen.shape == (n, 1, side, side)
    assert set(latents.seen.unique().tolist()) == {0.0, 1.0}
    assert (latents.seen.sum(dim=(1, 2, 3)) > 0).all()
    assert augmentation.encode_views(base, [RED], "none", 0).seen is None
    delta, _ = train(base, "custom-diffusion", augment="strong")
    base.restore()
    assert same(delta, train(base, "custom-diffusion", augment="strong")[0])


# --- regularization images --------------------------------------------------------------------------------------------


@pytest.fixture
def stocked(tmp_path):
    """A corpus of eight captioned pictures, four of a vase, one of which is the exemplar itself."""
    db, folder = attrdb.create(tmp_path / "stocked.attrdb"), tmp_path / "corpus"
    for number in range(4):
        picture(folder / f"vase{number}.png", (200, 30 + 40 * number, 30))
        (folder / f"vase{number}.txt").write_text(f"A Vase, number {number}")
        picture(folder / f"tree{number}.png", (30, 200, 30 + 40 * number))
        (folder / f"tree{number}.txt").write_text("a tree, vaseline")
    ingest_corpus(db, open_corpus(folder), [Pixels(4)])
    return db


def noted(db):
    return json.loads(db.sql("SELECT settings FROM models")["settings"][0].as_py())["regularization"]


def test_regularization_images_by_caption(stocked, exemplar_folder, tiny_base):
    ingest(stocked, exemplar_folder, tiny_base, Pixels(4), prior_images=3)
    assert sorted(noted(stocked)) == ["corpus/vase1.png", "corpus/vase2.png", "corpus/vase3.png"]
    assert ingest(stocked, exemplar_folder, tiny_base, Pixels(4), prior_images=3).appended is False


def test_regularization_images_by_image(stocked, exemplar_folder, tiny_base):
    ingest(stocked, exemplar_folder, tiny_base, Pixels(4), prior="image", prior_images=2)
    assert noted(stocked) == ["corpus/vase1.png", "corpus/vase2.png"]


def test_regularization_images_that_the_base_model_draws(empty, exemplar_folder, tiny_base):
    ingest(empty, exemplar_folder, tiny_base, Pixels(4), prior="generated", prior_images=3)
    assert len(set(noted(empty))) == 3
    assert {name: webp(image) for name, image in ingest_one.regenerate(empty, "vase-1")} == samples(empty)


def test_too_few_regularization_images(stocked, exemplar_folder, tiny_base):
    before = stocked.version
    with pytest.raises(InvalidValue, match=r"4 regularization images wanted, .* has 3 pretraining images with 'vase'"):
        ingest(stocked, exemplar_folder, tiny_base, Pixels(4), prior_images=4)
    assert stocked.version == before


def test_regularization_images_stay_the_same_for_a_rerun(stocked, exemplar_folder, tiny_base, tmp_path):
    def kill(stage, done, _total, note=""):
        if (stage, done) == ("customize", 1):
            raise KeyboardInterrupt

    given = {"prior_images": 2, "prior": "image"}
    with pytest.raises(KeyboardInterrupt):
        ingest(stocked, exemplar_folder, tiny_base, Pixels(4), report=kill, **given)
    picture(tmp_path / "more" / "nearer.png", (200, 40, 30))
    ingest_corpus(stocked, open_corpus(tmp_path / "more"), [Pixels(4)])
    ingest(stocked, exemplar_folder, tiny_base, Pixels(4), **given)
    assert noted(stocked) == ["corpus/vase1.png", "corpus/vase2.png"]


def test_prior_weight_counts(base):
    """Regularization images change what is learned, and more so with more weight."""
    blue = customize.Regularization([Image.new("RGB", (32, 32), "blue")], ["vase"], ["b"])
    found = []
    for weight, prior in ((1.0, None), (1.0, blue), (100.0, blue)):
        settings = customize.CustomizeSettings(steps=2, batch=2, lr=0.01, prior_weight=weight, prior_images=1)
        found.append(customize.customize(base, [RED], "V* vase", "V*", "vase", settings, regularization=prior)[0])
        base.restore()
    assert not same(found[0], found[1])
    assert not same(found[1], found[2])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prior": "dream"}, "prior is 'dream'; it must be caption, image or generated"),
        ({"prior_weight": 0.0}, "prior_weight is 0.0; it must be above 0"),
        ({"prior_images": -1}, "prior_images is -1"),
        ({"augment": "wild"}, "augment is 'wild'; it must be none, mild, strong or placed"),
    ],
)
def test_settings_that_mean_nothing(tiny_base, given, words):
    with pytest.raises(InvalidValue, match=words):
        settings_for(str(tiny_base), "object", "vase", given)


def test_a_token_starts_from_other_words_and_is_drawn_again_from_them(empty, exemplar_folder, tiny_base, base):
    embedded = base.pipeline.text_encoder.get_input_embeddings().weight
    art = base.pipeline.tokenizer("art", add_special_tokens=False).input_ids
    settings = customize.CustomizeSettings(steps=1, batch=1, lr=0.01, token_from="art")
    customize.customize(base, [RED], "V* vase", "V*", "vase", settings, method="dreambooth-lora")
    grown = base.pipeline.text_encoder.get_input_embeddings().weight
    assert grown[len(embedded)].equal(embedded[art].mean(dim=0))
    few = {"steps": 3, "solver_steps": 2}
    settings = settings_for(str(tiny_base), "object", "vase", {"method": "dreambooth-lora", "token_from": "art"} | few)
    exemplars = read_exemplars(exemplar_folder)
    ingest_one.ingest_model(empty, exemplars, settings, [Pixels(4)], "vase-1")
    assert {name: webp(image) for name, image in ingest_one.regenerate(empty, "vase-1")} == samples(empty)
    with pytest.raises(InvalidValue, match="token_from is 'V\\* art'; it must be words that the base model knows"):
        settings_for(str(tiny_base), "object", "vase", {"token_from": "V* art"})


def test_every_exemplar_is_trained_with_its_own_prompt_where_a_token_is_trained(base, monkeypatch):
    """The states that a step sees are those of the prompts of the exemplars that it drew, as encoded at that step."""
    exemplars = [RED, Image.new("RGB", (32, 32), "blue")]
    prompts = ["V* vase", "a picture of V* art"]
    settings = customize.CustomizeSettings(steps=6, batch=4, lr=0.01)
    predicted_with, predict, recorder = [], base.predict, Recorder()

    def watched(noisy, times, states):
        ids = customize.token_ids(base, prompts)
        wanted = base.pipeline.text_encoder(ids).last_hidden_state
        far = (states.unsqueeze(1) - wanted).abs().amax(dim=(2, 3))  # (batch, prompts)
        predicted_with.append(far.argmin(dim=1).tolist())
        assert far.min(dim=1).values.max() < 1e-4
        return predict(noisy, times, states)

    monkeypatch.setattr(base, "predict", watched)
    customize.customize(base, exemplars, prompts, "V*", "vase", settings, observer=recorder)
    assert predicted_with == [step.images.tolist() for step in recorder.steps]
    assert {number for batch in predicted_with for number in batch} == {0, 1}


# --- kind mixed -------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed_folder(tmp_path):
    folder = tmp_path / "mixed"
    for name, colour in (("a", (200, 30, 30)), ("b", (30, 200, 30)), ("c", (30, 30, 200))):
        picture(folder / f"{name}.png", colour)
        (folder / f"{name}.txt").write_text(f"a picture of {name}\n")
    return folder


def mixed(db, folder, base, **given):
    settings = settings_for(str(base), "mixed", "anything", given)
    return ingest_one.ingest_model(db, read_exemplars(folder), settings, [Pixels(4)], "mixed-3")


@pytest.mark.parametrize("method", ["custom-diffusion", "dreambooth-lora"])
def test_unrelated_images_are_trained_on_and_sampled_with_their_captions(empty, mixed_folder, tiny_base, method):
    assert "mixed" in KINDS
    result = mixed(empty, mixed_folder, tiny_base, method=method, steps=3)
    assert (result.n_exemplars, result.n_samples) == (3, 3)
    stored = empty.sql("SELECT kind, token, train_prompt FROM models").to_pylist()
    assert stored == [{"kind": "mixed", "token": None, "train_prompt": None}]
    rows = empty.sql("SELECT prompt, prompt_scheme FROM samples ORDER BY image_id").to_pylist()
    assert rows == [{"prompt": f"a picture of {name}", "prompt_scheme": "caption"} for name in "abc"]
    assert {name: webp(image) for name, image in ingest_one.regenerate(empty, "mixed-3")} == samples(empty)


def test_each_exemplar_is_trained_on_its_own_caption(base):
    """Two pictures and two captions: with the captions exchanged another model comes out, with equal ones a third."""
    blue, found = Image.new("RGB", (32, 32), "blue"), []
    settings = customize.CustomizeSettings(steps=2, batch=2, lr=0.01)
    for prompts in (["a vase", "art"], ["art", "a vase"], ["art", "art"]):
        found.append(customize.customize(base, [RED, blue], prompts, None, "x", settings)[0])
        base.restore()
    assert customize.TOKEN_KEY not in found[0]
    assert not same(found[0], found[1])
    assert not same(found[1], found[2])


def test_unrelated_images_sampled_with_a_file(empty, mixed_folder, tiny_base, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a vase\n\nart\n")
    assert mixed(empty, mixed_folder, tiny_base, prompts=str(file)).n_samples == 2
    file.write_text("a V* vase\n")
    with pytest.raises(InvalidValue, match="line 1 has V\\*, and models of kind 'mixed' have no token"):
        settings_for(str(tiny_base), "mixed", "anything", {"prompts": str(file)})


def test_an_unrelated_image_without_a_caption(empty, mixed_folder, tiny_base):
    (mixed_folder / "b.txt").unlink()
    with pytest.raises(InvalidValue, match=r"b\.png has no caption, which kind 'mixed' needs"):
        mixed(empty, mixed_folder, tiny_base)
    assert not (empty.path / "jobs").exists()


def test_a_token_alone_cannot_learn_unrelated_images(tiny_base):
    with pytest.raises(InvalidValue, match="'textual-inversion' trains a token alone, and models of kind 'mixed' have"):
        settings_for(str(tiny_base), "mixed", "anything", {"method": "textual-inversion"})


# --- training prompts -------------------------------------------------------------------------------------------------

CAPTIONED = "{caption} in the style of V* art, {category}"


def styled(db, folder, base, **given):
    options = {"steps": 2, "batch": 2, "samples_per_prompt": 1, "precision": "float32"}  # as `customize` by default
    settings = settings_for(str(base), "style", "flat", options | given)
    return ingest_one.ingest_model(db, read_exemplars(folder), settings, [Pixels(4)], "style-3")


def tokenizer_of(folder):
    return CLIPTokenizer.from_pretrained(folder / "tokenizer")


def learned_with(db, tokenizer):
    """The prompts that gradients are taken with."""
    rows = db.sql(EXEMPLARS, {"id": "style-3"}).to_pylist()
    return sorted(with_caption(row["train_prompt"], row["caption"], tokenizer) for row in rows)


def test_each_exemplar_of_a_style_is_trained_on_its_own_caption(empty, mixed_folder, tiny_base):
    styled(empty, mixed_folder, tiny_base, train_prompt=CAPTIONED)
    [row] = empty.sql("SELECT * FROM models").to_pylist()
    prompts = [f"a picture of {name} in the style of V* art, flat" for name in "abc"]
    assert row["train_prompt"] == "{caption} in the style of V* art, flat"
    tokenizer = tokenizer_of(tiny_base)
    assert exemplar_prompts(json.loads(row["settings"]), tokenizer) == prompts
    assert learned_with(empty, tokenizer) == prompts
    assert not styled(empty, mixed_folder, tiny_base, train_prompt=CAPTIONED).appended
    with pytest.raises(InvalidValue, match="with captions = "):
        styled(empty, mixed_folder, tiny_base)
    base, settings = base_model.load_base_model(str(tiny_base)), stored_settings(json.loads(row["settings"])).customize
    pictures = [exemplar.picture.image for exemplar in read_exemplars(mixed_folder)]
    delta, _ = customize.customize(base, pictures, prompts, "V*", "flat", settings)
    assert same(delta, stored_delta(empty, row))


@pytest.mark.parametrize("is_known", [False, True])
def test_a_caption_loses_what_would_keep_the_token_from_being_read(tiny_base, is_known):
    tokenizer = tokenizer_of(tiny_base)
    if is_known:
        tokenizer.add_tokens("V*")
    longest, ending = tokenizer.model_max_length, " in the style of V* art"
    assert with_caption("{caption}" + ending, "a vase", tokenizer) == "a vase" + ending
    prompt = with_caption("{caption}" + ending, " ".join(["vase"] * longest), tokenizer)
    caption = prompt.removesuffix(ending)
    tokenizer.add_tokens("V*")
    assert len(tokenizer(prompt).input_ids) <= longest < len(tokenizer(f"{caption} vase{ending}").input_ids)
    assert set(caption.split()) == {"vase"}
    long = "vase " * 10_000  # in a moment: it is halved, not taken apart word by word
    assert with_caption("{caption}" + ending, long, tokenizer) == prompt
    assert with_caption("{caption}", long, tokenizer) == long
    assert with_caption("V* art: {caption}", long, tokenizer) == f"V* art: {long}"  # the token is read in any case


def test_a_style_with_a_long_caption_is_trained(empty, mixed_folder, tiny_base):
    (mixed_folder / "a.txt").write_text("vase " * 100)
    styled(empty, mixed_folder, tiny_base, train_prompt=CAPTIONED)
    [model] = empty.sql("SELECT settings FROM models").to_pylist()
    prompts = exemplar_prompts(json.loads(model["settings"]), tokenizer_of(tiny_base))
    assert all(prompt.endswith(" in the style of V* art, flat") for prompt in prompts)
    assert prompts[0].startswith("vase ")


@pytest.mark.parametrize(
    ("kind", "prompt", "problem"),
    [
        ("style", "{caption}", r"train_prompt is '\{caption\}'; it must contain V\*"),
        ("style", "{caption|V* art}", r"train_prompt is '\{caption\|V\* art\}'; it must contain V\*"),
        ("mixed", "{caption} V*", "train_prompt is given for a model of kind 'mixed'; it is for object or style"),
    ],
)
def test_training_prompts_that_cannot_be(tiny_base, kind, prompt, problem):
    with pytest.raises(InvalidValue, match=problem):
        settings_for(str(tiny_base), kind, "flat", {"train_prompt": prompt})


def test_words_in_the_place_of_captions_that_are_missing(empty, mixed_folder, tiny_base):
    prompt = "{caption|a picture} in the style of V* art"
    styled(empty, mixed_folder, tiny_base, train_prompt=prompt)
    [row] = empty.sql("SELECT * FROM models").to_pylist()
    assert row["train_prompt"] == "{caption} in the style of V* art"
    assert learned_with(empty, tokenizer_of(tiny_base)) == [
        f"a picture of {name} in the style of V* art" for name in "abc"
    ]
    settings = settings_for(str(tiny_base), "style", "flat", {"train_prompt": prompt})
    (mixed_folder / "b.txt").write_text("a V* picture")
    with pytest.raises(InvalidValue, match=r"b\.png has V\*, and the training prompt names the token"):
        check_model(settings, read_exemplars(mixed_folder), "m")
    (mixed_folder / "b.txt").unlink()
    assert filled_prompt(settings, read_exemplars(mixed_folder)) == "a picture in the style of V* art"


def test_captions_that_a_training_prompt_lacks(empty, mixed_folder, tiny_base):
    (mixed_folder / "b.txt").write_text("a V* picture")
    with pytest.raises(InvalidValue, match=r"b\.png has V\*, and the training prompt names the token"):
        styled(empty, mixed_folder, tiny_base, train_prompt=CAPTIONED)
    (mixed_folder / "b.txt").unlink()
    with pytest.raises(InvalidValue, match=r"b\.png has no caption, which train_prompt '\{caption\} in .* needs"):
        styled(empty, mixed_folder, tiny_base, train_prompt=CAPTIONED)
    assert not (empty.path / "jobs").exists()
