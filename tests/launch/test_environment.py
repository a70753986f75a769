"""The launch scripts' choice of Python, and the folders in which they make an environment."""

from __future__ import annotations

import ast
import os
import re
import sys
from pathlib import Path

import pytest

from tests.helpers.launching import LAUNCH, run, stand_in
from tests.helpers.tiny import ROOT

FIND = LAUNCH / "find_python.sh"
ENVIRONMENT = ["bash", "-c", ". launch/environment.sh"]


def setup_pythons() -> list[str]:
    """Returns the supported versions in setup.py, newest first."""
    found = re.search(r"^PYTHONS = (\(.*?\))", (ROOT / "setup.py").read_text(), re.M)
    return [*ast.literal_eval(found[1])][::-1]


def python(folder: Path, name: str, version: str, venv: bool = True) -> Path:
    """Makes an interpreter that reports another version; without `venv`, like Debian's without its venv package."""
    site = folder / f"site-{name}-{version}"
    site.mkdir(parents=True)
    lines = ["import sys", f"sys.version_info = {tuple(map(int, version.split('.')))}"]
    (site / "sitecustomize.py").write_text("\n".join([*lines, "" if venv else "sys.modules['ensurepip'] = None", ""]))
    return stand_in(folder, name, f'PYTHONPATH={site} exec {sys.executable} "$@"\n')


def searched(tmp_path: Path, *versions: str, **variables: object) -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr of the search, restricted to the programs of two folders."""
    environment = {"PATH": f"{tmp_path / 'programs'}:/usr/bin:/bin", "PYENV_ROOT": tmp_path / "pyenv"} | variables
    done = run(["bash", FIND, *versions], env={key: str(value) for key, value in environment.items()})
    return done.returncode, done.stdout.strip(), done.stderr


@pytest.fixture
def programs(tmp_path) -> Path:
    """Hides the machine's own Pythons, which /usr/bin may have."""
    folder = tmp_path / "programs"
    for name in ("python3", *(f"python{version}" for version in setup_pythons())):
        # Like a pyenv shim of an inactive version.
        stand_in(folder, name, "echo pyenv: command not found >&2; exit 127\n")
    return folder


def test_python_when_several_run_then_the_newest(programs, tmp_path):
    for version in setup_pythons()[::-1]:
        python(programs, f"python{version}", f"{version}.1")
        assert searched(tmp_path) == (0, f"python{version}", "")
    assert searched(tmp_path, "3.11") == (0, "python3.11", "")


def test_python_when_a_shim_fails_then_the_newest_of_pyenv(programs, tmp_path):
    python(programs, "python3.11", "3.11.7")
    for patch in ("3.12.9", "3.12.10", "3.12.1"):
        python(tmp_path / f"pyenv/versions/{patch}/bin", "python", patch)
    python(tmp_path / "pyenv/versions/3.14.0/bin", "python", "3.14.0")
    assert searched(tmp_path) == (0, f"{tmp_path}/pyenv/versions/3.12.10/bin/python", "")
    assert searched(tmp_path, "3.13", "3.11") == (0, "python3.11", "")


def test_python_when_only_python3_runs(programs, tmp_path):
    python(programs, "python3", "3.12.3")
    assert searched(tmp_path) == (0, "python3", "")


def test_python_when_the_newest_has_no_venv(programs, tmp_path):
    python(programs, "python3.13", "3.13.0", venv=False)
    python(programs, "python3.12", "3.12.0")
    assert searched(tmp_path) == (0, "python3.12", "")
    code, out, error = searched(tmp_path, PYTHON=programs / "python3.13")
    assert (code, out) == (2, "") and "has no venv. Install it (Debian: python3.13-venv)" in error


def test_python_when_none_is_supported(programs, tmp_path):
    python(programs, "python3", "3.10.13")
    code, out, error = searched(tmp_path)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith(
        "error: no Python 3.13 3.12 3.11 with venv was found. Install one of Python 3.13, 3.12, 3.11"
    )


def test_python_when_it_is_named(programs, tmp_path):
    python(programs, "python3.13", "3.13.0")
    named = python(tmp_path / "mine", "snake", "3.11.2")
    assert searched(tmp_path, PYTHON=named) == (0, str(named), "")


@pytest.mark.parametrize("version", ["3.10.13", "3.14.0", "3.15.0", "2.7.18", "3.1.1"])
def test_environment_when_python_is_unsupported(version, tmp_path):
    """The script prints one sentence before it makes or installs anything."""
    named, venv = python(tmp_path, "snake", version), tmp_path / "venv"
    done = run(ENVIRONMENT, env=os.environ | {"PYTHON": str(named), "VENV": str(venv)}, cwd=ROOT)
    minor = ".".join(version.split(".")[:2])
    message = f"error: PYTHON={named} is Python {minor}. Name one of Python 3.13, 3.12, 3.11, or leave PYTHON unset"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1 and not venv.exists()


def test_environment_when_python_does_not_run(tmp_path):
    done = run(ENVIRONMENT, env=os.environ | {"PYTHON": "nonsense", "VENV": str(tmp_path / "venv")}, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: PYTHON=nonsense does not run. Name one of Python")


def test_environment_when_the_folder_is_of_another(tmp_path):
    """The script deletes neither a user's files nor an environment that the user made."""
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\n")
    done = run(ENVIRONMENT, env=os.environ | {"PYTHON": sys.executable, "VENV": str(tmp_path)}, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path} exists and was not made by launch/")
    assert [file.name for file in tmp_path.iterdir()] == ["pyvenv.cfg"]


def test_pythons_when_setup_and_all_others_name_them():
    """All files list the same versions, each in its own format."""
    newest, oldest = setup_pythons()[0], setup_pythons()[-1]
    after = f"3.{int(newest.split('.')[1]) + 1}"
    assert f'python_requires=">={oldest},<{after}"' in (ROOT / "setup.py").read_text()
    assert re.search(r"^supported=\((.*)\)$", FIND.read_text(), re.M)[1].split() == setup_pythons()
    package = (ROOT / "aimv2_jax/__init__.py").read_text()
    assert f"not ({oldest.replace('.', ', ')}) <= sys.version_info[:2] <= ({newest.replace('.', ', ')}):" in package
    assert f"runs on Python {', '.join(setup_pythons()[::-1])};" in package
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert ast.literal_eval(re.search(r"^ +python: (\[.*\])$", workflow, re.M)[1])[::-1] == setup_pythons()
