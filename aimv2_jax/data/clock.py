"""Where the time of building a batch goes."""

from __future__ import annotations

import time


class StageClock:
    """Shares out the time since it was made: `seconds` of each stage, by name."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """What has passed since the last lap was spent on `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
