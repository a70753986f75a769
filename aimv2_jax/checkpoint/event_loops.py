"""asyncio policy that drains pending tasks before an event loop closes."""

from __future__ import annotations

import asyncio
import contextlib
import threading

_lock = threading.Lock()
_num_users = 0
_previous_policy: asyncio.AbstractEventLoopPolicy | None = None  # Restored when the last user exits.


class _DrainingLoop(asyncio.SelectorEventLoop):
    """An event loop that finishes all its tasks before it closes."""

    def close(self) -> None:
        if not self.is_closed() and (tasks := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()


class _DrainingPolicy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _DrainingLoop()


class DrainingEventLoops(contextlib.AbstractContextManager):
    """Context in which new event loops of this process finish all their tasks before they close.

    Orbax closes its loop at the first read or write that fails. Each operation still in flight would then end in a
    traceback of its own, and a write could go on unnoticed in a folder that is deleted. Thread-safe.
    """

    def __enter__(self) -> DrainingEventLoops:
        global _num_users, _previous_policy
        with _lock:
            if not _num_users:
                _previous_policy = asyncio.get_event_loop_policy()
                asyncio.set_event_loop_policy(_DrainingPolicy())
            _num_users += 1
        return self

    def __exit__(self, *exception: object) -> None:
        global _num_users
        with _lock:
            _num_users -= 1
            if not _num_users:
                asyncio.set_event_loop_policy(_previous_policy)
