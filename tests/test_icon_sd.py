"""IconScenes and the training of icon-sd: scenes show what their captions say, and every stage resumes."""

import hashlib
import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from attrdb.errors import InvalidValue
from attrdb.ingest.encode import load_encoder
from attrdb.training.icon_sd import (
    autoencoder,
    build,
    checkpoint,
    encoders,
    gpu,
    media,
    recorded,
    runs,
    sprites,
    stream,
    unet,
)
from attrdb.training.icon_sd.parts import TINY, noise_levels
from attrdb.training.icon_sd.runs import Execution, Stage, check_settings
from attrdb.training.icon_sd.scenes import Composer, PlacedSprite, Scene, Sprites, compose, pack
from attrdb.training.icon_sd.words import COLOURS, PATTERNS, with_article

CPU = Execution("cpu")
MINUTES = 60.0  # more than any test takes


@pytest.fixture(scope="module")
def shipped():
    return Sprites.read(build.SPRITES)


@pytest.fixture
def squares():
    """A full square in mono, a left half in red."""
    full = torch.full((4, 64, 64), 255, dtype=torch.uint8)
    left = torch.zeros(4, 64, 64, dtype=torch.uint8)
    left[0, :, :32] = left[3, :, :32] = 255
    return Sprites(torch.stack([full, left]), ["square", "half"], ["flat", "red"], [True, False])


# --- sprites ----------------------------------------------------------------------------------------------------------


def test_shipped_sprites_are_free_many_and_held_to_their_budget(shipped):
    rows = pq.read_table(build.SPRITES).to_pylist()
    assert build.SPRITES.stat().st_size <= 10 * 10**6
    assert len({row["thing"] for row in rows}) >= 2_000
    assert len({row["style"] for row in rows}) >= 40
    assert len({row["name"] for row in rows}) == len(rows)
    assert {row["license"] for row in rows} <= {"CC-PDDC", *sprites_licences()}
    assert not [row["source"] for row in rows if sprites.HELD_OUT.fullmatch(row["source"])]
    assert not [
        row["thing"] for row in rows if row["source"] != "openclipart" and sprites.NOT_THINGS.search(row["thing"])
    ]
    assert shipped.pixels.shape == (len(rows), 4, 64, 64)


def sprites_licences():
    from attrdb.training.icon_sd.icons import FREE

    return FREE


def test_no_style_comes_from_a_held_out_set():
    assert not [style.source for style in sprites.STYLES if sprites.HELD_OUT.fullmatch(style.source)]
    names = [style.name for style in sprites.STYLES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("icon", "thing"),
    [
        ("red apple 24", "red apple"),
        ("bell duo", "bell"),
        ("arrow left", None),
        ("a", None),
        ("4k", None),
        ("user plus", None),
    ],
)
def test_names_of_things(icon, thing):
    assert sprites.thing_of(icon) == thing


def test_vocabulary_has_what_is_shared_and_no_trademark():
    icons_of = {"one": {"bell", "acme"}, "two": {"bell", "acme"}, "three": {"bell", "acme"}, "logos": {"acme"}}
    found = sprites.vocabulary(icons_of, {"sloth": "Animals & Nature", "flag chad": "Flags"})
    assert found == {"bell", "sloth"}


# --- scenes -----------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_scenes_and_pixels(shipped):
    composer = Composer(shipped)
    one, other = (stream.draw_batch(composer, 24, 3, 5) for _ in range(2))
    assert one == other
    assert one != stream.draw_batch(composer, 24, 3, 6)
    pictures = compose(pack(one), shipped.pixels)
    assert pictures.shape == (24, 3, 64, 64)
    assert 0 <= pictures.min() <= pictures.max() <= 1
    torch.testing.assert_close(pictures, compose(pack(other), shipped.pixels), rtol=0, atol=0)
    # A scene does not depend on its company.
    torch.testing.assert_close(pictures[7:8], compose(pack(one[7:8]), shipped.pixels), rtol=0, atol=1e-5)


def test_scenes_are_those_that_icon_sd_was_trained_on(shipped):
    """A change of the drawing also changes the captions that its tokenizer was learned from."""
    batch = stream.draw_batch(Composer(shipped), 400, 0, 0)
    digest = hashlib.sha256("\n".join(scene.caption for scene in batch).encode())
    for _, tensor in sorted(pack(batch).items()):
        digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest()[:16] == "bb432a51a2f9e4a5"


