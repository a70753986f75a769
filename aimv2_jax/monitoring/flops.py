"""Model FLOPs of a train step, and model FLOPs utilisation (MFU).

Convention: 2 FLOPs a multiply-add, backward = 2 x forward, full attention (masks are ignored), recomputation is not
counted; norms, softmax and the optimiser are omitted.
"""

from __future__ import annotations

import jax

from aimv2_jax.config.schema import Config, DecoderConfig, EncoderConfig
from aimv2_jax.models.sizes import num_kept_tokens, swiglu_hidden
from aimv2_jax.parallel.hardware import chip_kind


def flops_per_example(config: Config, length: int | None = None) -> float:
    """Model FLOPs of one example of `length` patches (those of config data.image_size), forward and backward."""
    encoder, decoder, loss = config.model.encoder, config.model.decoder, config.loss
    length = length or config.num_patches
    pixels = len(config.model.pixel_mean) * config.model.patch_size**2
    multiply_adds = length * pixels * encoder.width + _trunk(encoder, length)
    for image, text in decoder_rows(config, length):
        multiply_adds += image * encoder.width * decoder.width + _trunk(decoder, image + text)
        multiply_adds += text * decoder.width * decoder.vocab_size
    if decoder.kind == "mlp":
        multiply_adds += (length - 1) * (encoder.width * decoder.width + decoder.depth * _mlp(decoder))
    if loss.image:
        multiply_adds += (length - 1) * decoder.width * pixels
    return 3 * 2 * multiply_adds


def decoder_rows(config: Config, length: int) -> list[tuple[int, int]]:
    """Image rows, of `length` patches, and text rows that pass through each causal trunk of a train step."""
    decoder, loss = config.model.decoder, config.loss
    if decoder.kind == "mlp":
        return []
    image = num_kept_tokens(decoder.token_keep_rate, length)
    text = decoder.text_length if loss.text else 0
    if decoder.kind == "joint":
        return [(image, text)]
    return [(image, 0)] * loss.image + [(image, text)] * loss.text


def _trunk(trunk: EncoderConfig | DecoderConfig, rows: int) -> int:
    return trunk.depth * (rows * (4 * trunk.width**2 + _mlp(trunk)) + 2 * rows**2 * trunk.width)


def _mlp(trunk: EncoderConfig | DecoderConfig) -> int:
    """Multiply-adds of a row in the SwiGLU of a block."""
    return 3 * trunk.width * (trunk.hidden or swiglu_hidden(trunk.width))


def model_flops_utilisation(config: Config, tflops_per_s: float | None, devices: list[jax.Device]) -> float | None:
    """Model TFLOP/s over the devices' bfloat16 peak; None if peak or rate are unknown or compute is not bfloat16."""
    chip = chip_kind(devices[0])
    if tflops_per_s is None or chip is None or config.model.compute_dtype != "bfloat16":
        return None
    return tflops_per_s * 1e12 / (len(devices) * chip.peak_flops)
