"""Dense probes of a small encoder beside its architecture at random weights and the colours of the patches.

    python experiments/dense_study.py --pairs PAIRS --checkpoint runs/comparison/aimv2:last --workdir runs/dense

PAIRS is a folder with SOURCE/{train,test}/00000.tar, as for launch/comparison.sh. Segmentation is of cut-outs pasted on
photographs, depth of rendered rooms (dense_scenes.py). WORKDIR gets the scenes, the metrics and the figures; with
--output FILE.md the tables are written there. A probe whose metrics are in WORKDIR is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from aimv2_jax.cli import Parser, positive  # noqa: E402
from aimv2_jax.data.dataset_info import DATASET_FILE, write_dataset  # noqa: E402
from aimv2_jax.errors import EXIT_FINISHED, cli_main  # noqa: E402
from aimv2_jax.eval.dense.__main__ import main as probe  # noqa: E402
from experiments import dense_scenes  # noqa: E402
from experiments.dense_scenes import CLASSES, SIZE  # noqa: E402

MODELS = {
    "aimv2": "AIMv2",
    "random": "the same architecture at random weights",
    "colours": "the colours of each patch",
}
_SEEDS = {"train": 1, "test": 2}


def make_scenes(workdir: Path, pairs: Path, counts: dict[str, int]) -> None:
    """Writes the datasets cut_outs and rooms, train and test, unless they are there."""
    for split, count in counts.items():
        pasted = dense_scenes.pasted_records(pairs, split, count, _SEEDS[split])
        rendered = dense_scenes.rendered_records(split, count, _SEEDS[split])
        for name, records in (("cut_outs", pasted), ("rooms", rendered)):
            if not (workdir / name / split / DATASET_FILE).is_file():
                write_dataset(workdir / name / split, records)
    (workdir / "classes.txt").write_text("\n".join(CLASSES) + "\n")


def run_probes(workdir: Path, checkpoint: str, flags: Sequence[str]) -> None:
    """Runs the probes whose metrics are missing."""
    tasks = {
        "segmentation": ("cut_outs", "mask", [f"--names={workdir}/classes.txt", f"--classes={len(CLASSES)}"]),
        "depth": ("rooms", "depth", []),
    }
    for task, (name, field, more) in tasks.items():
        for model in MODELS:
            metrics = workdir / f"{task}_{model}.json"
            if metrics.is_file():
                continue
            spec = (
                [f"--checkpoint={checkpoint}"]
                if model == "aimv2"
                else [f"--checkpoint={model}", f"--like={checkpoint}"]
            )
            figures = [f"--predictions={workdir}/{task}_{model}.png"]
            if task == "segmentation":
                figures.append(f"--bars={workdir}/{task}_{model}_bars.png")
            data = [f"--train={workdir}/{name}/train", f"--test={workdir}/{name}/test", f"--map={field}"]
            arguments = [f"--task={task}", *spec, *data, *more, *figures, f"--json={metrics}", *flags]
            print("python -m aimv2_jax.eval.dense", *arguments, flush=True)
            code = probe(arguments)
            if code != EXIT_FINISHED:
                raise SystemExit(code)


def markdown(workdir: Path) -> str:
    """The tables of both tasks, and of IoU by class."""
    results = {
        task: {model: json.loads((workdir / f"{task}_{model}.json").read_text()) for model in MODELS}
        for task in ("segmentation", "depth")
    }
    segmentation, depth = results["segmentation"], results["depth"]
    lines = ["| | mIoU | 95 % | pixel accuracy | mean accuracy |", "| --- | --- | --- | --- | --- |"]
    for model, title in MODELS.items():
        result = segmentation[model]
        figures = [_with_interval(result, "miou"), f"{result['accuracy']:.3f}", f"{result['mean_accuracy']:.3f}"]
        lines.append(f"| {title} | {' | '.join(figures)} |")
    lines += ["", "| | RMSE, m | 95 % | abs-rel | 95 % | δ1 | 95 % |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for model, title in MODELS.items():
        figures = [_with_interval(depth[model], name) for name in ("rmse", "abs_rel", "delta1")]
        lines.append(f"| {title} | {' | '.join(figures)} |")
    lines += ["", f"| IoU | {' | '.join(CLASSES)} |", f"| --- |{' --- |' * len(CLASSES)}"]
    for model, title in MODELS.items():
        of_class = segmentation[model]["iou"]
        lines.append(f"| {title} | {' | '.join(f'{of_class.get(name, 0):.2f}' for name in CLASSES)} |")
    return "\n".join(lines) + "\n"


def _with_interval(result: dict[str, Any], name: str) -> str:
    low, high = result[f"{name}_ci95"]
    return f"{result[name]:.3f} | {low:.3f} to {high:.3f}"


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses the command line; other flags are those of the probes."""
    summary, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python experiments/dense_study.py", description=summary, epilog=epilog)
    add = parser.add_argument
    add("--pairs", required=True, type=Path, metavar="DIR", help="pairs with cut-outs and photographs")
    add("--checkpoint", required=True, metavar="SPEC", help="the encoder")
    add("--workdir", required=True, type=Path, metavar="DIR", help="folder of scenes, metrics and figures")
    add("--train", type=positive, default=800, metavar="N", help="train scenes of each task (default %(default)s)")
    add("--test", type=positive, default=200, metavar="N", help="test scenes of each task (default %(default)s)")
    add("--output", type=Path, metavar="FILE.md", help="also write the tables to this file")
    return parser.parse_known_args(arguments)


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    flags, others = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    make_scenes(flags.workdir, flags.pairs, {"train": flags.train, "test": flags.test})
    sizes = [] if any(other.startswith(("--image-size", "--area")) for other in others) else [f"--image-size={SIZE}"]
    run_probes(flags.workdir, flags.checkpoint, [*sizes, *others])
    tables = markdown(flags.workdir)
    print(tables)
    if flags.output is not None:
        flags.output.write_text(tables)
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
