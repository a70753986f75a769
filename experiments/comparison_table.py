"""Tables of the comparison, from the JSON files that launch/comparison.sh writes.

python experiments/comparison_table.py runs/comparison
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
    """Returns two tables: top-1 with its interval, with all categories and without two; and top-1 by source.

    Args:
      folder: contains MODEL.json and MODEL_without.json, as `aimv2_jax.eval.probes --by source --json` writes them.
    """
    probes_by_model = {
        name: (_read(folder / f"{model}.json"), _read(folder / f"{model}_without.json"))
        for model, name in MODELS.items()
    }
    aimv2 = probes_by_model[MODELS["aimv2"]]
    # All rows use the same images, so the floor is the same.
    probes_by_model[FLOOR] = tuple(probe["floor"] for probe in aimv2)
    whole = [
        [name, *(cell for probe in probes for cell in (f"{probe['top1']:.3f}", _interval(probe["ci95"])))]
        for name, probes in probes_by_model.items()
    ]
    sources = aimv2[0]["by"]
    by_source = [
        [
            source,
            str(sources[source]["examples"]),
            *(f"{probes[0]['by'][source]['top1']:.3f}" for probes in probes_by_model.values()),
        ]
        for source in sources
    ]
    heading = ["", *(cell for probe in aimv2 for cell in (f"{len(probe['per_class'])} categories", "95 %"))]
    return f"{_table(heading, whole)}\n\n{_table(['source', 'images', *probes_by_model], by_source)}\n"


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
