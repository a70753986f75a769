"""A barrier among the processes that write one checkpoint, which fails at once when one of them cannot write.

Orbax's own barrier waits for such a process until its time-out, of which it knows no reason.
"""

from __future__ import annotations

import socket
import time

import jax

from aimv2_jax.parallel import processes

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.02, 0.5  # Between two looks at the others.


class PeerFailed(Exception):
    """Another process could not write its part of the checkpoint; the text names it and the reason."""


class SaveBarrier:
    """Orbax's `barrier_sync_fn`, for one save after another.

    It has no time-out: a save takes as long as it takes in the background, and the watchdog limits the time that
    training waits for it (`watch.save_s`), by a monotonic clock.
    """

    def __init__(self):
        self.save = self._before = ""  # The names of the save that goes on, and of the one before.

    def begin(self, save: str) -> None:
        """Names the save that begins, alike on all processes and unlike any before."""
        self._before, self.save = self.save, save

    def forget_before(self) -> None:
        """Deletes what the save before has stored: call it where all processes have begun this one."""
        if self._before and jax.process_index() == 0:
            processes.withdraw(self._before)

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits until all processes have come to `key`.

        Raises:
          PeerFailed: when one of them has failed.
        """
        del timeout_ms
        self._meet(key, failing=True)

    def end(self) -> None:
        """Says that nothing of this process writes any more; on process 0, waits until all have said so.

        Only then may a folder be deleted, or a new save begin: TensorStore waits without end for files that it has
        written into a folder that is gone.
        """
        if jax.process_index() == 0:
            self._meet("end", failing=False)
        else:
            processes.post(f"{self.save}/end", None)

    def _meet(self, key: str, failing: bool) -> None:
        name, wait_s = f"{self.save}/{key}", _FIRST_WAIT_S
        processes.post(name, None)
        while len(processes.posted(name)) < jax.process_count():
            failures = processes.posted(f"{self.save}/failed") if failing else {}
            if failures:
                raise PeerFailed(failures[min(failures)])
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def fail(self, reason: str) -> str:
        """Tells the other processes that this one cannot write; the reason as they are given it."""
        if jax.process_count() > 1:
            reason = f"process {jax.process_index()} on {socket.gethostname()}: {reason}"
            processes.post(f"{self.save}/failed", reason)
        return reason
