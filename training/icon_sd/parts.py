"""The parts of icon-sd: those of Stable Diffusion, only smaller.

A CLIP tokenizer and text model, AutoencoderKL, UNet2DConditionModel and a DPM-Solver++ scheduler with v-prediction. The
classes are those of Stable Diffusion, so whatever customizes icon-sd customizes SD 1.x and 2.x.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from attrdb.ingest.customize.base_model import quiet_libraries

START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class IconSdSettings:
    """All that decides the weights. `device` and `minutes` do not: they belong to a call, not to the model."""

    size: int = 64  # pixels
    latent_channels: int = 16
    vae_channels: tuple[int, ...] = (16, 32, 64, 96)
    vae_images: int = 720_000
    vae_batch: int = 8
    vae_lr: float = 3e-4
    kl_weight: float = 2e-7  # on the sum over a latent's elements; at 3e-4 half of the channels died
    vocabulary: int = 3072
    max_tokens: int = 32
    text_width: int = 192
    text_layers: int = 3
    unet_channels: tuple[int, ...] = (96, 160)
    unet_batch: int = 64
    unet_lr: float = 5e-4
    ema: float = 0.9995
    seed: int = 0


# For tests and rehearsals: a CPU trains it in seconds.
TINY = IconSdSettings(
    size=32,
    latent_channels=4,
    vae_channels=(8, 8, 8),
    vae_images=64,
    vae_batch=4,
    vocabulary=700,
    max_tokens=32,
    text_width=32,
    text_layers=1,
    unet_channels=(32, 32),
    unet_batch=8,
)


def train_tokenizer(captions: list[str], settings: IconSdSettings, folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer (bytes, '</w>' ends a word) whose merges come from the captions."""
    if not (folder / "tokenizer_config.json").exists():
        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        bpe.normalizer = normalizers.Lowercase()
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        n_merges = settings.vocabulary - 2 * len(alphabet) - 2
        trainer = trainers.BpeTrainer(
            vocab_size=len(alphabet) * 2 + n_merges,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        )
        bpe.train_from_iterator(captions, trainer)
        merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]][:n_merges]
        tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
        vocab = {token: index for index, token in enumerate(dict.fromkeys([*tokens, START, END]))}
        tokenizer = CLIPTokenizer(
            vocab=vocab,
            merges=merges,
            bos_token=START,
            eos_token=END,
            unk_token=END,
            pad_token=END,
            model_max_length=settings.max_tokens,
        )
        tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def new_vae(settings: IconSdSettings) -> AutoencoderKL:
    """An autoencoder that begins near a linear one.

    Its residual blocks begin at zero, and its latents have nearly no noise: after 3,600 scenes it reconstructs at 15.4
    decibels; one that starts as diffusers makes it reaches 13.4. Each norm has one group: with eight groups over 16 channels,
    the last norm leaves only the signs of a plain picture's colour.
    """
    levels = len(settings.vae_channels)
    vae = AutoencoderKL(
        sample_size=settings.size,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=settings.vae_channels,
        layers_per_block=1,
        latent_channels=settings.latent_channels,
        norm_num_groups=1,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    for part in vae.modules():
        if isinstance(part, ResnetBlock2D):
            torch.nn.init.zeros_(part.conv2.weight)
            torch.nn.init.zeros_(part.conv2.bias)
    vae.quant_conv.bias.data[settings.latent_channels :] -= 5.0  # the logarithm of the variance
    return vae


def new_unet(settings: IconSdSettings) -> UNet2DConditionModel:
    levels = len(settings.unet_channels)
    return UNet2DConditionModel(
        sample_size=settings.size // 2 ** (len(settings.vae_channels) - 1),
        in_channels=settings.latent_channels,
        out_channels=settings.latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        block_out_channels=settings.unet_channels,
        layers_per_block=1,
        cross_attention_dim=settings.text_width,
        attention_head_dim=4,
    )


def new_text_encoder(tokenizer: CLIPTokenizer, settings: IconSdSettings) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.text_width,
            intermediate_size=4 * settings.text_width,
            num_hidden_layers=settings.text_layers,
            num_attention_heads=4,
            max_position_embeddings=settings.max_tokens,
            projection_dim=settings.text_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,  # the last step is noise alone, or the colour of a ground leaks into it
        timestep_spacing="trailing",
        steps_offset=1,
    )


def noise_levels() -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of signal and of noise by time step: (1000,) float32 each; their squares sum to 1."""
    alphas = new_scheduler().alphas_cumprod
    return alphas.sqrt(), (1 - alphas).sqrt()


def export(
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    figures: dict,
    out: Path,
) -> None:
    """Write the pipeline folder in fp16, and the figures as `training.json` in it; converts the parts to fp16 in place."""
    for part in (vae, unet):
        part.to(memory_format=torch.contiguous_format)  # as safetensors stores tensors
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    quiet_libraries()
    pipeline.to("cpu", torch.float16).save_pretrained(out, safe_serialization=True)
    (out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
