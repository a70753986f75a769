"""One small input at a time."""

import contextlib
import json
import tempfile
from pathlib import Path

import pytest

from aimv2_jax.data.inputs import discover


@pytest.fixture
def shard(tmp_path):
    def make(data, name="00000.tar", successes=None):
        """The one shard of a file with `data`, and with statistics beside it."""
        path = tmp_path / name
        path.write_bytes(data)
        if successes is not None:
            (tmp_path / f"{name.partition('.')[0]}_stats.json").write_text(json.dumps({"successes": successes}))
        [found] = discover.find([str(path)])
        return found

    return make


@pytest.fixture
def full_disk(monkeypatch):
    """A context in which the kernel refuses what temporary files flush, as on a full disk."""

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "TemporaryFile", lambda: Path("/dev/full").open("w+b"))  # noqa: SIM115
            yield

    return context()
