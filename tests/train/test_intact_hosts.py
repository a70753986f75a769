"""Several processes and one folder of checkpoints: the first looks and moves, and all know the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import folders
from several import free_port

from aimv2_jax.train.checkpoint import CheckpointReader

# Tests with worker processes run one after another: several at a time would starve those that watch the clock.
pytestmark = pytest.mark.xdist_group("shared-memory")

ROOT = Path(__file__).parents[2]
PROCESS = """
import os, sys
index, port, workdir = int(sys.argv[1]), sys.argv[2], sys.argv[3]
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from aimv2_jax.config import ProcessesConfig
from aimv2_jax.errors import UserError
from aimv2_jax.parallel import processes
from aimv2_jax.parallel.clusters import Place
from aimv2_jax.train import manifest
from aimv2_jax.train.checkpoint import Checkpointer

processes.join(Place(f"127.0.0.1:{port}", 2, index), ProcessesConfig(60, 100, 60))
sharding = jax.NamedSharding(jax.make_mesh((4,), ("data",)), jax.P("data"))
saved = {step: jax.jit(lambda: {"w": jnp.arange(64.0) * step}, out_shardings=sharding)() for step in range(6)}
shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved[0])

def assert_restored(checkpointer, step, like):
    for shard in checkpointer.restore(step, shapes)["w"].addressable_shards:
        assert np.array_equal(shard.data, np.arange(64.0, dtype=np.float32)[shard.index] * like)

with Checkpointer(workdir, keep=3) as checkpointer:
    assert checkpointer.newest_intact() == (None, [])
    for step in (1, 2, 3):
        assert checkpointer.save(step, saved[step], None) is None
    assert checkpointer.set_aside_newer(2, "rewound") == [3] and checkpointer.steps() == [1, 2]
    checkpointer.save(3, saved[4], None)
    assert_restored(checkpointer, 3, 4)  # On both: none goes on before it is a step.
    processes.meet("restored", 60)
    if index == 0:
        file = max((Path(workdir) / "checkpoints/3/state/d").iterdir(), key=lambda file: file.stat().st_size)
        data = bytearray(file.read_bytes())
        data[50] ^= 1
        file.write_bytes(data)
    processes.meet("harmed", 60)
with Checkpointer(workdir, keep=3) as checkpointer:
    newest, damages = checkpointer.newest_intact()
    print(newest, checkpointer.steps(), *damages)
    assert_restored(checkpointer, 2, 2)

    def full(*_):
        raise OSError(28, os.strerror(28), "a file")

    manifest.write = full  # By process 0 alone; the other would know nothing of it.
    checkpointer.save(5, saved[5], None)
    try:
        checkpointer.wait()
    except UserError as error:
        print(error)
    assert checkpointer.steps() == [1, 2]
processes.leave()
"""


def test_steps_when_2_processes_save_set_aside_and_restore_then_they_know_the_same(tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(ROOT),
    }
    port, running = str(free_port()), []
    try:
        for index in range(2):
            command = [sys.executable, "-c", PROCESS, str(index), port, str(tmp_path)]
            with (tmp_path / f"{index}.log").open("w") as log:
                running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
        for index, one in enumerate(running):
            assert one.wait(120) == 0, (tmp_path / f"{index}.log").read_text()[-3000:]
    finally:
        for one in running:
            one.kill()
            one.wait()
    said = [(tmp_path / f"{index}.log").read_text() for index in range(2)]
    for lines in said:
        assert "2 [1, 2] the checkpoint of step 3 is damaged and was set aside as checkpoints/damaged-3-1: " in lines
        assert "could not write the checkpoint of step 5" in lines and "No space left on device" in lines
    assert folders(tmp_path) == ["1", "2", "damaged-3-1", "rewound-3-1"]
    assert CheckpointReader(tmp_path).verify(2)
