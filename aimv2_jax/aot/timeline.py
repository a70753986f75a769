"""How long a step takes when collectives and computation share the time.

The schedule is played through in order. A synchronous collective waits for its links, then holds up the computation for
its whole time. An asynchronous one runs while the instructions between its start and its done run; what is left when
its done is reached holds them up. Collectives on the same link of the interconnect come one after another.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from aimv2_jax.aot.collectives import Collective, Collectives
from aimv2_jax.aot.hlo import Instruction, Module
from aimv2_jax.aot.schedule import trip_count


@dataclasses.dataclass
class Played:
    """What became of one run of a computation."""

    compute_s: float = 0.0
    communication_s: float = 0.0  # The sum of all collectives' times, each alone.
    exposed_s: float = 0.0  # What of it nothing hid.
    collectives: list[tuple[Collective, int, float]] = dataclasses.field(default_factory=list)
    """Each with its number of runs a step, and the exposed seconds of one run."""

    @property
    def without_overlap_s(self) -> float:
        return self.compute_s + self.communication_s

    @property
    def with_overlap_s(self) -> float:
        return self.compute_s + self.exposed_s


def play(module: Module, collectives: Collectives, seconds: Callable[[Instruction, str], float]) -> Played:
    """Plays a module's schedule; `seconds(instruction, computation)` is what an instruction computes for."""
    return _play(module, module.entry, collectives, seconds)


def _play(
    module: Module, computation: str, collectives: Collectives, seconds: Callable[[Instruction, str], float]
) -> Played:
    played, now = Played(), 0.0
    free: dict[str, float] = {}  # When each link is free again.
    waiting: dict[str, list[tuple[int, float]]] = {}  # Key -> (place in the list, end) of what is in flight.
    marks = collectives.marks(computation)

    def begin(collective: Collective) -> float:
        start = max([now, *(free.get(link, 0.0) for link in collective.route.links)])
        end = start + collective.route.seconds
        free.update(dict.fromkeys(collective.route.links, end))
        played.communication_s += collective.route.seconds
        played.collectives.append((collective, 1, 0.0))
        return end

    def wait(place: int, end: float) -> float:
        exposed = max(0.0, end - now)
        collective, times, before = played.collectives[place]
        played.collectives[place] = (collective, times, before + exposed)
        played.exposed_s += exposed
        return exposed

    for one in module.computations[computation]:
        for called, times in _bodies(module, one):
            inner = _play(module, called, collectives, seconds)
            played.compute_s += inner.compute_s * times
            played.communication_s += inner.communication_s * times
            played.exposed_s += inner.exposed_s * times
            played.collectives += [(each, count * times, exposed) for each, count, exposed in inner.collectives]
            now += inner.with_overlap_s * times
        for mark in marks.get(one.name, []):
            if mark.role == "done":
                if waiting.get(mark.key):
                    now += wait(*waiting[mark.key].pop(0))
                continue
            end = begin(mark.collective)
            place = len(played.collectives) - 1
            if mark.role == "start":
                waiting.setdefault(mark.key, []).append((place, end))
            else:
                now += wait(place, end)
        took = seconds(one, computation)
        played.compute_s += took
        now += took
    for left in waiting.values():  # A done in the next trip of a loop, or none: what is left is not hidden.
        for place, end in left:
            now += wait(place, end)
    return played


def _bodies(module: Module, one: Instruction) -> list[tuple[str, int]]:
    if one.opcode == "while":
        return [(re.search(r"body=%?([\w.\-]+)", one.rest)[1], trip_count(module, one))]
    if one.opcode == "call":
        return [(re.search(r"to_apply=%?([\w.\-]+)", one.rest)[1], 1)]
    if one.opcode == "conditional":
        return [(re.search(r"(?:branch_computations=\{|true_computation=)%?([\w.\-]+)", one.rest)[1], 1)]
    return []
