"""CI runs the suite, then the other tier's tests in their own environment; a failure of either fails CI."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers.launching import LAUNCH, run, stand_in
from tests.helpers.tiny import ROOT


def ci(tmp_path: Path, found: str = "", suite: int = 0, other: int = 0, **variables: str) -> tuple[int, list[str], str]:
    """Returns exit code, calls and output of CI if the scripts exit with these codes and find `found`."""
    launch = tmp_path / "launch"
    log = 'echo "$(basename "$0") PYTHON=${PYTHON:-} VENV=${VENV:-} OTHER=${OTHER_PYTHON:-} $*" >>log\n'
    stand_in(launch, "test.sh", f"{log}exit {suite}\n")
    stand_in(launch, "stack_tests.sh", f"{log}exit {other}\n")
    # Without arguments the fake finds this Python, with arguments `found` or nothing.
    searching = f"[ $# -gt 0 ] || {{ echo {sys.executable}; exit; }}\n{log}[ -n '{found}' ] || exit 2\necho '{found}'\n"
    stand_in(launch, "find_python.sh", searching)
    for folder in (".ci", ".venv"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    environment = {"PATH": "/usr/bin:/bin"} | variables
    done = run(["bash", tmp_path / ".ci/run"], env=environment, cwd="/")
    log = (tmp_path / "log").read_text().replace(str(tmp_path), "ROOT")
    return done.returncode, log.splitlines(), done.stdout


SUITE = "test.sh PYTHON= VENV= OTHER= "
OTHERS = "3.11" if sys.version_info >= (3, 12) else "3.13 3.12"
SEARCH = f"find_python.sh PYTHON= VENV= OTHER= {OTHERS}"
STACK = f"stack_tests.sh PYTHON={sys.executable} VENV=.venv-other OTHER=ROOT/.venv/bin/python "


@pytest.mark.parametrize(("other", "code"), [(0, 0), (1, 1), (5, 5)])
def test_ci_when_the_other_tier_is_found(other, code, tmp_path):
    done = ci(tmp_path, found=sys.executable, other=other)
    assert done[:2] == (code, [SUITE, SEARCH, STACK])


def test_ci_when_no_other_tier_is_found(tmp_path):
    code, log, output = ci(tmp_path)
    assert (code, log) == (0, [SUITE, SEARCH])
    assert output == f"CI: no Python {OTHERS} was found; the tests of the other tier are left out.\n"


def test_ci_when_the_suite_fails(tmp_path):
    assert ci(tmp_path, found=sys.executable, suite=1)[:2] == (1, [SUITE])


def test_ci_when_python_is_named(tmp_path):
    """The suite uses it; the search for the other tier ignores it."""
    code, log, _ = ci(tmp_path, found=sys.executable, PYTHON="named")
    assert (code, log) == (0, ["test.sh PYTHON=named VENV= OTHER= ", SEARCH, STACK])


def test_stack_tests_when_they_name_paths_then_all_exist():
    paths = re.findall(r"^  (tests/\S+)", (LAUNCH / "stack_tests.sh").read_text(), re.M)
    assert len(paths) > 5 and all((ROOT / path).exists() for path in paths)
