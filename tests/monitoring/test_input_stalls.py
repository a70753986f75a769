"""Input stalls: advice names the slow stage and what to change, and is rate-limited."""

import pytest

from aimv2_jax.monitoring.input_stalls import InputMonitor


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def make_monitor(clock=None, **changes):
    settings = {"workers": 2, "read_threads": 32, "prefetch": 2, "builders": 2, "cores": 4} | changes
    return InputMonitor(**settings, clock=clock or Clock())


def lap(monitor, seconds, waited=0.4, steps=10):
    """Runs an interval of `steps` steps of a second, each with a batch of these stages."""
    for _ in range(steps):
        monitor.add(seconds, depth=1)
    return monitor.lap(1.0, waited)


def advice(seconds, waited=0.4, **changes):
    monitor = make_monitor(**changes)
    lap(monitor, seconds, waited)
    return lap(monitor, seconds, waited)[1]


def test_queue_depth_is_the_mean_since_the_last_lap():
    """The depth is the mean over the batches of a lap, and None without batches."""
    monitor = make_monitor()
    for depth in (0, 1, 2, 2):
        monitor.add({}, depth)
    assert monitor.lap(1.0, 0.0) == ({"data_queue_depth": 1.25}, None)
    assert monitor.lap(None, None) == ({"data_queue_depth": None}, None)


DECODING, READING = {"read": 0.1, "decode": 1.5, "resize": 0.3}, {"read": 1.5, "decode": 0.1, "resize": 0.3}


@pytest.mark.parametrize(
    ("seconds", "changes", "words"),
    [
        (DECODING, {}, ["slowest is decode, 79%", "raise data.workers from 2 (this host has 4 cores)"]),
        (DECODING, {"workers": 4, "builders": 2}, ["slowest is decode", "all 4 cores", "--max-side", "more hosts"]),
        (READING, {}, ["slowest is read, 79%", "raise data.read_threads from 32, or data.workers from 2"]),
        (READING, {"workers": 4, "builders": 2}, ["slowest is read", "raise data.read_threads from 32"]),
        (DECODING | {"tokenise": 0.99}, {}, ["slowest is tokenise", "busy 99%"]),
        (DECODING | {"tokenise": 0.5, "transfer": 5.0}, {}, ["slowest is decode, 79%"]),
        ({"read": 0.1, "decode": 0.2}, {}, ["busy only 15%", "raise data.prefetch from 2"]),
        ({}, {}, ["busy only 0%", "raise data.prefetch from 2"]),
    ],
)
def test_advice_names_the_slow_stage_and_a_remedy(seconds, changes, words):
    """Advice for starved steps names the slowest stage and what to change."""
    text = advice(seconds, **changes)
    assert text.startswith("steps wait for data 40% of their time; ")
    for word in words:
        assert word in text


def test_advice_when_steps_do_not_wait_then_none():
    assert advice(DECODING, waited=0.01) is None and advice(DECODING, waited=None) is None


def test_no_advice_in_the_first_interval():
    """There is no advice in the first interval, when workers are starting."""
    assert lap(make_monitor(), DECODING)[1] is None


def test_advice_is_repeated_after_ten_minutes():
    """The same advice is repeated after ten minutes, and another stage is named at once."""
    clock = Clock()
    monitor = make_monitor(clock)
    lap(monitor, DECODING)
    assert "decode" in lap(monitor, DECODING)[1]
    clock.now_s += 500
    assert lap(monitor, DECODING)[1] is None
    assert "slowest is read" in lap(monitor, READING)[1]
    clock.now_s += 101
    assert "slowest is decode" in lap(monitor, DECODING)[1]


def test_lap_resets_the_seconds_of_stages():
    """Seconds of one interval do not count in the next."""
    monitor = make_monitor()
    lap(monitor, DECODING)
    lap(monitor, {"decode": 100.0}, waited=0.0)
    assert "slowest is read" in lap(monitor, READING)[1]


def test_slow_transfer_is_named():
    """A slow transfer is named, and the batch builders are not."""
    clock = Clock()
    monitor = make_monitor(clock)
    lap(monitor, READING)
    with monitor.transferring():
        clock.now_s += 1.9
    assert lap(monitor, READING, waited=0.01)[1] is None
    with monitor.transferring():
        clock.now_s += 3
    assert lap(monitor, READING, waited=0.01)[1].startswith("steps wait 30% of their time for the transfer of batches")
    with monitor.transferring():
        clock.now_s += 3
    assert "slowest is read, 79%" in lap(monitor, READING)[1]
