"""Stopping on request (SIGTERM, a closed terminal, Ctrl-C once): all processes save one and the same step, and end."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils

# `scancel -s INT` and srun signal every process of a step: the trainer, and its parent, which passes it on.
_SAME_S = 0.5


class StopRequests:
    """Listens to the signals inside its `with`.

    One process alone keeps a flag. Of several, each has jax's own handler of SIGTERM, which tells the others: these
    settle on a call of `reached` that none of them has made yet.

    The first Ctrl-C is as good as a SIGTERM, the second one raises KeyboardInterrupt, if it is not the same that came
    twice. More of SIGTERM changes nothing.
    """

    def __init__(self) -> None:
        self._requested = False
        self._interrupted_s: float | None = None  # When Ctrl-C came first.
        self._several = jax.process_count() > 1
        self._calls = 0  # Of `reached`.
        self._before: dict[int, object] = {}

    def reached(self) -> bool:
        """Whether to stop now, and at every later call; the same on all processes, each of which asks equally often.

        XLA remembers the last number that it was asked about, 0 before the first, takes the number after it as the one
        to stop at, once in the life of a process, and compares for equality (PreemptionSyncManager::ReachedSyncPoint).
        Steps are no such numbers: a resumed run begins above 1, and a run that goes back asks about lower ones again.
        """
        self._calls += 1
        if self._several and multihost_utils.reached_preemption_sync_point(self._calls):
            self._requested = True  # A spike may come between this and the save; then it is the next call that stops.
        return self._requested

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():  # Only there signals can be listened to.
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
            if not self._several:
                self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._request)
                if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # As nohup has it.
                    self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._request)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self._interrupted_s is not None:
            if now_s < self._interrupted_s + _SAME_S:
                return
            raise KeyboardInterrupt
        self._interrupted_s = now_s
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._requested = True
