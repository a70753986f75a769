"""Compiles a run's train step for TPUs that are not here, and predicts what it takes.

python -m aimv2_jax.aot --config=experiments/pretrain_large_224.py --topology=v5e:16x16
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aimv2_jax.aot.compiling import compile_step
from aimv2_jax.aot.prediction import Twin, predict, refused
from aimv2_jax.aot.table import report_lines
from aimv2_jax.aot.topology import Topology, parse_topology, require_libtpu
from aimv2_jax.aot.twin import stack_depths, twin_config
from aimv2_jax.config import Config, load_config
from aimv2_jax.errors import EXIT_FINISHED, UserError, reports_user_errors
from aimv2_jax.files import write_whole
from aimv2_jax.flags import Parser, check_output, positive, split_overrides
from aimv2_jax.versions import warn_of_versions

_EPILOG = """\
Any key of the config can be set: --config.mesh.fsdp=32 --config.train.reduce_dtype=bfloat16.
The default way compiles the whole step up to its schedule (memory, collectives), and a twin with two layers of each
kind to the end (cycles); --full compiles the whole step to the end, which takes many minutes.
exit codes: 0 reported, also where it does not compile; 1 our bug; 2 you can mend it
"""


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m aimv2_jax.aot", description=__doc__.split("\n")[0], epilog=_EPILOG)
    parser.add_argument("--config", required=True, metavar="FILE", help="an experiment")
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="v5e:16x16, v5p:4x4x16, v6e:16x16, ...")
    parser.add_argument("--slices", type=positive, default=1, metavar="N", help="so many of them, joined by a network")
    parser.add_argument("--area", type=positive, metavar="A", help="one of data.areas; the largest, unless given")
    parser.add_argument("--full", action="store_true", help="generate the code of the whole step, not of a twin")
    parser.add_argument("--breakdown", action="store_true", help="show where the cycles go by part of the model")
    parser.add_argument("--no-xla-attention", action="store_true", help="leave out the figures with XLA attention")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    rest, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    flags = parser.parse_args(rest)
    if flags.json:
        check_output(Path(flags.json), ".json", "--json")
    topology = parse_topology(flags.topology, flags.slices)
    said = dict(overrides)
    if topology.slices > 1:
        overrides = [("mesh.slices", str(topology.slices)), *overrides]
    config = at_one_area(load_config(flags.config, overrides), flags.area)
    require_libtpu()
    warn_of_versions()
    figures = {"topology": topology.name, "slices": topology.slices, "config": flags.config, "full": flags.full}
    figures |= {"area": max(config.data.areas, default=None), "overrides": said}
    figures |= run(config, topology, flags.full)
    if not flags.no_xla_attention and config.model.attention != "xla":
        with_xla = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="xla"))
        figures["xla_attention"] = run(with_xla, topology, full=False)
    print("\n".join(report_lines(figures, topology, flags.breakdown)))
    if flags.json:
        write_whole(flags.json, (json.dumps(figures, indent=1) + "\n").encode())
    return EXIT_FINISHED


def at_one_area(config: Config, area: int | None) -> Config:
    """A native-resolution config with one of its areas, the largest unless said; others as they are."""
    areas = {shape.patches: shape for shape in config.batch_shapes}
    if area is not None and (area not in areas or not config.data.areas):
        known = ", ".join(map(str, config.data.areas)) or "none: it has a fixed resolution"
        raise UserError("--area is none of the config's", area, f"Give one of data.areas ({known})")
    if not config.data.areas:
        return config
    shape = areas[area or max(areas)]
    data = dataclasses.replace(config.data, areas=(shape.patches,), batch_size=shape.examples)
    return dataclasses.replace(config, data=data)


def run(config: Config, topology: Topology, full: bool) -> dict[str, Any]:
    """Compiles a config one way or the other; its figures."""
    compiled = compile_step(config, topology, full)
    if compiled.refusal:
        return refused(compiled, topology)
    twin = None
    if not full:
        shallow = twin_config(config)
        deep = compile_step(shallow, topology, full=True)
        if deep.refusal:
            return refused(deep, topology)
        twin = Twin(deep, stack_depths(config) | stack_depths(shallow))
    return predict(config, topology, compiled, twin)


if __name__ == "__main__":
    sys.exit(main())
