"""Encoders: their specs, identities and errors, and the stream that encodes; no weights come from a hub."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import timm
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from attrdb.bundled import EXEMPLARS, sprite_rows
from attrdb.errors import AttrdbError, InvalidValue
from attrdb.ingest.dimensions import known_dimension
from attrdb.ingest.encode import EfficientNetLite0, Pixels, encode, encode_file, load_encoder, weights
from attrdb.ingest.encode.stream import ahead, encode_stream
from attrdb.ingest.read.pictures import read_picture
from attrdb.store.schema import encoder_id_of

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def icons() -> dict[str, Image.Image]:
    things = ("bicycle", "strawberry", "guitar", "penguin", "umbrella", "hammer", "cactus", "bell")
    wanted = {f"{vendor}/{thing}" for thing in things for vendor in ("noto", "twemoji")}
    rows = {row["name"]: row["image"] for row in sprite_rows() if row["name"] in wanted}
    return {name: read_picture(name, rows[name]).image for name in sorted(wanted)}


@pytest.fixture(scope="module")
def pictures(icons) -> list[Image.Image]:
    """Real pictures: square, wide and tall."""
    wide, tall = icons["noto/guitar"].resize((150, 97)), icons["noto/bell"].resize((61, 300))
    return [*list(icons.values())[:3], wide, tall, wide.crop((0, 0, 40, 33))]


# --- encoders that need no checkpoint ---------------------------------------------------------------------------------


def test_pixels_by_hand():
    encoder = Pixels(2)
    prepared = encoder.prepare(Image.new("RGB", (64, 64), (255, 0, 0)))
    assert (prepared.dtype, prepared.shape) == (np.uint8, (2, 2, 3))
    np.testing.assert_allclose(encoder.features(prepared[None]), [[1.001, -0.999, -0.999] * 4], atol=1e-6)
    with pytest.raises(InvalidValue, match="N lies between 2 and 64"):
        load_encoder("pixels:1")


def test_what_older_databases_were_made_with_is_still_made():
    """Identities and features of attrdb 0.1.0."""
    bicycle = read_picture("bicycle", (FIXTURES / "bicycle.webp").read_bytes()).image  # Noto Emoji, see NOTICE
    lite, pixels = load_encoder("efficientnet-lite0"), load_encoder("pixels:8")
    assert (lite.spec, lite.dimension, lite.weights_fingerprint) == ("efficientnet-lite0", 1280, "579344248a93e230")
    assert lite.preprocessing == {"size": 128, "resize": "bicubic on a white square", "scale": "(x - 127) / 128"}
    assert (pixels.spec, pixels.dimension, pixels.weights_fingerprint) == ("pixels:8", 192, "none")
    scale = "x / 127.5 - 1 + 1e-3"
    assert pixels.preprocessing == {"size": 8, "resize": "box on a white square of 64", "scale": scale}
    found = encode(lite, [bicycle])[0]
    assert np.argsort(-found)[:3].tolist() == [1162, 468, 717]
    np.testing.assert_allclose(found[[1162, 468, 717]], [0.1570967, 0.1469619, 0.1429284], rtol=1e-4)
    found = encode(pixels, [bicycle])[0]
    np.testing.assert_allclose(found[[156, 157, 158]], [0.018029, 0.028185, 0.030216], rtol=1e-4)


def test_efficientnet_tells_what_is_shown_from_how_it_is_drawn(icons):
    """Real weights on real icons: the same thing by another vendor is nearer than another thing."""
    features = encode(EfficientNetLite0(), list(icons.values()))
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    similarity = features[:8] @ features[8:].T
    assert (similarity.argmax(axis=1) == np.arange(8)).mean() >= 0.75


def test_vgg_gram_tells_how_a_picture_is_drawn():
    """Real weights on real icons: of twenty styles of eight icons each, the nearest other icon is often of the same style."""
    pytest.importorskip("stlpips_pytorch")
    rows = pq.read_table(EXEMPLARS).to_pylist()
    said = [json.loads(row["metadata"]) for row in rows]
    styles = np.array([one["concept"] for one in said if one["kind"] == "style"])
    shown = [row for row, one in zip(rows, said, strict=True) if one["kind"] == "style"]
    features = encode(load_encoder("vgg-gram"), [read_picture(row["name"], row["image"]).image for row in shown])
    similarity = features @ features.T
    np.fill_diagonal(similarity, -1)
    assert len(set(styles)) == 20
    assert (styles[similarity.argmax(axis=1)] == styles).mean() > 0.35  # chance: 0.04


def test_vgg_gram_is_the_gram_matrix_of_its_layers():
    """The first layer's part against a plain evaluation, for one picture of noise."""
    pytest.importorskip("stlpips_pytorch")
    encoder = load_encoder("vgg-gram")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    found = encoder.features(pixels)[0]
    assert found.shape == (encoder.dimension,) == (900,)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    for number in (0, 2):
        weight, bias = (encoder._weights[f"slice1.{number}.{what}"].double() for what in ("weight", "bias"))
        x = torch.nn.functional.conv2d(x, weight, bias, padding=1).relu()
    mixed = torch.einsum("kc,chw->khw", encoder._mixes["slice1"].double(), x[0])
    gram = np.array([[(a * b).mean() for b in mixed.numpy()] for a in mixed.numpy()])
    wanted = gram[np.triu_indices(24)]
    np.testing.assert_allclose(found[:300], wanted / np.linalg.norm(wanted), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.reshape(3, 300), axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(("name", "dimension"), [("icon-clip", 128), ("icon-moco", 256)])
def test_encoders_that_attrdb_trained(icons, name, dimension):
    """They are what their cards say, and tell what is shown from how it is drawn."""
    encoder = load_encoder(name)
    assert (encoder.spec, encoder.dimension) == (name, dimension)
    assert known_dimension(name) == dimension
    folder = files("attrdb") / "assets" / "encoders"
    card = json.loads((folder / f"{name}-training.json").read_text())
    assert hashlib.sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest() == card["sha256"]
    page = (Path(__file__).parent.parent / "docs" / "encoders.md").read_text()
    assert card["sha256"] in page
    assert f"{card['images']:,}" in page
    features = encode(encoder, list(icons.values()))
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    similarity = features[:8] @ features[8:].T
    assert (similarity.argmax(axis=1) == np.arange(8)).mean() >= 0.5  # chance: 0.125


def test_bundled_encoders_are_small():
    folder = files("attrdb") / "assets" / "encoders"
    assert sum(file.stat().st_size for file in Path(str(folder)).rglob("*") if file.is_file()) <= 12 * 10**6


# --- reconstructions --------------------------------------------------------------------------------------------------


def test_pictures_that_went_through_an_autoencoder(tiny_base, icons, monkeypatch):
    """As the pipeline's own image processor and autoencoder make them; the encoder is found again from another folder."""
    monkeypatch.chdir(tiny_base.parent)
    encoder = load_encoder(f"vae:{tiny_base.name}+pixels:4")
    assert encoder.spec == f"vae:{tiny_base}+pixels:4"
    assert encoder_id_of(encoder.spec) == f"vae_{tiny_base.name}_pixels_4".replace("-", "_")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, local_files_only=True, use_safetensors=True)
    shown = [image.resize((32, 32)) for image in list(icons.values())[:3]]
    x = pipeline.image_processor.preprocess(shown)
    with torch.no_grad():
        decoded = pipeline.vae.decode(pipeline.vae.encode(x).latent_dist.mean).sample
    reconstructed = pipeline.image_processor.postprocess(decoded)
    assert reconstructed[0].tobytes() != shown[0].tobytes()
    found = encode(load_encoder(encoder.spec), shown)
    np.testing.assert_allclose(found, encode(load_encoder("pixels:4"), reconstructed), atol=0.01)
    assert encoder.weights_fingerprint.endswith("-none")


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("vae:icon-sd", "names no base model and encoder; give vae:BASE\\+ENCODER"),
        ("vae:+pixels:8", "names no base model and encoder"),
        ("vae:icon-sd+pixel:8", "no encoder 'pixel:8'"),
        ("vae:nothing+pixels:8", "no base model 'nothing'"),
    ],
)
def test_reconstructions_that_cannot_be(spec, problem):
    with pytest.raises(AttrdbError, match=problem):
        load_encoder(spec)


