"""Compiles a run's train step for described TPUs, without hardware, and predicts memory, time and MFU.

python -m aimv2_jax.aot --config=experiments/pretrain_large_224.py --topology=v5e:16x16
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aimv2_jax.aot.compiler import compile_step
from aimv2_jax.aot.predict import Proxy, predict, refused
from aimv2_jax.aot.proxy import proxy_config, stack_depths
from aimv2_jax.aot.report import report_lines
from aimv2_jax.aot.topology import Topology, parse_topology, require_libtpu
from aimv2_jax.cli import Parser, check_output, positive, split_overrides
from aimv2_jax.config import Config, load_config
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main
from aimv2_jax.storage.files import atomic_write
from aimv2_jax.version import warn_of_versions

_EPILOG = """\
Any key of the config can be set: --config.mesh.fsdp=32 --config.train.reduce_dtype=bfloat16.
The default compiles the whole step up to its schedule (memory, collectives), and a proxy with two layers of each kind
("twin" in the tables) with code generation (cycles). --full generates the code of the whole step: many minutes.
exit codes: 0 reported, even if the step does not compile; 1 internal error; 2 user error
"""


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m aimv2_jax.aot", description=__doc__.split("\n")[0], epilog=_EPILOG)
    parser.add_argument("--config", required=True, metavar="FILE", help="the experiment")
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="v5e:16x16, v5p:4x4x16, v6e:16x16, ...")
    parser.add_argument(
        "--slices", type=positive, default=1, metavar="N", help="number of slices, joined by the data-centre network"
    )
    parser.add_argument("--area", type=positive, metavar="A", help="one of data.areas (default: the largest)")
    parser.add_argument(
        "--full", action="store_true", help="generate the code of the whole step, not of a shallow proxy"
    )
    parser.add_argument("--breakdown", action="store_true", help="show the cycles by part of the model")
    parser.add_argument("--no-xla-attention", action="store_true", help="leave out the figures with XLA attention")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    rest, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    flags = parser.parse_args(rest)
    if flags.json:
        check_output(Path(flags.json), ".json", "--json")
    topology = parse_topology(flags.topology, flags.slices)
    user_overrides = dict(overrides)
    if topology.slices > 1:
        overrides = [("mesh.slices", str(topology.slices)), *overrides]
    config = at_one_area(load_config(flags.config, overrides), flags.area)
    require_libtpu()
    warn_of_versions()
    figures = {"topology": topology.name, "slices": topology.slices, "config": flags.config, "full": flags.full}
    figures |= {"area": max(config.data.areas, default=None), "overrides": user_overrides}
    figures |= run(config, topology, flags.full)
    if not flags.no_xla_attention and config.model.attention != "xla":
        with_xla = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="xla"))
        figures["xla_attention"] = run(with_xla, topology, full=False)
    print("\n".join(report_lines(figures, topology, flags.breakdown)))
    if flags.json:
        atomic_write(flags.json, (json.dumps(figures, indent=1) + "\n").encode())
    return EXIT_FINISHED


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


def run(config: Config, topology: Topology, full: bool) -> dict[str, Any]:
    """Compiles a config, in full or with a proxy, and returns its figures."""
    compiled = compile_step(config, topology, full)
    if compiled.refusal:
        return refused(compiled, topology)
    proxy = None
    if not full:
        shallow = proxy_config(config)
        deep = compile_step(shallow, topology, full=True)
        if deep.refusal:
            return refused(deep, topology)
        proxy = Proxy(deep, stack_depths(config) | stack_depths(shallow))
    return predict(config, topology, compiled, proxy)


if __name__ == "__main__":
    sys.exit(main())
