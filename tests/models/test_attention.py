"""Masks against their definition, attention against its formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from aimv2_jax.models.attention import MaskSpec, attend, causal_mask, full_mask

VALID = np.array([[True] * 6, [True, True, False, True, False, False]])


def by_definition(allowed) -> np.ndarray:
    return np.array([[[bool(allowed(b, i, j)) for j in range(6)] for i in range(6)] for b in range(2)])


def test_prefix_mask_when_any_prefix_and_padding_then_the_definition():
    for prefix in range(1, 7):
        ours = MaskSpec(jnp.asarray([prefix, 7 - prefix]), jnp.asarray(VALID)).mask(6)
        lengths = (prefix, 7 - prefix)
        expected = by_definition(lambda b, i, j, lengths=lengths: VALID[b, j] and (j <= i or j < lengths[b]))
        np.testing.assert_array_equal(ours[:, 0], expected)


def test_causal_and_full_masks_when_there_is_padding_then_the_definition():
    np.testing.assert_array_equal(
        causal_mask(jnp.asarray(VALID)).mask(6)[:, 0], by_definition(lambda b, i, j: VALID[b, j] and j <= i)
    )
    np.testing.assert_array_equal(
        causal_mask(jnp.asarray(VALID), query_offset=3).mask(2)[:, 0],
        by_definition(lambda b, i, j: VALID[b, j] and j <= i)[:, 3:5],
    )
    np.testing.assert_array_equal(
        full_mask(jnp.asarray(VALID)).mask(6)[:, 0], by_definition(lambda b, i, j: VALID[b, j])
    )


def test_attention_when_masked_then_the_formula_and_finite_where_nothing_may_be_read():
    q, k, v = (np.asarray(jax.random.normal(jax.random.key(i), (2, 6, 12)), np.float64) for i in range(3))
    key_valid = VALID.copy()
    key_valid[1, 0] = False  # With a prefix of 1, query 0 of example 1 has no valid key.
    mask_spec = MaskSpec(jnp.asarray([2, 1]), jnp.asarray(key_valid))
    ours = np.asarray(attend(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), mask_spec, None, heads=3))
    assert np.isfinite(ours).all()
    mask = np.asarray(mask_spec.mask(6))
    q, k, v, ours = (x.reshape(2, 6, 3, 4) for x in (q, k, v, ours))
    for b in range(2):
        for i in range(6):
            keys = mask[b, 0, i]
            if not keys.any():
                assert (b, i) == (1, 0)
                keys = np.ones(6, bool)  # Without valid keys, all values have equal weight.
            for h in range(3):
                scores = k[b, keys, h] @ q[b, i, h] / 2 * mask[b, 0, i].any()  # 1 / sqrt(4)
                weights = np.exp(scores - scores.max())
                np.testing.assert_allclose(ours[b, i, h], weights @ v[b, keys, h] / weights.sum(), rtol=0, atol=1e-5)
