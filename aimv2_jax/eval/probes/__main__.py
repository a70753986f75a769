"""What a frozen encoder's features know of a label.

    python -m aimv2_jax.eval.probes --checkpoint SPEC --train data/train --test data/test --label coarse
    python -m aimv2_jax.eval.probes --checkpoint random --like SPEC ... --kind knn --json knn.json

SPEC is a run (WORKDIR, WORKDIR:STEP, WORKDIR:last), an export, a folder of Hugging Face's or a .safetensors file;
`random` is the architecture of --like before any training. --train and --test are data sets that
aimv2_jax.data.prepare made with --label NAME=FIELD.

attentive  a learned query over all patches, and a linear layer; each feature standardised first
linear     a linear layer on the mean of the patches, standardised
knn        the nearest train pictures by the cosine of those means vote

The grid of learning rates and weight decays is trained together. Its best point, or the number of neighbours, is chosen
on pictures that are cut from --train, never on --test; what was chosen is then trained again on all of --train, unless
--no-refit. Features of the centre crop and of its mirror image are computed once, and kept in --cache; with --augment
crops the encoder runs on new random crops in every epoch, so that training again takes as long as the grid.
--json writes top1, ci95 (bootstrap over test pictures), per_class, kind, label, best, floor (the nearest train picture
by 16 x 16 pixels, on the same pictures) and examples.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from aimv2_jax.allocator import keep_freed_memory
from aimv2_jax.errors import EXIT_FINISHED, UserError, reports_user_errors
from aimv2_jax.eval.arguments import add_encoder, check_layer
from aimv2_jax.eval.encoders import LoadedEncoder, encoder_of
from aimv2_jax.eval.probes.examples import read_examples, split
from aimv2_jax.eval.probes.methods import neighbours, trained_head
from aimv2_jax.eval.probes.neighbours import pixel_floor
from aimv2_jax.eval.probes.report import confusion_figure, figures, summary
from aimv2_jax.export.source import open_weights, untrained
from aimv2_jax.flags import Parser, check_output, positive
from aimv2_jax.platforms import skip_absent_tpu

RANDOM = "random"


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The checked flags of a command line."""
    summary, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python -m aimv2_jax.eval.probes", description=summary, epilog=epilog)
    add_encoder(parser)
    add = parser.add_argument
    add("--like", metavar="SPEC", help="with --checkpoint random: whose architecture")
    add("--train", required=True, metavar="DATA", help="a prepared set with labels")
    add("--test", required=True, metavar="DATA", help="another one")
    add("--label", required=True, metavar="NAME", help="the label to be told")
    add("--kind", choices=("attentive", "linear", "knn"), default="attentive", help="default %(default)s")
    add("--grid", choices=("small", "full"), default="small", help="rates and decays (default %(default)s)")
    add("--augment", choices=("flip", "none", "crops"), default="flip", help="of train pictures (default %(default)s)")
    add("--epochs", type=positive, default=30, metavar="N", help="default %(default)s; Table A2: 100")
    add("--warmup-epochs", type=int, default=3, metavar="N", help="default %(default)s; Table A2: 5 (ImageNet), 0")
    add("--batch-size", type=positive, default=256, metavar="N", help="default %(default)s; Table A2: 1024, 512")
    add("--no-normalise", dest="normalise", action="store_false", help="features as they are")
    add("--by", metavar="NAME", help="another label, by whose values results are told apart")
    add(
        "--without",
        type=lambda text: tuple(filter(None, text.split(","))),
        default=(),
        metavar="A,B",
        help="values of --label that are left out",
    )
    add(
        "--validation",
        type=_share,
        default=0.15,
        metavar="SHARE",
        help="of --train, to choose by (default %(default)s)",
    )
    add("--no-refit", dest="refit", action="store_false", help="the head that was chosen, trained without those")
    add("--encoder-batch", type=positive, metavar="N", help="pictures at a time (default: 32 of 256 patches)")
    add("--seed", type=_seed, default=0, metavar="N", help="of the split, the order and the head (default %(default)s)")
    add("--cache", type=Path, metavar="DIR", help="where features are kept (default: nowhere)")
    add(
        "--no-floor", dest="floor", action="store_false", help="without the floor, which decodes all pictures once more"
    )
    add("--json", type=Path, metavar="FILE", help="the figures")
    add("--confusion", type=Path, metavar="FILE.png", help="the confusion matrix")
    flags = parser.parse_args(arguments)
    if (flags.checkpoint == RANDOM) != (flags.like is not None):
        parser.error("--checkpoint random and --like go together")
    if flags.kind == "knn" and flags.augment == "crops":
        parser.error("--augment crops is for heads that are trained, not for knn")
    if flags.cache is not None and flags.augment == "crops":
        parser.error("--augment crops keeps no features: leave --cache out")
    if flags.warmup_epochs < 0:
        parser.error("--warmup-epochs is below 0")
    return flags


