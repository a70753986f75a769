"""Compiles a run's train step for TPUs that are not here, and predicts what it takes.

python -m aimv2_jax.aot --config=experiments/pretrain_large_224.py --topology=v5e:16x16
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from aimv2_jax.aot.compiling import compile_step
from aimv2_jax.aot.hlo import parse_module
from aimv2_jax.aot.schedule import scheduled
from aimv2_jax.aot.topology import parse_topology, require_libtpu
from aimv2_jax.config import load_config
from aimv2_jax.errors import EXIT_FINISHED, reports_user_errors
from aimv2_jax.flags import Parser, positive, split_overrides


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m aimv2_jax.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, metavar="FILE", help="an experiment")
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="such as v5e:16x16")
    parser.add_argument("--slices", type=positive, default=1, help="how many of them")
    parser.add_argument("--full", action="store_true", help="code generation of the whole step")
    rest, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    flags = parser.parse_args(rest)
    require_libtpu()
    topology = parse_topology(flags.topology, flags.slices)
    compiled = compile_step(load_config(flags.config, overrides), topology, flags.full)
    if compiled.refusal:
        print(compiled.refusal)
        return EXIT_FINISHED
    module = parse_module(compiled.text)
    cycles = sum(one.times * (one.instruction.estimated_cycles or 0) for one in scheduled(module))
    flops = compiled.program["flops_per_example"] * compiled.program["batch_size"] / topology.num_chips
    print(
        f"{cycles / 1e6:.1f} Mcycles, {flops / 1e12:.2f} TFLOP, MFU {flops / max(cycles, 1) / topology.chip.flops_per_cycle:.3f}"
    )
    print(f"HBM {compiled.hbm_bytes / 2**30:.2f} GiB, {compiled.seconds:.0f} s, {len(compiled.text)}")
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
