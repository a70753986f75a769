"""Cycle estimates of scheduled instructions, with the source of each estimate."""

from __future__ import annotations

import dataclasses
import enum
import math

from aimv2_jax.aot.collectives import Collectives
from aimv2_jax.aot.cost_model.fingerprint import Fingerprints
from aimv2_jax.aot.cost_model.kernels import FREE_OPCODES, accessed_bytes, is_free, roofline_cycles
from aimv2_jax.aot.hlo import Instruction, Module, scheduled
from aimv2_jax.parallel.hardware import Chip


class Source(enum.StrEnum):
    """Sources of estimates, from the most to the least reliable. The values are written to reports."""

    COMPILER = "the compiler's estimate"
    PROXY = "the same fusion in the shallow proxy"
    PROXY_OTHER_MEMORY = "the same fusion in the shallow proxy, with operands in another memory"
    PROXY_SCALED = "the same fusion over fewer layers, scaled by its bytes"
    KERNEL = "the roofline rule for kernels"
    BYTES = "the roofline rule and the latency of a transfer, for fusions that the proxy lacks"
    NOTHING = "no cycles of its own"


@dataclasses.dataclass(frozen=True)
class CycleEstimate:
    """Cycles of one execution of an instruction."""

    cycles: float
    source: Source


class CompiledCostModel:
    """Cost model of a module after code generation: the compiler's estimates, else the roofline rule."""

    def __init__(self, module: Module, collectives: Collectives, chip: Chip):
        self._module = module
        self._collectives = collectives
        self._chip = chip

    def estimate(self, instruction: Instruction, computation: str) -> CycleEstimate:
        if instruction.estimated_cycles is not None:
            return CycleEstimate(instruction.estimated_cycles, Source.COMPILER)
        if is_free(instruction) or instruction.name in self._collectives.events(computation):
            return CycleEstimate(0, Source.NOTHING)
        return CycleEstimate(roofline_cycles(instruction, computation, self._module, self._chip), Source.KERNEL)


class ProxyCostModel:
    """Cost model of a module before code generation, from the estimates of a proxy after code generation.

    The proxy is the same model with fewer layers. A fusion takes the estimate of the proxy's fusion with the same
    computation (`fingerprint`). A fusion over a whole stack of layers has no equal in the proxy. It is matched without
    the number of layers and scaled by its bytes; if that fails too, the roofline rule estimates it.
    """

    def __init__(self, module: Module, roofline: CompiledCostModel, chip: Chip, proxy: Module, depths: frozenset[int]):
        self._module = module
        self._roofline = roofline
        self._chip = chip
        self._fingerprints = Fingerprints(module, depths)
        proxy_fingerprints = Fingerprints(proxy, depths)
        self._cache: dict[tuple[str, str], CycleEstimate] = {}
        self._exact: dict[str, float] = {}
        self._unestimated: set[str] = set()  # Digests that occur in the proxy, but without an estimate.
        self._any_memory: dict[str, list[tuple[str, float]]] = {}
        self._any_depth: dict[str, tuple[float, int]] = {}
        hbm_writes = [math.inf]  # Cycles of each instruction that writes to HBM; the minimum is a transfer's latency.
        for item in scheduled(proxy):
            instruction, cycles = item.instruction, item.instruction.estimated_cycles
            fingerprint = proxy_fingerprints.of(instruction, item.computation)
            if cycles is None:
                self._unestimated.add(fingerprint.digest)
                continue
            if "H" in fingerprint.memories.partition(">")[2]:
                hbm_writes.append(cycles)
            self._exact[fingerprint.exact] = cycles
            self._any_memory.setdefault(fingerprint.digest, []).append((fingerprint.memories, cycles))
            num_bytes = accessed_bytes(instruction, item.computation, proxy)
            self._any_depth[fingerprint.depthless_digest] = (cycles, num_bytes)
        self._min_cycles = min(hbm_writes) if len(hbm_writes) > 1 else 0

    def estimate(self, instruction: Instruction, computation: str) -> CycleEstimate:
        key = (computation, instruction.name)
        if key not in self._cache:
            self._cache[key] = self._match(instruction, computation)
        return self._cache[key]

    def _match(self, instruction: Instruction, computation: str) -> CycleEstimate:
        roofline = self._roofline.estimate(instruction, computation)
        opcode = instruction.opcode
        if opcode in FREE_OPCODES or opcode == "custom-call" or opcode.endswith(("-start", "-done")):
            return roofline
        fingerprint = self._fingerprints.of(instruction, computation)
        if fingerprint.exact in self._exact:
            return CycleEstimate(self._exact[fingerprint.exact], Source.PROXY)
        if fingerprint.digest in self._any_memory:
            cycles = _nearest(self._any_memory[fingerprint.digest], fingerprint.memories)
            return CycleEstimate(cycles, Source.PROXY_OTHER_MEMORY)
        if fingerprint.depthless_digest in self._any_depth:
            cycles, num_bytes = self._any_depth[fingerprint.depthless_digest]
            ratio = accessed_bytes(instruction, computation, self._module) / max(num_bytes, 1)
            return CycleEstimate(cycles * ratio, Source.PROXY_SCALED)
        if roofline.source is Source.KERNEL and fingerprint.digest not in self._unestimated:
            return CycleEstimate(roofline.cycles + self._min_cycles, Source.BYTES)
        return roofline


def _nearest(known: list[tuple[str, float]], memories: str) -> float:
    """Returns the cycles of the fusion with the fewest operands and results in other memories, or the mean of ties."""
    distances = [sum(a != b for a, b in zip(other, memories)) for other, _ in known]
    nearest = [cycles for distance, (_, cycles) in zip(distances, known) if distance == min(distances)]
    return sum(nearest) / len(nearest)
