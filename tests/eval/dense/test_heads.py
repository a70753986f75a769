"""The head, its losses and its optimiser against plain references."""

import colorsys
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aimv2_jax.eval.dense.augment import random_colours, shift_hue
from aimv2_jax.eval.dense.heads import DenseHead, depths_from, loss_from, on_canvas, pixel_sums
from aimv2_jax.eval.dense.optimizer import adamw, first_beta, initial_moments, learning_rate
from aimv2_jax.eval.dense.settings import DEPTH, SEGMENTATION, SETTINGS, DenseConfig
from aimv2_jax.eval.dense.windows import interpolation

SIDE = 3
GRIDS = np.array([[4, 5], [2, 5], [3, 2]], np.int32)


def truths(config, rng):
    """Truth on the canvas [3, 12, 15], of each image's own grid; the rest does not count."""
    if config.task == DEPTH:
        truth = np.zeros((3, 12, 15), np.float32)
        draw = lambda shape: rng.uniform(0, 11, shape)  # noqa: E731
    else:
        truth = np.full((3, 12, 15), 255, np.uint8)
        draw = lambda shape: rng.choice([0, 1, 2, 255], shape)  # noqa: E731
    for image, (rows, columns) in zip(truth, GRIDS * SIDE):
        image[:rows, :columns] = draw((rows, columns))
    return truth


def plain_loss(outputs, truth, config, step, mean_only):
    """The loss over the pixels that count, each image interpolated by itself."""
    found, wanted = [], []
    for values, image, (rows, columns) in zip(outputs, truth, GRIDS):
        y, x = (interpolation((np.arange(count * SIDE) + 0.5) / SIDE, count, count) for count in (rows, columns))
        resized = jnp.einsum("hr,rck,wc->hwk", y, values[:rows, :columns], x)
        found.append(resized.reshape(-1, values.shape[-1]))
        wanted.append(image[: rows * SIDE, : columns * SIDE].reshape(-1))
    found, wanted = jnp.concatenate(found), np.concatenate(wanted)
    if config.task == SEGMENTATION:
        kept = np.flatnonzero(wanted != 255)
        return optax.softmax_cross_entropy_with_integer_labels(found[kept], wanted[kept].astype(int)).mean()
    kept = np.flatnonzero((wanted > 0.001) & (wanted < 10))
    g = jnp.log(found[kept, 0] + 0.001) - jnp.log(wanted[kept] + 0.001)
    return jnp.sqrt(jnp.where(step >= mean_only, jnp.var(g, ddof=1), 0.0) + 0.15 * jnp.mean(g) ** 2)


@pytest.mark.parametrize(
    ("task", "steps", "mean_only"), [(SEGMENTATION, 1000, 100), (DEPTH, 1000, 100), (DEPTH, 250, 25)]
)
def test_loss_of_rows_equals_that_of_whole_maps(task, steps, mean_only):
    """Loss and gradient, summed over rows of patches, are those over all pixels at once, for images of three grids.

    The first 100 steps of depth, of a short training the first tenth, have the mean of the errors alone.
    """
    config, rng = DenseConfig(task, steps=steps), np.random.default_rng(0)
    outputs = rng.uniform(0.5, 4, (3, 4, 5, 1 if task == DEPTH else 3)).astype(np.float32)
    truth = truths(config, rng)

    def rows_loss(outputs, step):
        sums = pixel_sums(outputs, jnp.asarray(GRIDS), jnp.asarray(truth), SIDE, config)
        return loss_from(sums, step, config)

    ours = jax.jit(jax.value_and_grad(rows_loss))
    plain = jax.jit(jax.value_and_grad(lambda outputs, step: plain_loss(outputs, truth, config, step, mean_only)))
    for step in (mean_only - 1, mean_only):
        loss, gradient = ours(outputs, jnp.int32(step))
        expected, expected_gradient = plain(outputs, jnp.int32(step))
        assert float(loss) == pytest.approx(float(expected), rel=2e-5)  # Float32 sums are in another order.
        np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=2e-5 * np.abs(expected_gradient).max())


def test_canvas_of_whole_images_has_their_rows():
    """Patches of whole images, which have no gaps, get their row and column; those of windows have it already."""
    outputs = np.zeros((3, 20, 1), np.float32)
    for row, (rows, columns) in enumerate(GRIDS):
        outputs[row, : rows * columns, 0] = np.arange(rows * columns)
    canvas = np.asarray(on_canvas(jnp.asarray(outputs), jnp.asarray(GRIDS), (4, 5), True))[..., 0]
    for values, (rows, columns) in zip(canvas, GRIDS):
        np.testing.assert_array_equal(values[:rows, :columns], np.arange(rows * columns).reshape(rows, columns))
    plain = np.asarray(on_canvas(jnp.asarray(outputs), jnp.asarray(GRIDS), (4, 5), False))
    np.testing.assert_array_equal(plain, outputs.reshape(3, 4, 5, 1))


def test_head_statistics_ignore_padding():
    """In training the norm takes the statistics of valid patches, and keeps a tenth of them for the test."""
    rng = np.random.default_rng(0)
    features, valid = rng.normal(3, 2, (4, 6, 5)).astype(np.float32), rng.random((4, 6)) < 0.7
    features[~valid] = 1e3
    head, arrays = DenseHead(2), (jnp.asarray(features), jnp.asarray(valid))
    variables = head.init(jax.random.key(0), *arrays)
    out, changed = head.apply(variables, *arrays, True, mutable=["batch_stats"])
    kept = features[valid]
    normed = (kept - kept.mean(0)) / np.sqrt(kept.var(0) + 1e-5)
    kernel = np.asarray(variables["params"]["outputs"]["kernel"])
    np.testing.assert_allclose(np.asarray(out)[valid], normed @ kernel, rtol=0, atol=1e-5)
    statistics = changed["batch_stats"]["norm"]
    np.testing.assert_allclose(statistics["mean"], 0.1 * kept.mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics["var"], 0.9 + 0.1 * kept.var(0), rtol=1e-4)


