"""Attentive, linear and k-NN probes of a frozen encoder on a labelled dataset.

    python -m aimv2_jax.eval.probes --checkpoint SPEC --train data/train --test data/test --label coarse
    python -m aimv2_jax.eval.probes --checkpoint random --like SPEC ... --kind knn --json knn.json

SPEC is a run (WORKDIR, WORKDIR:STEP, WORKDIR:last), an export, a Hugging Face folder or a .safetensors file;
`random` is the architecture of --like with untrained parameters. --train and --test are datasets that
aimv2_jax.prepare wrote with --label NAME=FIELD.

attentive  a learned query over all patches, and a linear layer, on standardised features
linear     a linear layer on the standardised mean of the patches
knn        a vote of the train images nearest in the cosine of those means

The whole grid of learning rates and weight decays is trained at once. Its best point, or the number of neighbours, is
chosen on images split off --train, never on --test. The chosen head is then trained again on all of --train, unless
--no-refit is given. Features of the centre crop and of its mirror image are computed once and stored in --cache. With
--augment crops the encoder runs on new random crops in every epoch, so the second training takes as long as the grid.
--json writes top1, ci95 (bootstrap over test images), per_class, kind, label, best, floor (the nearest train image
by 16 x 16 pixels, on the same images) and examples.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from aimv2_jax.allocator import keep_freed_memory
from aimv2_jax.cli import Parser, non_negative, positive
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main
from aimv2_jax.eval.cli import add_encoder, add_labels, check_files, check_layer, write_json
from aimv2_jax.eval.probes.dataset import read_labelled_dataset, split
from aimv2_jax.eval.probes.knn import pixel_floor
from aimv2_jax.eval.probes.report import classification_metrics, confusion_figure, summary
from aimv2_jax.eval.probes.run import ProbeConfig, head_probe, knn_probe
from aimv2_jax.eval.probes.sweep import GRIDS
from aimv2_jax.platforms import skip_absent_tpu
from aimv2_jax.pretrained.encoder import PretrainedEncoder, encoder_of
from aimv2_jax.pretrained.source import open_weights, untrained

RANDOM = "random"


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses and checks the command line."""
    summary, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python -m aimv2_jax.eval.probes", description=summary, epilog=epilog)
    add_encoder(parser)
    add = parser.add_argument
    add("--like", metavar="SPEC", help="the encoder whose architecture --checkpoint random has")
    add("--train", required=True, metavar="DATA", help="prepared train dataset with labels")
    add("--test", required=True, metavar="DATA", help="prepared test dataset with labels")
    add_labels(parser)
    add("--kind", choices=("attentive", "linear", "knn"), help="default %(default)s")
    grid_help = "learning rates and weight decays (default %(default)s)"
    add("--grid", choices=GRIDS, help=grid_help)
    augment_help = "augmentation of train images (default %(default)s)"
    add("--augment", choices=("flip", "none", "crops"), help=augment_help)
    add("--epochs", type=positive, metavar="N", help="default %(default)s; Table A2: 100")
    add("--warmup-epochs", type=int, metavar="N", help="default %(default)s; Table A2: 5 (ImageNet), 0")
    add("--batch-size", type=positive, metavar="N", help="default %(default)s; Table A2: 1024, 512")
    add("--no-normalise", dest="normalise", action="store_false", help="do not standardise features")
    add(
        "--validation",
        type=_share,
        default=0.15,
        metavar="SHARE",
        help="share of --train for validation (default %(default)s)",
    )
    add("--no-refit", dest="refit", action="store_false", help="do not train the chosen head again on all of --train")
    add("--encoder-batch", type=positive, metavar="N", help="images per encoder batch (default: 32 of 256 patches)")
    seed_help = "seed of the split, the order and the head (default %(default)s)"
    add("--seed", type=non_negative, metavar="N", help=seed_help)
    add("--cache", type=Path, metavar="DIR", help="folder for computed features (default: not stored)")
    floor_help = "skip the floor, which decodes all images once more"
    add("--no-floor", dest="floor", action="store_false", help=floor_help)
    parser.set_defaults(**vars(ProbeConfig()))
    flags = parser.parse_args(arguments)
    if (flags.checkpoint == RANDOM) != (flags.like is not None):
        parser.error("--checkpoint random and --like go together")
    if flags.kind == "knn" and flags.augment == "crops":
        parser.error("--augment crops is for trained heads, not for knn")
    if flags.cache is not None and flags.augment == "crops":
        parser.error("--augment crops stores no features: remove --cache")
    if flags.warmup_epochs < 0:
        parser.error("--warmup-epochs is below 0")
    return flags


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1")
    return value


def probe_config(flags: argparse.Namespace) -> ProbeConfig:
    """The settings of the probe among the flags."""
    return ProbeConfig(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(ProbeConfig)})


def open_encoder(flags: argparse.Namespace) -> PretrainedEncoder:
    """Opens the encoder of the flags; `--checkpoint random` gets untrained parameters from the seed."""
    weights = open_weights(flags.like or flags.checkpoint, flags.heads, flags.weights)
    print(weights.pixel_statistics())
    if flags.checkpoint == RANDOM:
        weights = untrained(weights.spec, flags.seed)
    encoder = encoder_of(weights, flags.dtype, flags.image_size, flags.area)
    check_layer(flags.layer, encoder.spec.depth)
    if flags.augment == "crops" and encoder.spec.area is not None:
        raise UserError(
            "--augment crops makes square crops, which a native-resolution model does not use",
            flags.augment,
            "Remove it, or give --image-size",
        )
    return encoder


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    keep_freed_memory()
    flags = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    if flags.cache is not None and flags.cache.exists() and not flags.cache.is_dir():
        raise UserError("--cache is a file", str(flags.cache), "Name a folder")
    check_files(json=flags.json, confusion=flags.confusion)
    train = read_labelled_dataset(flags.train, "--train", flags.label, flags.by, flags.without)
    test = read_labelled_dataset(flags.test, "--test", flags.label, flags.by, flags.without, train.names)
    fit_idx, val_idx = split(train, flags.validation, flags.seed)
    if not len(val_idx):
        what = "--train has too few images of each class for a validation split"
        raise UserError(what, len(train), "Give a larger dataset")
    encoder = open_encoder(flags)
    probe = knn_probe if flags.kind == "knn" else head_probe
    outcome = probe(encoder, (train, test), fit_idx, val_idx, probe_config(flags))
    floor = classification_metrics(test, pixel_floor(train, test)) if flags.floor else None
    result = {
        **classification_metrics(test, outcome.predicted),
        "kind": flags.kind,
        "label": flags.label,
        "best": outcome.best,
        "floor": floor,
        "examples": {"train": len(fit_idx), "validation": len(val_idx), "test": len(test)},
        "seconds": outcome.seconds,
        "encoder": encoder.source,
    }
    print(summary(result, train.names))
    seconds = outcome.seconds
    if seconds["features"]:
        share = seconds["encoder"] / seconds["features"]
        print(
            f"features took {seconds['features']:.1f} s, {share:.0%} of it in the encoder; "
            f"the probe {seconds['probe']:.1f} s"
        )
    if flags.json is not None:
        write_json(flags.json, result)
    if flags.confusion is not None:
        heading = f"{flags.kind} probe of {flags.label}: top-1 {result['top1']:.3f}"
        note = f"{len(test)} test images. Rows are true classes, columns predicted ones."
        confusion_figure(test, outcome.predicted, heading, note).savefig(flags.confusion, dpi=110)
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
