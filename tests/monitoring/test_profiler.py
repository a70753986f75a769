"""The profiler traces the requested steps only, in the folder layout of XProf."""

from __future__ import annotations

import jax
import pytest

from aimv2_jax.main import main
from aimv2_jax.monitoring.profiler import Profiler
from tests.helpers.tiny import tiny_arguments

pytestmark = pytest.mark.usefixtures("two_devices")


def steps_in(file) -> list[int]:
    """The steps whose dispatch is in a trace."""
    events = [
        event
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
    ]
    return [int(dict(event.stats)["step_num"]) for event in events if event.name == "train"]


@pytest.mark.parametrize(
    ("steps", "name", "traced"), [("(3, 6)", "steps_3_to_5", [3, 4, 5]), ("(6, 9)", "steps_6_to_8", [6, 7])]
)
def test_trace_has_the_requested_steps(tmp_path, steps, name, traced):
    """The trace has the requested steps, as far as the run goes."""
    changes = dict(train__steps=7, eval__sources={})
    assert main(tiny_arguments(tmp_path, train__profile=steps, **changes)) == 0
    [folder] = (tmp_path / "profile/plugins/profile").iterdir()
    [file] = folder.glob("*.xplane.pb")
    assert folder.name == name and steps_in(file) == traced


def test_trace_when_not_asked_for_then_never_due(tmp_path):
    profiler = Profiler(None, tmp_path)
    assert not any(profiler.due(step) for step in range(10))
    profiler.before(1)
    profiler.close()
    assert not list(tmp_path.iterdir())
