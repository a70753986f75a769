"""A request to stop, between real processes: all act on the same call, whatever came before it."""

from __future__ import annotations

import signal

import pytest
from several import outputs_of_two

from aimv2_jax.train import stopping

pytestmark = pytest.mark.xdist_group("shared-memory")

CALLS = """
import os, signal, sys, time
from aimv2_jax.config import ProcessesConfig
from aimv2_jax.parallel import processes
from aimv2_jax.parallel.clusters import Place
from aimv2_jax.train.stopping import StopRequests

index = int(sys.argv[1])
processes.join(Place(f"127.0.0.1:{sys.argv[2]}", 2, index), ProcessesConfig(60, 100, 60))
with StopRequests() as requests:
    if index:
        os.kill(os.getpid(), signal.SIGTERM)  # Before the first call, as during a long start.
        time.sleep(1)
    processes.meet("first call", 60)
    calls = 1
    while not requests.reached():
        calls += 1
        time.sleep(0.01)
        assert calls < 1000
    print("stops at call", calls, "and later", [requests.reached() for _ in range(3)])
processes.meet("end", 60)
processes.leave()
"""


def test_interrupt_when_it_comes_twice_at_once(monkeypatch):
    """As from srun and from the parent: only one that comes later is a second Ctrl-C."""
    clock = [10.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    with stopping.StopRequests() as requests:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        assert requests.reached()
        clock[0] += 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_stop_when_requested_before_the_first_call():
    """Both processes stop at one call, and at every one after it: a rewind may lie between the call and the save."""
    lines = [[line for line in output if "stops at" in line] for output in outputs_of_two(CALLS)]
    assert lines[0] == lines[1] and lines[0][0].endswith("and later [True, True, True]")
