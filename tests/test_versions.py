"""Tests of installed versions and version warnings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from aimv2_jax.version import installed_versions, warn_of_versions
from tests.helpers.package_metadata import install
from tests.helpers.tiny import QUICKSTART, ROOT

UNSUPPORTED = [(3, 10, 13), (3, 14, 0), (3, 15, 0), (4, 0, 0)]


def test_versions_of_installed_and_absent_packages(tmp_path, monkeypatch):
    """A package that is earlier in the import path than the installed one counts, with its own version."""
    install(tmp_path, "ftfy", "0.0.1")
    monkeypatch.syspath_prepend(tmp_path)
    versions = installed_versions()
    assert versions["numpy"] == numpy.__version__
    assert versions["ftfy"] == "0.0.1"
    assert versions["python"].count(".") == 1
    assert all(versions.values())


@pytest.mark.parametrize(
    ("jax", "violation"),
    [
        ("0.9.2", "jax 0.9.2 is not >=0.10.0,<0.13"),
        ("0.10.0", None),
        ("0.12.0.1", None),
        ("0.13.0.dev20261101", "jax 0.13.0.dev20261101 is not >=0.10.0,<0.13"),
        ("0.13.0", "jax 0.13.0 is not >=0.10.0,<0.13"),
        ("of-my-own", None),
    ],
)
def test_warning_when_jax_is_outside_of_the_bounds(jax, violation, tmp_path, monkeypatch, capsys):
    """The bounds are those for this Python in the package's metadata."""
    other = "python_version < '3.11'"
    requirements = ["jax<0.13,>=0.10.0; python_version >= '3.11'", f"jax<0.5; {other}", f"flax<0.5; {other}"]
    requirements += ["jaxtyping<0.0.1", 'jax[cuda12]<0.5; extra == "gpu"']
    install(tmp_path, "aimv2_jax", "9", *requirements)
    install(tmp_path, "jax", jax)
    monkeypatch.syspath_prepend(tmp_path)
    warn_of_versions()
    output = capsys.readouterr()
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    tested = f", the versions that aimv2_jax is tested with on Python {python}. Results may differ\n"
    assert output.out == ""
    assert output.err == (f"warning: {violation}{tested}" if violation else "")


def test_warning_when_jax_and_flax_are_outside(tmp_path, monkeypatch, capsys):
    install(tmp_path, "aimv2_jax", "9", "jax<0.3", "flax<0.4")
    monkeypatch.syspath_prepend(tmp_path)
    warn_of_versions()
    warning = capsys.readouterr().err
    versions = installed_versions()
    assert f"jax {versions['jax']} is not <0.3 and flax {versions['flax']} is not <0.4" in warning
    assert warning.count("\n") == 1


@pytest.mark.parametrize("metadata", ["absent", "without requirements"])
def test_warning_when_the_bounds_are_unknown(metadata, tmp_path, monkeypatch, capsys):
    install(tmp_path, "jax", "0.1")
    if metadata != "absent":
        install(tmp_path, "aimv2_jax", "9")
    pytest.importorskip("packaging.requirements")  # Imported before the path loses it.
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    warn_of_versions()
    assert capsys.readouterr().err == ""


def test_warning_when_a_command_starts(tmp_path):
    """The run continues after the warning; here it ends with its first user error."""
    install(tmp_path, "aimv2_jax", "9", "jax<0.3")
    arguments = [f"--config={QUICKSTART}", f"--workdir={tmp_path}/run", "--config.tokenizer.path=none.model"]
    code = f"from aimv2_jax.main import main; raise SystemExit(main({arguments!r}))"
    done = started("-c", code, path=tmp_path)
    warning, error = done.stderr.splitlines()
    assert warning.startswith("warning: jax ") and " is not <0.3," in warning
    assert error.startswith("error: ") and "none.model" in error and done.returncode == 2


def started(*words: str, path: Path, python: str = sys.executable) -> subprocess.CompletedProcess:
    environment = {"PATH": "", "PYTHONPATH": f"{path}:{ROOT}", "JAX_PLATFORMS": "cpu", "HOME": str(path)}
    return subprocess.run([python, *words], cwd=path, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("version", UNSUPPORTED)
def test_command_when_the_python_is_unsupported(version, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.version_info = {version}\n")
    done = started("-m", "aimv2_jax.main", "--help", path=tmp_path)
    message = f"aimv2_jax runs on Python 3.11, 3.12, 3.13; this is {version[0]}.{version[1]}.\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}")
    done = started("-c", "import aimv2_jax", path=tmp_path)
    assert done.returncode == 1 and done.stderr.endswith(f"ImportError: {message}")


def test_command_when_a_real_older_python_starts_it(tmp_path):
    """Python 3.7 can parse the first lines of the package, too."""
    pythons = sorted(Path.home().glob(".pyenv/versions/3.[789]*/bin/python"))
    if not pythons:
        pytest.skip("needs a Python 3.7, 3.8 or 3.9 of pyenv")
    done = started("-m", "aimv2_jax.main", "--help", path=tmp_path, python=str(pythons[0]))
    assert done.returncode == 2 and done.stderr.startswith(
        "error: aimv2_jax runs on Python 3.11, 3.12, 3.13; this is 3."
    )
