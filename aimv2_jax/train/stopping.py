"""Stopping on request: SIGTERM, or Ctrl-C once, lets all processes save one and the same step and end."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils


class StopRequests:
    """Listens to the signals inside its `with`.

    One process alone keeps a flag. Of several, each has jax's own handler of SIGTERM, which tells the others: these
    settle on a step that none of them has reached yet.

    The first Ctrl-C is as good as a SIGTERM, the second one raises KeyboardInterrupt. More of SIGTERM changes nothing.
    """

    def __init__(self) -> None:
        self._requested = self._interrupted = False
        self._several = jax.process_count() > 1
        self._before: dict[int, object] = {}

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`, the same on all processes; each asks once a step, from the same one on."""
        return multihost_utils.reached_preemption_sync_point(step) if self._several else self._requested

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():  # Only there signals can be listened to.
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
            if not self._several:
                self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = self._requested = True
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
