"""Base models: the one that ships is a genuine pipeline, and Stable Diffusion's own shape works."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from attrdb.bundled import ASSETS
from attrdb.errors import InvalidValue
from attrdb.ingest.customize import base_model as loading
from attrdb.ingest.customize import customize as cd
from attrdb.ingest.customize.synthesize import SynthesizeSettings, plan_samples, synthesize, use_fast_solver
from attrdb.ingest.prompts import Prompt


def test_the_bundled_base_model_is_known_by_its_hash():
    """So that a database of models of an edition that is no longer bundled is told where to get it."""
    assert loading.weights_hash(loading.base_model_folder("icon-sd")) in loading.EDITIONS


def test_bundled_icon_sd_is_a_genuine_small_pipeline():
    folder = ASSETS / "icon-sd"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 25 * 10**6
    base = loading.load_base_model("icon-sd")
    assert type(base.pipeline) is StableDiffusionPipeline
    assert base.resolution == 64
    figures = json.loads((folder / "training.json").read_text())
    assert figures["unet_images"] > 0
    use_fast_solver(base)
    settings = SynthesizeSettings(samples_per_prompt=1, solver_steps=4, guidance=3.0)
    [batch] = plan_samples("x", [Prompt(0, "gpt", "a bicycle on a meadow")], settings)
    [image] = synthesize(base, batch, settings)
    assert image.size == (64, 64)


def sd15(folder):
    """A randomly initialised pipeline with the layer sizes of Stable Diffusion 1.5; only the vocabulary is icon-sd's."""
    with torch.device("cpu"):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=64,
            in_channels=4,
            out_channels=4,
            block_out_channels=(320, 640, 1280, 1280),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        )
        tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "icon-sd" / "tokenizer", model_max_length=77)
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                max_position_embeddings=77,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=tokenizer.bos_token_id,
            )
        )
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.mark.slow
def test_stable_diffusion_1_5_shape(tmp_path, monkeypatch):
    folder = sd15(tmp_path / "sd15")
    base = loading.load_base_model(str(folder))
    assert base.resolution == 512
    # The architecture is what is tested: pictures of 64 pixels keep it to minutes on a CPU.
    monkeypatch.setattr(type(base), "resolution", 64)
    exemplar = Image.new("RGB", (80, 64), (200, 40, 40))
    settings = cd.CustomizeSettings(steps=2, batch=1, lr=1e-4)
    delta, figures = cd.customize(base, [exemplar], "V* vase", "V*", "vase", settings)
    # 16 cross-attention layers, K and V each: 768 x (320 x 5 + 640 x 5 + 1280 x 6) x 2, and one token of 768.
    n_weights = 768 * (320 * 5 + 640 * 5 + 1280 * 6) * 2
    assert len(delta) == 33
    assert sum(value.numel() for value in delta.values()) == n_weights + 768
    assert figures["loss"] > 0
    cd.save_delta(delta, tmp_path / "delta.safetensors", ["V*"], loading.weights_hash(folder))
    assert (tmp_path / "delta.safetensors").stat().st_size == pytest.approx(4 * (n_weights + 768), rel=0.01)

    fresh = loading.load_base_model(str(folder))
    loaded = cd.load_delta(tmp_path / "delta.safetensors")
    assert all(loaded[name].equal(delta[name]) for name in delta)
    cd.apply_delta(fresh, loaded, {"V*": "vase"})
    for one, other in zip(
        base.pipeline.unet.state_dict().values(), fresh.pipeline.unet.state_dict().values(), strict=True
    ):
        assert one.equal(other)
    use_fast_solver(fresh)
    out = fresh.pipeline("a V* vase", height=64, width=64, num_inference_steps=2, output_type="pil").images
    assert out[0].size == (64, 64)
    with pytest.raises(InvalidValue, match="do not fit base model"):
        cd.apply_delta(loading.load_base_model("icon-sd"), loaded, "V*", "vase")
