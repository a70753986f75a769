"""HBM use of a train step by purpose."""

from __future__ import annotations

import dataclasses
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip. Activations are everything but state and batch: temporaries of the step."""

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
        """Free fraction of the limit."""
        return 1 - self.total / self.limit


def read_memory(program: dict[str, Any], total: int, limit: int) -> Memory:
    """Combines the per-chip sizes of the program's tensors with the compiler's total."""

    def bytes_of(kind: str) -> int:
        return sum(tensor["bytes"] for tensor in program["tensors"] if tensor["kind"] == kind)

    return Memory(bytes_of("parameter"), bytes_of("optimiser"), bytes_of("batch"), total, limit)
