"""Choice of how to run a config on rented chips: candidates are compiled, and ranked by their predicted cost."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence

from aimv2_jax.aot.candidates import REMATS, Candidate, enumerate_candidates
from aimv2_jax.aot.predict import GIB, predict_step
from aimv2_jax.aot.prediction import MIN_SPARE, Figures, Refusal
from aimv2_jax.aot.report import money
from aimv2_jax.aot.topology import Topology, parse_topology
from aimv2_jax.config.schema import Config
from aimv2_jax.errors import UserError
from aimv2_jax.parallel.hardware import find_chip

_HEADER = ("candidate", "HBM GiB", "spare", "step ms", "MFU", "with coll.", "chip-hours")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A compiled candidate; the outcome is an error where there is no step to compile, or libtpu cannot print it."""

    candidate: Candidate
    outcome: Figures | Refusal | UserError

    @property
    def fits(self) -> bool:
        """Whether it compiles and leaves the memory free that a prediction may be wrong by."""
        return isinstance(self.outcome, Figures) and self.outcome.hbm_spare >= MIN_SPARE

    @property
    def rank(self) -> tuple[bool, float]:
        """Sorts choices: those that fit first, the cheapest first."""
        hours = self.outcome.chip_hours if isinstance(self.outcome, Figures) else math.inf
        return not self.fits, hours


def parse_chips(chips: str, topology: str | None, slices: int) -> Topology:
    """Returns the slices that `--chips` names: CHIP:SHAPE, or CHIP:COUNT with the most cubic shape or `topology`.

    The count is that of one slice.

    Raises:
      UserError: for a chip that the table lacks, or a topology of another chip or another number of chips.
    """
    match = re.fullmatch(r"(\w+):(\d{1,6})", chips)
    if not match or int(match[2]) < 1:
        found = parse_topology(chips, slices, "--chips")
    else:
        chip, count = find_chip(match[1], "--chips"), int(match[2])
        found = parse_topology(f"{chip.name}:{'x'.join(map(str, cubic_shape(count, chip.torus_axes)))}", slices)
    if topology is None:
        return found
    given = parse_topology(topology, slices)
    if given.chip != found.chip or given.chips_per_slice != found.chips_per_slice:
        raise UserError(
            "--topology is not made of the chips of --chips",
            f"{topology} has {given.chips_per_slice} {given.chip.name} chips, --chips is {chips}",
            f"Give a shape of {found.chips_per_slice} chips, such as --topology={found.name}, or leave it out",
        )
    return given


def cubic_shape(count: int, axes: int) -> tuple[int, ...]:
    """Returns the shape of `count` chips whose sizes differ least, ascending, as libtpu names it: axes of one last."""
    divisors = [size for size in range(1, count + 1) if count % size == 0]
    shapes = itertools.combinations_with_replacement(divisors, axes)
    shape = min((shape for shape in shapes if math.prod(shape) == count), key=lambda shape: shape[-1] / shape[0])
    return shape if axes == 2 else tuple(sorted(shape, key=lambda size: (size == 1, size)))


def choose(
    configure: Callable[[Mapping[str, str]], Config],
    topology: Topology,
    fixed: Mapping[str, str],
    count: int,
    full: bool,
    report: Callable[[str], None],
) -> list[Choice]:
    """Compiles up to `count` candidates, and returns them, the cheapest that fits first.

    Of each mesh and number of passes the candidate with the least recomputation that may fit is compiled; where it
    does not fit, so is the one with the next more.

    Args:
      configure: builds the config with further keys, given with their text.
      fixed: keys that the user has set: all candidates have them.
      report: takes a line before each compilation.

    Raises:
      UserError: if nothing fits, naming the least that is needed; or the error of a candidate that has no step.
    """
    candidates = enumerate_candidates(configure({}), topology, fixed)
    limit = topology.chip.hbm_limit_bytes * (1 - MIN_SPARE)
    least = min(candidates, key=lambda candidate: candidate.num_bytes)
    waiting = [candidate for candidate in candidates if candidate.may_fit(limit)]
    choices: list[Choice] = []
    while waiting and len(choices) < count:
        candidate = _next(waiting)
        report(f"{len(choices) + 1} of at most {count}: {candidate.name}, ~{candidate.num_bytes / GIB:.1f} GiB")
        choices.append(Choice(candidate, _outcome(configure(candidate.overrides), topology, full)))
        same = [other for other in waiting if _shape(other) == _shape(candidate)]
        done = same if choices[-1].fits else [candidate]
        waiting = [other for other in waiting if other not in done]
    choices.sort(key=lambda choice: choice.rank)
    if not choices or not choices[0].fits:
        errors = [choice.outcome for choice in choices if isinstance(choice.outcome, UserError)]
        raise errors[0] if errors else UserError(*_nothing_fits(choices, least, topology))
    return choices


