"""A fake gs://bucket on a local disk for etils and Orbax: it supports copies, but no append and no rename.

It is more lenient than a real bucket, so no test of failures may rely on it: it raises OSError where TensorFlow's file
system raises `tf.errors.OpError` (UnavailableError, FailedPreconditionError, ...; etils translates NotFoundError
alone); it keeps folders without files, which a bucket does not have; it lists at once what was written; it answers
within microseconds, and takes any number of writes of one object a second (GCS takes one).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

NAME = "gs://bucket"


def stand_in(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Redirects gs://bucket to the folder `root`, which is created."""
    from etils.epath import backend, gpath

    root.mkdir()

    def local(path):
        return str(path).replace(NAME, str(root))

    class Bucket(backend._OsPathBackend):
        def open(self, path, mode):
            if not set(mode) <= set("rwbt"):
                raise AssertionError(f"a bucket can't open files as {mode}")
            if "w" in mode:
                Path(local(path)).parent.mkdir(parents=True, exist_ok=True)  # Buckets have no folders.
            return super().open(local(path), mode)

        def copy(self, path, dst, overwrite):
            assert str(dst).startswith("gs://")
            Path(local(dst)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(local(path), local(dst))

        def rename(self, path, dst):
            raise AssertionError("a bucket can't rename")

        replace = rename

    for name in ("exists", "isdir", "listdir", "stat", "mkdir", "makedirs", "remove", "rmtree", "glob"):
        original = getattr(backend._OsPathBackend, name)
        setattr(Bucket, name, lambda self, path, *args, _call=original, **kw: _call(self, local(path), *args, **kw))
    fake = Bucket()
    chosen = gpath._get_backend

    def choose(*paths):
        return fake if any(path._uri_scheme == "gs" for path in paths) else chosen(*paths)

    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", fake)
    monkeypatch.setattr(gpath, "_get_backend", choose)
    return root


def stand_in_for_arrays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redirects array I/O of Orbax in gs://bucket to `root`; TensorStore does not use etils."""
    from orbax.checkpoint._src.path import gcs_utils

    def kvstore(path):
        assert path.startswith(NAME)
        return {"driver": "file", "path": path.replace(NAME, str(root))}

    monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", kvstore)
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