# --- open_clip, timm, TorchScript -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A CLIP of random weights, and its checkpoint."""
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    }
    (folder / "attrdb-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "attrdb-tiny.json")
    torch.manual_seed(0)
    model = open_clip.create_model("attrdb-tiny", load_weights=False).eval()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "mine.safetensors")
    return model, folder / "mine.safetensors"


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ("", {}),
        ("?resize=longest", {"resize_mode": "longest"}),
        ("?resize=squash&interpolation=bilinear", {"resize_mode": "squash", "interpolation": "bilinear"}),
        ("?mean=half&std=0.5,0.4,0.3", {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.4, 0.3)}),
    ],
)
def test_open_clip_sees_what_open_clip_shows(tiny_clip, pictures, settings, arguments):
    model, checkpoint = tiny_clip
    encoder = load_encoder(f"open_clip:attrdb-tiny/{checkpoint}{settings}")
    reference = open_clip.image_transform(64, is_train=False, **arguments)
    prepared = np.stack([encoder.prepare(picture) for picture in pictures])
    assert prepared.dtype == np.uint8
    scaled = (prepared / 255 - encoder.preprocessing["mean"]) / encoder.preprocessing["std"]
    wanted = torch.stack([reference(picture) for picture in pictures])
    np.testing.assert_allclose(scaled.transpose(0, 3, 1, 2), wanted, atol=1e-5)
    with torch.inference_mode():
        np.testing.assert_allclose(encoder.features(prepared), model.encode_image(wanted), atol=1e-5)
    assert encoder.dimension == 24


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory):
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    path = tmp_path_factory.mktemp("vit") / "mine.safetensors"
    save_file(model.state_dict(), path)
    return model, path


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k"])
def test_timm_sees_what_timm_shows_and_its_classifier_is_left_out(tiny_vit, pictures, name):
    model, checkpoint = tiny_vit
    encoder = load_encoder(f"timm:{name}/{checkpoint}")
    config = timm.data.resolve_model_data_config(timm.create_model(name))
    reference = timm.data.create_transform(**config, is_training=False)
    wanted = torch.stack([reference(picture) for picture in pictures])
    with torch.inference_mode():
        pooled = model.forward_head(model.forward_features(wanted), pre_logits=True)
    prepared = np.stack([encoder.prepare(picture) for picture in pictures])
    np.testing.assert_allclose(encoder.features(prepared), pooled, atol=1e-5)
    assert encoder.dimension == 192


