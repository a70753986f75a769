"""Predictions of train steps, and their JSON form, whose keys are the names of the fields."""

from __future__ import annotations

import dataclasses
from typing import Any

MIN_SPARE = 0.05  # Fraction of a device's memory that a prediction must leave free, as a margin of error.


@dataclasses.dataclass(frozen=True)
class CollectiveTotal:
    """Collectives of one kind, over the same mesh axes, in a step."""

    kind: str
    axis: str
    dtype: str
    asynchronous: bool
    count: int
    bytes: int
    ms: float  # Without overlap.
    exposed_ms: float


@dataclasses.dataclass(frozen=True)
class SliceTraffic:
    """Traffic between slices in a step. Only gradients, losses, counts and norms should cross."""

    kind: str
    carries: str
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class KernelTotal:
    """Executions of a kernel that the roofline rule estimated."""

    name: str
    states_its_cost: bool
    count: int
    mcycles: float


@dataclasses.dataclass(frozen=True)
class OperationTotal:
    """Executions of an operation with one shape in a step."""

    part: str
    operation: str
    shape: str
    count: int
    kcycles_each: float
    share: float  # Fraction of the step's cycles.
    of_peak: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Outcome:
    """Facts about a step whether it compiles or not."""

    hbm_limit_gib: float
    model_tflops_per_chip: float
    versions: dict[str, str]
    mesh: dict[str, int]
    num_chips: int
    batch_size: int
    patches: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal(_Outcome):
    """A step that does not compile, with the compiler's message."""

    compiles: bool = False
    refusal: str
    hbm_gib: None = None
    predicted_ms: None = None
    predicted_mfu: None = None
    predicted_mfu_with_comms: None = None
    collectives: tuple[()] = ()
    images_per_s: None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures(_Outcome):
    """Figures of a step that compiles."""

    compiles: bool = True
    hbm_gib: float
    hbm_spare: float  # Free fraction of the limit.
    hbm_parts_gib: dict[str, float]
    model_tflops_per_chip_of_allowed_pairs: float
    compiled_tflops_per_chip: float
    recompute: float  # Compiled FLOPs beyond the model's, as a fraction of these.
    predicted_mcycles: float
    predicted_compute_ms: float
    predicted_ms_without_overlap: float
    predicted_ms: float
    predicted_mfu: float
    predicted_mfu_of_allowed_pairs: float
    predicted_mfu_without_overlap: float
    predicted_mfu_with_comms: float
    images_per_s: float
    steps: int
    days: float
    chip_hours: float
    collectives: list[CollectiveTotal]
    gradient_dtypes: dict[str, int]  # Bytes of reduced gradients by element type.
    between_slices: list[SliceTraffic]
    replicated: list[str]
    cycles_from: dict[str, float]  # Shares of the cycles by the source of their estimates.
    kernels: list[KernelTotal]
    top: list[OperationTotal]
    breakdown: dict[str, dict[str, float]]  # Megacycles by part of the model and kind of instruction.
    compiler_options: dict[str, str]
    compile_s: float


_ROWS = {
    "collectives": CollectiveTotal,
    "between_slices": SliceTraffic,
    "kernels": KernelTotal,
    "top": OperationTotal,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """An experiment on a topology, and the outcome of its step."""

    topology: str
    slices: int
    config: str
    full: bool  # Whether the code of the whole step was generated.
    area: int | None
    overrides: dict[str, str]
    outcome: Figures | Refusal
    xla_attention: Figures | Refusal | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns one flat object; the outcome with XLA attention is nested, where there is one."""
        data = dataclasses.asdict(self)
        data |= data.pop("outcome")
        xla_attention = data.pop("xla_attention")
        return data | ({"xla_attention": xla_attention} if xla_attention else {})

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Prediction:
        """Raises KeyError or TypeError for an object without the keys of `to_json`."""
        xla_attention = data.get("xla_attention")
        return cls(
            **{key: data[key] for key in ("topology", "slices", "config", "full", "area", "overrides")},
            outcome=_outcome(data),
            xla_attention=_outcome(xla_attention) if xla_attention else None,
        )


def _outcome(data: dict[str, Any]) -> Figures | Refusal:
    kind = Figures if data["compiles"] else Refusal
    values = {field.name: data[field.name] for field in dataclasses.fields(kind)}
    if data["compiles"]:
        values |= {key: [row_type(**row) for row in data[key]] for key, row_type in _ROWS.items()}
    return kind(**values)
