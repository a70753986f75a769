"""Means and differences of held-out losses, with intervals over images."""

import numpy as np

from experiments.heldout_intervals import draw_means, table


def test_differences_are_of_the_same_images():
    """A run that is better by the same amount on every image has a difference without spread."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 9, 50).astype(float)
    first = np.stack([rng.normal(3, 1, 50) * counts, counts], axis=1)
    better = np.stack([first[:, 0] - 0.25 * counts, counts], axis=1)
    lines = table(["a", "b"], [{"text": first}, {"text": better}]).splitlines()
    mean = first[:, 0].sum() / first[:, 1].sum()
    assert lines[2].startswith(f"| a | text | {mean:.3f} | ") and lines[2].endswith("| | |")
    assert lines[3].startswith(f"| b | text | {mean - 0.25:.3f} | ")
    assert lines[3].endswith("| -0.250 | -0.250 to -0.250 |")


def test_interval_has_the_width_of_the_mean_s_error():
    """Draws of a mean of 400 values of deviation 2 have a deviation of about 0.1."""
    values = np.random.default_rng(1).normal(5, 2, 400)
    draws = draw_means(np.stack([values, np.ones(400)], axis=1))
    assert abs(draws.mean() - values.mean()) < 0.02 and abs(draws.std() - 0.1) < 0.02
