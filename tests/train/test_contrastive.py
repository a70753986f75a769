"""Contrastive losses against numpy, on any mesh, in chunks, with padding."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aimv2_jax.aot import hlo
from aimv2_jax.parallel import rules
from aimv2_jax.parallel.mesh import build_mesh
from aimv2_jax.train.contrastive import ContrastiveSums, sigmoid_sums, softmax_sums

BATCH = 64
SCALE, BIAS = 8.0, -2.0  # The gradient of the scale is far from 0, where its terms would cancel.
LOSSES = ["softmax", "sigmoid"]
MESHES = {"data": (1, 8, 1, 1), "fsdp x tensor": (1, 1, 4, 2), "all axes but one": (2, 2, 1, 2)}


def loss_sums(loss: str, image, text, scale, bias, valid, chunks) -> ContrastiveSums:
    """Both losses with the same arguments; the first does not depend on the bias."""
    if loss == "softmax":
        return softmax_sums(image, text, scale, valid, chunks)
    return sigmoid_sums(image, text, scale, bias, valid, chunks)


@partial(jax.jit, static_argnames=("loss", "chunks"))
def loss_and_gradients(image, text, scale, bias, valid, *, loss: str, chunks: int = 1):
    """The sums, and the loss's gradients with respect to everything but `valid`."""

    def total(*args):
        sums = loss_sums(loss, *args, valid, chunks)
        return sums.loss, sums

    (_, sums), gradients = jax.value_and_grad(total, range(4), has_aux=True)(image, text, scale, bias)
    return sums, gradients


def oracle(image, text, scale, bias, valid, loss: str):
    """The same in float64, from the matrix of all logits of the valid rows."""
    x, y = image[valid].astype(np.float64), text[valid].astype(np.float64)
    z, own = scale * x @ y.T + bias * (loss == "sigmoid"), np.eye(len(x))
    if loss == "softmax":
        rows, columns = (np.exp(z) / np.exp(z).sum(axis, keepdims=True) for axis in (1, 0))
        total, dz = -np.log(np.diag(rows) * np.diag(columns)).sum() / 2, (rows + columns) / 2 - own
    else:
        sign = 2 * own - 1
        total, dz = np.log1p(np.exp(-sign * z)).sum(), -sign / (1 + np.exp(sign * z))
    dimage, dtext = np.zeros((2, *image.shape))
    dimage[valid], dtext[valid] = scale * dz @ y, scale * dz.T @ x
    dscale, dbias = (dz * (x @ y.T)).sum(), dz.sum() * (loss == "sigmoid")
    return (total, (z.argmax(1) == np.arange(len(x))).sum()), (dimage, dtext, dscale, dbias)


def pairs(batch: int, width: int = 16):
    """Arguments of `loss_and_gradients`: rows of length 1 of which a few are padding; pairs resemble each other."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(batch, width))
    text = image + rng.normal(size=(batch, width))
    image, text = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (image, text))
    valid = rng.random(batch) < 0.9
    assert 0 < valid.sum() < batch
    return image.astype(np.float32), text.astype(np.float32), np.float32(SCALE), np.float32(BIAS), valid


def assert_close(actual, expected):
    """Numbers and gradients agree to 1e-6 of the largest entry; the counts are equal."""
    (loss, correct), gradients = jax.device_get(actual)
    (expected_loss, expected_correct), expected_gradients = expected
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert correct == expected_correct
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_contrastive_loss_equals_numpy(loss, chunks):
    """Loss, gradients and correct pairs equal those of the matrix of valid pairs, also with an incomplete chunk."""
    arguments = pairs(BATCH)
    expected = oracle(*arguments, loss)
    assert 0 < expected[0][1] < arguments[-1].sum()
    assert_close(loss_and_gradients(*arguments, loss=loss, chunks=chunks), expected)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("loss", LOSSES)
def test_contrastive_loss_on_eight_devices(loss, mesh, chunks):
    """Negatives come from the whole batch on any mesh."""
    arguments, mesh = pairs(BATCH), build_mesh(*MESHES[mesh])
    expected = jax.device_get(loss_and_gradients(*arguments, loss=loss))
    *others, valid = arguments
    rows = jax.device_put((others[0], others[1], valid), rules.batch_sharding(mesh))
    with rules.scope(mesh):
        actual = loss_and_gradients(*rows[:2], *others[2:], rows[2], loss=loss, chunks=chunks)
    assert_close(actual, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_contrastive_loss_ignores_padding(loss):
    """What padded rows hold changes nothing, and a batch of padding has loss and gradients 0."""
    image, text, scale, bias, valid = pairs(BATCH)
    expected = jax.device_get(loss_and_gradients(image, text, scale, bias, valid, loss=loss))
    image[~valid], text[~valid] = text[valid][0], image[valid][0]
    assert_close(loss_and_gradients(image, text, scale, bias, valid, loss=loss), expected)
    nothing = loss_and_gradients(image, text, scale, bias, np.zeros_like(valid), loss=loss)
    assert not any(map(np.any, jax.tree.leaves(jax.device_get(nothing))))


@pytest.mark.parametrize("loss", LOSSES)
def test_no_device_holds_all_logits(loss, always_compiled):
    """On eight devices no array is larger than a chunk of logits, and rows are gathered outside the loop."""
    batch, width, chunks = 1024, 8, 4
    mesh = build_mesh(1, 2, 2, 2)
    arguments = pairs(batch, width)
    sharding = rules.batch_sharding(mesh)
    rows = [jax.ShapeDtypeStruct(arguments[i].shape, arguments[i].dtype, sharding=sharding) for i in (0, 1, 4)]
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    with rules.scope(mesh):
        step = loss_and_gradients.lower(*rows[:2], scalar, scalar, rows[2], loss=loss, chunks=chunks)
        text = step.compile().as_text()
    largest = max(hlo.arrays(text), key=lambda array: array.size)
    assert largest.size == batch // 4 // chunks * batch, largest
    module = hlo.parse_module(text)
    outside = {line.opcode for line in module.computations[module.entry]}
    inside = {line.opcode for name, lines in module.computations.items() if name != module.entry for line in lines}
    assert {"all-gather", "reduce-scatter", "while"} <= outside
    assert not {"all-gather", "reduce-scatter", "all-reduce"} & inside
