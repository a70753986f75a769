"""Stage timer: where the time of building a batch goes."""

from __future__ import annotations

import time


class StageTimer:
    """Attributes the time since its creation to stages: `seconds` by stage name."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Adds the time since the last lap to `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
