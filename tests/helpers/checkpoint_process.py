"""One of several processes that save or restore a checkpoint together.

    python tests/helpers/checkpoint_process.py INDEX COUNT PORT save|restore WORKDIR FILE KEY=VALUE ...

`save` initialises a state, adds to each of its arrays the array's size, and saves it as step 1. `restore` restores
step 1. Process 0 writes all values of the state to FILE.
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
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from aimv2_jax.checkpoint.checkpointer import Checkpointer
    from aimv2_jax.distributed import coordination
    from aimv2_jax.distributed.cluster import ProcessInfo
    from aimv2_jax.train.builder import build_setup
    from tests.helpers.tiny import tiny_config

    config = tiny_config(**dict(argument.split("=", 1) for argument in sys.argv[7:]))
    coordination.initialize(ProcessInfo(f"127.0.0.1:{port}", count, index), config.processes)
    setup = build_setup(config)
    with Checkpointer(workdir, keep=1) as checkpointer:
        if task == "save":
            state = setup.init()
            add_size = jax.jit(
                lambda tree: jax.tree.map(lambda x: x + x.size, tree), out_shardings=setup.state_shardings
            )
            state = add_size(state)  # Without it, Adam's moments would be zero.
            checkpointer.save(1, state, config)
        else:
            state = checkpointer.restore(1, setup.abstract_state)
    leaves = jax.tree.leaves(multihost_utils.process_allgather(state, tiled=True))
    if index == 0:
        np.savez(file, **{f"{number:04d}": leaf for number, leaf in enumerate(leaves)})
    coordination.shutdown()


if __name__ == "__main__":
    main()