def _seed(text: str) -> int:
    return 0 if text == "0" else positive(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share between 0 and 1")
    return value


def open_encoder(flags: argparse.Namespace) -> LoadedEncoder:
    """The encoder of the flags; of `--checkpoint random` with fresh parameters of the seed."""
    weights = open_weights(flags.like or flags.checkpoint, flags.heads, flags.weights)
    if flags.checkpoint == RANDOM:
        weights = untrained(weights.vision, flags.seed)
    encoder = encoder_of(weights, flags.dtype, flags.image_size, flags.area)
    check_layer(flags.layer, encoder.vision.depth)
    if flags.augment == "crops" and encoder.vision.area is not None:
        raise UserError(
            "--augment crops crops squares, which a native model does not see",
            flags.augment,
            "Leave it out, or give --image-size",
        )
    return encoder


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    keep_freed_memory()
    flags = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    if flags.cache is not None and flags.cache.exists() and not flags.cache.is_dir():
        raise UserError("--cache is a file", str(flags.cache), "Name a folder")
    for path, flag, suffix in ((flags.json, "--json", ""), (flags.confusion, "--confusion", ".png")):
        if path is not None:
            check_output(path, suffix, flag)
    known = read_examples(flags.train, "--train", flags.label, flags.by, flags.without)
    asked = read_examples(flags.test, "--test", flags.label, flags.by, flags.without, known.names)
    fit, held = split(known, flags.validation, flags.seed)
    if not len(held):
        raise UserError("--train has too few pictures of each class to choose by", len(known), "Give a larger set")
    encoder = open_encoder(flags)
    flags.encoder_batch = flags.encoder_batch or encoder.batch_size
    found = (neighbours if flags.kind == "knn" else trained_head)(encoder, (known, asked), fit, held, flags)
    floor = figures(asked, pixel_floor(known, asked)) if flags.floor else None
    result = {
        **figures(asked, found.predicted),
        "kind": flags.kind,
        "label": flags.label,
        "best": found.best,
        "floor": floor,
        "examples": {"train": len(fit), "validation": len(held), "test": len(asked)},
        "seconds": found.seconds,
        "encoder": encoder.source,
    }
    print(summary(result, known.names))
    seconds = found.seconds
    if seconds["features"]:
        share = seconds["encoder"] / seconds["features"]
        print(
            f"features took {seconds['features']:.1f} s, {share:.0%} of it in the encoder; "
            f"the probe {seconds['probe']:.1f} s"
        )
    if flags.json is not None:
        flags.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if flags.confusion is not None:
        heading = f"{flags.kind} probe of {flags.label}: top-1 {result['top1']:.3f}"
        note = f"{len(asked)} test pictures. A row a true class, a column what the probe said."
        confusion_figure(asked, found.predicted, heading, note).savefig(flags.confusion, dpi=110)
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
