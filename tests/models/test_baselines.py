"""AIMv1's pixel head: formula, initial values and independence of rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from aimv2_jax.models.layers import TrunkOptions
from aimv2_jax.models.patch_mlp import PatchMLP
from aimv2_jax.models.position_embeddings import sincos_positions
from tests.helpers.golden_names import paths

B, L, C, D, F, P, DEPTH = 2, 6, 20, 64, 96, 27, 2


def build(layers: str = "scan", remat: str = "none") -> PatchMLP:
    return PatchMLP(width=D, depth=DEPTH, hidden=F, pixels=P, options=TrunkOptions(layers, remat))


def apply(head: PatchMLP, params, features):
    coords = jnp.asarray(np.broadcast_to(np.indices((2, 3)).reshape(2, -1).T, (B, L, 2)), jnp.int32)
    valid, tokens = jnp.ones((B, L), bool), jnp.zeros((B, 4), jnp.int32)
    return head.apply({"params": params}, features, coords, valid, tokens, ("pixels",), method="predict").pixels


@pytest.fixture(scope="module")
def features():
    return jax.random.normal(jax.random.key(0), (B, L, C))


@pytest.fixture(scope="module")
def params():
    coords, valid = jnp.zeros((1, L, 2), jnp.int32), jnp.ones((1, L), bool)
    tokens = jnp.zeros((1, 1), jnp.int32)
    init = build().init(
        jax.random.key(1), jnp.zeros((1, L, C)), coords, valid, tokens, ("pixels", "logits"), method="predict"
    )
    return meta.unbox(init["params"])


def in_float64(params, features) -> np.ndarray:
    """Computes the head in numpy and float64."""
    tree = {path: np.asarray(leaf, np.float64) for path, leaf in paths(params).items()}

    def norm(x, gain):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain

    coords = jnp.asarray(np.indices((2, 3)).reshape(1, 2, -1).swapaxes(1, 2), jnp.int32)
    x = np.asarray(features, np.float64)[:, :-1] @ tree["embed/kernel"] + tree["embed/bias"]
    x = x + np.asarray(sincos_positions(coords, D), np.float64)[:, :-1]
    for i in range(DEPTH):
        x = x + norm(x, tree["blocks/norm_1/scale"][i])
        normed = norm(x, tree["blocks/norm_2/scale"][i])
        gate, up = (normed @ tree[f"blocks/mlp/{name}/kernel"][i] for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ tree["blocks/mlp/down/kernel"][i]
    return norm(x, tree["norm/scale"]) @ tree["pixel_head/kernel"] + tree["pixel_head/bias"]


@pytest.mark.parametrize(("layers", "remat"), [("scan", "none"), ("loop", "full")])
def test_head_when_computed_in_float64_then_equal(params, features, layers, remat):
    noise = np.random.default_rng(2)
    noisy = jax.tree.map(lambda leaf: leaf + 0.1 * noise.normal(size=leaf.shape).astype(np.float32), params)
    ours, expected = apply(build(layers, remat), noisy, features), in_float64(noisy, features)
    assert ours.shape == (B, L - 1, P) and ours.dtype == jnp.float32
    # Sums of a hundred products in float32, through two blocks.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_head_when_initialised_then_xavier_with_biases_of_0_and_gains_of_1(params):
    for path, leaf in paths(params).items():
        if path.endswith("kernel"):
            bound = (6 / sum(leaf.shape[-2:])) ** 0.5
            assert 0.95 * bound < float(jnp.abs(leaf).max()) <= bound, path
            assert abs(float(leaf.std()) / (bound / 3**0.5) - 1) < 0.08, path
        else:
            assert (leaf == (0 if path.endswith("bias") else 1)).all(), path


def test_head_when_a_row_changes_then_no_other_prediction_moves(params, features):
    run = jax.jit(lambda features: apply(build(), params, features))
    before = np.asarray(run(features))
    for row in range(L):
        moved = (np.asarray(run(features.at[0, row].add(1.0))) != before).any(-1)
        assert np.argwhere(moved).tolist() == ([[0, row]] if row < L - 1 else [])
