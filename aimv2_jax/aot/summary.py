"""Many reports as one table: `python -m aimv2_jax.aot.summary FOLDER --output experiments/results/aot.md`.

FOLDER holds the files that `python -m aimv2_jax.aot --json` wrote. exit codes: 0 all compile and split what they
should; 2 you can mend it; 3 the table is written, and something in it does not compile, fit or split.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aimv2_jax.errors import EXIT_FINISHED, GuardStop, UserError, reports_user_errors
from aimv2_jax.files import write_whole
from aimv2_jax.flags import Parser, check_output

LEAST_SPARE = 0.05  # Of a chip's memory: what a prediction should leave for what it does not know.
_COLUMNS = (
    "experiment | topology | mesh | way | HBM GiB (spare) | TFLOP a chip | recompute | Mcycles | compute ms | step ms "
    "| MFU | MFU with collectives | XLA attention: MFU, with collectives | gradients in | images/s | days | chip-hours"
)


def summary_text(reports: Sequence[dict[str, Any]], date: str) -> str:
    """A Markdown page of all reports, in the order given."""
    versions = sorted({", ".join(f"{k} {v}" for k, v in each["versions"].items()) for each in reports})
    lines = [
        "# Ahead-of-time predictions",
        "",
        "**Every figure here is a prediction by the TPU compiler, made without hardware; none is a measurement.** "
        "Cycles are the compiler's cost model; they leave out contention for HBM and waits between instructions. "
        "Expect hardware to be slower, and trust the order of variants more than the values.",
        "",
        f'{date}; {"; ".join(versions)}. Made by `launch/aot_check.sh`; README, "Ahead of time", says what each means.',
        "",
        f"| {_COLUMNS} |",
        "|" + "---|" * (_COLUMNS.count("|") + 1),
        *(f"| {' | '.join(_cells(each))} |" for each in reports),
        "",
        *_agreement(reports),
        *_slices(reports),
        *_offenders(reports),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _cells(figures: dict[str, Any]) -> list[str]:
    slices = f"{figures['slices']} x " if figures["slices"] > 1 else ""
    mesh = ", ".join(f"{axis} {size}" for axis, size in figures["mesh"].items() if size > 1)
    cells = [_name(figures), f"{slices}{figures['topology']}", mesh, "full" if figures["full"] else "twin"]
    if not figures["compiles"]:
        return [*cells, f"does not compile: {figures['refusal']}", *[""] * 12]
    other = figures.get("xla_attention")
    beside = "-"
    if other:
        beside = "does not compile"
        if other["compiles"]:
            beside = f"{other['predicted_mfu']:.3f}, {other['predicted_mfu_with_comms']:.3f}"
    return [
        *cells,
        f"{figures['hbm_gib']:.2f} of {figures['hbm_limit_gib']:.2f} ({figures['hbm_spare']:.0%})",
        f"{figures['model_tflops_per_chip']:.2f}",
        f"{figures['recompute']:+.1%}",
        f"{figures['predicted_mcycles']:.1f}",
        f"{figures['predicted_compute_ms']:.1f}",
        f"{figures['predicted_ms']:.1f}",
        f"{figures['predicted_mfu']:.3f}",
        f"{figures['predicted_mfu_with_comms']:.3f}",
        beside,
        next(iter(figures["gradient_dtypes"]), "-"),
        f"{figures['images_per_s']:,.0f}",
        f"{figures['days']:.1f}",
        f"{figures['chip_hours']:,.0f}",
    ]


def _name(figures: dict[str, Any]) -> str:
    """The experiment, its area at native resolution, and the keys that were set."""
    area = [f"{figures['area']} patches"] if figures["area"] else []
    changes = [f"{key}={value}" for key, value in figures["overrides"].items()]
    return ", ".join([Path(figures["config"]).stem, *area, *changes])


def _agreement(reports: Sequence[dict[str, Any]]) -> list[str]:
    """Where one step was compiled both ways, how far they are apart."""

    def key(each: dict[str, Any]) -> tuple:
        return (_name(each), each["topology"], each["slices"])

    reports = [each for each in reports if each["compiles"]]
    full = {key(each): each["predicted_mcycles"] for each in reports if each["full"]}
    lines = [
        f"- {_name(each)} on {each['topology']}: {each['predicted_mcycles']:.1f} Mcycles by the twin, "
        f"{full[key(each)]:.1f} in full, {each['predicted_mcycles'] / full[key(each)] - 1:+.2%}"
        for each in reports
        if not each["full"] and key(each) in full
    ]
    return ["## The default way beside the full compile", "", *lines, ""] if lines else []


def _slices(reports: Sequence[dict[str, Any]]) -> list[str]:
    """What crosses slices, by report."""
    lines = [
        f"- {_name(each)}, {each['slices']} x {each['topology']}: {row['count']} x {row['carries']}, "
        f"{row['bytes'] / 1e6:.2f} MB a chip"
        for each in reports
        for row in each.get("between_slices", [])
    ]
    return ["## What crosses slices", "", *lines, ""] if lines else []


def _offenders(reports: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"- {line}" for line in offenders(reports)]
    return ["## What is not as it should be", "", *(lines or ["Nothing: all compile, fit and split what they should."])]


def offenders(reports: Sequence[dict[str, Any]]) -> list[str]:
    """What does not compile, leaves too little memory, or is replicated."""
    found = []
    for each in reports:
        name = f"{_name(each)} on {each['topology']}"
        if not each["compiles"]:
            found.append(f"{name} does not compile: {each['refusal']}")
            continue
        if each["hbm_spare"] < LEAST_SPARE:
            found.append(f"{name} leaves {each['hbm_spare']:.1%} of the memory")
        found += [f"{name} replicates {line}" for line in each["replicated"]]
        for row in each["between_slices"]:
            if row["carries"].startswith("other"):
                found.append(f"{name} sends {row['carries']} between slices")
    return found


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m aimv2_jax.aot.summary", description="Reports as one table.")
    parser.add_argument("folder", metavar="FOLDER", help="where the reports are")
    parser.add_argument("--output", required=True, metavar="FILE.md", help="the table")
    flags = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    check_output(Path(flags.output), ".md")
    files = sorted(Path(flags.folder).glob("*.json"))
    if not files:
        raise UserError(
            "no reports", flags.folder, "Name the folder of python -m aimv2_jax.aot --json FOLDER/NAME.json"
        )
    reports = [json.loads(file.read_text()) for file in files]
    write_whole(flags.output, summary_text(reports, datetime.date.today().isoformat()).encode())
    print(f"{len(reports)} reports in {flags.output}")
    if found := offenders(reports):
        raise GuardStop(f"{len(found)} findings, the first: {found[0]}")
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
