"""Linear probes of a frozen encoder for dense tasks: semantic segmentation and depth.

    python -m aimv2_jax.eval.dense --task segmentation --checkpoint SPEC --train data/train --test data/test --map mask
    python -m aimv2_jax.eval.dense --settings nyuv2 --checkpoint SPEC --train nyu/train --test nyu/test --map depth

SPEC is a run (WORKDIR, WORKDIR:STEP, WORKDIR:last), an export, a Hugging Face folder or a .safetensors file. With
--like SPEC, `random` is its architecture with untrained parameters, and `colours` the pixels of each patch in place of
features. --train and --test are datasets that aimv2_jax.prepare wrote with --image NAME=FIELD; --map is that NAME.

Features of each patch (--layers) go through BatchNorm and a linear layer, and are interpolated to pixels. An encoder of
fixed resolution is trained on random crops and tested on sliding windows; its positions are resized to them. An
encoder with an area (native resolution) sees whole images. --settings ade20k and nyuv2 are those of dinov3's published
configs; flags that are given beside them count.

Segmentation: masks are PNGs whose values are labels; --ignore and --zero-is-ignored name those that do not count. The
metrics are miou (of one confusion matrix of all pixels) with miou_ci95, accuracy, mean_accuracy and iou by class.
Depth: maps are PNGs of 16 bits. The metrics are rmse (metres), abs_rel and delta1, means over images. Intervals are
bootstrapped over test images. Samples that cannot be used are left out, counted and named.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aimv2_jax.allocator import keep_freed_memory
from aimv2_jax.cli import Parser, non_negative, positive
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main
from aimv2_jax.eval.cli import add_encoder, check_files, write_json
from aimv2_jax.eval.dense import plots
from aimv2_jax.eval.dense.dataset import DenseDataset, count_classes, read_dense_dataset
from aimv2_jax.eval.dense.features import DenseEncoder, parse_layers
from aimv2_jax.eval.dense.report import summary
from aimv2_jax.eval.dense.run import run_probe
from aimv2_jax.eval.dense.settings import CLASSES, DEPTH, DIFFERENCES, SEGMENTATION, SETTINGS, TASKS, DenseConfig
from aimv2_jax.platforms import skip_absent_tpu
from aimv2_jax.pretrained.encoder import encoder_of
from aimv2_jax.pretrained.source import open_weights, untrained
from aimv2_jax.untrusted import read_file

RANDOM, COLOURS = "random", "colours"
_MAX_CLASSES = 255  # A mask of 8 bits has 256 labels, one of them for pixels that do not count.
_MAX_NAMES_BYTES = 1 << 20
_NAMED = 5  # Classes that a message names.


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses and checks the command line."""
    summary, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python -m aimv2_jax.eval.dense", description=summary, epilog=epilog)
    parser.add_argument("--task", choices=TASKS, help="default: that of --settings")
    parser.add_argument("--settings", choices=SETTINGS, help="settings of a published probe")
    add_encoder(parser, with_layer=False)
    add = parser.add_argument
    add("--like", metavar="SPEC", help="the encoder whose architecture or patches random or colours has")
    layers_help = "last (default), four (every quarter of the depth), or blocks such as 6,12"
    add("--layers", default="last", metavar="LAYERS", help=layers_help)
    add("--train", required=True, metavar="DATA", help="prepared train dataset with maps")
    add("--test", required=True, metavar="DATA", help="prepared test dataset with maps")
    add("--map", required=True, metavar="NAME", help="name of the maps in the records")
    classes_help = "number of classes (default: one more than the greatest of the train masks)"
    add("--classes", type=positive, metavar="N", help=classes_help)
    add("--names", type=Path, metavar="FILE", help="names of the classes, a line for each")
    _add_settings(parser)
    encoder_help = "images and windows in a batch of the encoder in the test (default: 32 of 256 patches)"
    add("--encoder-batch", type=positive, metavar="N", help=encoder_help)
    add("--json", type=Path, metavar="FILE", help="write the metrics to this file")
    add("--predictions", type=Path, metavar="FILE.png", help="draw predictions of test images beside the truth")
    add("--bars", type=Path, metavar="FILE.png", help="draw the IoU of each class")
    flags = parser.parse_args(arguments)
    if flags.task is None and flags.settings is None:
        parser.error("--task or --settings is required")
    if flags.settings and flags.task not in (None, SETTINGS[flags.settings].task):
        parser.error(f"--settings {flags.settings} is for --task {SETTINGS[flags.settings].task}")
    if flags.image_size is not None and flags.area is not None:
        parser.error("--image-size, for windows, and --area, for whole images, exclude each other")
    if (flags.checkpoint in (RANDOM, COLOURS)) != (flags.like is not None):
        parser.error("--checkpoint random or colours, and --like, go together")
    if config_of(flags).task == DEPTH and (flags.classes or flags.names or flags.bars):
        parser.error("--classes, --names and --bars are for --task segmentation")
    if (flags.classes or 0) > _MAX_CLASSES:
        parser.error(f"--classes is above {_MAX_CLASSES}, the most in a mask of 8 bits")
    return flags


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that change a field of `DenseConfig`, each of that field's name; their default is None."""
    default = DenseConfig(SEGMENTATION)
    add = parser.add_argument
    add("--steps", type=positive, metavar="N", help=f"training steps (default {default.steps})")
    add("--batch-size", type=positive, metavar="N", help=f"images of a step (default {default.batch_size})")
    add("--rate", type=_positive_number, metavar="X", help=f"peak learning rate (default {default.rate})")
    add("--weight-decay", type=_number, metavar="X", help=f"default {default.weight_decay}")
    warmup_help = f"warm-up steps (default: the share {default.warmup / default.steps:g} of --steps)"
    add("--warmup", type=non_negative, metavar="N", help=warmup_help)
    scales_help = "resolutions of each test image, averaged, such as 0.75 1 1.25 (default 1)"
    add("--scales", type=_positive_number, nargs="+", metavar="X", help=scales_help)
    add("--flip-test", action="store_true", default=None, help="average over test images and their mirror images")
    range_help = "random scale of train images (default {} to {})".format(*default.scale_range)
    add("--scale-range", type=_positive_number, nargs=2, metavar=("LEAST", "MOST"), help=range_help)
    add("--colours", choices=("none", "photometric", "gamma"), help="random colours of train images (default none)")
    add("--ignore", type=non_negative, metavar="LABEL", help=f"label that does not count (default {default.ignore})")
    add("--zero-is-ignored", action="store_true", default=None, help="label 0 does not count; class c has label c + 1")
    add("--bins", type=positive, metavar="N", help=f"depths that are weighted (default {default.bins}; 1: regression)")
    depths_help = "depths in metres that count (default {} to {})".format(*default.depths)
    add("--depths", type=_positive_number, nargs=2, metavar=("LEAST", "MOST"), help=depths_help)
    units_help = f"values of a depth map for a metre (default {default.units_per_metre:g})"
    add("--units-per-metre", type=_positive_number, metavar="X", help=units_help)
    add("--mask", choices=("full", "eigen"), help="pixels of a depth map that are evaluated (default full)")
    add("--seed", type=non_negative, metavar="N", help="seed of order, crops and head (default 0)")


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < np.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def _positive_number(text: str) -> float:
    value = _number(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def config_of(flags: argparse.Namespace) -> DenseConfig:
    """The settings among the flags, over those of --settings.

    Raises:
      UserError: for a range whose ends are exchanged.
    """
    base = SETTINGS[flags.settings] if flags.settings else DenseConfig(flags.task)
    given = {field.name: getattr(flags, field.name, None) for field in dataclasses.fields(DenseConfig)}
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    config = dataclasses.replace(base, **{name: value for name, value in changes.items() if value is not None})
    for name in ("depths", "scale_range"):
        low, high = getattr(config, name)
        if low > high or (name == "depths" and low == high):
            raise UserError(f"--{name.replace('_', '-')} does not rise", f"{low} {high}", "Give the least value first")
    if flags.warmup is None:
        config = dataclasses.replace(config, warmup=round(base.warmup / base.steps * config.steps))
    if flags.image_size is not None:
        square = flags.image_size, flags.image_size
        config = dataclasses.replace(config, crop=square, window=square)
    return config


def open_encoder(flags: argparse.Namespace, config: DenseConfig) -> DenseEncoder:
    """Opens the encoder of the flags, for crops of `config.crop` or for whole images."""
    weights = open_weights(flags.like or flags.checkpoint, flags.heads, flags.weights)
    print(weights.pixel_statistics())
    if flags.checkpoint == RANDOM:
        weights = untrained(weights.spec, flags.seed or 0)
    encoder = encoder_of(weights, flags.dtype, None, flags.area)
    spec = encoder.spec
    if flags.image_size is not None:
        encoder = dataclasses.replace(encoder, spec=dataclasses.replace(spec, area=None))
    layers = parse_layers(flags.layers, spec.depth)
    dense = DenseEncoder(encoder, spec.grid, layers, flags.checkpoint == COLOURS)
    if encoder.spec.area is not None or config.crop is None:
        return dense
    rows, columns = (max(1, round(side / spec.patch_size)) for side in config.crop)
    if (rows * spec.patch_size, columns * spec.patch_size) != config.crop:
        height, width = rows * spec.patch_size, columns * spec.patch_size
        print(f"crops of {height} x {width} pixels, whole patches of {spec.patch_size}, in place of {config.crop}")
    return dense.at((rows, columns))


def read_names(file: Path | None, count: int) -> list[str]:
    """The names of the classes: the lines of `file`, or their numbers.

    Raises:
      UserError: for another number of lines than of classes, or a repeated name.
    """
    if file is None:
        return [str(index) for index in range(count)]
    try:
        lines = read_file(file, _MAX_NAMES_BYTES).decode().splitlines()
    except (OSError, ValueError) as error:
        raise UserError("--names cannot be read", str(file), "Give a text file, a line for each class") from error
    names = [line.strip() for line in lines if line.strip()]
    if len(names) != count or len(set(names)) < len(names):
        what = f"--names has {len(set(names))} different names for {count} classes"
        raise UserError(what, str(file), "Give a line for each class, in the order of their labels")
    return names


def absent_classes(train: DenseDataset, names: Sequence[str]) -> list[str]:
    """The classes that no train mask has."""
    counts = np.zeros(len(names), np.int64)
    if train.pixels is not None:
        counts[: len(train.pixels)] = train.pixels
    return [name for name, count in zip(names, counts) if not count]


def read_datasets(flags: argparse.Namespace, config: DenseConfig) -> tuple[DenseDataset, DenseDataset, int]:
    """The train and the test dataset, and the number of classes (0 for depth)."""
    if config.task == DEPTH:
        train, test = (
            read_dense_dataset(path, flag, flags.map, config)
            for path, flag in ((flags.train, "--train"), (flags.test, "--test"))
        )
        return train, test, 0
    classes = flags.classes or CLASSES.get(flags.settings or "")
    train = read_dense_dataset(flags.train, "--train", flags.map, config, classes)
    count = count_classes(train, classes)
    return train, read_dense_dataset(flags.test, "--test", flags.map, config, count), count


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    keep_freed_memory()
    flags = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    check_files(json=flags.json, predictions=flags.predictions, bars=flags.bars)
    config = config_of(flags)
    train, test, num_classes = read_datasets(flags, config)
    names = [] if config.task == DEPTH else read_names(flags.names, num_classes)
    if absent := absent_classes(train, names):
        print(f"--train has no pixel of {len(absent)} of {len(names)} classes: {', '.join(absent[:_NAMED])}")
    encoder = open_encoder(flags, config)
    if flags.settings:
        print(f"--settings {flags.settings} differs from dinov3's in: {DIFFERENCES[flags.settings]}")
    outcome = run_probe(encoder, train, test, names, config, flags.encoder_batch)
    result: dict[str, Any] = {
        **outcome.metrics,
        "task": config.task,
        "encoder": COLOURS if encoder.colours else encoder.encoder.source,
        "layers": flags.layers,
        "settings": dataclasses.asdict(config),
        "examples": {"train": len(train), "test": len(test)},
        "left_out": {"train": train.dropped, "test": test.dropped},
        "seconds": outcome.seconds,
    }
    print(summary(result))
    if flags.json is not None:
        write_json(flags.json, result)
    figure = f"RMSE {result['rmse']:.3f} m" if config.task == DEPTH else f"mIoU {result['miou']:.3f}"
    heading = f"{config.task.capitalize()} by a linear probe: {figure}"
    if flags.predictions is not None:
        plots.predictions_figure(outcome.drawn, config, heading).savefig(flags.predictions, dpi=110)
    if flags.bars is not None:
        note = f"IoU of each class over all pixels of {len(test):,} test images."
        plots.bars_figure(result["iou"], names, heading, note).savefig(flags.bars, dpi=110)
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