@pytest.mark.parametrize("crop_mode", ["center", "border", "squash"])
def test_every_crop_of_timm(pictures, crop_mode):
    from attrdb.ingest.encode.networks import _timm_preprocessing

    config = {"input_size": (3, 48, 48), "crop_pct": 0.9, "crop_mode": crop_mode, "interpolation": "bicubic"}
    network = timm.create_model("vit_tiny_patch16_224")
    network.pretrained_cfg = {**network.pretrained_cfg, **config}
    ours = _timm_preprocessing(timm, "this", network)
    used = timm.data.resolve_model_data_config(network)
    reference = timm.data.create_transform(**used, is_training=False, normalize=False)
    for picture in pictures:
        np.testing.assert_array_equal(ours.prepare(picture).transpose(2, 0, 1), reference(picture))


def test_a_moco_v3_checkpoint_gives_its_base_encoder(tiny_vit, tmp_path):
    model, checkpoint = tiny_vit
    base = {f"module.base_encoder.{name}": value for name, value in model.state_dict().items()}
    other = {f"module.momentum_encoder.{name}": value + 1 for name, value in model.state_dict().items()}
    saved = {"epoch": 300, "state_dict": {**other, **base, "module.predictor.0.weight": torch.ones(2)}}
    torch.save(saved, tmp_path / "moco.pth.tar")
    encoder = load_encoder(
        f"timm:vit_tiny_patch16_224/{tmp_path / 'moco.pth.tar'}?mean=imagenet&std=imagenet&crop=0.875"
    )
    plain = load_encoder(f"timm:vit_tiny_patch16_224/{checkpoint}")
    assert encoder.weights_fingerprint == plain.weights_fingerprint
    assert (encoder.preprocessing["resized"], plain.preprocessing["resized"]) == (256, 248)
    assert encoder.preprocessing["mean"] == [0.485, 0.456, 0.406]


