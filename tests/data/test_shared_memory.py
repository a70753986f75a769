"""Too little shared memory for the batches of workers, as in Docker: errors before the first step and later."""

import os
import re
import subprocess
import sys

import pytest
from tiny import ROOT, tiny_config

from aimv2_jax.data import pipeline
from aimv2_jax.data.loading import workers
from aimv2_jax.data.loading.batch_builder import batch_bytes
from aimv2_jax.errors import UserError

pytestmark = pytest.mark.xdist_group("shared-memory")

BATCHES = dict(data__workers=1, data__prefetch=1, data__image_size=224, data__batch_size=64)
# Runs in its own mount namespace with a small /dev/shm.
TRAINER = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]


def main():
    from tiny import tiny_config
    from aimv2_jax.data import pipeline
    from aimv2_jax.errors import UserError

    if sys.argv[1] == "unchecked":
        pipeline.check_shared_memory = lambda *_: None
    try:
        with pipeline.training_batches(tiny_config(**{BATCHES!r}), range, 0) as batches:
            for _ in range(8):
                next(batches)
    except UserError as error:
        print(error)


if __name__ == "__main__":
    main()
"""


def test_batch_bytes_when_a_batch_is_built():
    config = tiny_config(data__batch_size=8)
    with pipeline.training_batches(config, range, 0) as batches:
        arrays = next(batches).arrays
    from_trainer = ("tokens", "token_valid", "truncated")  # The trainer makes these.
    built = sum(array.nbytes for name, array in arrays.items() if name not in from_trainer)
    assert batch_bytes(8, config.num_patches, config.model.patch_size) == built


def test_shared_memory_when_there_is_none(monkeypatch):
    monkeypatch.setattr(workers, "_SHM_DIR", "/nowhere/at/all")
    workers.check_shared_memory(1 << 60, 8, 2)


def test_shared_memory_when_it_just_suffices(monkeypatch):
    """statvfs(3) of a 64 MiB tmpfs, Docker's default, with 4 MiB used."""
    status = os.statvfs_result((4096, 4096, 16384, 15360, 15360, 1000, 1000, 1000, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: {"/dev/shm": status}[path])
    workers.check_shared_memory((10 << 20) - (1 << 16), 1, 2)  # Six batches, 60 MiB.
    with pytest.raises(UserError) as error:
        workers.check_shared_memory(10 << 20, 1, 2)
    message = str(error.value)
    assert "/dev/shm has no room for the batches of 1 data workers: '60 MiB free of 64 MiB, 60 MiB needed'" in message
    assert "--shm-size=65m" in message and "data.prefetch" in message


def run_with_small_shm(size, check, tmp_path):
    """Output of the trainer when /dev/shm is a tmpfs with these options."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    run = f"mount -t tmpfs -o {size} tmpfs /dev/shm && exec {sys.executable} {tmp_path}/trainer.py {check}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", run], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def may_mount():
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "check", "expected"),
    [
        (
            "size=20m",
            "checked",
            "has no room for the batches of 1 data workers: '20 MiB free of 20 MiB, 38 MiB needed'",
        ),
        ("size=5m", "unchecked", "died twice over the same batch: .* exit code -7 .*It is SIGBUS, .*--shm-size="),
        ("nr_inodes=16", "unchecked", "found no room in /dev/shm: 'No space left on device, .*--shm-size="),
    ],
)
def test_batches_when_shared_memory_is_small(tmp_path, size, check, expected):
    if not may_mount():
        pytest.skip("mounting a small /dev/shm needs privileges")
    output = run_with_small_shm(size, check, tmp_path)
    assert re.search(expected, output), output
