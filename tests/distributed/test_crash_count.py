"""Count of killed trainers since the newest checkpoint."""

from __future__ import annotations

import os
import threading

import pytest

from aimv2_jax.checkpoint.layout import FOLDER
from aimv2_jax.distributed import crash_count
from aimv2_jax.distributed.crash_count import count_kill
from aimv2_jax.storage.files import atomic_write


def test_kills_when_a_checkpoint_comes_between(tmp_path):
    assert [count_kill(tmp_path), count_kill(tmp_path)] == [1, 2]
    (tmp_path / FOLDER / "50").mkdir(parents=True)
    (tmp_path / FOLDER / "100.orbax-checkpoint-tmp-saving").mkdir()  # Not a checkpoint yet.
    assert [count_kill(tmp_path), count_kill(tmp_path), count_kill(tmp_path)] == [1, 2, 3]
    (tmp_path / FOLDER / "100").mkdir()
    assert count_kill(tmp_path) == 1


def test_kills_when_the_run_is_in_a_bucket(gcs_folder):
    """A folder counts as a step once it has a manifest; STEP-2 is a step that was saved again."""
    atomic_write(f"{gcs_folder}/{FOLDER}/50/manifest.json", b"{}")
    assert count_kill(gcs_folder) == 1
    atomic_write(f"{gcs_folder}/{FOLDER}/100/state/d/1", b"half written")
    atomic_write(f"{gcs_folder}/{FOLDER}/200/manifest.json", b"{}")
    atomic_write(f"{gcs_folder}/{FOLDER}/200/set_aside.json", b"{}")
    assert [count_kill(gcs_folder), count_kill(gcs_folder)] == [2, 3]
    atomic_write(f"{gcs_folder}/{FOLDER}/100-2/manifest.json", b"{}")
    assert count_kill(gcs_folder) == 1


def test_kills_when_the_disk_hangs(tmp_path, monkeypatch):
    """A pipe without a writer blocks its reader as a hung disk does."""
    os.mkfifo(tmp_path / crash_count.FILE)
    assert crash_count.count_kill_within(tmp_path, seconds=0.1) == 1
    [thread] = [thread for thread in threading.enumerate() if thread.name == "kills"]
    os.close(os.open(tmp_path / crash_count.FILE, os.O_WRONLY))
    thread.join()


@pytest.mark.parametrize(
    "content", ["", "[" * 100_000, "[]", '{"newest_step": 0}', '{"newest_step": 0, "kills": "many"}', "\xff"]
)
def test_kills_when_the_file_is_damaged(content, tmp_path):
    (tmp_path / crash_count.FILE).write_text(content, "latin-1")
    assert [count_kill(tmp_path), count_kill(tmp_path)] == [1, 2]


def test_kills_when_the_workdir_is_gone(tmp_path):
    assert count_kill(tmp_path / "none") == 1
