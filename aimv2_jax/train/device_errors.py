"""What an error of jax's runtime tells: memory that is too small, a device or network that failed, or a bug.

Its text begins with the name of a status (absl/status/status.h). As jaxlib 0.10 and its plug-ins raise them:

    INTERNAL             a TPU core halted; CUDA and NCCL errors, also of a peer that died
    FAILED_PRECONDITION  a TPU's program halted
    UNKNOWN              gloo: a peer's connection was closed (raised as a ValueError, where dispatching waits for it)
    UNAVAILABLE, DEADLINE_EXCEEDED, CANCELLED, ABORTED   the coordination service, when another process is missing
    DATA_LOSS            memory or a transfer with errors
    RESOURCE_EXHAUSTED   out of memory, while compiling and while running
    INVALID_ARGUMENT, UNIMPLEMENTED, OUT_OF_RANGE, NOT_FOUND and the rest   the program asks for what cannot be

A kernel of ours that is wrong may raise INTERNAL, too. So a failure is worth one more start, and no second one at the
same step (interruptions.py).
"""

from __future__ import annotations

import contextlib
import os
import re
import traceback
from collections.abc import Callable, Iterator

import jax

from aimv2_jax.errors import EXIT_HUNG, DeviceFailure, UserError
from aimv2_jax.train.events import Events
from aimv2_jax.train.interruptions import Interruptions

_ERRORS = (jax.errors.JaxRuntimeError, ValueError)  # Of the latter, those whose text begins with a status.
_STATUS = re.compile(r"([A-Z]+(?:_[A-Z]+)*): ")
_FAILURES = {"INTERNAL", "FAILED_PRECONDITION", "UNKNOWN", "DATA_LOSS"}
_FAILURES |= {"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED"}
_NO_MEMORY = "RESOURCE_EXHAUSTED"


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Tells what does not compile from what fails later: it is too large for the devices, or it is our bug.

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
def running(computed: Callable[[], int], interruptions: Interruptions, events: Events) -> Iterator[None]:
    """Tells what devices raise while a run goes on.

    Args:
      computed: the step that is being dispatched, or waited for.
      interruptions: where the failure is recorded, and that say whether there was one at this step.
      events: of the run.

    Raises:
      UserError: where the devices' memory is too small.
      DeviceFailure: where a device failed, or the network between devices.
    """
    try:
        yield
    except _ERRORS as error:
        step = computed()
        _check_memory(error, f"step {step}")
        if status(error) not in _FAILURES:
            raise
        code, file = interruptions.exit_code(step), str(interruptions.file(step, "device"))
        with contextlib.suppress(Exception):  # Of a bucket, TensorFlow's and fsspec's own kinds; the run ends anyway.
            interruptions.record(step, "device", "".join(traceback.format_exception(error)).encode(errors="replace"))
        with contextlib.suppress(UserError):  # The disk may have no room.
            events.write("device_failure", max(0, step - 1), status=_first_line(error), file=file)
        again = ", as at this step before" if code == EXIT_HUNG else ""
        who = f"a device of process {jax.process_index()} on {os.uname().nodename}, or one that it waited for"
        raise DeviceFailure(f"{who}, failed at step {step}{again}: {_first_line(error)}; see {file}", code) from error


def status(error: BaseException) -> str | None:
    """Name of the status that an error of jax's runtime has; None for other errors."""
    found = _STATUS.match(str(error)) if isinstance(error, _ERRORS) else None
    return None if found is None else found[1]


def _check_memory(error: BaseException, what: str) -> None:
    if status(error) == _NO_MEMORY:
        remedy = "Raise train.microbatches or mesh.fsdp, lower data.batch_size, or let model.remat recompute more"
        raise UserError(f"the devices have too little memory for {what}", _first_line(error), remedy) from error


def _first_line(error: BaseException) -> str:
    """Of its text, which may go on with a dump of memory."""
    return next(iter(str(error).splitlines()), "")
