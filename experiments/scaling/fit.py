"""Fits a scaling law to the finished cooldowns of a study and plots it.

    python experiments/scaling/fit.py --workdir=runs/scaling

The law is L = E + A / N^a + B / D^b for the held-out loss after D samples with N encoder parameters (all sizes have the
same decoder). fit.json, in the folder of the figures, gets the printed values with the 95 % interval of each parameter
and the residual of each point; null means that the points do not bound that end.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from etils import epath  # noqa: E402

from aimv2_jax.checkpoint.checkpointer import CheckpointReader  # noqa: E402
from aimv2_jax.checkpoint.metadata import measured_on  # noqa: E402
from aimv2_jax.cli import Parser, make_output_folder  # noqa: E402
from aimv2_jax.config.load import build_config, config_to_dict  # noqa: E402
from aimv2_jax.config.schema import Config  # noqa: E402
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main  # noqa: E402
from aimv2_jax.monitoring.metrics import read_metrics  # noqa: E402
from aimv2_jax.platforms import skip_absent_tpu  # noqa: E402
from experiments.scaling.figures import Point, loss_against_compute, loss_against_samples, short  # noqa: E402
from experiments.scaling.law import LEVEL, NAMES, Fit, fit  # noqa: E402
from experiments.scaling.study import Run, cooldown_folders  # noqa: E402


def read_points(workdir: epath.PathLike, loss: str) -> tuple[list[Point], list[str]]:
    """Returns the finished cooldowns of a study by size and samples, and the others with the reasons to leave them out.

    Raises:
      UserError: if there is none, or if losses were measured on different data.
    """
    points, left_out, measured = [], [], {}
    for folder in cooldown_folders(workdir):
        name = f"{folder.parent.name}/{folder.name}"
        reader = CheckpointReader(folder)
        latest = reader.latest_step()
        config = None if latest is None else build_config(reader.meta(latest)["config"])
        if config is None or latest < config.train.steps:
            left_out.append(f"{name}: not finished")
            continue
        lines = [line for line in read_metrics(folder)[1] if line["step"] == config.train.steps]
        value = lines[-1].get(loss) if lines else None
        if value is None:
            left_out.append(f"{name}: no {loss} after its last step")
            continue
        measured[_measure(config)] = name
        run = Run(folder.parent.name, folder, config, ())
        points.append(Point(run.size, run.parameters[0], run.samples, run.flops, value))
    if len(measured) > 1:
        names = " and ".join(list(measured.values())[:2])
        raise UserError(
            "held-out losses were measured on different data", names, "Give a folder of runs with the same evaluation"
        )
    if not points:
        why = left_out[0] if left_out else "no cooldown was begun"
        raise UserError("no point of the study", why, "Train the runs with experiments/scaling/grid.py --start")
    return sorted(points, key=lambda point: (point.parameters, point.samples)), left_out


def _measure(config: Config) -> str:
    """Returns the evaluation data and the loss weights of a held-out loss, for comparison."""
    tree = config_to_dict(config)
    return json.dumps([measured_on(tree["eval"]), tree["loss"]], sort_keys=True)


def report(points: Sequence[Point], fitted: Fit, loss: str, left_out: Sequence[str]) -> dict:
    """Returns the content of fit.json."""
    rows = [
        dataclasses.asdict(point) | {"residual": round(float(residual), 6), "weight": round(float(weight), 4)}
        for point, residual, weight in zip(points, fitted.residuals, fitted.weights)
    ]
    return {
        "law": "L = E + A / N^a + B / D^b; N: encoder parameters, D: samples",
        "loss": loss,
        "values": dataclasses.asdict(fitted.law),
        "intervals": fitted.intervals,
        "level": LEVEL,
        "points": rows,
        "left_out": list(left_out),
    }


def text(points: Sequence[Point], fitted: Fit, left_out: Sequence[str]) -> str:
    """Returns the report as text."""
    lines = []
    for name in NAMES:
        ends = ["not bounded" if end is None else f"{end:.4g}" for end in fitted.intervals[name]]
        lines.append(f"{name} = {getattr(fitted.law, name):.4g}  ({LEVEL:.0%}: {ends[0]} to {ends[1]})")
    lines.append("residual: log(loss / law); weight: below 1 for outliers")
    for point, residual, weight in zip(points, fitted.residuals, fitted.weights):
        label = f"{point.size:>8}  N {short(point.parameters):>5}  D {short(point.samples):>5}"
        lines.append(f"{label}  loss {point.loss:.4f}  residual {residual:+.4f}  weight {weight:.2f}")
    return "\n".join([*lines, *(f"left out: {reason}" for reason in left_out)])


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    summary, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python experiments/scaling/fit.py", description=summary, epilog=epilog)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the --workdir of experiments/scaling/grid.py")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where fit.json and figures go (default: WORKDIR)")
    parser.add_argument(
        "--loss", default="eval_loss", metavar="NAME", help="key in metrics.jsonl (default %(default)s)"
    )
    flags = parser.parse_args(arguments)
    output = epath.Path(flags.workdir) if flags.output is None else flags.output
    if flags.output is not None:
        make_output_folder(flags.output)
    points, left_out = read_points(flags.workdir, flags.loss)
    fitted = fit(
        [point.parameters for point in points], [point.samples for point in points], [point.loss for point in points]
    )
    print(text(points, fitted, left_out))
    (output / "fit.json").write_text(json.dumps(report(points, fitted, flags.loss, left_out), indent=1) + "\n")
    law = fitted.law
    note = f"L = {law.E:.3g} + {law.A:.3g} / N^{law.a:.3g} + {law.B:.3g} / D^{law.b:.3g}"
    note += f", {len(points)} points\nN: parameters of the encoder, D: samples"
    for name, draw in (("loss_by_samples", loss_against_samples), ("loss_by_compute", loss_against_compute)):
        with (output / f"{name}.png").open("wb") as file:
            draw(points, law, f"held-out {flags.loss.removeprefix('eval_')}", note).savefig(file, dpi=150, format="png")
    print(f"wrote fit.json, loss_by_samples.png and loss_by_compute.png to {output}")
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