def test_depths_are_weighted_bins():
    """A depth is the mean of the bins by their rectified outputs plus 0.1; one output is a regression."""
    outputs = np.array([[-3.0, 0.9, 0.4]], np.float32)
    expected = (0.1 * 0.001 + 1.0 * 5.0005 + 0.5 * 10) / 1.6
    assert float(depths_from(jnp.asarray(outputs), (0.001, 10.0))[0, 0]) == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(depths_from(jnp.array([[-1.0], [2.0]]), (0.001, 10.0)), [[0.001], [2.001]], rtol=1e-6)


def test_adamw_equals_that_of_optax():
    """Steps with clipped gradients are those of optax at the same rates; every parameter decays."""
    config = DenseConfig(SEGMENTATION, steps=20, warmup=5, weight_decay=0.1, clip=0.5, rate=0.03)
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32), "bias": jnp.ones(2)}
    schedule = partial(learning_rate, config=config)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(schedule, weight_decay=0.1))
    theirs, state, moments = params, optimizer.init(params), initial_moments(params)
    step_fn, update_fn = jax.jit(partial(adamw, config=config)), jax.jit(optimizer.update)
    for step in range(6):
        gradients = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
        params, moments = step_fn(jnp.int32(step), params, gradients, moments)
        updates, state = update_fn(gradients, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    jax.tree.map(lambda ours, other: np.testing.assert_allclose(ours, other, rtol=0, atol=2e-5), params, theirs)


def test_rates_are_those_of_published_settings():
    """Rates and β1 at the start, in the warm-up, after it and at the end, worked out from dinov3's scheduler."""
    ade, nyu = SETTINGS["ade20k"], SETTINGS["nyuv2"]
    cosine = lambda share: (1 + np.cos(np.pi * share)) / 2  # noqa: E731
    expected = {
        ("ade20k", 0): 1e-9,
        ("ade20k", 750): 1e-3 * (1e-6 + (1 - 1e-6) / 2) * (1 - 750 / 40_000),
        ("ade20k", 1500): 1e-3 * cosine(1501 / 40_000),
        ("ade20k", 39_999): 0.0,
        ("nyuv2", 0): 3e-7,
        ("nyuv2", 6400): 3e-7 + 3e-4 * cosine(1 / 6) / 2,
        ("nyuv2", 12_800): 3e-4 / 25_000 + 3e-4 * (1 - 1 / 25_000) * cosine(12_801 / 38_400),
        ("nyuv2", 38_399): 3e-4 / 25_000,
    }
    for (name, step), rate in expected.items():
        found = float(learning_rate(jnp.int32(step), SETTINGS[name]))
        assert found == pytest.approx(rate, rel=1e-4, abs=2e-11), (name, step)
    betas = [float(first_beta(jnp.int32(step), nyu)) for step in (0, 12_799, 12_800, 25_600, 38_400)]
    assert betas == pytest.approx([0, 0, 0.85, 0.9, 0.95]) and first_beta(jnp.int32(7), ade) == pytest.approx(0.9)


def test_hue_turns_as_in_colorsys():
    """Hues turn by a share of the circle; grey stays."""
    rng = np.random.default_rng(0)
    values = rng.integers(256, size=(2, 20, 3)).astype(np.float32)
    values[0, 0] = 77
    shifts = np.array([0.3, -0.45], np.float32)
    found = np.asarray(jax.jit(shift_hue)(jnp.asarray(values), jnp.asarray(shifts)))
    for image, turned, shift in zip(values, found, shifts.tolist()):
        for pixel, ours in zip(image.tolist(), turned):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            expected = colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)
            np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-3)  # Values are 0 to 255, in float32.


@pytest.mark.parametrize("kind", ["photometric", "gamma"])
def test_colours_change_by_image(kind):
    """Some images of a batch change, each in its own way; another key gives other colours, "none" the same ones."""
    patches = jnp.asarray(np.random.default_rng(0).integers(256, size=(8, 4, 12), dtype=np.uint8))
    change = jax.jit(lambda key: random_colours(key, patches, kind))
    first, again, other = (change(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any() and first.dtype == jnp.uint8
    changes = np.abs(np.asarray(first, int) - np.asarray(patches, int)).mean(axis=(1, 2))
    assert (changes > 1).sum() >= 2 and len(set(changes.round(3).tolist())) >= 3
    np.testing.assert_array_equal(random_colours(jax.random.key(0), patches, "none"), patches)


def test_settings_are_those_of_published_configs():
    """The figures of dinov3's two files."""
    fields = ("steps", "batch_size", "rate", "weight_decay", "warmup", "crop")
    found = {name: tuple(getattr(config, field) for field in fields) for name, config in SETTINGS.items()}
    assert found["ade20k"] == (40_000, 16, 1e-3, 1e-3, 1500, (512, 512))
    assert found["nyuv2"] == (38_400, 16, 3e-4, 1e-4, 12_800, (416, 544))
    assert SETTINGS["nyuv2"].clip == 35 and SETTINGS["nyuv2"].depths == (0.001, 10.0)
    assert round(SETTINGS["ade20k"].stride * 512) == 341 and SETTINGS["ade20k"].zero_is_ignored
    assert dataclasses.replace(SETTINGS["nyuv2"], seed=1).mask == "eigen"
