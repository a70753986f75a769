"""Where the time of a batch goes."""

from aimv2_jax.data import clock


def test_clock_when_stages_come_again_then_each_has_the_time_since_the_stage_before(monkeypatch):
    now = iter([10.0, 11.0, 13.0, 17.0, 18.0])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    stages = clock.StageClock()
    for stage in ("read", "decode", "read", "decode"):
        stages.lap(stage)
    assert stages.seconds == {"read": 1 + 4, "decode": 2 + 1}
