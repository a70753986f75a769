"""Layers: gradient rules of projections, scan and loop, rematerialisation, the cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta

from aimv2_jax.models.attention import causal_mask
from aimv2_jax.models.layers import REMAT, Cache, Linear, Precision, RMSNorm, Trunk, TrunkOptions, unstack
from aimv2_jax.models.ops import project

BF16 = Precision(compute=jnp.bfloat16)
TRUNK = dict(depth=3, heads=2, hidden=24, eps=1e-5, precision=Precision())


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("sizes", [(6, 9), (9, 6), (7, 7)])
def test_projection_when_differentiated_then_the_rule_of_a_plain_product(sizes):
    inputs, outputs = sizes
    x, kernel, weight = normal(0, 2, 5, inputs), normal(1, inputs, outputs), normal(2, 2, 5, outputs)
    ours = jax.grad(lambda x, k: jnp.sum(project(x, k, ("embed", "mlp"), jnp.float32, jnp.float32) * weight), (0, 1))(
        x, kernel
    )
    plain = jax.grad(lambda x, k: jnp.sum((x @ k) * weight), (0, 1))(x, kernel)
    for actual, expected in zip(ours, plain):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)  # Sums of ten products in another order.


@pytest.mark.parametrize("sizes", [(6, 9), (9, 6)])
def test_projection_when_rows_are_bfloat16_then_the_kernel_gradient_is_summed_in_float32(sizes):
    rows = 4099  # The neighbouring bfloat16 values are 4096 and 4128.
    x = jnp.ones((rows, sizes[0]), jnp.bfloat16)
    kernel = normal(1, *sizes)
    gradient = jax.grad(lambda k: jnp.sum(project(x, k, ("embed", "mlp"), jnp.float32, jnp.float32)))(kernel)
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, np.full(sizes, rows))


@pytest.mark.parametrize(
    "layer", [Linear(6, ("embed", "output"), BF16, bias_init=nn.initializers.ones), RMSNorm(0.0, BF16)]
)
def test_vector_gradient_bfloat16_sums_in_float32(layer):
    rows = 4099  # The neighbouring bfloat16 values are 4096 and 4128.
    x = jnp.ones((rows, 6), jnp.bfloat16)
    params = meta.unbox(layer.init(jax.random.key(0), x))["params"]
    gradient = jax.grad(lambda params: jnp.sum(layer.apply({"params": params}, x).astype(jnp.float32)))(params)
    vector = gradient["bias" if isinstance(layer, Linear) else "scale"]
    assert vector.dtype == jnp.float32
    np.testing.assert_array_equal(vector, np.full(6, rows))


@pytest.fixture(scope="module")
def stream():
    trunk = Trunk(**TRUNK)
    x, mask_spec = normal(0, 2, 5, 12), causal_mask(jnp.ones((2, 5), bool))
    params = meta.unbox(trunk.init(jax.random.key(1), x, mask_spec))
    return params, x, mask_spec


@pytest.mark.parametrize("layers", ["scan", "loop"])
@pytest.mark.parametrize("remat", ["none", *REMAT])
def test_trunk_when_run_in_any_way_then_one_tree_and_the_same_numbers(stream, layers, remat):
    params, x, mask_spec = stream

    def loss(trunk, params):
        out, hidden_states, _ = trunk.apply(params, x, mask_spec, return_hidden_states=True)
        return jnp.sum(out**2) + jnp.sum(hidden_states), (out, hidden_states)

    plain, ours = Trunk(**TRUNK), Trunk(**TRUNK, options=TrunkOptions(layers, remat))
    assert jax.tree.structure(params) == jax.tree.structure(meta.unbox(ours.init(jax.random.key(1), x, mask_spec)))
    grads, (out, hidden_states) = jax.jit(jax.grad(lambda p: loss(ours, p), has_aux=True))(params)
    expected_grads, (expected, expected_hidden_states) = jax.jit(jax.grad(lambda p: loss(plain, p), has_aux=True))(
        params
    )
    assert hidden_states.shape == (3, 2, 5, 12)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(hidden_states, expected_hidden_states, rtol=0, atol=1e-5)
    for actual, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads)):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=2e-5 * float(jnp.abs(wanted).max()))


def test_trunk_when_rematerialised_then_fewer_numbers_are_kept_for_the_backward_pass(stream):
    params, x, mask_spec = stream

    def num_saved(remat: str) -> int:
        trunk = Trunk(**TRUNK, options=TrunkOptions("loop", remat))
        _, pullback = jax.vjp(lambda x: trunk.apply(params, x, mask_spec)[0], x)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    sizes = [num_saved(remat) for remat in ("full", "attention", "gate", "matmuls", "none")]
    assert sizes == sorted(set(sizes)) and sizes[0] < sizes[-1] / 2


def test_trunk_when_rows_come_one_by_one_with_a_cache_then_equals_the_whole(stream):
    params, x, mask_spec = stream
    trunk = Trunk(**TRUNK)
    whole, _, none = trunk.apply(params, x, mask_spec)
    assert none is None
    zeros = jnp.zeros((3, *x.shape))
    cache = Cache(zeros, zeros, jnp.zeros(3, jnp.int32))
    for row in range(x.shape[1]):
        out, _, cache = trunk.apply(params, x[:, row : row + 1], causal_mask(mask_spec.key_valid, row), cache)
        np.testing.assert_allclose(out[:, 0], whole[:, row], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(cache.index, [5, 5, 5])


def test_unstack_when_differentiated_then_gradients_are_stacked_again():
    stack = normal(0, 3, 4)
    gradient = jax.grad(lambda s: sum((i + 1) * leaf.sum() for i, leaf in enumerate(unstack(s, 3))))(stack)
    np.testing.assert_array_equal(gradient, np.repeat([[1.0], [2.0], [3.0]], 4, axis=1))


def test_norm_when_in_bfloat16_then_statistics_are_float32_and_the_cast_comes_before_the_gain():
    x, gain = (100 + normal(0, 3, 64)).astype(jnp.bfloat16), normal(1, 64)
    ours = RMSNorm(1e-5, Precision(jnp.bfloat16)).apply({"params": {"scale": gain}}, x)
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5)
    expected = jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16) * gain.astype(jnp.bfloat16)
    np.testing.assert_array_equal(ours, expected)