def test_a_sprite_lands_where_it_is_placed(squares):
    red = (255, 0, 0)
    scene = Scene("", (PlacedSprite(0, red, -0.5, 0.5, 0.5),))
    [picture] = compose(pack([scene]), squares.pixels)
    inked = (picture[0] - picture[1]) > 0.5
    rows, columns = inked.nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (32, 63, 0, 31)


@pytest.mark.parametrize(
    ("angle", "mirrored", "side"),
    [(0.0, False, "left"), (0.0, True, "right"), (180.0, False, "right"), (90.0, False, "top")],
)
def test_turning_and_mirroring(squares, angle, mirrored, side):
    scene = Scene("", (PlacedSprite(1, (255, 255, 255), 0, 0, 1.0, angle, mirrored),))
    [picture] = compose(pack([scene]), squares.pixels)
    red = picture[0] - picture[1]
    half = {"left": red[:, :32], "right": red[:, 32:], "top": red[:32], "bottom": red[32:]}
    assert half[side].mean() > 0.9
    assert red.mean() == pytest.approx(0.5, abs=0.02)


def test_later_things_cover_earlier_ones(squares):
    things = (PlacedSprite(0, (255, 0, 0), 0, 0, 1.0), PlacedSprite(0, (0, 0, 255), 0, 0, 0.5))
    [picture] = compose(pack([Scene("", things)]), squares.pixels)
    assert picture[:, 32, 32].tolist() == [0, 0, 1]
    assert picture[:, 2, 2].tolist() == [1, 0, 0]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_grounds_are_of_their_two_colours(squares, pattern):
    scene = Scene("", (), pattern, (255, 0, 0), (0, 0, 255))
    [picture] = compose(pack([scene]), squares.pixels)
    assert picture[1].abs().max() == 0
    shares = picture[2].mean().item()
    assert shares == 0 if pattern == "plain" else 0.002 < shares < 0.99


def test_captions_say_what_is_in_the_scene(shipped):
    composer, rng = Composer(shipped), random.Random(0)
    drawn = [composer.draw(rng) for _ in range(3_000)]
    empty = [scene for scene in drawn if not scene.caption]
    assert 0.07 < len(empty) / len(drawn) < 0.13
    for scene in drawn:
        if not scene.caption:
            continue
        for thing in scene.things:
            assert shipped.things[thing.sprite] in scene.caption
        one, *others = scene.things
        for word, differs in ((" to the left of ", one.x < 0), (" to the right of ", one.x > 0)):
            assert differs or word not in scene.caption
        for count, word in ((2, "two "), (3, "three ")):
            if scene.caption.startswith(word):
                assert len(scene.things) == count
                assert {thing.sprite for thing in others} == {one.sprite}
                assert max(t.scale for t in scene.things) < 1.35 * min(t.scale for t in scene.things)
        if scene.medium >= 0 and media.NAMES[scene.medium] in media.WITHOUT_GROUND:
            assert " ground" not in scene.caption
        named = [medium for medium in media.NAMES if f"{media.MEDIA[medium][0]} of" in scene.caption]
        assert named == ([media.NAMES[scene.medium]] if scene.medium >= 0 else [])
    sizes = {len(scene.things) for scene in drawn}
    assert sizes == {1, 2, 3}
    assert len({shipped.styles[thing.sprite] for scene in drawn for thing in scene.things}) == len(set(shipped.styles))
    # What is named is what is there: a place by its colours, left by its half.
    for scene in drawn:
        if " in the snow" in scene.caption:
            assert scene.pattern == "horizon"
        if scene.caption and len(scene.things) == 1 and " on the left" in scene.caption:
            assert scene.things[0].x < 0


def test_mono_things_stand_out_from_their_ground(shipped):
    composer, rng = Composer(shipped), random.Random(1)
    for _ in range(2_000):
        scene = composer.draw(rng)
        for thing in scene.things:
            if shipped.mono[thing.sprite]:
                far = min(np.linalg.norm(np.subtract(thing.tint, ground)) for ground in (scene.first, scene.second))
                assert far > 60


