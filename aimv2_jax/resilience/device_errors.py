"""Classifies errors of jax's runtime: out of memory, a failed device or network, or a bug.

The text of an error begins with the name of a status (absl/status/status.h). jaxlib 0.10 and its plug-ins raise:

    INTERNAL             a TPU core halted; CUDA and NCCL errors, also those of a dead peer
    FAILED_PRECONDITION  a TPU's program halted
    UNKNOWN              gloo: a peer closed its connection (raised as a ValueError by a dispatch that waits for it)
    UNAVAILABLE, DEADLINE_EXCEEDED, CANCELLED, ABORTED   the coordination service, when another process is missing
    DATA_LOSS            a memory or transfer error
    RESOURCE_EXHAUSTED   out of memory, while compiling and while running
    INVALID_ARGUMENT, UNIMPLEMENTED, OUT_OF_RANGE, NOT_FOUND and the rest   the program is wrong

A wrong kernel may raise INTERNAL, too. So the run is restarted after a failure, but not after a second one at the same
step (repeated_failures.py).
"""

from __future__ import annotations

import contextlib
import os
import re
import traceback
from collections.abc import Callable, Iterator

import jax

from aimv2_jax.errors import EXIT_HUNG, DeviceFailure, StorageError, UserError, first_line
from aimv2_jax.monitoring.events import EventKind, EventLog
from aimv2_jax.resilience.repeated_failures import RepeatedFailures

# A ValueError counts only if its text begins with a status.
_ERRORS = (jax.errors.JaxRuntimeError, ValueError)
_STATUS = re.compile(r"([A-Z]+(?:_[A-Z]+)*): ")
_FAILURES = {"INTERNAL", "FAILED_PRECONDITION", "UNKNOWN", "DATA_LOSS"}
_FAILURES |= {"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED"}
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Handles errors of the compiler: the program is too large for the devices, or it has a bug.

    Raises:
      UserError: where the devices' memory is too small.
      RuntimeError: for any other status.
    """
    try:
        yield
    except _ERRORS as error:
        _check_memory(error, "the train step")
        if status(error) is None:
            raise
        raise RuntimeError("the train step does not compile") from error


@contextlib.contextmanager
def running(current_step: Callable[[], int], failures: RepeatedFailures, events: EventLog) -> Iterator[None]:
    """Handles and records errors of the devices while a run goes on.

    Args:
      current_step: returns the step that is being dispatched, or waited for.
      failures: records the failure; a second one at the same step ends the restarts.
      events: the event log of the run.

    Raises:
      UserError: where the devices' memory is too small.
      DeviceFailure: where a device or the network between devices failed.
    """
    try:
        yield
    except _ERRORS as error:
        step = current_step()
        _check_memory(error, f"step {step}")
        if status(error) not in _FAILURES:
            raise
        code, file = failures.exit_code(step), str(failures.file(step, "device"))
        with contextlib.suppress(OSError):
            failures.record(step, "device", "".join(traceback.format_exception(error)).encode(errors="replace"))
        with contextlib.suppress(UserError, StorageError):  # The disk may be full.
            events.write(EventKind.DEVICE_FAILURE, max(0, step - 1), status=first_line(error), file=file)
        again = ", as before at this step" if code == EXIT_HUNG else ""
        device = f"a device of process {jax.process_index()} on {os.uname().nodename}, or one that it waited for"
        raise DeviceFailure(f"{device}, failed at step {step}{again}: {first_line(error)}; see {file}", code) from error


def status(error: BaseException) -> str | None:
    """Name of the status of a jax runtime error; None for other errors."""
    match = _STATUS.match(str(error)) if isinstance(error, _ERRORS) else None
    return None if match is None else match[1]


def _check_memory(error: BaseException, what: str) -> None:
    if status(error) == _OUT_OF_MEMORY:
        remedy = "Raise train.microbatches or mesh.fsdp, lower data.batch_size, or let model.remat recompute more"
        raise UserError(f"the devices have too little memory for {what}", first_line(error), remedy) from error
