"""Stop requests (SIGTERM, a closed terminal, one Ctrl-C): all processes save the same step and end."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils

# `scancel -s INT` and srun signal both the trainer and its parent, which forwards the signal: a second SIGINT within
# this time is the same Ctrl-C.
_DUPLICATE_SIGNAL_S = 0.5


class PreemptionHandler:
    """Handles stop signals inside its `with` block.

    A single process sets a flag. With several processes, jax's own SIGTERM handler notifies the others, and all agree
    on a call of `reached` that none of them has made yet.

    The first Ctrl-C acts as a SIGTERM. A second one raises KeyboardInterrupt, unless it is a duplicate of the first.
    Further SIGTERMs have no effect.
    """

    def __init__(self) -> None:
        self._requested = False
        self._interrupted_s: float | None = None  # Time of the first Ctrl-C.
        self._is_distributed = jax.process_count() > 1
        self._num_calls = 0  # Calls of `reached`.
        self._previous_handlers: dict[int, object] = {}

    def reached(self) -> bool:
        """Whether to stop now and at every later call; the same on all processes, which must call it equally often.

        XLA stores the last number that it was asked about (0 before the first), chooses the next number as the sync
        point, once in the life of a process, and compares for equality (PreemptionSyncManager::ReachedSyncPoint). Step
        numbers do not qualify: a resumed run begins above 1, and a rewound run repeats lower ones.
        """
        self._num_calls += 1
        if self._is_distributed and multihost_utils.reached_preemption_sync_point(self._num_calls):
            # XLA reports the sync point once. If a rewind prevents the save, the next call must return True as well.
            self._requested = True
        return self._requested

    def __enter__(self) -> PreemptionHandler:
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers only there.
            self._previous_handlers[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
            if not self._is_distributed:
                self._previous_handlers[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._request)
                if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it.
                    self._previous_handlers[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._request)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self._interrupted_s is not None:
            if now_s < self._interrupted_s + _DUPLICATE_SIGNAL_S:
                return
            raise KeyboardInterrupt
        self._interrupted_s = now_s
        if self._is_distributed:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._requested = True