def test_things_and_media_that_are_held_out_are_never_drawn(shipped):
    composer, rng = Composer(shipped), random.Random(2)
    drawn = [composer.draw(rng) for _ in range(3_000)]
    held = [medium for medium in media.NAMES if media.held_out("bell", medium)]
    assert 0 < len(held) < len(media.NAMES) / 2
    for scene in drawn:
        if scene.medium >= 0:
            names = [shipped.things[thing.sprite] for thing in scene.things]
            assert not [name for name in names if media.held_out(name, media.NAMES[scene.medium])]


@pytest.mark.parametrize("name", media.NAMES)
def test_media_change_the_picture_and_stay_in_range(shipped, name):
    scene = Scene("", (PlacedSprite(3, (255, 255, 255), 0, 0, 0.8),), "plain", COLOURS["sky blue"], COLOURS["sky blue"])
    plain = compose(pack([scene]), shipped.pixels)
    drawn = compose(pack([replace(scene, medium=media.NAMES.index(name))]), shipped.pixels)
    assert 0 <= drawn.min() <= drawn.max() <= 1
    assert (drawn - plain).abs().mean() > 0.03


def test_articles():
    named = [with_article(name) for name in ("bell", "apple", "glasses", "bus", "cross")]
    assert named == ["a bell", "an apple", "glasses", "a bus", "a cross"]


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(shipped):
    names = [range(0, 8), range(len(shipped.things) - 8, len(shipped.things))]
    picks = [number for part in names for number in part]
    columns = ([column[n] for n in picks] for column in (shipped.things, shipped.styles, shipped.mono))
    return Sprites(shipped.pixels[picks], *columns)


@pytest.fixture
def few_file(tmp_path):
    table = pq.read_table(build.SPRITES)
    few = pa.concat_tables([table.slice(0, 8), table.slice(len(table) - 8)])
    pq.write_table(few, tmp_path / "few.parquet")
    return tmp_path / "few.parquet"


