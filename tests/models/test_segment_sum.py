"""Sums of rows by index: the sorted way against a scatter-add, and which platform gets which."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aimv2_jax.models.ops import embedding_lookup
from aimv2_jax.models.segment_sum import segment_sum, sorted_segment_sum

VOCAB, WIDTH = 50, 6


sorted_sum = jax.jit(sorted_segment_sum, static_argnames="num_segments")


def captions(rows: int, pads: float) -> np.ndarray:
    """Tokens of which a share `pads` is token 1."""
    random = np.random.default_rng(rows)
    return np.where(random.random(rows) < pads, 1, random.integers(0, VOCAB, rows)).astype(np.int32)


@pytest.mark.parametrize(("rows", "pads"), [(1, 0.0), (300, 0.1), (300, 1.0)])
def test_sorted_sum_equals_float64(rows, pads):
    """Sums are those of float64 within float32 rounding; an index without rows, first and last included, has 0."""
    index = captions(rows, pads)
    values = np.asarray(jax.random.normal(jax.random.key(0), (rows, WIDTH)))
    expected = np.zeros((VOCAB, WIDTH))
    np.add.at(expected, index, values.astype(np.float64))
    actual = np.asarray(sorted_sum(values, index, num_segments=VOCAB))
    # A tree of at most 9 additions, each with an error of half a unit of 2**-23 of a partial sum below 32.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=9 * 32 * 2**-24)
    np.testing.assert_array_equal(actual[np.bincount(index, minlength=VOCAB) == 0], 0)


def test_sorted_sum_is_exact_for_integers():
    """Of sums without rounding every bit is right."""
    index = captions(300, 0.9)
    actual = sorted_sum(np.full((300, WIDTH), 7919, np.float32), index, num_segments=VOCAB)
    np.testing.assert_array_equal(actual[:, 0], 7919 * np.bincount(index, minlength=VOCAB))


def lowered(platform: str) -> str:
    """The gradient of a token table, lowered for a platform that need not be present."""
    tokens = jnp.asarray(captions(60, 0.5).reshape(5, 12))

    def loss(table):
        return jnp.sum(embedding_lookup(table, tokens, jnp.bfloat16, jnp.float32).astype(jnp.float32) ** 2)

    traced = jax.jit(jax.grad(loss)).trace(jnp.ones((VOCAB, WIDTH)))
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("platform", "adds"), [("cuda", False), ("cpu", True), ("tpu", True)])
def test_token_gradient_scatters_where_it_repeats(platform, adds):
    """CUDA gets no scatter, whose atomic additions have no order; CPU and TPU keep theirs, and nothing of the other."""
    program = lowered(platform)
    assert ("stablehlo.scatter" in program) is adds
    assert ("stablehlo.sort" in program) is not adds
    assert not re.search(r"stablehlo\.(case|if)", program)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_sum_elsewhere_is_the_plain_program(platform):
    """CPUs and TPUs get the program of a plain scatter-add, operation by operation."""
    index, rows = jnp.asarray(captions(300, 0.3).reshape(10, 30)), jnp.ones((10, 30, WIDTH))

    def operations(function):
        program = jax.jit(function).trace(rows, index).lower(lowering_platforms=(platform,)).as_text()
        return [line.strip() for line in program.splitlines() if "stablehlo" in line or "func" in line]

    def total(rows, index):
        return segment_sum(rows, index, VOCAB)

    def plain(rows, index):
        return jnp.zeros((VOCAB, WIDTH)).at[index].add(rows)

    plain.__name__ = total.__name__
    assert operations(total) == operations(plain)
