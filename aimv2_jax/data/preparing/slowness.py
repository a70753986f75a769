"""Logs samples that take long, so that no hang of a preparation is silent."""

from __future__ import annotations

import logging
import threading
import time

from aimv2_jax.untrusted import printable

_LIMIT_S = 120.0  # The slowest sound picture takes a few seconds; a large tar is copied from a bucket before its first.

_MAX_LINE = 1000


class SlowSampleLog:
    """Logs once for each step of the work that takes longer than `limit_s`; a context, in which a thread looks on.

    Nothing is dropped for being slow: the data set would depend on the machine.
    """

    def __init__(self, limit_s: float = _LIMIT_S):
        self._limit_s = limit_s
        self._step: tuple[str, float] | None = None  # What it is, and when it began.
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True, name="slow samples")

    def __enter__(self) -> SlowSampleLog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def begin(self, step: str) -> None:
        """The work now begins `step`."""
        self._step = (step, time.monotonic())

    def _look_on(self) -> None:
        logged = None
        while not self._ended.wait(self._limit_s / 4):
            step = self._step
            if step is not None and step is not logged and time.monotonic() - step[1] > self._limit_s:
                logged = step
                logging.getLogger(__name__).warning(
                    "prepare has been at %s for over %.0f s", printable(step[0], _MAX_LINE), self._limit_s
                )