def test_autoencoder_killed_and_rerun_equals_an_undisturbed_run(few, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SAVE_SECONDS", 0.0)
    whole = autoencoder.train_autoencoder(few, TINY, Stage(tmp_path / "whole", "vae"), CPU)
    save = Stage.save

    def kill_after_saving(self, state):
        save(self, state)
        raise KeyboardInterrupt

    half = Stage(tmp_path / "killed", "vae")
    monkeypatch.setattr(Stage, "save", kill_after_saving)
    with pytest.raises(KeyboardInterrupt):
        autoencoder.train_autoencoder(few, TINY, half, CPU)
    monkeypatch.setattr(Stage, "save", save)
    assert half.load()["step"] == 1
    again = autoencoder.train_autoencoder(few, TINY, half, CPU)
    for one, other in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert np.isfinite(autoencoder.reconstruction(whole, few, TINY, n_scenes=8))


@pytest.mark.parametrize("minutes", [math.inf, 1e-6])
def test_a_finished_autoencoder_stays_as_it_is(few, tmp_path, minutes):
    stage = Stage(tmp_path, "vae")
    trained = autoencoder.train_autoencoder(few, TINY, stage, CPU, minutes)
    state = stage.load()
    assert state["finished"]
    again = autoencoder.train_autoencoder(few, replace(TINY, vae_images=2 * TINY.vae_images), stage, CPU)
    assert stage.load()["step"] == state["step"]
    for one, other in zip(trained.state_dict().values(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_decoder_is_refined_and_latents_stay_what_they_are(few, tmp_path):
    stage = Stage(tmp_path, "vae", 0.001)
    with pytest.raises(InvalidValue, match="is not finished; train it to its end first"):
        autoencoder.refine_decoder(few, TINY, stage, CPU)
    before = autoencoder.train_autoencoder(few, TINY, Stage(tmp_path, "vae"), CPU).state_dict()
    autoencoder.refine_decoder(few, TINY, stage, CPU)
    autoencoder.refine_decoder(few, TINY, stage, CPU)
    state = stage.load()
    moved = {name for name, value in state["vae"].items() if not value.equal(before[name])}
    assert state["refined"] >= 2
    assert moved
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)
    again = autoencoder.train_autoencoder(few, TINY, Stage(tmp_path, "vae"), CPU)  # the U-Net's stage begins with it
    assert again.state_dict()["decoder.conv_out.bias"].equal(state["vae"]["decoder.conv_out.bias"])


def test_batches_do_not_depend_on_the_number_of_workers(few):
    def captions(workers):
        batches = stream.SceneBatches(few, 4, 0, 2).loaded(workers)
        return [next(batches)["sprite"].tolist() for _ in range(4)]

    assert captions(0) == captions(2)


def test_a_pool_renews_its_scenes_and_keeps_captions_with_their_latents(few, tmp_path):
    vae = autoencoder.train_autoencoder(few, TINY, Stage(tmp_path, "vae"), CPU)
    tokenizer = build.learned_tokenizer(few, TINY, tmp_path / "tokenizer")
    pool = unet.Latents(vae, few, tokenizer, TINY, 0, 0, pool=16)
    known = {}
    for _ in range(12):
        latents, tokens = pool.next()
        assert len(latents) == len(tokens) == TINY.unet_batch
        for one, caption in zip(latents, tokens, strict=True):
            assert known.setdefault(one.numpy().tobytes(), caption.tolist()) == caption.tolist()
    assert len(known) >= 12 * TINY.unet_batch // unet.RENEWED
    assert len({one.numpy().tobytes() for one in pool.latents}) == 16


def test_noise_levels_end_in_noise_alone():
    signal, sigma = noise_levels()
    torch.testing.assert_close(signal**2 + sigma**2, torch.ones(1000))
    assert signal[0] > 0.99
    assert signal[-1] < 1e-3


def test_most_time_steps_are_where_a_thing_takes_its_shape():
    steps = unet._time_steps(20_000, 1000, torch.Generator().manual_seed(0))
    assert (steps.min(), steps.max()) == (0, 999)
    signal, _ = noise_levels()
    between = ((signal[steps] > 0.05) & (signal[steps] < 0.45)).float().mean()
    assert between > 1.8 * ((signal > 0.05) & (signal < 0.45)).float().mean()
    assert 0.05 < (steps < 300).float().mean() < 0.12


@pytest.fixture
def end_after(monkeypatch):
    """Let the stages of later calls end after so many steps, however busy the machine is."""

    def set_steps(n):
        def late(stage):
            stage.n_asked = getattr(stage, "n_asked", 0) + 1
            return stage.n_asked > n

        monkeypatch.setattr(Stage, "late", property(late))

    return set_steps


def test_a_run_goes_from_nothing_to_a_pipeline_and_on_from_it(few_file, tmp_path, monkeypatch, end_after):
    monkeypatch.setattr(build, "N_CAPTIONS", 200)
    monkeypatch.setattr(runs, "FIRST_REPORT", 0.0)
    monkeypatch.setattr(unet, "WARM_UP", 1)
    run, out = tmp_path / "run", tmp_path / "out"
    end_after(2)
    cut = build.build(few_file, run, out, TINY, MINUTES, CPU)
    assert cut["vae_images"] < TINY.vae_images  # no time: the autoencoder is not finished, nothing is exported
    assert not out.exists()
    end_after(20)
    first = build.build(few_file, run, out, TINY, MINUTES, CPU)
    second = build.build(few_file, run, out, TINY, MINUTES, CPU, lr_end=0.1)
    assert first["unet_images"] == 20 * TINY.unet_batch
    assert second["unet_images"] == 40 * TINY.unet_batch
    assert second["vae_seconds"] == first["vae_seconds"]  # finished, and not trained again
    losses = [json.loads(line)["loss"] for line in (run / "unet.jsonl").read_text().splitlines()]
    assert np.mean(losses[-15:]) < np.mean(losses[:15]) - 0.05
    pipeline = StableDiffusionPipeline.from_pretrained(out, local_files_only=True, use_safetensors=True)
    assert pipeline.scheduler.config.rescale_betas_zero_snr
    assert json.loads((out / "training.json").read_text())["unet_images"] == second["unet_images"]

    onward = build.build(few_file, tmp_path / "two", tmp_path / "further", TINY, MINUTES, CPU, start=out)
    assert onward["unet_images"] == 60 * TINY.unet_batch
    assert onward["vae_images"] == TINY.vae_images


def test_a_run_is_carried_to_another_machine(few_file, tmp_path, monkeypatch, end_after):
    monkeypatch.setattr(build, "N_CAPTIONS", 200)
    end_after(20)
    run, kept, other = tmp_path / "run", tmp_path / "kept", tmp_path / "other"
    assert checkpoint.restore(run, kept) == []
    figures = build.build(few_file, run, tmp_path / "out", TINY, MINUTES, CPU)
    assert checkpoint.save(run, kept) == ["vae", "unet"]
    assert not [file for file in kept.rglob("*") if file.suffix in (".pt", ".bin")]
    assert checkpoint.restore(other, kept) == ["vae", "unet"]
    assert checkpoint.restore(other, kept) == []  # it has a state of its own now
    onward = build.build(few_file, other, tmp_path / "out", TINY, MINUTES, CPU)
    assert onward["unet_images"] > figures["unet_images"]
    assert onward["vae_images"] == figures["vae_images"]
    before, after = Stage(run, "vae").load()["vae"], Stage(other, "vae").load()["vae"]
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


def test_a_warm_up_goes_on_where_it_was(few, tmp_path):
    """After the steps that the stored moments are of; weights that come without moments warm up from the start."""
    tokenizer = build.learned_tokenizer(few, TINY, tmp_path / "tokenizer")
    latents, tokens = torch.randn(2, TINY.latent_channels, 8, 8), stream.tokens_of(tokenizer, ["a bell", ""])
    learner, again, carried = (unet.Learner(tokenizer, TINY, CPU) for _ in range(3))
    for _ in range(3):
        learner.learn(latents, tokens, 1e-4)
    state = learner.state()
    again.load(state)
    carried.load({name: value for name, value in state.items() if name != "optimizer"})
    assert [recorded.steps_taken(one.optimizer) for one in (learner, again, carried)] == [3, 3, 0]
    rates = [unet._learning_rate(TINY, n_steps, 0.0, 1.0) for n_steps in (0, 3, unet.WARM_UP, 10 * unet.WARM_UP)]
    assert rates[0] < rates[1] < rates[2] == rates[3] == TINY.unet_lr
    assert unet._learning_rate(TINY, unet.WARM_UP, 1.0, 0.1) == pytest.approx(0.1 * TINY.unet_lr)


class Waits(TorchDispatchMode):
    """The operations whose result Python looks at: a GPU cannot record them."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, _types, args=(), kwargs=None):
        if operation.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.found.append(str(operation))
        return operation(*args, **(kwargs or {}))


def steps_to_record(tokenizer):
    """The steps that a GPU records, each with its inputs."""
    noise = torch.randn(2, TINY.latent_channels, 8, 8)
    tokens, t = stream.tokens_of(tokenizer, ["a bell", ""]), torch.tensor([10, 900])
    yield unet.Learner(tokenizer, TINY, CPU)._step, (torch.randn_like(noise), tokens, t, noise)
    learner = autoencoder.Learner(TINY, CPU)
    for step in learner.steps:
        yield step, (torch.rand(2, 3, TINY.size, TINY.size), noise)


def test_no_step_that_is_recorded_waits_for_a_value(few_file, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "N_CAPTIONS", 200)
    tokenizer = build.learned_tokenizer(Sprites.read(few_file), TINY, tmp_path)
    for step, inputs in steps_to_record(tokenizer):
        step(*inputs)  # the first also makes the optimizer's state
        with Waits() as waits:
            step(*inputs)
        assert waits.found == []


@pytest.mark.gpu
def test_a_recorded_step_is_the_step(few_file, tmp_path):
    sprites = Sprites.read(few_file)
    sprites = replace(sprites, pixels=sprites.pixels.cuda())
    figures = []
    for is_recorded in (False, True):
        learner = autoencoder.Learner(TINY, Execution("cuda", recorded=is_recorded))
        pictures = compose(pack(stream.draw_batch(Composer(sprites), 4, 0, 0)), sprites.pixels, TINY.size)
        losses = [float(learner.learn(pictures * 2 - 1, step, 1e-3)) for step in range(40)]
        figures.append(np.mean(losses[-10:]))
    assert figures[1] == pytest.approx(figures[0], rel=0.1)


def test_two_processes_do_not_train_one_run(tmp_path):
    with runs.exclusive_run(tmp_path / "run"):
        again = subprocess.run(
            [
                sys.executable,
                "-m",
                "attrdb.training.icon_sd.build",
                "--run",
                str(tmp_path / "run"),
                "--out",
                "x",
                "--tiny",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    assert again.returncode != 0
    assert "is being trained by another process; wait for it, or stop it" in again.stderr


def test_a_run_is_not_continued_with_other_settings(tmp_path):
    check_settings(TINY, tmp_path)
    check_settings(TINY, tmp_path)
    with pytest.raises(InvalidValue, match="began with vae_images=64, now it is 800"):
        check_settings(replace(TINY, vae_images=800), tmp_path)


# --- encoders ---------------------------------------------------------------------------------------------------------


def test_views_differ_and_stay_in_range(shipped):
    pictures = compose(pack(stream.draw_batch(Composer(shipped), 8, 0, 0)), shipped.pixels)
    generator = torch.Generator().manual_seed(0)
    one, other = (encoders.view(pictures, 0.3, generator) for _ in range(2))
    assert one.shape == pictures.shape
    assert 0 <= one.min() <= one.max() <= 1
    assert (one - other).abs().mean() > 0.02


@pytest.mark.parametrize(
    ("kind", "spec", "dimension"),
    [
        ("icon-clip", "open_clip:icon-clip/{out}/icon-clip.safetensors", 128),
        ("icon-moco", "timm:convnext_zepto_rms/{out}/icon-moco.safetensors?size=64&crop=1", 256),
    ],
)
def test_an_encoder_learns_resumes_and_loads(few_file, tmp_path, monkeypatch, end_after, kind, spec, dimension):
    monkeypatch.setattr(build, "N_CAPTIONS", 200)
    monkeypatch.setattr(runs, "FIRST_REPORT", 0.0)
    settings = encoders.EncoderSettings(kind, batch=16)
    run, out = tmp_path / "run", tmp_path / "out"
    first = encoders.train_encoder(settings, few_file, run, out, 0.0, CPU)
    end_after(23)
    second = encoders.train_encoder(settings, few_file, run, out, MINUTES, CPU)
    assert (first["steps"], second["steps"]) == (1, 25)
    assert second["images"] > first["images"]
    losses = [json.loads(line)["loss"] for line in (run / f"{kind}.jsonl").read_text().splitlines()]
    assert np.mean(losses[-2:]) < np.mean(losses[1:4])  # the first is of one batch
    loaded = load_encoder(spec.format(out=out))
    assert loaded.dimension == dimension
    picture = Image.new("RGB", (64, 64), (200, 30, 30))
    [feature] = loaded.features(np.stack([loaded.prepare(picture)]))
    assert np.isfinite(feature).all()
    assert (out / f"{kind}.safetensors").stat().st_size < 8 * 10**6
    card = json.loads((out / f"{kind}-training.json").read_text())
    assert card["sha256"] == hashlib.sha256((out / f"{kind}.safetensors").read_bytes()).hexdigest()


# --- the queue for a GPU ----------------------------------------------------------------------------------------------


def test_the_queue_for_a_gpu_rehearsed_without_a_database_or_an_installation(few_file, tmp_path):
    """As on a bare machine: without the packages of the database, with attrdb's rooms as they lie in the repository."""
    absent = tmp_path / "absent"
    absent.mkdir()
    for name in ("lance", "lancedb", "duckdb"):
        (absent / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name} here', name={name!r})\n")
    (absent / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path = [one for one in sys.meta_path if 'Editable' not in str(one)]\n"
    )
    program = [sys.executable, "training/icon_sd/gpu.py", "--rehearse", str(few_file)]
    folders = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    variables = {**os.environ, "PYTHONPATH": str(absent), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*program, *folders], cwd=gpu.ROOT, env=variables, capture_output=True, text=True, check=False)
    said = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [one["state"] for one in said] == ["done"] * len(gpu.TASKS), ran.stderr + logs(tmp_path / "out")
    assert ran.returncode == 0
    gpu.unpack(tmp_path / "out", tmp_path / "unpacked")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "unpacked" / "icon-sd", local_files_only=True)
    assert pipeline.unet.config.sample_size == 8
    assert (tmp_path / "unpacked" / "encoders" / "icon-clip.safetensors").is_file()
    assert (tmp_path / "unpacked" / "encoders" / "icon-moco.safetensors").is_file()
    assert json.loads((tmp_path / "unpacked" / "sd15" / "sd15.json").read_text())["methods"]
    again = subprocess.run(
        [*program, *folders], cwd=gpu.ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert [json.loads(line)["state"] for line in again.stdout.splitlines()] == ["done before"] * len(gpu.TASKS)


def logs(folder):
    return "\n".join(file.read_text()[-2000:] for file in folder.glob("*.log"))


def test_a_task_that_fails_or_overruns_does_not_stop_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 1)
    tasks = tuple(
        gpu.Task(name, ((("-c", program),),), 1.0, most=minutes)
        for name, program, minutes in (
            ("fails", "raise SystemExit(3)", 1.0),
            ("hangs", "import time; time.sleep(60)", 0.01),
            ("works", "open('{out}/made', 'w').write('x' * 40)", 1.0),
        )
    )
    said = gpu.run(tasks, 5, tmp_path / "runs", tmp_path / "out", None)
    assert [one["state"] for one in said] == ["failed with 3", "ended after 2 s", "done"]
    monkeypatch.setattr(gpu, "PART", 4096)
    assert len(gpu.pack(tmp_path / "runs" / "results", tmp_path / "out")) > 1
    gpu.unpack(tmp_path / "out", tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / "works" / "made").read_text() == "x" * 40