def _outcome(config: Config, topology: Topology, full: bool) -> Figures | Refusal | UserError:
    try:
        return predict_step(config, topology, full)
    except UserError as error:
        if error.what.startswith("--topology"):  # No candidate can be compiled.
            raise
        return error


def _shape(candidate: Candidate) -> tuple[int, int]:
    return candidate.fsdp, candidate.passes


def _next(waiting: Sequence[Candidate]) -> Candidate:
    """Returns the fastest estimate among the least recomputation of each mesh and number of passes."""
    first: dict[tuple[int, int], Candidate] = {}
    for candidate in sorted(waiting, key=lambda candidate: REMATS.index(candidate.remat)):
        first.setdefault(_shape(candidate), candidate)
    return min(first.values(), key=lambda candidate: candidate.seconds)


def _nothing_fits(choices: Sequence[Choice], least: Candidate, topology: Topology) -> tuple[str, str, str]:
    limit = topology.chip.hbm_limit_bytes / GIB
    compiled = [choice for choice in choices if isinstance(choice.outcome, Figures)]
    need, name = least.num_bytes / GIB, f"by estimate {least.name}"
    if compiled:
        smallest = min(compiled, key=lambda choice: choice.outcome.hbm_gib)
        need, name = smallest.outcome.hbm_gib, smallest.candidate.name
    value = f"{topology.name}: the least is {need:.1f} GiB of {limit:.1f}, {name}"
    if choices and not compiled:
        value += f"; the compiler says: {_reason(choices[0].outcome)[:120]}"
    remedy = "Take more chips or chips with more memory, a smaller data.batch_size, or more --candidates"
    return f"none of {len(choices)} compiled candidates fits with {MIN_SPARE:.0%} to spare", value, remedy


def _reason(outcome: Refusal | UserError) -> str:
    return outcome.refusal if isinstance(outcome, Refusal) else str(outcome)


def choice_lines(
    choices: Sequence[Choice],
    topology: Topology,
    config: str,
    overrides: Mapping[str, str],
    price: float | None,
    area: int | None = None,
) -> list[str]:
    """Returns the table of candidates, and the flags that make the first of them.

    Args:
      config: the experiment, as on the command line.
      overrides: what the user has set besides.
      price: of a chip-hour; None leaves the money out.
      area: the area that was compiled, if the user has named one.
    """
    rows = [(*_HEADER, "cost") if price else _HEADER]
    for choice in choices:
        rows.append(_cells(choice, price))
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(rows[0]))]
    lines = [
        f"PREDICTIONS by the TPU compiler, not measurements: {topology.slices} x {topology.name}, "
        f"{topology.num_chips} chips, HBM by device, {len(choices)} candidates compiled, the cheapest first",
        "",
    ]
    for row in rows:
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    keys = {**overrides, **choices[0].candidate.overrides}
    if topology.slices > 1:
        keys["mesh.slices"] = str(topology.slices)
    flags = " ".join([f"--config={config}", *(f"--config.{key}={value}" for key, value in keys.items())])
    described = f"--topology={topology.name}"
    if topology.slices > 1:
        described += f" --slices={topology.slices}"
    if area:
        described += f" --area={area}"
    return [
        *lines,
        "",
        "the first, to train and to predict:",
        f"  python -m aimv2_jax.main {flags} --workdir=DIR",
        f"  python -m aimv2_jax.aot {described} {flags}",
    ]


def _cells(choice: Choice, price: float | None) -> tuple[str, ...]:
    figures = choice.outcome
    if not isinstance(figures, Figures):
        return choice.candidate.name, f"does not compile: {_reason(figures)[:60]}"
    cells = (
        choice.candidate.name + ("" if choice.fits else " (too little memory left)"),
        f"{figures.hbm_gib:.2f}",
        f"{figures.hbm_spare:.0%}",
        f"{figures.predicted_ms:.1f}",
        f"{figures.predicted_mfu:.3f}",
        f"{figures.predicted_mfu_with_comms:.3f}",
        f"{figures.chip_hours:,.0f}",
    )
    return (*cells, money(figures.chip_hours * price)) if price else cells
