"""Simulation of a step's schedule with overlapping collectives and computation.

The schedule is simulated in order. A synchronous collective waits for its links, then blocks the computation for its
whole time. An asynchronous one runs in parallel with the instructions between its start and its done; the rest blocks
at its done. Collectives on the same link of the interconnect run one after another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from aimv2_jax.aot.collectives import Collective, Collectives
from aimv2_jax.aot.hlo import Instruction, Module, body_of


@dataclasses.dataclass
class ScheduleTimes:
    """Times of one execution of a computation."""

    compute_s: float = 0.0
    communication_s: float = 0.0  # The sum of all collectives' times without overlap.
    exposed_s: float = 0.0  # The part of communication_s that no computation hides.
    collectives: list[tuple[Collective, int, float]] = dataclasses.field(default_factory=list)
    """Each collective with its executions a step, and the exposed seconds of one execution."""

    @property
    def without_overlap_s(self) -> float:
        return self.compute_s + self.communication_s

    @property
    def with_overlap_s(self) -> float:
        return self.compute_s + self.exposed_s


def simulate(
    module: Module,
    collectives: Collectives,
    seconds: Callable[[Instruction, str], float],
    computation: str | None = None,
) -> ScheduleTimes:
    """Simulates the schedule of a computation, by default the entry.

    `seconds(instruction, computation)` is the compute time of one execution of an instruction.
    """
    computation = computation or module.entry
    result, now = ScheduleTimes(), 0.0
    free_at: dict[str, float] = {}  # Time at which each link is free again.
    in_flight: dict[str, list[tuple[int, float]]] = {}  # Key -> (index in the list, end) of pending collectives.
    events = collectives.events(computation)

    def begin(collective: Collective) -> float:
        start = max([now, *(free_at.get(link, 0.0) for link in collective.route.links)])
        end = start + collective.route.seconds
        free_at.update(dict.fromkeys(collective.route.links, end))
        result.communication_s += collective.route.seconds
        result.collectives.append((collective, 1, 0.0))
        return end

    def wait(index: int, end: float) -> float:
        exposed = max(0.0, end - now)
        collective, times, before = result.collectives[index]
        result.collectives[index] = (collective, times, before + exposed)
        result.exposed_s += exposed
        return exposed

    for instruction in module.computations[computation]:
        if body := body_of(module, instruction):
            called, times = body
            inner = simulate(module, collectives, seconds, called)
            result.compute_s += inner.compute_s * times
            result.communication_s += inner.communication_s * times
            result.exposed_s += inner.exposed_s * times
            result.collectives += [(item, count * times, exposed) for item, count, exposed in inner.collectives]
            now += inner.with_overlap_s * times
        for event in events.get(instruction.name, []):
            if event.role == "done":
                if in_flight.get(event.key):
                    now += wait(*in_flight[event.key].pop(0))
                continue
            end = begin(event.collective)
            index = len(result.collectives) - 1
            if event.role == "start":
                in_flight.setdefault(event.key, []).append((index, end))
            else:
                now += wait(index, end)
        compute_s = seconds(instruction, computation)
        result.compute_s += compute_s
        now += compute_s
    for pending in in_flight.values():  # The done is in the next trip of a loop, or missing: the rest is exposed.
        for index, end in pending:
            now += wait(index, end)
    return result
