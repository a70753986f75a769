"""Flags of the probe commands, and the encoder and settings that they name."""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path

from aimv2_jax.cli import non_negative, positive
from aimv2_jax.errors import UserError
from aimv2_jax.eval.cli import check_layer
from aimv2_jax.eval.probes.protocol import PAPER, PAPER_IMAGENET, QUICK, ProbeConfig
from aimv2_jax.eval.probes.sweep import GRIDS
from aimv2_jax.pretrained.encoder import PretrainedEncoder, encoder_of
from aimv2_jax.pretrained.source import open_weights, untrained

RANDOM = "random"


def add_like(parser: argparse.ArgumentParser) -> None:
    """Adds --like, which goes with `--checkpoint random`."""
    parser.add_argument("--like", metavar="SPEC", help="the encoder whose architecture --checkpoint random has")


def add_probe_settings(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ProbeConfig`, which are only in the result if they are given."""
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    add("--grid", choices=GRIDS, help=f"learning rates and weight decays (default {QUICK.grid}; paper: {PAPER.grid})")
    augment_help = f"augmentation of train images (default {QUICK.augment}; paper: {PAPER.augment})"
    add("--augment", choices=("flip", "none", "crops", "randaugment"), help=augment_help)
    add("--epochs", type=positive, metavar="N", help=f"default {QUICK.epochs}; paper: {PAPER.epochs}")
    warmup_help = f"default {QUICK.warmup_epochs}; paper: {PAPER_IMAGENET.warmup_epochs} (ImageNet), 0"
    add("--warmup-epochs", type=int, metavar="N", help=warmup_help)
    batch_help = f"default {QUICK.batch_size}; paper: {PAPER_IMAGENET.batch_size} (ImageNet), {PAPER.batch_size}"
    add("--batch-size", type=positive, metavar="N", help=batch_help)
    add("--no-normalise", dest="norm", action="store_const", const="none", help="do not standardise features")
    share_help = f"share of --train for validation (default {QUICK.validation}; paper: none)"
    add("--validation", type=_share, metavar="SHARE", help=share_help)
    refit_help = "do not train the chosen head again on all of --train"
    add("--no-refit", dest="refit", action="store_false", help=refit_help)
    add("--encoder-batch", type=positive, metavar="N", help="images per encoder batch (default: 32 of 256 patches)")
    seed_help = f"seed of the split, the order, the views and the head (default {QUICK.seed})"
    add("--seed", type=non_negative, metavar="N", help=seed_help)
    add("--cache", type=Path, metavar="DIR", help="folder for computed features (default: not stored)")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1")
    return value


def check_flags(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    """Ends with a parser's error if flags contradict each other."""
    if (flags.checkpoint == RANDOM) != (flags.like is not None):
        parser.error("--checkpoint random and --like go together")
    if getattr(flags, "warmup_epochs", 0) < 0:
        parser.error("--warmup-epochs is below 0")


def check_cache(config: ProbeConfig) -> None:
    """Raises `UserError` if the folder for features is a file."""
    if config.cache is not None and config.cache.exists() and not config.cache.is_dir():
        raise UserError("--cache is a file", str(config.cache), "Name a folder")


def reference_config(protocol: str, imagenet: bool) -> ProbeConfig:
    """The settings of `--protocol`; `imagenet` chooses the paper's column."""
    if protocol == "quick":
        return QUICK
    return PAPER_IMAGENET if imagenet else PAPER


def probe_config(flags: argparse.Namespace, reference: ProbeConfig) -> ProbeConfig:
    """The settings `reference`, changed by the flags that are given."""
    names = [field.name for field in dataclasses.fields(ProbeConfig)]
    given = {name: getattr(flags, name) for name in names if hasattr(flags, name)}
    return dataclasses.replace(reference, **given)


def open_encoder(flags: argparse.Namespace, config: ProbeConfig) -> PretrainedEncoder:
    """Opens the encoder of the flags; `--checkpoint random` gets untrained parameters from the seed."""
    weights = open_weights(flags.like or flags.checkpoint, flags.heads, flags.weights)
    print(weights.pixel_statistics())
    if flags.checkpoint == RANDOM:
        weights = untrained(weights.spec, config.seed)
    encoder = encoder_of(weights, flags.dtype, flags.image_size, flags.area)
    check_layer(config.layer, encoder.spec.depth)
    if config.random_views and encoder.spec.area is not None:
        raise UserError(
            f"--augment {config.augment} makes square crops, which a native-resolution model does not use",
            encoder.source,
            "Give --image-size",
        )
    return encoder
