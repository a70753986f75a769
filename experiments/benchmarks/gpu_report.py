"""Makes the Markdown of a GPU's figures from the JSON files of `gpu.sh`.

    python experiments/benchmarks/gpu_report.py OUT > experiments/results/gpu.md

A step without a file failed or did not run; the report names it. Needs no jax.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from aimv2_jax.cli import Parser  # noqa: E402
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main  # noqa: E402

STEPS = ("jax", "torch", "native", "attention", "first", "resumed", "golden", "torch_golden")


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The lines of the steps that have one.

    Raises:
      UserError: if there is none, or if one is no JSON object.
    """
    lines = {}
    for name in STEPS:
        path = folder / f"{name}.json"
        if path.is_file():
            try:
                lines[name] = dict(json.loads(path.read_text()))
            except (ValueError, TypeError) as error:
                raise UserError("a result is no JSON object", path, "Run gpu.sh again") from error
    if not lines:
        raise UserError("the folder has no results", folder, "Run bash experiments/benchmarks/gpu.sh OUT")
    return lines


def report(lines: dict[str, dict[str, Any]], date: str) -> str:
    """The report of the lines of `read`."""
    jax, torch = lines.get("jax"), lines.get("torch")
    source = jax or next(iter(lines.values()))
    parts = [
        "# The train step on one GPU",
        f"`bash experiments/benchmarks/gpu.sh OUT GOLDEN`, {date}; {source.get('device', 'device unknown')}"
        + "".join(f", {name} {line[name]}" for name, line in (("jax", jax), ("torch", torch)) if line),
    ]
    if jax or torch:
        rows = ["| | batch | images/s | MFU | memory GiB | compile s |", "|---|---|---|---|---|---|"]
        rows += [_row(name, lines[key], jax) for name, key in (("JAX", "jax"), ("PyTorch", "torch")) if key in lines]
        if "native" in lines:
            rows.append(_row("JAX, 4,096 patches an image", lines["native"], lines["native"]))
        parts.append("\n".join(rows))
    if jax and torch:
        ratio = jax["images_per_s"] / torch["images_per_s"]
        equal = jax["batch"] == torch["batch"]
        parts.append(f"JAX makes {ratio:.2f} x the images of PyTorch" + ("." if equal else ", at another batch."))
    checks = {
        "attention": "attention against the dense mask",
        "golden": "losses and gradients against the reference",
        "torch_golden": "PyTorch's losses, gradients and steps against the reference",
    }
    texts = [_check(text, lines[key]) for key, text in checks.items() if key in lines]
    if "resumed" in lines:
        same = "the same bits as" if lines["resumed"]["passed"] else "OTHER BITS than"
        texts.append(f"- 20 steps, of which the last 10 in a new process from the saved state: {same} 20 in a row")
    parts += ["\n".join(texts)] if texts else []
    missing = [name for name in STEPS if name not in lines]
    if missing:
        parts.append(f"Without a result: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def _row(name: str, line: dict[str, Any], flops_of: dict[str, Any] | None) -> str:
    """A row of the table; PyTorch's MFU is by the FLOPs and the peak of JAX's line."""
    mfu = line.get("mfu")
    if mfu is None and flops_of and flops_of.get("mfu"):
        mfu = flops_of["mfu"] * line["images_per_s"] / flops_of["images_per_s"]
    figures = (f"{line['images_per_s']:.1f}", *(f"{x:.3g}" if x is not None else "" for x in (mfu, line["memory_gib"])))
    return f"| {name} | {line['batch']} | {' | '.join(figures)} | {line['compile_s']:.0f} |"


def _check(text: str, line: dict[str, Any]) -> str:
    errors = line.get("errors") or line.get("largest_errors") or {}
    outcome = "passed" if line.get("passed", True) else "FAILED"
    return f"- {text}: {outcome}; largest errors: {', '.join(f'{name} {error:.1e}' for name, error in errors.items())}"


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder that gpu.sh wrote to")
    flags = parser.parse_args(arguments)
    print(report(read(flags.folder), datetime.date.today().isoformat()), end="")
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
