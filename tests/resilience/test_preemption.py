"""Tests of stop requests: with several real processes, all stop at the same call."""

from __future__ import annotations

import signal

import pytest

from aimv2_jax.resilience import preemption
from tests.helpers.several import outputs_of_two

pytestmark = pytest.mark.xdist_group("processes")

CALLS = """
import os, signal, sys, time
from aimv2_jax.config.schema import ProcessesConfig
from aimv2_jax.distributed import coordination
from aimv2_jax.distributed.cluster import ProcessInfo
from aimv2_jax.resilience.preemption import PreemptionHandler

index = int(sys.argv[1])
coordination.initialize(ProcessInfo(f"127.0.0.1:{sys.argv[2]}", 2, index), ProcessesConfig(60, 100, 60))
with PreemptionHandler() as preemption:
    if index:
        os.kill(os.getpid(), signal.SIGTERM)  # Before the first call, as during a slow start.
        time.sleep(1)
    coordination.barrier("first call", 60)
    calls = 1
    while not preemption.reached():
        calls += 1
        time.sleep(0.01)
        assert calls < 1000
    print("stops at call", calls, "and later", [preemption.reached() for _ in range(3)])
coordination.barrier("end", 60)
coordination.shutdown()
"""


def test_interrupt_when_it_comes_twice_at_once(monkeypatch):
    """Srun and the parent may both send it: only a later one is a second Ctrl-C."""
    clock = [10.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: clock[0])
    with preemption.PreemptionHandler() as handler:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        assert handler.reached()
        clock[0] += 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_stop_when_requested_before_the_first_call():
    """Both processes stop at the same call and at every later one: a rewind may come between the call and the save."""
    lines = [[line for line in output if "stops at" in line] for output in outputs_of_two(CALLS)]
    assert lines[0] == lines[1] and lines[0][0].endswith("and later [True, True, True]")
