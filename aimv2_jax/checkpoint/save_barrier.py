"""Barrier among the processes that write a checkpoint; it fails at once when any of them cannot write.

Orbax's own barrier would wait for such a process until its timeout and could not report the reason.
"""

from __future__ import annotations

import dataclasses
import socket
import time

import jax

from aimv2_jax.distributed import coordination

# Poll interval, which doubles from the first to the second value.
_MIN_POLL_S, _MAX_POLL_S = 0.02, 0.5


@dataclasses.dataclass(frozen=True)
class SaveFailure:
    """Why a save failed.

    Attributes:
      reason: for the user.
      is_temporary: whether a bucket failed that may be back later.
    """

    reason: str
    is_temporary: bool


class PeerFailed(Exception):
    """Another process could not write its part of the checkpoint; the reason of `failure` names the process."""

    def __init__(self, failure: SaveFailure):
        super().__init__(failure.reason)
        self.failure = failure


class SaveBarrier:
    """Orbax's `barrier_sync_fn` for consecutive saves.

    It has no timeout: a background save may take any time, and the watchdog limits the time that training waits for it
    (`watch.save_s`), by a monotonic clock.
    """

    def __init__(self):
        self.save = ""  # Name of the current save.
        self._previous_save = ""

    def begin(self, save: str) -> None:
        """Sets the name of a new save, equal on all processes and never used before."""
        self._previous_save = self.save
        self.save = save

    def forget_before(self) -> None:
        """Deletes the stored keys of the previous save; call it after all processes have begun this one."""
        if self._previous_save and jax.process_index() == 0:
            coordination.unpublish(self._previous_save)

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits until all processes have reached `key`.

        Raises:
          PeerFailed: when one of them has failed.
        """
        del timeout_ms
        self._wait_for_all(key, raise_failures=True)

    def end(self) -> None:
        """Announces that this process writes no more; process 0 waits for the announcements of all processes.

        Only after that may a folder be deleted or a new save begin: TensorStore waits forever for files that it has
        written to a deleted folder.
        """
        if jax.process_index() == 0:
            self._wait_for_all("end", raise_failures=False)
        else:
            coordination.publish(f"{self.save}/end", None)

    def _wait_for_all(self, key: str, raise_failures: bool) -> None:
        name, wait_s = f"{self.save}/{key}", _MIN_POLL_S
        coordination.publish(name, None)
        while len(coordination.published(name)) < jax.process_count():
            failures = coordination.published(f"{self.save}/failed") if raise_failures else {}
            if failures:
                raise PeerFailed(SaveFailure(**failures[min(failures)]))
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, _MAX_POLL_S)

    def fail(self, failure: SaveFailure) -> SaveFailure:
        """Notifies the other processes that this one cannot write; returns the failure as published."""
        if jax.process_count() > 1:
            where = f"process {jax.process_index()} on {socket.gethostname()}"
            failure = dataclasses.replace(failure, reason=f"{where}: {failure.reason}")
            coordination.publish(f"{self.save}/failed", dataclasses.asdict(failure))
        return failure
