"""Stage timer."""

from aimv2_jax.data.loading import batch_builder


def test_clock_when_stages_come_again_then_each_has_the_time_since_the_stage_before(monkeypatch):
    now = iter([10.0, 11.0, 13.0, 17.0, 18.0])
    monkeypatch.setattr(batch_builder.time, "perf_counter", lambda: next(now))
    timer = batch_builder.StageTimer()
    for stage in ("read", "decode", "read", "decode"):
        timer.lap(stage)
    assert timer.seconds == {"read": 1 + 4, "decode": 2 + 1}
