"""What a step needs of a chip's memory, by what it is for."""

from __future__ import annotations

import dataclasses
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip. Activations are all that the state and the batch are not: temporaries of the step."""

    parameters: int
    optimiser: int
    batch: int
    total: int
    limit: int

    @property
    def activations(self) -> int:
        return self.total - self.parameters - self.optimiser - self.batch

    @property
    def spare(self) -> float:
        """The share of the limit that is left."""
        return 1 - self.total / self.limit


def read_memory(program: dict[str, Any], total: int, limit: int) -> Memory:
    """The parts from the program's tensors as one chip holds them, the total from the compiler's buffers."""

    def of(kind: str) -> int:
        return sum(tensor["bytes"] for tensor in program["tensors"] if tensor["kind"] == kind)

    return Memory(of("parameter"), of("optimiser"), of("batch"), total, limit)