class Means(torch.nn.Module):
    """The mean of every channel."""

    def forward(self, x):
        return x.mean(dim=(2, 3))


def script(network: torch.nn.Module, path) -> str:
    torch.jit.trace(network, torch.zeros(1, 3, 32, 32)).save(path)
    return f"torchscript:{path}"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_by_hand(tmp_path):
    spec = script(Means(), tmp_path / "means.pt")
    encoder = load_encoder(spec + "?size=32&mean=0,0,0.5&std=1,0.5,0.5")
    assert (encoder.dimension, encoder.preprocessing["size"]) == (3, 32)
    prepared = encoder.prepare(Image.new("RGB", (90, 70), (255, 51, 0)))
    np.testing.assert_allclose(encoder.features(prepared[None].copy()), [[1, 0.4, -1]], atol=1e-6)
    assert load_encoder(spec).preprocessing["mean"] == [0.485, 0.456, 0.406]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("resnet:9", "no encoder 'resnet:9'; there are: efficientnet-lite0, pixels:N"),
        ("pixel:8", "nearest are 'pixels'"),
        ("open_clip:ViT-B32/openai", "open_clip has no architecture 'ViT-B32'; nearest are 'ViT-B-32'"),
        ("open_clip:ViT-B-32/opena", "'opena' is neither a file nor a tag of open_clip; nearest are 'openai'"),
        ("open_clip:ViT-B-32", "there are: openai, laion400m_e31"),
        ("timm:vit_base_patch16_22", "timm has no model .*; nearest are 'vit_base_patch16_224'"),
        ("timm:vit_base_patch16_224.dinoo", "no weights 'dinoo' .*; nearest are 'vit_base_patch16_224.dino'"),
        ("timm:vit_base_patch16_224/no/where.pth", "'no/where.pth' is no file"),
        ("timm:test_vit9", "timm has no model 'test_vit9'"),
        ("torchscript:nowhere.pt", "'nowhere.pt' is no file"),
        ("torchscript:nowhere.pt?size", "settings 'size' are not NAME=VALUE joined by &"),
    ],
)
def test_specs_that_name_nothing(spec, says):
    with pytest.raises(InvalidValue, match=says):
        load_encoder(spec)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("sice=64", "no setting 'sice' of an encoder; there are: size, resize, crop, interpolation, mean, std"),
        ("size=9000", "size=9000 is not one of: 16 to 1024 pixels"),
        ("size=big", "size=big is not one of"),
        ("crop=0", "crop=0 is not one of: 0.1 to 1"),
        ("resize=fit", "resize=fit is not one of: shortest/longest/squash"),
        ("std=1,0,1", "std=1,0,1 is neither three numbers a,b,c nor one of: imagenet, clip, half"),
        ("size=64&size=65", "give one of them twice"),
        ("size=96", "fails on a picture of 96x96 pixels"),
    ],
)
def test_settings_that_are_none(tiny_clip, settings, says):
    with pytest.raises(InvalidValue, match=says):
        load_encoder(f"open_clip:attrdb-tiny/{tiny_clip[1]}?{settings}")


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_is_never_unpickled(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "args": Trap(tmp_path / "sprung")}, tmp_path / "evil.pt")
    (tmp_path / "worse.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    for name in ("evil.pt", "worse.bin"):
        with pytest.raises(InvalidValue, match=rf"{name} cannot be read as weights alone .* save its state dict"):
            load_encoder(f"timm:vit_tiny_patch16_224/{tmp_path / name}")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_checkpoints_that_do_not_fit(tiny_clip, tiny_vit, tmp_path):
    with pytest.raises(InvalidValue, match=r"for timm's vit_small_patch16_224 .* cls_token \(1x1x192 for 1x1x384\)"):
        load_encoder(f"timm:vit_small_patch16_224/{tiny_vit[1]}")
    with pytest.raises(InvalidValue, match=r"it lacks cls_token, pos_embed, .* and 14\d more; it has besides ln_final"):
        load_encoder(f"timm:vit_tiny_patch16_224/{tiny_clip[1]}")
    (tmp_path / "torn.safetensors").write_bytes(tiny_vit[1].read_bytes()[:1000])
    with pytest.raises(InvalidValue, match=r"torn\.safetensors cannot be read as weights alone \(SafetensorError\)"):
        load_encoder(f"timm:vit_tiny_patch16_224/{tmp_path / 'torn.safetensors'}")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(InvalidValue, match=r"empty\.pt has no state dict"):
        load_encoder(f"timm:vit_tiny_patch16_224/{tmp_path / 'empty.pt'}")
    with pytest.raises(InvalidValue, match=r"is no TorchScript archive"):
        load_encoder(f"torchscript:{tmp_path / 'empty.pt'}")
    scripted = script(torch.nn.Identity(), tmp_path / "maps.pt")
    with pytest.raises(InvalidValue, match=r"output of shape \(1, 3, 224, 224\); \(1, dimension\) is needed"):
        load_encoder(scripted)
    with pytest.raises(InvalidValue, match=r"maps\.pt is a TorchScript archive; name it as torchscript:"):
        load_encoder(f"timm:vit_tiny_patch16_224/{tmp_path / 'maps.pt'}")


def test_weights_that_cannot_be_downloaded(monkeypatch):
    asked = {}

    def refuse(name, **options):
        asked.update(options)
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "create_model", refuse)
    says = r"of open_clip:ViT-B-32/openai .*no route to host.* name the file: open_clip:ViT-B-32/FILE"
    with pytest.raises(InvalidValue, match=says):
        load_encoder("open_clip:ViT-B-32/openai")
    # OpenAI's weights mean nothing under another activation than QuickGELU.
    assert asked == {"pretrained": "openai", "force_quick_gelu": True}
    with pytest.raises(InvalidValue, match="could not be downloaded"):
        load_encoder("open_clip:ViT-B-32/laion2b_s34b_b79k")
    assert asked["force_quick_gelu"] is False
    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(InvalidValue, match=r"no route to host.* name the file: timm:vit_base_patch16_224\.dino/FILE"):
        load_encoder("timm:vit_base_patch16_224.dino")


