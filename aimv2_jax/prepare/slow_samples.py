"""Log of slow samples, so that a preparation never hangs silently."""

from __future__ import annotations

import logging
import threading
import time

from aimv2_jax.untrusted import printable

# The slowest valid image takes a few seconds; a large tar in a bucket is copied before its first sample.
_SLOW_SAMPLE_S = 120.0
_MAX_LINE_LENGTH = 1000


class SlowSampleLog:
    """Context whose thread logs every step that takes longer than `limit_s`, once per step.

    Slow samples are not dropped: the dataset would depend on the machine.
    """

    def __init__(self, limit_s: float = _SLOW_SAMPLE_S):
        self._limit_s = limit_s
        self._step: tuple[str, float] | None = None  # (description, start time).
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="slow samples")

    def __enter__(self) -> SlowSampleLog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def begin(self, step: str) -> None:
        """Records that `step` begins now."""
        self._step = (step, time.monotonic())

    def _watch(self) -> None:
        logged = None
        while not self._ended.wait(self._limit_s / 4):
            step = self._step
            if step is not None and step is not logged and time.monotonic() - step[1] > self._limit_s:
                logged = step
                logging.getLogger(__name__).warning(
                    "prepare has been at %s for over %.0f s", printable(step[0], _MAX_LINE_LENGTH), self._limit_s
                )