def test_a_way_that_fails_is_followed_by_the_next_one(tmp_path):
    """A way of two processes fails when one of them does."""
    fast = (("-c", "raise SystemExit(3)"), ("-c", ""))
    slow = (("-c", "open('{out}/slow', 'w')"), ("-c", "open('{out}/beside', 'w')"))
    [said] = gpu.run((gpu.Task("two", (fast, slow), 1.0),), 2, tmp_path / "runs", tmp_path / "out", None)
    assert said["state"] == "done"
    assert {file.name for file in (tmp_path / "runs" / "results" / "two").iterdir()} == {"slow", "beside"}


@pytest.mark.parametrize(
    ("minutes", "done", "begun"),
    [
        (9.5, [], ["icon-sd", "encoders"]),
        (14.0, [], ["icon-sd", "encoders", "sd15"]),
        (6.5, [], ["icon-sd"]),
        (5.0, ["icon-sd"], ["encoders", "sd15"]),
        (3.0, ["icon-sd", "encoders"], ["sd15"]),
        (1.0, [], []),
    ],
)
def test_the_plan_of_a_visit(minutes, done, begun):
    """Every task uses all of its time and its grace: what is begun, and that the visit is over in time."""
    left, waiting, got = minutes, [task for task in gpu.TASKS if task.name not in done], {}
    while waiting:
        planned = gpu.minutes_for(waiting[0], tuple(waiting), left)
        task = waiting.pop(0)
        assert task.least <= planned <= task.most or planned == 0
        if planned:
            got[task.name] = planned
            left -= planned + gpu.GRACE / 60
    assert list(got) == begun
    assert left >= -0.01


def test_a_task_without_enough_time_waits(tmp_path):
    [said] = gpu.run((gpu.Task("long", ((("-c", ""),),), 1.0, 3.0),), 2, tmp_path / "runs", tmp_path / "out", None)
    assert said == {"task": "long", "state": "no time", "minutes_left": 2.0}


def test_what_a_gpu_machine_is_sent_fits():
    """The tracked files without those that no task needs, in bytes: 64 MiB with the wheels, which take 9 MB."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=gpu.ROOT, capture_output=True, text=True, check=False).stdout
    names = {name for name in listed.split("\0") if (gpu.ROOT / name).is_file()} - {""}
    if not names:
        pytest.skip("not a git checkout")
    assert names.issuperset(gpu.UNNEEDED)
    assert sum((gpu.ROOT / name).stat().st_size for name in names.difference(gpu.UNNEEDED)) < 58 * 10**6
