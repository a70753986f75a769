"""Syntax checks of all launch scripts by bash and shellcheck."""

import shutil

import pytest

from tests.helpers.launching import LAUNCH, run

SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_script_when_bash_reads_it_then_no_mistake(script):
    done = run(["bash", "-n", script])
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_script_when_shellcheck_reads_it_then_no_warning(script):
    done = run(["shellcheck", "--external-sources", script])
    assert done.returncode == 0, done.stdout
