"""One of several processes: `python tests/state_of.py INDEX COUNT PORT save|restore WORKDIR FILE KEY=VALUE ...`.

Saves a state that no other process count has computed as step 1, or restores it; and writes all of its numbers to FILE.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> None:
    index, count, port = map(int, sys.argv[1:4])
    task, workdir, file = sys.argv[4:7]
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    import jax
    import numpy as np
    from jax.experimental import multihost_utils
    from tiny import tiny_config

    from aimv2_jax.parallel import processes
    from aimv2_jax.parallel.clusters import Place
    from aimv2_jax.train.checkpoint import Checkpointer
    from aimv2_jax.train.program import build_program

    config = tiny_config(**dict(argument.split("=", 1) for argument in sys.argv[7:]))
    processes.join(Place(f"127.0.0.1:{port}", count, index), config.processes)
    program = build_program(config)
    with Checkpointer(workdir, keep=1) as checkpointer:
        if task == "save":
            state = program.init()
            spread = jax.jit(
                lambda tree: jax.tree.map(lambda x: x + x.size, tree), out_shardings=program.state_shardings
            )
            state = spread(state)  # Adam's moments are not all zero then.
            checkpointer.save(1, state, config)
        else:
            state = checkpointer.restore(1, program.abstract_state)
    leaves = jax.tree.leaves(multihost_utils.process_allgather(state, tiled=True))
    if index == 0:
        np.savez(file, **{f"{number:04d}": leaf for number, leaf in enumerate(leaves)})
    processes.leave()


if __name__ == "__main__":
    main()
