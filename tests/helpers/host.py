"""Runs one host of several: `python tests/helpers/host.py PROCESS COUNT DEVICES PORT WORKDIR KEY=VALUE …`.

Trains a tiny model, and writes the shards of this host's devices of every global batch to
`WORKDIR/batches/STEP.PROCESS.npz`: an array for each name and device, called `NAME FIRST_ROW`. Where the run resumes
a checkpoint, host 0 writes the restored state to `WORKDIR/restored.npz`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

DEVICES = 4  # Total over all hosts, by default.
MIXTURE = {
    "photo": {"alt": 0.30, "synthetic": 0.30},
    "other": {"alt": 0.09},
    "held": {"alt": 0.28, "synthetic": 0.03},
}
CYCLE = 100
FOLDERS = {"photo": "train/photo", "other": "train/other", "held": "test/photo"}
SETTINGS = {
    "data__sources": {name: f"package:data/sample/{folder}" for name, folder in FOLDERS.items()},
    "data__mixture": MIXTURE,
    "data__batch_size": 40,
    "data__image_size": 28,
    "eval__batch_size": 16,
    "eval__max_examples": 10,
    "train__steps": 10,
    "train__log_every": 1,
    "train__save_every": 5,
    "mesh__data": DEVICES,
}


def main() -> None:
    process, count, devices, port = map(int, sys.argv[1:5])
    workdir = Path(sys.argv[5])
    changes = dict(argument.split("=", 1) for argument in sys.argv[6:])
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices // count}"
    from aimv2_jax.distributed import coordination
    from aimv2_jax.distributed.cluster import ProcessInfo
    from tests.helpers.tiny import tiny_config

    if count > 1:
        coordination.initialize(ProcessInfo(f"127.0.0.1:{port}", count, process), tiny_config().processes)
    train(workdir, process, **changes)
    coordination.shutdown()


def train(workdir: Path, process: int = 0, **changes: object) -> None:
    """Trains in this process, on all devices of jax."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from aimv2_jax.data import pipeline
    from aimv2_jax.train import trainer
    from tests.helpers.bytes_tokenizer import BytesTokenizer
    from tests.helpers.tiny import tiny_config

    config = tiny_config(**SETTINGS | changes)
    to_devices = pipeline.to_devices
    (workdir / "batches").mkdir(parents=True, exist_ok=True)

    def recording_to_devices(arrays, sharding, rows, global_rows):
        batch = to_devices(arrays, sharding, rows, global_rows)
        if "source" in batch:  # Training batches only.
            shards = {
                f"{name} {shard.index[0].start or 0}": np.asarray(shard.data)
                for name, array in batch.items()
                for shard in array.addressable_shards
            }
            first = int(shards[next(name for name in shards if name.startswith("example_index"))][0, 1])
            np.savez(workdir / "batches" / f"{first // global_rows}.{process}.npz", **shards)
        return batch

    restore_state = trainer.restore_state

    def recording_restore_state(*args):
        state, progress = restore_state(*args)
        with jax.transfer_guard("allow"):
            leaves = multihost_utils.process_allgather(jax.tree.leaves(state), tiled=True)
        if process == 0:
            np.savez(workdir / "restored.npz", *leaves)
        return state, progress

    pipeline.to_devices, trainer.restore_state = recording_to_devices, recording_restore_state
    try:
        trainer.train(config, workdir, BytesTokenizer("", config.model.decoder.text_length))
    finally:
        pipeline.to_devices, trainer.restore_state = to_devices, restore_state


if __name__ == "__main__":
    main()
