"""Checkpoints of several processes: process 0 verifies and moves, and all agree on the outcome of every save."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aimv2_jax.checkpoint.checkpointer import CheckpointReader
from tests.helpers.checkpoints import folders
from tests.helpers.several import free_port

# Tests with worker processes run one at a time, since parallel ones would starve time-dependent tests.
pytestmark = pytest.mark.xdist_group("processes")

ROOT = Path(__file__).parents[2]
JOIN = """
import contextlib, os, sys, time
index, port, workdir = int(sys.argv[1]), sys.argv[2], sys.argv[3]
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from aimv2_jax.config.schema import ProcessesConfig
from aimv2_jax.errors import UserError
from aimv2_jax.distributed import coordination as processes
from aimv2_jax.distributed.cluster import ProcessInfo
from aimv2_jax.checkpoint import manifest
from aimv2_jax.checkpoint.checkpointer import Checkpointer
from tests.helpers.full_disk import files_of_at_most

processes.initialize(ProcessInfo(f"127.0.0.1:{port}", 2, index), ProcessesConfig(60, 100, 60))
sharding = jax.NamedSharding(jax.make_mesh((4,), ("data",)), jax.P("data"))
"""
AGREE = """
hashed, hash_files = [], manifest.hash_files
manifest.hash_files = lambda folder, sizes, *more: (hashed.append(list(sizes)), hash_files(folder, sizes, *more))[1]
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
    assert_restored(checkpointer, 3, 4)  # On both: neither continues before the commit.
processes.barrier("hashed", 60)
print("hashed", {file for files in hashed for file in files})
if index == 0:
    file = max((Path(workdir) / "checkpoints/3/state/d").iterdir(), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[50] ^= 1
    file.write_bytes(data)
processes.barrier("harmed", 60)
with Checkpointer(workdir, keep=3) as checkpointer:
    newest, damages = checkpointer.newest_intact()
    print(newest, checkpointer.steps(), *damages)
    assert_restored(checkpointer, 2, 2)
processes.shutdown()
"""
FAIL = """
LIMIT = 1 << 16  # Maximum file size in bytes; each device has four times as many.
state = jax.jit(lambda: {"w": jax.random.normal(jax.random.key(0), (1 << 18,))}, out_shardings=sharding)()

def failure_of(checkpointer, step, refused, limit=LIMIT):
    # Returns the failure of the save of `step`, where the processes `refused` cannot write their part.
    with files_of_at_most(limit) if index in refused else contextlib.nullcontext():
        assert checkpointer.save(step, state, None) is None
        begin_s = time.monotonic()
        while (failure := checkpointer.check_errors()) is None:
            assert time.monotonic() < begin_s + 60, "no failure was reported"
            time.sleep(0.01)
    assert f"could not write the checkpoint of step {step}," in failure.what, failure
    assert failure.value == f"process {refused[0]} on {os.uname().nodename}: File too large", failure
    return failure

def raised(call):
    try:
        call()
    except UserError as error:
        return str(error)
    raise AssertionError("nothing is raised")

checkpointer = Checkpointer(workdir, keep=9)
good = []
for step, refused in ((1, [1]), (3, [0]), (5, [0, 1])):
    failure_of(checkpointer, step, refused)
    good.append(step + 1)
    assert checkpointer.save(step + 1, state, None) is None  # Makes up for it.
    checkpointer.wait()
    assert checkpointer.check_errors() is None and checkpointer.steps() == good

def full(*_):
    raise OSError(28, os.strerror(28), "a file")

write, manifest.write = manifest.write, full  # Called on process 0 only.
assert checkpointer.save(7, state, None) is None
failure = checkpointer.save(8, state, None)  # Process 1 has not asked before, so all learn of it here.
assert "of step 7," in failure.what and "process 0 on" in failure.value and "No space left" in failure.value
assert "of step 8," in raised(checkpointer.wait)
manifest.write = write
checkpointer.save(9, state, None)
checkpointer.wait()

failure_of(checkpointer, 10, [1])
assert "of step 11," in raised(lambda: failure_of(checkpointer, 11, [1]))  # The second in a row.
checkpointer.save(12, state, None)
checkpointer.wait()
with files_of_at_most(LIMIT // 2) if index == 0 else contextlib.nullcontext():  # Process 0 cannot begin, twice.
    assert "of step 13," in raised(lambda: checkpointer.save(13, state, None))
checkpointer.close()
assert not processes.published("checkpoint 2/failed"), "the keys of a save are not deleted"
print("steps", checkpointer.steps())
processes.shutdown()
"""


def run_two(script: str, folder: Path, workdir: Path) -> list[str]:
    """The logs of two processes that run `script`."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(ROOT),
    }
    port, running = str(free_port()), []
    logs = [folder / f"{index}.log" for index in range(2)]
    try:
        for index, log in enumerate(logs):
            command = [sys.executable, "-c", JOIN + script, str(index), port, str(workdir)]
            with log.open("w") as out:
                running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out))
        for process, log in zip(running, logs):
            assert process.wait(120) == 0, log.read_text()[-3000:]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [log.read_text() for log in logs]


def test_steps_when_2_processes_save_set_aside_and_restore_then_they_know_the_same(tmp_path):
    logs = run_two(AGREE, tmp_path, tmp_path)
    for index, log in enumerate(logs):
        assert f"state/ocdbt.process_{index}/" in log and f"state/ocdbt.process_{1 - index}/" not in log
        assert ("meta/metadata" in log) == (index == 0)
        assert "2 [1, 2] the checkpoint of step 3 is damaged and was set aside as checkpoints/damaged-3-1: " in log
    assert folders(tmp_path) == ["1", "2", "damaged-3-1", "rewound-3-1"]
    CheckpointReader(tmp_path).verify(2)  # Raises if it is damaged.


def test_save_when_one_of_2_processes_cannot_write(tmp_path):
    """All learn of it in seconds, with process and reason; the next save makes up for it, a second one is raised."""
    for log in run_two(FAIL, tmp_path, tmp_path / "run"):
        assert "steps [2, 4, 6, 9, 12]" in log and "Traceback" not in log
    assert folders(tmp_path / "run") == ["12", "2", "4", "6", "9"]
