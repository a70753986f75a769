"""Output: in a bucket as on the disk."""

import shutil

import pytest

from aimv2_jax.data.prepare import main
from aimv2_jax.data.preparing.output import Output


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs://bucket as etils reaches it, kept in a local folder; it can copy files to itself, and rename none."""
    from etils.epath import backend, gpath

    root = tmp_path / "bucket"
    root.mkdir()

    class Bucket(backend._OsPathBackend):
        def copy(self, path, dst, overwrite):
            assert str(dst).startswith("gs://")
            shutil.copyfile(path, local(dst))

        def rename(self, path, dst):
            raise AssertionError("a bucket can't rename")

        replace = rename

    def local(path):
        return str(path).replace("gs://bucket", str(root))

    for name in ("open", "exists", "isdir", "listdir", "stat", "mkdir", "makedirs", "remove", "rmtree", "glob"):
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


FLAGS = ["--caption", "alt=json:alt", "--shard-size", "30KB", "--workers", "1"]


def prepare(tars, output, *flags):
    return main(["--input", str(tars), "--output", str(output), *FLAGS, *flags])


def test_bucket_when_it_is_the_output_then_the_same_files_as_on_the_disk(bucket, tars, tmp_path, files_of):
    assert prepare(tars, "gs://bucket/sets/one") == 0
    assert prepare(tars, tmp_path / "local") == 0
    assert files_of(bucket / "sets/one") == files_of(tmp_path / "local")


def test_bucket_when_it_fails_midway_then_one_line_and_resume_goes_on(
    bucket, tars, tmp_path, files_of, monkeypatch, capsys
):
    place, placed = Output.place.__wrapped__, []

    def failing(self, part, name):
        if len(placed) == 3:
            raise RuntimeError("503")  # Backends have kinds of their own.
        placed.append(name)
        place(self, part, name)

    from aimv2_jax.data.preparing import output

    monkeypatch.setattr(Output, "place", output._asks_bucket(failing))
    assert prepare(tars, "gs://bucket/one") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --output cannot be used: 'gs://bucket/one'") and "503" in said and "--resume" in said
    monkeypatch.setattr(Output, "place", output._asks_bucket(place))
    assert prepare(tars, "gs://bucket/one") == 2 and "not finished" in capsys.readouterr().err
    assert prepare(tars, "gs://bucket/one", "--resume") == 0
    assert prepare(tars, tmp_path / "local") == 0
    assert files_of(bucket / "one") == files_of(tmp_path / "local")
