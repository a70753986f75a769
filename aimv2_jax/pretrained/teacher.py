"""The teacher of a distillation: opens the model at `distill.path`, and compares it with the config."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

from aimv2_jax.config.schema import Config, Output
from aimv2_jax.errors import UserError
from aimv2_jax.models.sizes import swiglu_hidden
from aimv2_jax.pretrained.encoder_spec import EncoderSpec
from aimv2_jax.pretrained.hf_import import is_foreign
from aimv2_jax.pretrained.init_source import SHARED_FIELDS, PretrainedWeights, check_equal, check_fields
from aimv2_jax.pretrained.source import open_weights
from aimv2_jax.train.init_from import RunWeights, WeightSource

_KEY = "distill.path"
_ENCODER_FIELDS = ("width", "depth", "heads", "hidden", "position")
_DECODER_FIELDS = ("kind", "width", "depth", "heads", "hidden")
_HEAD = {"pixels": "pixel_head/kernel", "logits": "token_head/kernel"}
_LOSS = {"pixels": "image", "logits": "text"}


def find_teacher(config: Config) -> Callable[[], WeightSource] | None:
    """A function that opens the config's teacher; None without one."""
    return partial(open_teacher, config) if config.task == "distill" else None


def open_teacher(config: Config) -> WeightSource:
    """Opens the model at `distill.path`; reads shapes and configs only.

    Raises:
      UserError: for an unreadable path; for a model of other sizes than the config's, or that sees other patches or
        another grid; for one without the decoder that the losses need.
    """
    path = config.distill.path
    source: PretrainedWeights | RunWeights
    if is_foreign(path):
        source = PretrainedWeights(path, config.distill.encoder.heads)
        _check_encoder(source.spec, config)
        their_config = None
    else:
        source = RunWeights(path, f"config {_KEY}")
        weights = open_weights(source.name)
        _check_encoder(weights.spec, config)
        their_config = weights.training and weights.training.config
    for output in config.teacher_outputs:
        _check_predicts(output, source, their_config, config)
    if config.teacher_outputs:
        _check_decoder(their_config, config)
    return source


def _check_encoder(theirs: EncoderSpec, config: Config) -> None:
    encoder = config.distill.encoder
    rows, _ = config.teacher_grid
    ours = dataclasses.replace(
        theirs,
        width=encoder.width,
        depth=encoder.depth,
        heads=encoder.heads,
        position=encoder.position,
        hidden=encoder.hidden or swiglu_hidden(encoder.width),
        patch_size=config.model.patch_size,
        image_size=rows * config.model.patch_size,
        norm_eps=config.model.norm_eps,
        pixel_mean=config.model.pixel_mean,
        pixel_std=config.model.pixel_std,
    )
    fields = {field: f"distill.encoder.{field}" for field in _ENCODER_FIELDS}
    check_fields(_KEY, theirs, ours, fields | SHARED_FIELDS)
    if ours.position == "learned" and theirs.grid != ours.grid:
        raise UserError(
            f"config {_KEY} is a teacher whose learned positions fit only its own image size",
            f"{theirs.image_size} px there, {ours.image_size} here",
            f"Set distill.image_size={theirs.image_size}",
        )


def _check_predicts(output: Output, source: WeightSource, their_config: Config | None, config: Config) -> None:
    """Raises UserError unless the teacher has a decoder that was trained to predict `output`."""
    if not any(name.startswith("decoder/") for name in source.shapes):
        raise UserError(
            f"config distill.{output} needs a teacher with a decoder, and distill.path is an encoder alone",
            config.distill.path,
            f"Set distill.{output}=0, or give a run or an export with --whole",
        )
    has_head = any(name.startswith("decoder/") and name.endswith(_HEAD[output]) for name in source.shapes)
    if not has_head or (their_config is not None and output not in their_config.outputs):
        raise UserError(
            f"config distill.{output} needs a teacher that was trained with the {_LOSS[output]} loss",
            config.distill.path,
            f"Set distill.{output}=0, or choose another teacher",
        )


def _check_decoder(their_config: Config | None, config: Config) -> None:
    assert their_config is not None, "a decoder is saved with its config"
    theirs, ours = their_config.model.decoder, config.distill.decoder
    for field in _DECODER_FIELDS:
        values = (
            getattr(decoder, field) or (swiglu_hidden(decoder.width) if field == "hidden" else None)
            for decoder in (theirs, ours)
        )
        check_equal(_KEY, f"distill.decoder.{field}", *values)
    if "logits" in config.teacher_outputs:
        for field in ("vocab_size", "text_length"):
            check_equal(_KEY, f"model.decoder.{field}", getattr(theirs, field), getattr(config.model.decoder, field))
