"""Event loops that wait for all their tasks before they close."""

from __future__ import annotations

import asyncio
import contextlib
import threading

_lock = threading.Lock()
_users = 0  # Of the policy that is in force.
_before: asyncio.AbstractEventLoopPolicy | None = None  # The policy that is restored when the last of them leaves.


class _PatientLoop(asyncio.SelectorEventLoop):
    """An event loop that closes when all its tasks have ended."""

    def close(self) -> None:
        if not self.is_closed() and (tasks := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()


class _PatientLoops(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _PatientLoop()


class PatientEventLoops(contextlib.AbstractContextManager):
    """While this lasts, new event loops of this process wait for all their tasks before they close.

    Orbax closes its loop at the first read or write that fails. Each one still in flight would then end in a traceback
    of its own, and a write would go on in a folder that nobody waits for. Several threads may use this at a time.
    """

    def __enter__(self) -> PatientEventLoops:
        global _users, _before
        with _lock:
            if not _users:
                _before = asyncio.get_event_loop_policy()
                asyncio.set_event_loop_policy(_PatientLoops())
            _users += 1
        return self

    def __exit__(self, *exception: object) -> None:
        global _users
        with _lock:
            _users -= 1
            if not _users:
                asyncio.set_event_loop_policy(_before)
