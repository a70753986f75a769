"""Whether the checkpoints of a run are what was saved: every file of every step, compared with its manifest.

    python -m aimv2_jax.train.verify WORKDIR [--step N ...] [--json FILE]

Prints a line a step: intact, without a manifest (an older aimv2_jax wrote it, so nothing can be said), or damaged, with
each file and what is wrong with it: missing, extra, its size, or other contents. Changes nothing, and does not disturb
a trainer at work there. The exit code is 0 where all are intact, and 2 otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from aimv2_jax.errors import EXIT_FINISHED, UserError, reports_user_errors
from aimv2_jax.flags import Parser, check_output
from aimv2_jax.platforms import skip_absent_tpu
from aimv2_jax.train.checkpoint import CheckpointReader
from aimv2_jax.train.manifest import Wrong
from aimv2_jax.train.step_meta import DamagedStep, StepVanished, there

INTACT, UNVERIFIED, DAMAGED = "intact", "no manifest", "damaged"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What is known of a step after all of it was read."""

    step: int
    state: str
    wrong: tuple[Wrong, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"step {self.step}: {self.state}", *(f"  {wrong}" for wrong in self.wrong)])


def examine(reader: CheckpointReader, step: int) -> Finding | None:
    """Reads a step; None where a trainer deleted it meanwhile. Shows its progress on a terminal."""
    with tqdm(unit="B", unit_scale=True, desc=f"step {step}", leave=False, disable=None) as bar:
        try:
            return Finding(step, INTACT if reader.verify(step, bar.update) else UNVERIFIED)
        except DamagedStep as error:
            return Finding(step, DAMAGED, error.wrong)
        except StepVanished:
            return None


def check(findings: Sequence[Finding], workdir: str) -> None:
    """Raises `UserError` unless all are intact."""
    named = {
        state: ", ".join(str(finding.step) for finding in findings if finding.state == state)
        for state in (DAMAGED, UNVERIFIED)
    }
    if named[DAMAGED]:
        remedy = "Use another step; the run sets them aside when it goes on from the newest intact one"
        raise UserError(f"damaged checkpoints in {workdir}", f"steps {named[DAMAGED]}", remedy)
    if named[UNVERIFIED]:
        remedy = "An older aimv2_jax wrote them, without a manifest; those of this one have it"
        raise UserError(f"checkpoints in {workdir} that cannot be verified", f"steps {named[UNVERIFIED]}", remedy)


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    parser = Parser(prog="python -m aimv2_jax.train.verify", description=__doc__)
    parser.add_argument("workdir", metavar="WORKDIR", help="of a training run, or an export with checkpoints")
    parser.add_argument("--step", type=int, nargs="+", metavar="N", help="only these; all steps, unless given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the findings are written, beside the screen")
    flags = parser.parse_args(arguments)
    if flags.json:
        check_output(flags.json, flag="--json")
    reader = CheckpointReader(flags.workdir)
    steps = reader.steps()
    if not steps:
        raise UserError("the folder has no checkpoints", flags.workdir, "Give the --workdir of a training run")
    for step in flags.step or ():
        if step not in steps:
            raise UserError("--step: the run has no such step", step, there(steps))
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
