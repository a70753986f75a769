"""Model FLOPs of a train step, and model FLOPs utilisation (MFU).

Convention: 2 FLOPs a multiply-add, backward = 2 x forward, full attention (masks are ignored), recomputation is not
counted; norms, softmax and the optimiser are omitted.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax

from aimv2_jax.config.schema import Config, DecoderConfig, Output, TeacherDecoderConfig, TrunkConfig
from aimv2_jax.models.sizes import num_kept_tokens, swiglu_hidden
from aimv2_jax.parallel.hardware import chip_kind

Mask = Literal["full", "prefix", "causal"]


class TrunkRun(NamedTuple):
    """A trunk that runs in a train step.

    Attributes:
      trunk: its sizes.
      rows: patches and tokens of an example that pass through it.
      mask: the pairs of rows that may attend to one another.
      passes: its cost in forward passes: 3 with the backward pass, 1 without.
    """

    trunk: TrunkConfig
    rows: int
    mask: Mask
    passes: int


class ModelRun(NamedTuple):
    """A model that runs in a train step.

    Attributes:
      trunks: those with attention.
      others: multiply-adds of an example's forward pass outside of these trunks.
      passes: its cost in forward passes.
    """

    trunks: tuple[TrunkRun, ...]
    others: int
    passes: int


def model_runs(config: Config, length: int) -> tuple[ModelRun, ...]:
    """The models that run in a train step on images of `length` patches."""
    model, distill = config.model, config.distill
    if config.task == "lit":
        return _encoder_run(config, model.encoder, length, "full", passes=1), _text_tower_run(config, length)
    mask = model.encoder.attention_mask
    kept = num_kept_tokens(model.decoder.token_keep_rate, length)
    runs = (
        _encoder_run(config, model.encoder, length, mask, passes=3),
        _decoder_run(config, model.encoder, model.decoder, config.outputs, length, kept, passes=3),
    )
    if config.task == "pretrain":
        return runs
    patches = length if config.teacher_image_size is None else math.prod(config.teacher_grid)
    runs += (_encoder_run(config, distill.encoder, patches, mask, passes=1),)
    if distill.features:
        runs += (ModelRun((), length * model.encoder.width * distill.encoder.width, passes=3),)
    if distill.decoder is None:
        return runs
    outputs = config.teacher_outputs
    return *runs, _decoder_run(config, distill.encoder, distill.decoder, outputs, patches, patches, passes=1)


def flops_per_example(config: Config, length: int | None = None) -> float:
    """Model FLOPs of one example of `length` patches (those of config data.image_size), forward and backward.

    Frozen models have no backward pass.
    """
    multiply_adds = 0
    for run in model_runs(config, length or config.num_patches):
        multiply_adds += run.passes * (run.others + sum(_trunk(trunk.trunk, trunk.rows) for trunk in run.trunks))
    return 2 * multiply_adds


def _encoder_run(config: Config, encoder: TrunkConfig, patches: int, mask: Mask, passes: int) -> ModelRun:
    embedding = patches * config.patch_pixels * encoder.width
    return ModelRun((TrunkRun(encoder, patches, mask, passes),), embedding, passes)


def _decoder_run(
    config: Config,
    encoder: TrunkConfig,
    decoder: DecoderConfig | TeacherDecoderConfig,
    outputs: tuple[Output, ...],
    patches: int,
    kept: int,
    passes: int,
) -> ModelRun:
    """A decoder that receives `kept` of the patches and predicts `outputs`; if these are none, it does not run."""
    text = config.text.text_length if "logits" in outputs else 0
    # Image and text rows of each causal trunk.
    rows = {
        "joint": [(kept, text)] * bool(outputs),
        "separate": [(kept, 0)] * ("pixels" in outputs) + [(kept, text)] * ("logits" in outputs),
        "mlp": [],
    }[decoder.kind]
    others = 0
    for image_rows, text_rows in rows:
        others += image_rows * encoder.width * decoder.width
        others += text_rows * decoder.width * config.text.vocab_size
    if decoder.kind == "mlp":
        others += (patches - 1) * (encoder.width * decoder.width + decoder.depth * _mlp(decoder)) * bool(outputs)
    if "pixels" in outputs:
        others += (patches - 1) * decoder.width * config.patch_pixels
    trunks = (TrunkRun(decoder, image_rows + text_rows, "causal", passes) for image_rows, text_rows in rows)
    return ModelRun(tuple(trunks), others, passes)


def _text_tower_run(config: Config, patches: int) -> ModelRun:
    """LiT's trained part. The pooled head multiplies each patch by its query and sums them once for each head.

    The comparison of a batch's pairs is not counted: it is no part of a model, and small.
    """
    encoder, text, embed_dim = config.model.encoder, config.lit.text, config.lit.embed_dim
    others = 2 * patches * encoder.heads * encoder.width + 2 * encoder.width**2 + encoder.width * embed_dim
    others += text.width * embed_dim
    return ModelRun((TrunkRun(text, text.text_length, "causal", passes=3),), others, passes=3)


def _trunk(trunk: TrunkConfig, rows: int) -> int:
    return trunk.depth * (rows * (4 * trunk.width**2 + _mlp(trunk)) + 2 * rows**2 * trunk.width)


def _mlp(trunk: TrunkConfig) -> int:
    """Multiply-adds of a row in the SwiGLU of a block."""
    return 3 * trunk.width * (trunk.hidden or swiglu_hidden(trunk.width))


def model_flops_utilisation(config: Config, tflops_per_s: float | None, devices: list[jax.Device]) -> float | None:
    """Model TFLOP/s over the devices' bfloat16 peak; None if peak or rate are unknown or compute is not bfloat16."""
    chip = chip_kind(devices[0])
    if tflops_per_s is None or chip is None or config.model.compute_dtype != "bfloat16":
        return None
    return tflops_per_s * 1e12 / (len(devices) * chip.peak_flops)
