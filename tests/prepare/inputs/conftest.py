"""Fixtures for single small inputs."""

import contextlib
import json
import tempfile
from pathlib import Path

import pytest

from aimv2_jax.prepare.inputs import discover


@pytest.fixture
def shard(tmp_path):
    def make(data, name="00000.tar", successes=None):
        """Writes a file with `data`, optionally with a statistics file, and returns its shard."""
        path = tmp_path / name
        path.write_bytes(data)
        if successes is not None:
            (tmp_path / f"{name.partition('.')[0]}_stats.json").write_text(json.dumps({"successes": successes}))
        [found] = discover.find_shards([str(path)])
        return found

    return make


@pytest.fixture
def full_disk(monkeypatch):
    """Context in which flushes of temporary files fail, as on a full disk."""

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "TemporaryFile", lambda: Path("/dev/full").open("w+b"))  # noqa: SIM115
            yield

    return context()
