"""Tests of the classification of jax runtime errors. The texts are those of jaxlib and its plug-ins, with sources."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from aimv2_jax.errors import EXIT_HUNG, EXIT_RETRY, DeviceFailure, UserError, describe_exit
from aimv2_jax.monitoring.events import EventLog, read_events
from aimv2_jax.resilience import device_errors
from aimv2_jax.resilience.repeated_failures import RepeatedFailures

FAILURES = [
    # pytorch/xla#7138 (PJRT's texts are the same in jax: jax-ml/jax#9642)
    jax.errors.JaxRuntimeError("INTERNAL: Core halted unexpectedly: INTERNAL: Accelerator device halted prematurely"),
    # pytorch/xla#8459
    jax.errors.JaxRuntimeError("FAILED_PRECONDITION: The program continuator has halted unexpectedly."),
    # jax-ml/jax#19307
    jax.errors.JaxRuntimeError(
        "INTERNAL: external/xla/xla/service/gpu/nccl_utils.cc:216: NCCL operation async_err failed: remote process "
        "exited or there was a network error"
    ),
    # Type and text with two processes of jaxlib 0.10.2 on CPUs, one of them killed.
    ValueError(
        "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer "
        "[127.0.0.1]:8084"
    ),
]
BUGS = [
    jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Executable expected parameter 0 of size 4 but got buffer of size 8"),
    jax.errors.JaxRuntimeError("UNIMPLEMENTED: no such thing on this platform"),
    ValueError("Incompatible shapes: (3,) and (4,)"),
]


def fail(workdir, error: Exception, step: int = 7) -> None:
    with EventLog(workdir) as events, device_errors.running(lambda: step, RepeatedFailures(workdir, 0), events):
        raise error


@pytest.mark.parametrize("error", FAILURES, ids=range(len(FAILURES)))
def test_run_when_a_device_fails_twice(tmp_path, error):
    """The code is 75 the first time at a step, 4 the second time, and 75 at another step; tracebacks are recorded."""
    for code, step in ((EXIT_RETRY, 7), (EXIT_HUNG, 7), (EXIT_RETRY, 8)):
        with pytest.raises(DeviceFailure, match=f"failed at step {step}") as raised:
            fail(tmp_path, error, step)
        assert describe_exit(raised.value) == (code, f"error: {raised.value}")
    assert "Traceback" in (tmp_path / "hangs/00000007-00000-device.txt").read_text()
    events = [event for event in read_events(tmp_path) if event.kind == "device_failure"]
    assert [event.step for event in events] == [6, 6, 7] and events[0].values["status"] == str(error)


def test_events_when_a_device_fails_at_step_0(tmp_path):
    with pytest.raises(DeviceFailure, match="failed at step 0"):
        fail(tmp_path, FAILURES[0], step=0)
    assert [event.step for event in read_events(tmp_path)] == [0]


@pytest.mark.parametrize("error", BUGS, ids=range(len(BUGS)))
def test_run_when_the_program_is_wrong(tmp_path, error):
    with pytest.raises(type(error)) as raised:
        fail(tmp_path, error)
    assert raised.value is error and describe_exit(error) is None and not (tmp_path / "hangs").exists()


def test_run_when_memory_is_too_small(tmp_path):
    """A real error of the allocator."""
    message = "too little memory for step 7: 'RESOURCE_EXHAUSTED: Out of memory"
    running = device_errors.running(lambda: 7, RepeatedFailures(tmp_path, 0), EventLog(tmp_path))
    with pytest.raises(UserError, match=message) as raised, running:
        jnp.zeros(1 << 50)
    assert "train.microbatches" in str(raised.value) and not (tmp_path / "hangs").exists()


@pytest.mark.parametrize("error", FAILURES[:1] + BUGS, ids=range(1 + len(BUGS)))
def test_compiler_when_it_fails(error):
    """A bug, with any status: compiling again gives the same error."""
    with pytest.raises((RuntimeError, ValueError)) as raised, device_errors.compiling():
        raise error
    assert describe_exit(raised.value) is None
    with pytest.raises(UserError, match="too little memory for the train step"), device_errors.compiling():
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in hbm"
        )
