"""Versions come from what is installed, and from the first place where Python finds it."""

from __future__ import annotations

import numpy

from aimv2_jax.versions import installed_versions


def test_versions_of_installed_and_absent_packages(tmp_path, monkeypatch):
    """A package that lies before the installed one in the path counts, with its own version."""
    folder = tmp_path / "ftfy-0.0.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: ftfy\nVersion: 0.0.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    versions = installed_versions()
    assert versions["numpy"] == numpy.__version__
    assert versions["ftfy"] == "0.0.1"
    assert versions["python"].count(".") == 1
    assert all(versions.values())
