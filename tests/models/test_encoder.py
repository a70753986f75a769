"""Encoder: hidden states, grids and position embeddings, which the golden tensors do not cover."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from aimv2_jax.models.encoder import Encoder
from aimv2_jax.models.position_embeddings import sincos_positions

SIZE = dict(width=16, depth=2, heads=2, hidden=24, num_patches=6)


def grid(rows: int, columns: int, batch: int = 2) -> jax.Array:
    coords = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(1, -1, 2)
    return jnp.asarray(np.broadcast_to(coords, (batch, rows * columns, 2)), jnp.int32)


def build(**changes):
    encoder = Encoder(**SIZE | changes)
    pixels = jax.random.normal(jax.random.key(0), (2, 6, 27))
    valid = jnp.ones((2, 6), bool)
    params = meta.unbox(encoder.init(jax.random.key(1), pixels, grid(2, 3), valid))
    return encoder, params, pixels, valid


def test_hidden_states_end_with_the_output():
    """There are depth + 1 hidden states. The normalised last one equals the features, with or without collection."""
    encoder, params, pixels, valid = build()
    features, hidden_states = encoder.apply(params, pixels, grid(2, 3), valid, None, True)
    assert hidden_states.shape == (3, 2, 6, 16)
    gain = params["params"]["trunk"]["norm"]["scale"]
    last = np.asarray(hidden_states[-1])
    normed = last / np.sqrt((last**2).mean(-1, keepdims=True) + 1e-5) * gain
    np.testing.assert_allclose(features, normed, rtol=0, atol=1e-5)
    alone, none = encoder.apply(params, pixels, grid(2, 3), valid)
    assert none is None
    np.testing.assert_array_equal(alone, features)


def test_learned_positions_refuse_another_grid():
    """The error names the number of patches with a position, and the number given."""
    encoder, params, _, _ = build()
    with pytest.raises(ValueError, match="learned positions for 6 patches, got 4"):
        encoder.apply(params, jnp.zeros((2, 4, 27)), grid(2, 2), jnp.ones((2, 4), bool))


def test_sincos_encoder_accepts_any_grid():
    """Sin-cos positions have no parameters, depend on the coordinates, and accept a larger grid."""
    encoder, params, pixels, valid = build(position="sincos")
    assert "position" not in params["params"]
    two_by_three, _ = encoder.apply(params, pixels, grid(2, 3), valid)
    three_by_two, _ = encoder.apply(params, pixels, grid(3, 2), valid)
    assert not np.allclose(two_by_three, three_by_two, atol=1e-3)
    larger, _ = encoder.apply(params, jnp.zeros((2, 20, 27)), grid(4, 5), jnp.ones((2, 20), bool))
    assert larger.shape == (2, 20, 16)


def test_sincos_positions_match_float64():
    """The embeddings equal a float64 computation to 1e-6."""
    ours = np.asarray(sincos_positions(grid(5, 7, 1), 24)[0])
    rows, columns = np.divmod(np.arange(35), 7)
    frequency = 10000.0 ** (-np.arange(6) / 6)
    parts = [wave(np.outer(axis, frequency)) for axis in (columns, rows) for wave in (np.sin, np.cos)]
    np.testing.assert_allclose(ours, np.concatenate(parts, axis=1), rtol=0, atol=1e-6)
