"""Held-out losses of runs on the same images, and their differences from the first run, with bootstrap intervals.

python experiments/heldout_intervals.py runs/distill/pairs_alone:last runs/distill/pairs:last

Losses are those of `aimv2_jax.eval.heldout`: sums over images divided by counts. The bootstrap draws images, the same
ones for every run, so that a difference has the interval of pairs. N images, R draws.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aimv2_jax.cli import Parser
from aimv2_jax.data.pipeline import evaluation_batches
from aimv2_jax.errors import cli_main
from aimv2_jax.eval.bootstrap import limits_95, resampled_sums
from aimv2_jax.eval.heldout import image_sums, text_sums
from aimv2_jax.pretrained.model import PretrainedModel, load
from aimv2_jax.train.evaluate import fixed_prefixes

DRAWS = 2000

Sums = Float[np.ndarray, "N 2"]
"""Sum of a loss and number of its terms, by image."""


def losses_by_image(loaded: PretrainedModel) -> dict[str, Sums]:
    """The image and text loss of every held-out image, with its captions of all evaluated kinds."""
    loaded = loaded.with_eval(batch_size=1, max_examples=None)
    task, params, config = loaded.task, loaded.params, loaded.config
    sum_images, sum_texts = jax.jit(partial(image_sums, task)), jax.jit(partial(text_sums, task))
    rows: dict[str, list[tuple[float, float]]] = {"image": [], "text": []}
    for _, host_batch in evaluation_batches(config, np.arange(1), loaded.tokenizer()):
        arrays = host_batch.arrays
        if not arrays["valid"].any():
            continue
        batch = loaded.put(arrays)
        terms = [
            sum_images(params, batch, loaded.put(prefix))["image"]
            for prefix in fixed_prefixes(config.eval.prefixes, arrays["valid"])
        ]
        rows["image"].append((sum(float(term.sum) for term in terms), sum(float(term.count) for term in terms)))
        text = sum_texts(params, batch, arrays["tokens"][None], arrays["token_valid"][None])
        rows["text"].append((float(text.sum[0]), float(text.count[0])))
    return {name: np.array(values) for name, values in rows.items()}


def draw_means(sums: Sums) -> Float[np.ndarray, " R"]:
    """The mean loss of `DRAWS` bootstrap samples of the images, which are the same for every run."""
    total, count = resampled_sums(sums, DRAWS).T
    return total / count


def table(runs: Sequence[str], losses: Sequence[dict[str, Sums]]) -> str:
    """A Markdown table with a line for each run and loss: the mean, and the difference from the first run."""
    lines = ["| run | loss | mean | 95 % | less the first run's | 95 % |", "|---|---|---|---|---|---|"]
    for run, by_name in zip(runs, losses):
        for name, sums in by_name.items():
            mean, first = (own[:, 0].sum() / own[:, 1].sum() for own in (sums, losses[0][name]))
            draws, first_draws = draw_means(sums), draw_means(losses[0][name])
            difference = f"{mean - first:+.3f} | {_interval(draws - first_draws, '+')}" if run != runs[0] else "|"
            lines.append(f"| {run} | {name} | {mean:.3f} | {_interval(draws)} | {difference} |")
    return "\n".join(lines)


def _interval(draws: Float[np.ndarray, " R"], sign: str = "") -> str:
    low, high = limits_95(draws)
    return f"{low:{sign}.3f} to {high:{sign}.3f}"


@cli_main
def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="SPEC", help="runs with the same held-out datasets")
    flags = parser.parse_args()
    losses = [losses_by_image(load(run)) for run in flags.runs]
    print(f"{len(losses[0]['image'])} held-out examples\n\n{table(flags.runs, losses)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
