"""Attentive, linear and k-NN probes of a frozen encoder on a labelled dataset.

    python -m aimv2_jax.eval.probes --checkpoint SPEC --train data/train --test data/test --label coarse
    python -m aimv2_jax.eval.probes --checkpoint random --like SPEC ... --kind knn --json knn.json

SPEC is a run (WORKDIR, WORKDIR:STEP, WORKDIR:last), an export, a Hugging Face folder or a .safetensors file;
`random` is the architecture of --like with untrained parameters. --train and --test are datasets that
aimv2_jax.prepare wrote with --label NAME=FIELD.

attentive  a learned query over all patches, and a linear layer, on standardised features
linear     a linear layer on the standardised mean of the patches
knn        a vote of the train images nearest in the cosine of those means

--protocol quick: the whole grid of learning rates and weight decays is trained at once. Its best point, or the number
of neighbours, is chosen on images split off --train, never on --test. The chosen head is then trained again on all of
--train, unless --no-refit is given. Features of the centre crop and of its mirror image are computed once and stored
in --cache.

--protocol paper: the paper's attentive probe (Table A2; --imagenet: its column for ImageNet-1k), 100 epochs of random
crops, flips, RandAugment and colour jitter, with one pass of the encoder a step for all points of the grid. As in the
paper, the best point on --test is reported; --validation SHARE chooses it on images split off --train instead. Other
flags change single settings; what then differs from the paper is printed.

--json writes top1, ci95 (bootstrap over test images), per_class, kind, label, best, grid (top1 of every point on the
images that chose), protocol, floor (the nearest train image by 16 x 16 pixels, on the same images) and examples.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from aimv2_jax.allocator import keep_freed_memory
from aimv2_jax.cli import Parser
from aimv2_jax.errors import EXIT_FINISHED, cli_main
from aimv2_jax.eval.cli import add_encoder, add_labels, check_files, write_json
from aimv2_jax.eval.probes.dataset import read_labelled_dataset, split
from aimv2_jax.eval.probes.flags import (
    add_like,
    add_probe_settings,
    check_cache,
    check_flags,
    open_encoder,
    probe_config,
    reference_config,
)
from aimv2_jax.eval.probes.knn import pixel_floor
from aimv2_jax.eval.probes.protocol import QUICK, notes_text, protocol_notes
from aimv2_jax.eval.probes.report import classification_metrics, confusion_figure, summary
from aimv2_jax.eval.probes.run import head_probe, knn_probe
from aimv2_jax.platforms import skip_absent_tpu


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses and checks the command line."""
    summary, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python -m aimv2_jax.eval.probes", description=summary, epilog=epilog)
    add_encoder(parser)
    add = parser.add_argument
    add_like(parser)
    add("--train", required=True, metavar="DATA", help="prepared train dataset with labels")
    add("--test", required=True, metavar="DATA", help="prepared test dataset with labels")
    add_labels(parser)
    kind_help = f"default {QUICK.kind}"
    add("--kind", choices=("attentive", "linear", "knn"), default=argparse.SUPPRESS, help=kind_help)
    add("--protocol", choices=("quick", "paper"), default="quick", help="see below (default %(default)s)")
    add("--imagenet", action="store_true", help="Table A2's batch and warm-up for ImageNet-1k; with --protocol paper")
    add_probe_settings(parser)
    floor_help = "skip the floor, which decodes all images once more"
    add("--no-floor", dest="floor", action="store_false", help=floor_help)
    flags = parser.parse_args(arguments)
    check_flags(parser, flags)
    if flags.imagenet and flags.protocol != "paper":
        parser.error("--imagenet goes with --protocol paper")
    config = probe_config(flags, reference_config(flags.protocol, flags.imagenet))
    if flags.protocol == "paper" and config.kind != "attentive":
        parser.error("--protocol paper is an attentive probe: remove --kind")
    if config.kind == "knn" and config.random_views:
        parser.error(f"--augment {config.augment} is for trained heads, not for knn")
    if config.cache is not None and config.random_views:
        parser.error(f"--augment {config.augment} stores no features: remove --cache")
    return flags


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    keep_freed_memory()
    flags = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    config = probe_config(flags, reference_config(flags.protocol, flags.imagenet))
    check_cache(config)
    check_files(json=flags.json, confusion=flags.confusion)
    train = read_labelled_dataset(flags.train, "--train", flags.label, flags.by, flags.without)
    test = read_labelled_dataset(flags.test, "--test", flags.label, flags.by, flags.without, train.names)
    fit_idx, val_idx = split(train, config.validation, config.seed)
    encoder = open_encoder(flags, config)
    notes = protocol_notes(config, reference_config(flags.protocol, flags.imagenet), len(train), len(train.names))
    print(notes_text(notes))
    probe = knn_probe if config.kind == "knn" else head_probe
    outcome = probe(encoder, (train, test), fit_idx, val_idx, config)
    floor = classification_metrics(test, pixel_floor(train, test)) if flags.floor else None
    result = {
        **classification_metrics(test, outcome.predicted),
        "kind": config.kind,
        "label": flags.label,
        "best": outcome.best,
        "grid": outcome.grid,
        "protocol": notes,
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
        heading = f"{config.kind} probe of {flags.label}: top-1 {result['top1']:.3f}"
        note = f"{len(test)} test images. Rows are true classes, columns predicted ones."
        confusion_figure(test, outcome.predicted, heading, note).savefig(flags.confusion, dpi=110)
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
