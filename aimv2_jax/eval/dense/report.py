"""The metrics of a dense probe as lines of text."""

from __future__ import annotations

from typing import Any

from aimv2_jax.eval.dense.settings import DEPTH

_WORST = 5


def summary(result: dict[str, Any]) -> str:
    """The metrics, and the best and worst classes."""
    examples, seconds = result["examples"], result["seconds"]
    count = f"{result['evaluated']:,} test images"

    def with_interval(name: str) -> str:
        low, high = result[f"{name}_ci95"]
        return f"{result[name]:.3f} ({low:.3f} to {high:.3f})"

    if result["task"] == DEPTH:
        figures = f"RMSE {with_interval('rmse')} m, abs-rel {with_interval('abs_rel')}, δ1 {with_interval('delta1')}"
        lines = [f"depth: {figures}, {count}"]
    else:
        figures = f"mIoU {with_interval('miou')}, pixel accuracy {result['accuracy']:.3f}"
        lines = [f"segmentation: {figures}, mean accuracy {result['mean_accuracy']:.3f}, {count}"]
        ordered = sorted(result["iou"].items(), key=lambda item: -item[1])
        parts = [("best", ordered[:_WORST]), ("worst", ordered[_WORST:][-_WORST:])]
        lines += [
            f"{title}: " + ", ".join(f"{name} {value:.2f}" for name, value in part) for title, part in parts if part
        ]
    left_out = {part: sum(faults.values()) for part, faults in result["left_out"].items()}
    lines.append(
        f"trained on {examples['train']:,} images in {seconds['train']:.0f} s, tested in {seconds['test']:.0f} s; "
        f"left out {left_out['train']:,} train and {left_out['test']:,} test samples"
    )
    return "\n".join(lines)
