"""A compiled train step, with the facts that the analysis of its text needs."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One array of the state or of the batch."""

    name: str  # Such as "params/encoder/kernel".
    kind: str  # "parameter", "optimiser" or "batch".
    shape: list[int]
    part: list[int]  # Shape of one device's shard.
    bytes: int  # Size of one device's shard.

    @property
    def is_split(self) -> bool:
        return self.part != self.shape


@dataclasses.dataclass(frozen=True)
class ProgramFacts:
    """Facts about a step that are known before its compilation. The worker writes them as JSON."""

    mesh: dict[str, int]
    coords: list[list[int]]  # Torus coordinates (x, y, z) and place in their chip of the mesh's devices, row-major.
    tensors: list[Tensor]  # The state, then the batch, in tree order.
    compiler_options: dict[str, str]
    versions: dict[str, str]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ProgramFacts:
        return cls(**data | {"tensors": [Tensor(**tensor) for tensor in data["tensors"]]})

    def bytes_of(self, kind: str) -> int:
        """Returns the bytes of one device's shards of all tensors of a kind."""
        return sum(tensor.bytes for tensor in self.tensors if tensor.kind == kind)


@dataclasses.dataclass(frozen=True)
class AotProgram:
    """A compiled step. `refusal` is the compiler's message if the step does not compile."""

    facts: ProgramFacts
    seconds: float  # Duration of the compilation.
    text: str = ""  # The scheduled module; with cycle estimates if its code was generated.
    hbm_bytes: int = 0
    refusal: str | None = None