# --- identity ---------------------------------------------------------------------------------------------------------


def test_a_fingerprint_changes_with_names_shapes_types_and_values():
    first = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1)}
    same = {"b": torch.tensor(1), "a": torch.arange(6.0).reshape(2, 3).T.contiguous().T}
    others = [
        {"a": first["a"], "c": first["b"]},
        {**first, "a": first["a"].reshape(3, 2)},
        {**first, "a": first["a"].double()},
        {**first, "b": torch.tensor(2)},
    ]
    assert weights.fingerprint(same) == weights.fingerprint(first)
    assert len({weights.fingerprint(one) for one in [first, *others]}) == 5


def test_other_weights_or_preprocessing_are_refused(empty, tiny_vit, tmp_path):
    model, path = tiny_vit
    copy = tmp_path / "mine.safetensors"
    copy.write_bytes(path.read_bytes())
    spec = f"timm:vit_tiny_patch16_224/{copy}"
    encoder = load_encoder(spec)
    empty.writer.add_encoder(encoder.spec, encoder.dimension, encoder.preprocessing, encoder.weights_fingerprint)
    Image.new("RGB", (40, 40), (9, 200, 30)).save(tmp_path / "green.png")
    assert encode_file(empty, tmp_path / "green.png").shape == (192,)
    save_file({name: value + 0.01 for name, value in model.state_dict().items()}, copy)
    with pytest.raises(InvalidValue, match=r"has weights fingerprint .*, its stored features were made with"):
        encode_file(empty, tmp_path / "green.png")


# --- the stream -------------------------------------------------------------------------------------------------------


def test_ahead_keeps_the_order_and_its_bounds():
    drawn, lock, running, most = [], threading.Lock(), 0, 0

    def items():
        for n in range(40):
            drawn.append(n)
            yield n

    def work(n):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.004 if n % 3 else 0)
        with lock:
            running -= 1
        return n * n

    stream = ahead(items(), work, workers=3, depth=5)
    for n, result in enumerate(stream):
        assert result == n * n
        assert len(drawn) <= n + 5
    assert most == 3


