"""Compiles a run's train step for described TPUs, without hardware, and predicts memory, time and MFU.

python -m aimv2_jax.aot --config=experiments/pretrain.py:large --topology=v5e:16x16
python -m aimv2_jax.aot --config=experiments/pretrain.py:large --choose --chips=v6e:64 --price=2.70
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from aimv2_jax.aot.choose import choice_lines, choose, parse_chips
from aimv2_jax.aot.predict import predict_step
from aimv2_jax.aot.prediction import Figures, Prediction, Refusal
from aimv2_jax.aot.report import report_lines
from aimv2_jax.aot.topology import Topology, parse_topology, require_libtpu
from aimv2_jax.cli import Parser, check_output, positive, positive_number, split_overrides
from aimv2_jax.config.load import load_config
from aimv2_jax.config.schema import Config
from aimv2_jax.console import print_line
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main
from aimv2_jax.storage.files import atomic_write
from aimv2_jax.version import warn_of_versions

Configure = Callable[[Mapping[str, str]], Config]
"""Builds the config with further keys, given with their text."""

_EPILOG = """\
Any key of the config can be set: --config.mesh.fsdp=32 --config.train.reduce_dtype=bfloat16.
The default compiles the whole step up to its schedule (memory, collectives), and a proxy with two layers of each kind
("proxy" in the tables) with code generation (cycles). --full generates the code of the whole step: many minutes.
--choose compiles candidates of mesh, passes over the batch and recomputation, and ranks them by chip-hours. Keys that
are set (mesh.fsdp, mesh.data, train.microbatches, model.remat, model.decoder.remat) stay as they are.
exit codes: 0 reported, even if the step does not compile; 1 internal error; 2 user error
"""


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m aimv2_jax.aot", description=__doc__.split("\n")[0], epilog=_EPILOG)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="the experiment")
    add("--topology", metavar="CHIP:SHAPE", help="v5e:16x16, v5p:4x4x16, v6e:16x16, ...")
    add("--choose", action="store_true", help="compile candidates for --chips, and rank them by cost")
    add("--chips", metavar="CHIP:N", help="with --choose: a chip and the number of them in a slice, or their shape")
    add("--candidates", type=positive, default=8, metavar="N", help="with --choose: compile at most N (default 8)")
    add("--price", type=positive_number, metavar="P", help="of a chip-hour: also report what the run costs")
    add("--slices", type=positive, default=1, metavar="N", help="number of slices, joined by the data-centre network")
    add("--area", type=positive, metavar="A", help="one of data.areas (default: the largest)")
    add("--full", action="store_true", help="generate the code of the whole step, not of a shallow proxy")
    add("--breakdown", action="store_true", help="show the cycles by part of the model")
    add("--no-xla-attention", action="store_true", help="leave out the figures with XLA attention")
    add("--json", metavar="FILE", help="also write the figures (with --choose: of the first candidate) to this file")
    rest, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    flags = parser.parse_args(rest)
    if flags.json:
        check_output(Path(flags.json), ".json", "--json")
    if flags.choose != bool(flags.chips):
        parser.error("--choose and --chips go together")
    if not flags.choose and not flags.topology:
        parser.error("the following arguments are required: --topology, or --choose and --chips")
    topology = (
        parse_chips(flags.chips, flags.topology, flags.slices)
        if flags.choose
        else parse_topology(flags.topology, flags.slices)
    )
    slices = {"mesh.slices": str(topology.slices)} if topology.slices > 1 else {}

    def configure(changes: Mapping[str, str]) -> Config:
        return at_one_area(load_config(flags.config, [*slices.items(), *overrides, *changes.items()]), flags.area)

    configure({})  # The config's own errors come before those of the compiler.
    require_libtpu()
    warn_of_versions()
    run = _choose if flags.choose else _predict
    prediction = run(flags, topology, configure, dict(overrides))
    if flags.json:
        atomic_write(flags.json, (json.dumps(prediction.to_json(), indent=1) + "\n").encode())
    return EXIT_FINISHED


def _predict(
    flags: argparse.Namespace, topology: Topology, configure: Configure, overrides: dict[str, str]
) -> Prediction:
    """Predicts the step of the config, and prints the report."""
    config = configure({})
    outcome = predict_step(config, topology, flags.full)
    xla_attention = None
    if not flags.no_xla_attention and config.model.attention != "xla":
        with_xla = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="xla"))
        xla_attention = predict_step(with_xla, topology, full=False)
    prediction = _prediction(flags, topology, config, overrides, outcome, xla_attention)
    print("\n".join(report_lines(prediction, topology.chip, flags.breakdown, flags.price)))
    return prediction


def _choose(
    flags: argparse.Namespace, topology: Topology, configure: Configure, overrides: dict[str, str]
) -> Prediction:
    """Compiles and ranks candidates, prints their table, and returns the prediction of the first."""
    choices = choose(configure, topology, overrides, flags.candidates, flags.full, print_line)
    print("\n".join(["", *choice_lines(choices, topology, flags.config, overrides, flags.price, flags.area)]))
    changes, outcome = choices[0].candidate.overrides, choices[0].outcome
    return _prediction(flags, topology, configure(changes), overrides | changes, outcome)


def _prediction(
    flags: argparse.Namespace,
    topology: Topology,
    config: Config,
    overrides: dict[str, str],
    outcome: Figures | Refusal,
    xla_attention: Figures | Refusal | None = None,
) -> Prediction:
    return Prediction(
        topology=topology.name,
        slices=topology.slices,
        config=flags.config,
        full=flags.full,
        area=max(config.data.areas, default=None),
        overrides=overrides,
        outcome=outcome,
        xla_attention=xla_attention,
    )


def at_one_area(config: Config, area: int | None) -> Config:
    """Reduces a native-resolution config to one area, by default the largest; returns others unchanged."""
    areas = {shape.patches: shape for shape in config.batch_shapes}
    if area is not None and (area not in areas or not config.data.areas):
        known = ", ".join(map(str, config.data.areas)) or "none: the resolution is fixed"
        raise UserError("--area is not an area of the config", area, f"Give one of data.areas ({known})")
    if not config.data.areas:
        return config
    shape = areas[area or max(areas)]
    data = dataclasses.replace(config.data, areas=(shape.patches,), batch_size=shape.examples)
    return dataclasses.replace(config, data=data)


if __name__ == "__main__":
    sys.exit(main())
