"""Probes an encoder on the sets of the paper's Table B1 that lie under one folder, and on others.

    python -m aimv2_jax.eval.suite --checkpoint SPEC --data ROOT --output DIR
    python -m aimv2_jax.eval.suite --checkpoint WORKDIR --data ROOT --output DIR --protocol quick --follow

SPEC is as for aimv2_jax.eval.probes. ROOT has a folder NAME for each set, with the datasets NAME/train and NAME/test
that aimv2_jax.prepare wrote. NAME is one of imagenet, inaturalist18, cifar10, cifar100, food101, dtd, pets, cars,
camelyon17, pcam, rxrx1, eurosat, fmow, infograph; or of another set, whose NAME/set.json may be {} or have the keys

title      its name in the table (default: NAME)
label      the label to predict (default: the only one, or class)
without    excluded values of the label, a list
classes    names of the classes for zero-shot: a file, or imagenet, as --classes of aimv2_jax.eval.zeroshot
templates  a file of templates, or imagenet or simple

attentive  the paper's attentive probe (--protocol paper), or the quick one, as aimv2_jax.eval.probes
linear     the quick linear probe on the mean of the patches
knn        DINO's protocol on that mean: cosine, temperature 0.07, the best of 10, 20, 100, 200 neighbours on the test
zeroshot   for a model with a text tower

DIR gets table.json, table.md, table.png, and a file for each probe of each set. After an interruption, the same command
goes on: a finished probe does not run again. The probes of a set share one pass over its images, unless the protocol
augments them. A set that cannot be used is named, the others run, and the command ends with code 2. Sets of Table B1
that are missing are named with where they come from and the commands that prepare them.

--follow probes each checkpoint of the run WORKDIR as it appears, into DIR/STEP, and draws DIR/steps.png; it ends after
the run's last step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from aimv2_jax.allocator import keep_freed_memory
from aimv2_jax.checkpoint.checkpointer import CheckpointReader
from aimv2_jax.checkpoint.metadata import DamagedStep
from aimv2_jax.cli import Parser, make_output_folder, positive
from aimv2_jax.console import print_line
from aimv2_jax.errors import EXIT_FINISHED, EXIT_USER, UserError, cli_main
from aimv2_jax.eval.cli import add_encoder
from aimv2_jax.eval.probes.flags import (
    RANDOM,
    add_like,
    add_probe_settings,
    check_cache,
    check_flags,
    open_encoder,
    probe_config,
    reference_config,
)
from aimv2_jax.eval.probes.protocol import QUICK, notes_text
from aimv2_jax.eval.suite.catalogue import Catalogue, find_sets
from aimv2_jax.eval.suite.evaluate import PROBES, SuiteModel
from aimv2_jax.eval.suite.figure import steps_figure
from aimv2_jax.eval.suite.follow import new_steps
from aimv2_jax.eval.suite.run import TABLE_FILE, SuiteConfig, run_suite, write_figure
from aimv2_jax.platforms import skip_absent_tpu
from aimv2_jax.pretrained.dual_encoder import load_dual_encoder
from aimv2_jax.pretrained.source import has_both_towers
from aimv2_jax.storage.files import atomic_write


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses and checks the command line."""
    summary, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python -m aimv2_jax.eval.suite", description=summary, epilog=epilog)
    add_encoder(parser)
    add_like(parser)
    add = parser.add_argument
    add("--data", required=True, type=Path, metavar="ROOT", help="folder of the sets, see below")
    add("--output", required=True, type=Path, metavar="DIR", help="folder for the results")
    add("--protocol", choices=("paper", "quick"), default="paper", help="of the attentive probe (default %(default)s)")
    add("--probes", type=_probes, default=PROBES, metavar="A,B", help=f"default {','.join(PROBES)}")
    add_probe_settings(parser)
    add("--follow", action="store_true", help="probe each checkpoint of the run as it appears")
    add("--poll", type=positive, default=30, metavar="SECONDS", help="between looks at the run (default %(default)s)")
    flags = parser.parse_args(arguments)
    check_flags(parser, flags)
    if flags.follow and flags.checkpoint == RANDOM:
        parser.error("--follow needs the --workdir of a run as --checkpoint")
    return flags


def _probes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in PROBES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(PROBES)}")
    return tuple(probe for probe in PROBES if probe in names)


def suite_config(flags: argparse.Namespace) -> SuiteConfig:
    """The settings among the flags, those given changing both heads."""
    references = [reference_config(flags.protocol, imagenet) for imagenet in (False, True)]
    attentive, attentive_imagenet = (probe_config(flags, reference) for reference in references)
    linear = probe_config(flags, dataclasses.replace(QUICK, kind="linear"))
    return SuiteConfig(
        flags.data, flags.probes, attentive, references[0], attentive_imagenet, references[1], linear
    )  # fmt: skip


def open_model(flags: argparse.Namespace, config: SuiteConfig) -> SuiteModel:
    """Opens the encoder of the flags, with its text tower if it has one and zero-shot figures are wanted."""
    encoder = open_encoder(flags, config.attentive)
    zeroshot = "zeroshot" in config.probes and flags.checkpoint != RANDOM and encoder.spec.area is None
    if not zeroshot or not has_both_towers(flags.checkpoint):
        return SuiteModel(encoder, None)
    dual = load_dual_encoder(flags.checkpoint, flags.dtype, flags.image_size, flags.heads, flags.weights)
    return SuiteModel(encoder, dual)


def follow_run(flags: argparse.Namespace, config: SuiteConfig, catalogue: Catalogue) -> bool:
    """Probes each checkpoint of the run; True if no set was refused."""
    workdir = flags.checkpoint
    before = flags.output.glob(f"*/{TABLE_FILE}")  # Their checkpoints may be gone.
    tables = {int(file.parent.name): json.loads(file.read_bytes()) for file in before if file.parent.name.isdecimal()}
    for step in new_steps(workdir, flags.poll):
        try:
            model = open_model(argparse.Namespace(**vars(flags) | {"checkpoint": f"{workdir}:{step}"}), config)
        except UserError as error:
            if step in CheckpointReader(workdir).steps() and not isinstance(error, DamagedStep):
                raise
            print_line(f"step {step} is not probed: {error}")  # The run has deleted it, or it is damaged.
            continue
        print_line(f"step {step}")
        tables[step] = run_suite(config, catalogue, model, flags.output / str(step))
        write_figure(flags.output / "steps.png", steps_figure(workdir, tables))
        steps = {str(step): tree["sets"] for step, tree in tables.items()}
        atomic_write(flags.output / "steps.json", (json.dumps(steps, indent=1) + "\n").encode())
    return not any(entry["errors"] for tree in tables.values() for entry in tree["sets"])


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    keep_freed_memory()
    flags = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    config = suite_config(flags)
    check_cache(config.attentive)
    catalogue = find_sets(flags.data)
    make_output_folder(flags.output)
    if flags.follow:
        return EXIT_FINISHED if follow_run(flags, config, catalogue) else EXIT_USER
    model = open_model(flags, config)
    tree = run_suite(config, catalogue, model, flags.output)
    print_line(notes_text(tree["protocol"]))
    print_line(f"wrote {flags.output / TABLE_FILE}, table.md and table.png")
    return EXIT_USER if any(entry["errors"] for entry in tree["sets"]) else EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
