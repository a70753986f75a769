"""Verifies the checkpoints of a run: compares every file of every step with the step's manifest.

    python -m aimv2_jax.checkpoint.verify WORKDIR [--step N ...] [--json FILE]

Prints a line a step: intact, or damaged, with each file and its problem: missing, extra, wrong size, or other contents.
Changes nothing, and does not disturb a running trainer. The exit code is 0 if all steps are intact, and 2 otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from aimv2_jax.checkpoint.checkpointer import CheckpointReader
from aimv2_jax.checkpoint.manifest import FileProblem
from aimv2_jax.checkpoint.metadata import DamagedStep, StepVanished, list_steps
from aimv2_jax.cli import Parser, check_output
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main
from aimv2_jax.platforms import skip_absent_tpu

INTACT, DAMAGED = "intact", "damaged"


@dataclasses.dataclass(frozen=True)
class Finding:
    """Result of verifying a step."""

    step: int
    state: str
    wrong: tuple[FileProblem, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"step {self.step}: {self.state}", *(f"  {wrong}" for wrong in self.wrong)])


def examine(reader: CheckpointReader, step: int) -> Finding | None:
    """Verifies a step; None if a trainer deleted it meanwhile. Shows a progress bar on a terminal."""
    with tqdm(unit="B", unit_scale=True, desc=f"step {step}", leave=False, disable=None) as bar:
        try:
            reader.verify(step, bar.update)
            return Finding(step, INTACT)
        except DamagedStep as error:
            return Finding(step, DAMAGED, error.wrong)
        except StepVanished:
            return None


def check(findings: Sequence[Finding], workdir: str) -> None:
    """Raises `UserError` unless all steps are intact."""
    damaged = [str(finding.step) for finding in findings if finding.state == DAMAGED]
    if damaged:
        remedy = "Use another step; at its next start the run sets them aside and goes on from the newest intact one"
        raise UserError(f"damaged checkpoints in {workdir}", f"steps {', '.join(damaged)}", remedy)


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    parser = Parser(prog="python -m aimv2_jax.checkpoint.verify", description=__doc__)
    parser.add_argument("workdir", metavar="WORKDIR", help="folder of a training run, or of an export with checkpoints")
    parser.add_argument("--step", type=int, nargs="+", metavar="N", help="verify only these steps (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings to this file")
    flags = parser.parse_args(arguments)
    if flags.json:
        check_output(flags.json, flag="--json")
    reader = CheckpointReader(flags.workdir)
    steps = reader.steps()
    if not steps:
        raise UserError("the folder has no checkpoints", flags.workdir, "Give the --workdir of a training run")
    for step in flags.step or ():
        if step not in steps:
            raise UserError("--step: the run has no such step", step, list_steps(steps))
    findings = []
    for step in sorted(set(flags.step or steps)):
        finding = examine(reader, step)
        if finding is not None:
            findings.append(finding)
            print(finding, flush=True)
    aside = reader.set_aside()
    if aside:
        print(f"set aside before: {', '.join(aside)}")
    if flags.json:
        report = {"steps": [dataclasses.asdict(finding) for finding in findings], "set_aside": aside}
        flags.json.write_text(json.dumps(report, indent=1) + "\n")
    check(findings, flags.workdir)
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
