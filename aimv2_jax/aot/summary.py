"""Summary of many reports in one table: `python -m aimv2_jax.aot.summary FOLDER --output experiments/results/aot.md`.

FOLDER holds the files that `python -m aimv2_jax.aot --json` wrote. exit codes: 0 all steps compile, fit and are split;
2 user error; 3 the table is written, and a step in it does not compile, does not fit or is not split.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

from aimv2_jax.aot.prediction import MIN_SPARE, Figures, Prediction, Refusal
from aimv2_jax.cli import Parser, check_output
from aimv2_jax.console import print_line
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main
from aimv2_jax.storage.files import atomic_write
from aimv2_jax.untrusted import read_json_object

_EXIT_PROBLEMS = 3
_COLUMNS = (
    "experiment | topology | mesh | way | HBM GiB (spare) | TFLOP a chip | recompute | Mcycles | compute ms | step ms "
    "| MFU | MFU with collectives | XLA attention: MFU, with collectives | gradients in "
    "| images/s | a chip | days | chip-days | chip-hours"
)


def summary_text(predictions: Sequence[Prediction], date: str) -> str:
    """Returns a Markdown page of all predictions, in the order given."""
    versions = sorted({", ".join(f"{k} {v}" for k, v in each.outcome.versions.items()) for each in predictions})
    problems = [f"- {problem}" for problem in find_problems(predictions)]
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
        *(f"| {' | '.join(_cells(prediction))} |" for prediction in predictions),
        "",
        *_section("The default compile compared with the full compile", _agreement(predictions)),
        *_section("Traffic between slices", _slice_traffic(predictions)),
        *_section("Problems", problems or ["None: all steps compile, fit in memory and are split."]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _section(heading: str, lines: Sequence[str]) -> list[str]:
    return [f"## {heading}", "", *lines, ""] if lines else []


def _cells(prediction: Prediction) -> list[str]:
    figures = prediction.outcome
    slices = f"{prediction.slices} x " if prediction.slices > 1 else ""
    mesh = ", ".join(f"{axis} {size}" for axis, size in figures.mesh.items() if size > 1)
    way = "full" if prediction.full else "proxy"
    cells = [_name(prediction), f"{slices}{prediction.topology}", mesh, way]
    if isinstance(figures, Refusal):
        return [*cells, f"does not compile: {figures.refusal}", *[""] * (_COLUMNS.count("|") - 4)]
    xla = prediction.xla_attention
    xla_cell = "-"
    if xla:
        xla_cell = (
            f"{xla.predicted_mfu:.3f}, {xla.predicted_mfu_with_comms:.3f}" if xla.compiles else "does not compile"
        )
    return [
        *cells,
        f"{figures.hbm_gib:.2f} of {figures.hbm_limit_gib:.2f} ({figures.hbm_spare:.0%})",
        f"{figures.model_tflops_per_chip:.2f}",
        f"{figures.recompute:+.1%}",
        f"{figures.predicted_mcycles:.1f}",
        f"{figures.predicted_compute_ms:.1f}",
        f"{figures.predicted_ms:.1f}",
        f"{figures.predicted_mfu:.3f}",
        f"{figures.predicted_mfu_with_comms:.3f}",
        xla_cell,
        next(iter(figures.gradient_dtypes), "-"),
        f"{figures.images_per_s:,.0f}",
        f"{figures.images_per_s / figures.num_chips:,.0f}",
        f"{figures.days:.1f}",
        f"{figures.chip_hours / 24:,.0f}",
        f"{figures.chip_hours:,.0f}",
    ]


def _name(prediction: Prediction) -> str:
    """Returns the experiment, its area at native resolution, and the overridden keys."""
    area = [f"{prediction.area} patches"] if prediction.area else []
    changes = [f"{key}={value}" for key, value in prediction.overrides.items()]
    return ", ".join([Path(prediction.config).name.replace(".py", ""), *area, *changes])


def _agreement(predictions: Sequence[Prediction]) -> list[str]:
    """Compares the cycles of steps that were compiled both with a proxy and in full."""

    def key(prediction: Prediction) -> tuple[str, str, int]:
        return _name(prediction), prediction.topology, prediction.slices

    compiled = [prediction for prediction in predictions if isinstance(prediction.outcome, Figures)]
    full = {key(prediction): prediction.outcome.predicted_mcycles for prediction in compiled if prediction.full}
    lines = []
    for prediction in compiled:
        if not prediction.full and key(prediction) in full:
            mcycles, expected = prediction.outcome.predicted_mcycles, full[key(prediction)]
            lines.append(
                f"- {_name(prediction)} on {prediction.topology}: {mcycles:.1f} Mcycles by the proxy, "
                f"{expected:.1f} in full, {mcycles / expected - 1:+.2%}"
            )
    return lines


def _slice_traffic(predictions: Sequence[Prediction]) -> list[str]:
    return [
        f"- {_name(prediction)}, {prediction.slices} x {prediction.topology}: {row.count} x {row.carries}, "
        f"{row.bytes / 1e6:.2f} MB a chip"
        for prediction in predictions
        if isinstance(prediction.outcome, Figures)
        for row in prediction.outcome.between_slices
    ]


def find_problems(predictions: Sequence[Prediction]) -> list[str]:
    """Lists steps that do not compile, leave too little memory, replicate tensors or send too much between slices."""
    problems = []
    for prediction in predictions:
        name = f"{_name(prediction)} on {prediction.topology}"
        outcome = prediction.outcome
        if isinstance(outcome, Refusal):
            problems.append(f"{name} does not compile: {outcome.refusal}")
            continue
        if outcome.hbm_spare < MIN_SPARE:
            problems.append(f"{name} leaves {outcome.hbm_spare:.1%} of the memory free")
        problems += [f"{name} replicates {line}" for line in outcome.replicated]
        for row in outcome.between_slices:
            if row.carries.startswith("other"):
                problems.append(f"{name} sends {row.carries} between slices")
    return problems


def read_predictions(folder: str) -> list[Prediction]:
    """Reads all predictions of a folder, by name; raises UserError if there is none, or for another JSON file."""
    remedy = "Give the folder of python -m aimv2_jax.aot --json FOLDER/NAME.json"
    predictions = []
    for file in sorted(Path(folder).glob("*.json")):
        try:
            predictions.append(Prediction.from_json(read_json_object(file)))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError("not a report of python -m aimv2_jax.aot", str(file), remedy) from error
    if not predictions:
        raise UserError("no reports", folder, remedy)
    return predictions


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m aimv2_jax.aot.summary", description="Writes a table of many reports.")
    parser.add_argument("folder", metavar="FOLDER", help="folder of the reports")
    parser.add_argument("--output", required=True, metavar="FILE.md", help="where the table goes")
    flags = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    check_output(Path(flags.output), ".md")
    predictions = read_predictions(flags.folder)
    atomic_write(flags.output, summary_text(predictions, datetime.date.today().isoformat()).encode())
    print(f"wrote {len(predictions)} reports to {flags.output}")
    if problems := find_problems(predictions):
        print_line(f"error: {len(problems)} problems in {flags.output}, the first: {problems[0]}", sys.stderr)
        return _EXIT_PROBLEMS
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