@pytest.mark.parametrize("where", ["work", "items"])
def test_ahead_raises_in_its_place(where):
    def items():
        yield from range(3)
        if where == "items":
            raise KeyError("torn")
        yield 3

    def work(n):
        if n == 3:
            raise KeyError("torn")
        return n

    stream = ahead(items(), work, workers=2, depth=8)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="torn"):
        next(stream)


def test_ahead_stops_when_its_reader_does():
    done = []
    before = threading.active_count()
    stream = ahead(range(1000), lambda n: done.append(n) or n, workers=2, depth=4)
    assert next(stream) == 0
    stream.close()
    assert threading.active_count() == before
    assert len(done) <= 4


def solid(n: int) -> Image.Image:
    return Image.new("RGB", (20, 20), (n % 251, 255 - n % 251, 77))


class Unusable(Pixels):
    """Gives the picture of n = 7 a feature of zeros."""

    def features(self, batch):
        found = super().features(batch)
        return np.where((batch[:, 0, 0, 0] == 7)[:, None], 0, found)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("concurrent", [True, False])
def test_a_stream_gives_what_one_picture_at_a_time_gives(concurrent, tmp_path):
    encoders = [load_encoder(script(Means(), tmp_path / "means.pt") + "?size=32"), Pixels(3), Unusable(2)]
    encoders[2].concurrent = concurrent
    reads, threads = [], torch.get_num_threads()

    def read(n):
        reads.append(n)
        if n % 50 == 30:
            raise InvalidValue(f"image {n} is torn")
        return f"kept {n}", solid(n)

    found = list(encode_stream(encoders, iter(range(90)), read))
    assert [one.item for one in found] == list(range(90))
    assert sorted(reads) == list(range(90))
    errors = {one.item: str(one.error) for one in found if one.error}
    assert errors == {
        7: "encoder 'pixels:2' makes a feature of length 0.0 of the picture",
        30: "image 30 is torn",
        80: "image 80 is torn",
    }
    for one in found:
        if one.error:
            assert one.features == ()
            continue
        assert one.kept == f"kept {one.item}"
        for encoder, feature in zip(encoders, one.features, strict=True):
            assert (feature.dtype, feature.shape) == (np.float32, (encoder.dimension,))
            np.testing.assert_allclose(feature, encode(encoder, [solid(one.item)])[0], atol=1e-5)
    assert torch.get_num_threads() == threads


def test_a_stream_of_unreadable_pictures_has_only_errors():
    def read(n):
        raise InvalidValue(f"image {n} is torn")

    assert [str(one.error) for one in encode_stream([Pixels(2)], range(2), read)] == [
        "image 0 is torn",
        "image 1 is torn",
    ]
    assert list(encode_stream([Pixels(2)], [], read)) == []


def test_many_pictures_or_few_are_encoded_alike(toy_encoder):
    images = [solid(n) for n in range(70)]
    alone = np.concatenate([encode(toy_encoder, [image]) for image in images])
    np.testing.assert_allclose(encode(toy_encoder, images), alone, rtol=1e-6)
    assert encode(toy_encoder, []).shape == (0, 2)
    with pytest.raises(InvalidValue, match=r"picture 7: encoder 'pixels:2' makes a feature of length 0\.0"):
        encode(Unusable(2), images)
    toy_encoder.dimension = 3
    with pytest.raises(
        InvalidValue, match=r"'toy:2' makes features of shape \(1, 2\) of 1 pictures; needed is \(1, 3\)"
    ):
        encode(toy_encoder, images[:1])


# --- encoders of other packages ---------------------------------------------------------------------------------------

PLUGIN = """
import numpy as np

class Mean:
    preprocessing, weights_fingerprint = {}, "none"

    def __init__(self, argument):
        self.spec, self.dimension = f"mean:{argument}", 3

    def prepare(self, image):
        return np.asarray(image.resize((4, 4)))

    def features(self, batch):
        return batch.mean(axis=(1, 2))

def short(argument):
    encoder = Mean(argument)
    encoder.spec, encoder.dimension = f"short:{argument}", 4
    return encoder

def lacking(argument):
    encoder = Mean(argument)
    del encoder.dimension
    return encoder

def raising(argument):
    raise RuntimeError("no such colour")
"""

