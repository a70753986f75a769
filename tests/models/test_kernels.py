"""Pallas kernels in the interpreter against XLA's attention: results and gradients.

In float32 only the order of sums differs; in bfloat16 the probabilities are rounded equally, but sums are not.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from aimv2_jax.models.attention import MaskSpec, attend, choose_attention, padded_rows
from aimv2_jax.models.kernels import flash_attention, short_attention
from aimv2_jax.models.ops import with_grad_dot

HEAD_DIM, HEADS = 128, 2
# (rows, prefix of each example, valid rows of each example). Only the last case ends at a block's edge.
CASES = {
    "encoder, prefixes from 1 to all but one": (256, (1, 255), (256, 256)),
    "decoder": (336, (0, 0), (336, 333)),
    "padding": (48, (5, 48), (33, 20)),
    "long": (1152, (0, 700), (1152, 1152)),
    "long, padding and a prefix at a block's edge": (768, (384, 1), (500, 767)),
}


def arrays(rows: int, dtype) -> list[jax.Array]:
    shape = (2, rows, HEADS * HEAD_DIM)
    return [jax.random.normal(jax.random.key(i), shape, jnp.float32).astype(dtype) for i in range(4)]


def results(implementation: str, mask_spec: MaskSpec, rows: int, dtype):
    """Output and gradients of q, k, v and grad_dot; padding rows are excluded from output and loss."""
    q, k, v, weight = arrays(rows, dtype)
    weight = jnp.where(mask_spec.key_valid[..., None], weight, 0)

    def loss(q, k, v, grad_dot):
        if implementation == "xla":
            q, k, v = with_grad_dot((q, k, v), grad_dot)
            grad_dot = None
        out = attend(q, k, v, mask_spec, grad_dot, HEADS, implementation)
        return jnp.sum((out * weight).astype(jnp.float32)), out

    grads, out = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(q, k, v, jnp.zeros(q.shape[:2]))
    return [jnp.where(mask_spec.key_valid[..., None], out, 0), *grads]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_kernel_when_given_prefixes_and_padding_then_the_numbers_of_xla(case, dtype):
    rows, prefix, valid = CASES[case]
    key_valid = np.arange(rows) < np.asarray(valid)[:, None]
    mask_spec = MaskSpec(jnp.asarray(prefix, jnp.int32), jnp.asarray(key_valid))
    assert padded_rows(rows, "pallas") == rows
    tolerance = 2e-5 if dtype == jnp.float32 else 2e-2  # Relative to the largest entry; bfloat16 has eight bits.
    ours, xla = (results(name, mask_spec, rows, dtype) for name in ("pallas_interpreted", "xla"))
    for name, actual, expected in zip(("out", "dq", "dk", "dv", "grad_dot"), ours, xla):
        actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("kernel", [short_attention, flash_attention], ids=["whole_row", "online"])
def test_kernel_when_a_query_may_read_nothing_then_finite(kernel):
    q, k, v, _ = arrays(128, jnp.float32)
    key_valid = jnp.zeros((2, 128), bool).at[1, 64:].set(True)
    run = partial(
        kernel.attend,
        prefix=jnp.zeros(2, jnp.int32),
        key_valid=key_valid,
        grad_dot=jnp.zeros((2, 128)),
        head_dim=HEAD_DIM,
        interpret=True,
    )
    grads = jax.grad(lambda q, k, v: jnp.sum(run(q, k, v) ** 2), (0, 1, 2))(q, k, v)
    assert all(np.isfinite(x).all() for x in (run(q, k, v), *grads))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "rows"), [(short_attention, 48), (flash_attention, 640)], ids=["whole_row", "online"]
)
def test_kernel_interpreted_as_tpu_same_bits(kernel, rows):
    """The TPU interpreter gives the same bits as the plain one.

    The plain interpreter has no cores, runs the grid in order, and pads out-of-bounds reads. The TPU interpreter runs
    the grid's parallel dimensions in any order on two cores, as a TPU may, and raises on out-of-bounds reads.
    """
    tpu = pltpu.InterpretParams(num_cores_or_threads=2, random_seed=1, out_of_bounds_reads="raise")
    q, k, v, weight = (x[:1] for x in arrays(rows, jnp.float32))
    prefix, key_valid = jnp.asarray([rows // 2]), jnp.arange(rows)[None] < rows - 5

    def loss(inputs, interpret):
        out = kernel.attend(*inputs, prefix, key_valid, jnp.zeros((1, rows)), HEAD_DIM, interpret)
        return jnp.sum(out * weight), out

    plain, as_tpu = (jax.grad(loss, has_aux=True)((q, k, v), interpret) for interpret in (True, tpu))
    for expected, actual in zip(jax.tree.leaves(plain), jax.tree.leaves(as_tpu)):
        np.testing.assert_array_equal(expected, actual)


@pytest.mark.parametrize(
    ("length", "rows"), [(256, 256), (333, 336), (653, 656), (704, 704), (1024, 1024), (1101, 1152), (4173, 4224)]
)
def test_rows_when_kernels_run_then_padded_to_whole_tiles_and_left_alone_under_xla(length, rows):
    assert padded_rows(length, "pallas") == rows
    assert padded_rows(length, "xla") == length


@pytest.mark.parametrize(
    ("wanted", "head_dim", "platform", "chosen"),
    [
        ("auto", 128, "tpu", "pallas"),
        ("auto", 64, "tpu", "xla"),
        ("auto", 128, "cpu", "xla"),
        ("pallas", 128, "tpu", "pallas"),
        ("pallas", 64, "cpu", "pallas_interpreted"),
        ("xla", 128, "tpu", "xla"),
    ],
)
def test_attention_when_chosen_then_kernels_run_where_they_can(wanted, head_dim, platform, chosen):
    assert choose_attention(wanted, head_dim, platform, jnp.bfloat16) == chosen
