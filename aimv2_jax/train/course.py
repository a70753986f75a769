"""Which course a run is on: how many steps are done, and what it jumps over. Beside the state, it is all there is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from aimv2_jax.data.skips import Skips


@dataclasses.dataclass(frozen=True)
class Course:
    """`step` steps are done; `skips` says which batches the run trains on; it has gone back `rewinds` times."""

    step: int = 0
    skips: Skips = dataclasses.field(default_factory=Skips)
    rewinds: int = 0

    def at(self, step: int) -> Course:
        """The same some steps earlier or later."""
        return dataclasses.replace(self, step=step)

    def skipping(self, skips: Skips) -> Course:
        """The same with other batches to jump over."""
        return dataclasses.replace(self, skips=skips)

    def extra(self) -> dict[str, Any]:
        """What of it stands in a checkpoint's `meta`, beside the step."""
        return {"skips": self.skips.as_json(), "rewinds": self.rewinds}

    @classmethod
    def of_meta(cls, meta: Mapping[str, Any]) -> Course:
        """That of a checkpoint; older ones jump over nothing."""
        extra = meta["extra"]
        return cls(meta["step"], Skips.of_json(extra.get("skips", ())), extra.get("rewinds", 0))
