"""Host-side progress of a run: finished steps, skipped batches, rewinds and the identity of its data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from aimv2_jax.data.sampling.skips import Skips


@dataclasses.dataclass(frozen=True)
class TrainProgress:
    """Progress that a checkpoint stores beside the train state.

    Attributes:
      step: number of finished steps.
      skips: the batches that the run does not train on.
      rewinds: how often the run was rewound.
      data: identifies the data and tokenizer of these steps (`data.identity`); None in checkpoints of older versions.
      data_changes: the steps from which other data was accepted, and what changed.
    """

    step: int = 0
    skips: Skips = dataclasses.field(default_factory=Skips)
    rewinds: int = 0
    data: Mapping[str, Any] | None = None
    data_changes: tuple[Mapping[str, Any], ...] = ()

    def at_step(self, step: int) -> TrainProgress:
        """This progress at another step."""
        return dataclasses.replace(self, step=step)

    def with_skips(self, skips: Skips) -> TrainProgress:
        """This progress with other skipped batches."""
        return dataclasses.replace(self, skips=skips)

    def rewound(self, step: int, skips: Skips) -> TrainProgress:
        """This progress after a rewind to `step`."""
        return dataclasses.replace(self, step=step, skips=skips, rewinds=self.rewinds + 1)

    def with_data(self, data: Mapping[str, Any], changes: Sequence[str] = ()) -> TrainProgress:
        """This progress with new data and tokenizer from here on; `changes` lists the differences from those before."""
        change = ({"step": self.step, "what": list(changes)},) if changes else ()
        return dataclasses.replace(self, data=data, data_changes=self.data_changes + change)

    def to_meta(self) -> dict[str, Any]:
        """The entries of a checkpoint's `meta["extra"]`; the step is stored beside them."""
        extra = {"skips": self.skips.as_json(), "rewinds": self.rewinds}
        return extra | {"data": self.data, "data_changes": list(self.data_changes)}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> TrainProgress:
        """The progress that a checkpoint stores; older ones have no skips and do not identify their data."""
        extra = meta["extra"]
        skips = Skips.from_json(extra.get("skips", ()))
        changes = tuple(extra.get("data_changes", ()))
        return cls(meta["step"], skips, extra.get("rewinds", 0), extra.get("data"), changes)
