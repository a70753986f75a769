"""Summary of many reports in one table: `python -m aimv2_jax.aot.summary FOLDER --output experiments/results/aot.md`.

FOLDER holds the files that `python -m aimv2_jax.aot --json` wrote. exit codes: 0 all steps compile, fit and are split;
2 user error; 3 the table is written, and a step in it does not compile, does not fit or is not split.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aimv2_jax.cli import Parser, check_output
from aimv2_jax.errors import EXIT_FINISHED, TrainingAborted, UserError, cli_main
from aimv2_jax.storage.files import atomic_write

MIN_SPARE = 0.05  # Fraction of a chip's memory that a prediction must leave free, as a margin of error.
_COLUMNS = (
    "experiment | topology | mesh | way | HBM GiB (spare) | TFLOP a chip | recompute | Mcycles | compute ms | step ms "
    "| MFU | MFU with collectives | XLA attention: MFU, with collectives | gradients in | images/s | days | chip-hours"
)


def summary_text(reports: Sequence[dict[str, Any]], date: str) -> str:
    """Returns a Markdown page of all reports, in the order given."""
    versions = sorted({", ".join(f"{k} {v}" for k, v in report["versions"].items()) for report in reports})
    lines = [
        "# Ahead-of-time predictions",
        "",
        "**Every figure here is a prediction by the TPU compiler, made without hardware; none is a measurement.** "
        "Cycles are the compiler's cost model; they exclude contention for HBM and waits between instructions. "
        "Expect hardware to be slower, and trust the order of variants more than the values.",
        "",
        f'{date}; {"; ".join(versions)}. Made by `launch/aot_check.sh`; README, "Ahead of time", explains each column.',
        "",
        f"| {_COLUMNS} |",
        "|" + "---|" * (_COLUMNS.count("|") + 1),
        *(f"| {' | '.join(_cells(report))} |" for report in reports),
        "",
        *_agreement(reports),
        *_slices(reports),
        *_problems(reports),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _cells(figures: dict[str, Any]) -> list[str]:
    slices = f"{figures['slices']} x " if figures["slices"] > 1 else ""
    mesh = ", ".join(f"{axis} {size}" for axis, size in figures["mesh"].items() if size > 1)
    cells = [_name(figures), f"{slices}{figures['topology']}", mesh, "full" if figures["full"] else "twin"]
    if not figures["compiles"]:
        return [*cells, f"does not compile: {figures['refusal']}", *[""] * 12]
    other = figures.get("xla_attention")
    xla = "-"
    if other:
        xla = "does not compile"
        if other["compiles"]:
            xla = f"{other['predicted_mfu']:.3f}, {other['predicted_mfu_with_comms']:.3f}"
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
        xla,
        next(iter(figures["gradient_dtypes"]), "-"),
        f"{figures['images_per_s']:,.0f}",
        f"{figures['days']:.1f}",
        f"{figures['chip_hours']:,.0f}",
    ]


def _name(figures: dict[str, Any]) -> str:
    """Returns the experiment, its area at native resolution, and the overridden keys."""
    area = [f"{figures['area']} patches"] if figures["area"] else []
    changes = [f"{key}={value}" for key, value in figures["overrides"].items()]
    return ", ".join([Path(figures["config"]).stem, *area, *changes])


def _agreement(reports: Sequence[dict[str, Any]]) -> list[str]:
    """Compares the cycles of steps that were compiled both with a proxy and in full."""

    def key(report: dict[str, Any]) -> tuple:
        return (_name(report), report["topology"], report["slices"])

    reports = [report for report in reports if report["compiles"]]
    full = {key(report): report["predicted_mcycles"] for report in reports if report["full"]}
    lines = [
        f"- {_name(report)} on {report['topology']}: {report['predicted_mcycles']:.1f} Mcycles by the twin, "
        f"{full[key(report)]:.1f} in full, {report['predicted_mcycles'] / full[key(report)] - 1:+.2%}"
        for report in reports
        if not report["full"] and key(report) in full
    ]
    return ["## The default compile compared with the full compile", "", *lines, ""] if lines else []


def _slices(reports: Sequence[dict[str, Any]]) -> list[str]:
    """Lists the traffic between slices, by report."""
    lines = [
        f"- {_name(report)}, {report['slices']} x {report['topology']}: {row['count']} x {row['carries']}, "
        f"{row['bytes'] / 1e6:.2f} MB a chip"
        for report in reports
        for row in report.get("between_slices", [])
    ]
    return ["## Traffic between slices", "", *lines, ""] if lines else []


def _problems(reports: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"- {line}" for line in find_problems(reports)]
    return ["## Problems", "", *(lines or ["None: all steps compile, fit in memory and are split."])]


def find_problems(reports: Sequence[dict[str, Any]]) -> list[str]:
    """Lists steps that do not compile, leave too little memory, replicate tensors or send too much between slices."""
    problems = []
    for report in reports:
        name = f"{_name(report)} on {report['topology']}"
        if not report["compiles"]:
            problems.append(f"{name} does not compile: {report['refusal']}")
            continue
        if report["hbm_spare"] < MIN_SPARE:
            problems.append(f"{name} leaves {report['hbm_spare']:.1%} of the memory free")
        problems += [f"{name} replicates {line}" for line in report["replicated"]]
        for row in report["between_slices"]:
            if row["carries"].startswith("other"):
                problems.append(f"{name} sends {row['carries']} between slices")
    return problems


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m aimv2_jax.aot.summary", description="Writes a table of many reports.")
    parser.add_argument("folder", metavar="FOLDER", help="folder of the reports")
    parser.add_argument("--output", required=True, metavar="FILE.md", help="where the table goes")
    flags = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    check_output(Path(flags.output), ".md")
    files = sorted(Path(flags.folder).glob("*.json"))
    if not files:
        raise UserError(
            "no reports", flags.folder, "Give the folder of python -m aimv2_jax.aot --json FOLDER/NAME.json"
        )
    reports = [json.loads(file.read_text()) for file in files]
    atomic_write(flags.output, summary_text(reports, datetime.date.today().isoformat()).encode())
    print(f"wrote {len(reports)} reports to {flags.output}")
    if problems := find_problems(reports):
        raise TrainingAborted(f"{len(problems)} problems, the first: {problems[0]}")
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
