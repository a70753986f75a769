"""Event loops that see their tasks through."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator


class _PatientLoop(asyncio.SelectorEventLoop):
    """An event loop that closes when all its tasks have ended."""

    def close(self) -> None:
        if not self.is_closed() and (tasks := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()


class _PatientLoops(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _PatientLoop()


@contextlib.contextmanager
def reads_seen_through() -> Iterator[None]:
    """While this lasts, event loops of this process wait for all their tasks before they close. Not for two threads.

    Orbax closes its loop at the first read that fails; each read still on its way would then end in a traceback of its
    own, beside the one line that tells the user.
    """
    policy = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_PatientLoops())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(policy)
