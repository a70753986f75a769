"""The linen modules of a config, for devices of a platform."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from aimv2_jax.config.schema import (
    Config,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    Remat,
    TeacherDecoderConfig,
    TeacherEncoderConfig,
    TrunkConfig,
)
from aimv2_jax.errors import UserError
from aimv2_jax.models.aimv2 import AIMv2
from aimv2_jax.models.attention import choose_attention, takes_cudnn
from aimv2_jax.models.baselines import SeparateDecoders
from aimv2_jax.models.decoder import Decoder
from aimv2_jax.models.encoder import Encoder
from aimv2_jax.models.layers import Precision, TrunkOptions
from aimv2_jax.models.patch_mlp import PatchMLP
from aimv2_jax.models.sizes import swiglu_hidden

_PLATFORMS = {"pallas": "tpu", "cudnn": "gpu"}  # By implementation of attention.


def build_model(config: Config, platform: str) -> AIMv2:
    """Builds encoder and decoder.

    Raises:
      UserError: if the config requests attention kernels that the platform or the head size does not support.
    """
    model, decoder = config.model, config.model.decoder
    return AIMv2(
        build_encoder(config, platform),
        _decoder(config, platform, decoder, model.encoder.width, decoder.remat or model.remat),
    )


def build_encoder(config: Config, platform: str) -> Encoder:
    """Builds the encoder; raises as `build_model`."""
    return _encoder(config, platform, config.model.encoder, config.grid, config.model.remat)


def build_teacher(config: Config, platform: str) -> AIMv2:
    """Builds the teacher of a distillation, whose decoder only has what the losses need; raises as `build_model`.

    It has no backward pass, so nothing of it is recomputed.
    """
    teacher, outputs = config.distill, config.teacher_outputs
    encoder = _encoder(config, platform, teacher.encoder, config.teacher_grid, "none")
    if not outputs:
        return AIMv2(encoder, None)
    decoder = _decoder(config, platform, teacher.decoder, teacher.encoder.width, "none", "logits" in outputs)
    return AIMv2(encoder, decoder)


def _encoder(
    config: Config,
    platform: str,
    encoder: EncoderConfig | TeacherEncoderConfig,
    grid: tuple[int, int],
    remat: Remat,
) -> Encoder:
    check_kernels(config, platform)
    return Encoder(
        width=encoder.width,
        depth=encoder.depth,
        heads=encoder.heads,
        hidden=encoder.hidden or swiglu_hidden(encoder.width),
        num_patches=math.prod(grid),
        eps=config.model.norm_eps,
        position=encoder.position,
        precision=precision(config),
        options=trunk_options(config.model, encoder, platform, remat),
    )


def _decoder(
    config: Config,
    platform: str,
    decoder: DecoderConfig | TeacherDecoderConfig,
    encoder_width: int,
    remat: Remat,
    predicts_text: bool = True,
) -> Decoder | SeparateDecoders | PatchMLP:
    """Builds a decoder of any kind for the config's patches and captions."""
    shared = dict(
        eps=config.model.norm_eps,
        width=decoder.width,
        depth=decoder.depth,
        hidden=decoder.hidden or swiglu_hidden(decoder.width),
        pixels=config.patch_pixels,
        precision=precision(config),
        options=trunk_options(config.model, decoder, platform, remat),
    )

    def causal_decoder(has_text: bool) -> Decoder:
        return Decoder(
            heads=decoder.heads,
            encoder_width=encoder_width,
            vocab_size=config.model.decoder.vocab_size,
            text_length=config.model.decoder.text_length,
            has_text=has_text,
            **shared,
        )

    decoders: dict[str, Any] = {
        "joint": lambda: causal_decoder(predicts_text),
        "separate": lambda: SeparateDecoders(image=causal_decoder(False), text=causal_decoder(True)),
        "mlp": lambda: PatchMLP(**shared),
    }
    return decoders[decoder.kind]()


def precision(config: Config) -> Precision:
    """The dtypes of a config."""
    dtypes = (config.model.compute_dtype, config.model.param_dtype, config.train.reduce_dtype)
    return Precision(*map(jnp.dtype, dtypes))


def trunk_options(model: ModelConfig, trunk: TrunkConfig, platform: str, remat: Remat) -> TrunkOptions:
    """How the blocks of a trunk are run."""
    attention = choose_attention(model.attention, trunk.width // trunk.heads, platform, model.compute_dtype)
    return TrunkOptions(model.layers, remat, attention)


def check_kernels(config: Config, platform: str) -> None:
    """Raises UserError if the config requests attention kernels on an unsupported platform, head size or dtype."""
    wanted = config.model.attention
    # A CPU interprets the kernels or computes their parts by XLA, for tests.
    if wanted not in _PLATFORMS or platform == "cpu":
        return
    if platform != _PLATFORMS[wanted]:
        raise UserError(
            f"config model.attention={wanted} selects kernels that run on {_PLATFORMS[wanted].upper()}s only",
            f"the devices are of platform {platform}",
            "Set model.attention=auto",
        )
    dtype = config.model.compute_dtype
    if wanted == "cudnn" and dtype != "bfloat16":
        raise UserError(
            "config model.attention=cudnn computes in bfloat16 only",
            f"model.compute_dtype={dtype}",
            "Set model.attention=auto, or model.compute_dtype=bfloat16",
        )
    for key, trunk in config.attention_trunks.items():
        channels = trunk.width // trunk.heads
        if channels % 128 if wanted == "pallas" else not takes_cudnn(channels, dtype):
            sizes = "a multiple of 128 channels" if wanted == "pallas" else "8, 16, ... or 128 channels"
            raise UserError(
                f"config model.attention={wanted} needs {sizes} per head in {key}",
                f"width {trunk.width}, {trunk.heads} heads, {channels} channels per head",
                f"Set model.attention=auto, or change {key}.heads",
            )
