"""Which course a run is on: how many steps are done, and what it jumps over. Beside the state, it is all there is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from aimv2_jax.data.skips import Skips


@dataclasses.dataclass(frozen=True)
class Course:
    """`step` steps are done; `skips` says which batches the run trains on; it has gone back `rewinds` times.

    `data` identifies the data and tokenizer of these steps (`data.identity`; None in checkpoints of older versions).
    `data_changes` lists the steps from which others were accepted, and what changed.
    """

    step: int = 0
    skips: Skips = dataclasses.field(default_factory=Skips)
    rewinds: int = 0
    data: Mapping[str, Any] | None = None
    data_changes: tuple[Mapping[str, Any], ...] = ()

    def at(self, step: int) -> Course:
        """The same some steps earlier or later."""
        return dataclasses.replace(self, step=step)

    def skipping(self, skips: Skips) -> Course:
        """The same with other batches to jump over."""
        return dataclasses.replace(self, skips=skips)

    def rewound(self, step: int, skips: Skips) -> Course:
        """The same after going back to `step`."""
        return dataclasses.replace(self, step=step, skips=skips, rewinds=self.rewinds + 1)

    def on_data(self, data: Mapping[str, Any], changes: Sequence[str] = ()) -> Course:
        """The same with the data and tokenizer from here on; `changes` describes how they differ from those before."""
        change = ({"step": self.step, "what": list(changes)},) if changes else ()
        return dataclasses.replace(self, data=data, data_changes=self.data_changes + change)

    def extra(self) -> dict[str, Any]:
        """What of it stands in a checkpoint's `meta`, beside the step."""
        extra = {"skips": self.skips.as_json(), "rewinds": self.rewinds}
        return extra | {"data": self.data, "data_changes": list(self.data_changes)}

    @classmethod
    def of_meta(cls, meta: Mapping[str, Any]) -> Course:
        """That of a checkpoint; older ones jump over nothing, and do not say what they were trained on."""
        extra = meta["extra"]
        skips, changes = Skips.of_json(extra.get("skips", ())), tuple(extra.get("data_changes", ()))
        return cls(meta["step"], skips, extra.get("rewinds", 0), extra.get("data"), changes)