ASK = """
import json, sys
from PIL import Image
from attrdb.errors import InvalidValue
from attrdb.ingest.encode import encode, load_encoder

said = {}
for spec in sys.argv[1:]:
    try:
        said[spec] = encode(load_encoder(spec), [Image.new("RGB", (32, 32), (3, 4, 0))]).tolist()
    except InvalidValue as error:
        said[spec] = str(error)
print(json.dumps(said))
"""


def install(folder, package: str, entry_points: dict[str, str]) -> str:
    """Build and install a package with pip, offline; the folder that it was installed into."""
    module = package.replace("-", "_")
    source, site = folder / package, folder / f"{package}-site"
    source.mkdir()
    (source / f"{module}.py").write_text(PLUGIN)
    lines = "".join(f'{name} = "{target}"\n' for name, target in entry_points.items())
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        f'[project]\nname = "{package}"\nversion = "1"\n[project.entry-points."attrdb.encoders"]\n{lines}'
        f'[tool.setuptools]\npy-modules = ["{module}"]\n'
    )
    command = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([sys.executable, *command, "--target", str(site), str(source)], check=True)
    return str(site)


def ask(sites: list[str], *specs: str) -> dict:
    path = os.pathsep.join([*sites, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", ASK, *specs], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_installed_package_adds_encoders(tmp_path):
    names = {"mean": "Mean", "short": "short", "lacking": "lacking", "raising": "raising", "alias": "Mean"}
    targets = {name: f"colour_mean:{target}" for name, target in names.items()}
    good = install(tmp_path, "colour-mean", {**targets, "gone": "colour_mean.nowhere:Mean"})
    said = ask([good], "mean:red", "short:red", "lacking:red", "raising:red", "alias:red", "gone:red", "meen:red")
    np.testing.assert_allclose(said["mean:red"], [[0.6, 0.8, 0]], atol=1e-6)
    start = "encoder '{}:red' of package colour-mean fails with "
    assert said["short:red"].startswith(start.format("short") + "ValueError: features of one picture have shape (1, 3)")
    assert said["lacking:red"].startswith(
        start.format("lacking") + "TypeError: it needs the attribute dimension, of type int"
    )
    assert said["raising:red"] == start.format("raising") + "RuntimeError: no such colour"
    assert said["alias:red"].startswith(start.format("alias") + "ValueError: it calls itself 'mean:red'")
    assert said["gone:red"].startswith(start.format("gone") + "ModuleNotFoundError")
    assert said["meen:red"].endswith("alias, gone, lacking, mean, raising, short; nearest are 'mean'")

    clash = install(tmp_path, "other-mean", {"mean": "other_mean:Mean", "pixels": "other_mean:Mean"})
    said = ask([good, clash], "mean:red", "pixels:8", "efficientnet-lite0")
    assert said["mean:red"].startswith("the packages colour-mean and other-mean both add an encoder 'mean'")
    assert said["pixels:8"].startswith("package other-mean adds an encoder 'pixels', which attrdb has itself")
    assert len(said["efficientnet-lite0"][0]) == 1280  # encoders that no package claims are not touched


class Picky:
    """Takes no dark picture."""

    spec, dimension, preprocessing, weights_fingerprint = "picky:1", 1, {}, "none"

    def prepare(self, image):
        return np.ones(1, np.float32) if image.getpixel((0, 0))[0] > 10 else 1 / 0

    def features(self, batch):
        return batch


def test_a_picture_that_an_encoder_cannot_take_ends_no_stream():
    images = [Image.new("RGB", (20, 20), (shade, 0, 0)) for shade in (200, 0, 100)]
    encoded = list(encode_stream([Picky()], images, lambda image: (None, image)))
    assert [image.error is None for image in encoded] == [True, False, True]
    assert "encoder 'picky:1' cannot prepare the picture of 20x20 pixels: ZeroDivisionError" in str(encoded[1].error)
