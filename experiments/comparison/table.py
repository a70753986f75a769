"""The comparison's tables, of the figures that launch/comparison.sh leaves.

python experiments/comparison/table.py runs/comparison
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODELS = {
    "aimv2": "AIMv2, both captions",
    "aimv2_alt": "AIMv2, alt-text alone",
    "captioning": "captioning (α = 0), both captions",
    "random": "the same architecture at random weights",
}
FLOOR = "nearest 16 × 16 pixels"


def markdown(folder: Path) -> str:
    """Two tables: top-1 with its interval, with all categories and without two; and top-1 by source.

    Args:
      folder: that of MODEL.json and MODEL_without.json, as `aimv2_jax.eval.probes --by source --json` writes them.
    """
    found = {
        name: (_read(folder / f"{model}.json"), _read(folder / f"{model}_without.json"))
        for model, name in MODELS.items()
    }
    ours = found[MODELS["aimv2"]]
    found[FLOOR] = tuple(probe["floor"] for probe in ours)  # The same pictures in every row: the same floor.
    whole = [
        [name, *(cell for probe in probes for cell in (f"{probe['top1']:.3f}", _interval(probe["ci95"])))]
        for name, probes in found.items()
    ]
    sources = ours[0]["by"]
    apart = [
        [
            source,
            str(sources[source]["examples"]),
            *(f"{probes[0]['by'][source]['top1']:.3f}" for probes in found.values()),
        ]
        for source in sources
    ]
    heading = ["", *(cell for probe in ours for cell in (f"{len(probe['per_class'])} categories", "95 %"))]
    return f"{_table(heading, whole)}\n\n{_table(['source', 'pictures', *found], apart)}\n"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _interval(bounds: Sequence[float]) -> str:
    low, high = bounds
    return f"{low:.3f} to {high:.3f}"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(markdown(Path(sys.argv[1])))
