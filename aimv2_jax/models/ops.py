"""Operations with gradient rules of their own. B batch, T text, D width, F hidden, I inputs, O outputs, V vocabulary.

The results are those of the plain expressions. Autodiff would sum gradients of parameters in the dtype of the
activations, save more arrays, or pass over all rows more often.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from aimv2_jax.models.precision import exact_products
from aimv2_jax.models.segment_sum import segment_sum
from aimv2_jax.parallel import collectives

TOKEN_TABLE_AXES = ("vocab_in", "output")
POSITION_AXES = ("positions", "position_embed")


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def project(
    x: Float[Array, "B *rows I"], kernel: Float[Array, "I O"], axes: collectives.Axes, out_dtype: Any, reduce_dtype: Any
) -> Float[Array, "B *rows O"]:
    """x · kernel, computed in x's dtype; the kernel's gradient is accumulated in the kernel's dtype.

    With float32 parameters the sum over rows is float32, also for bfloat16 operands; the sum over devices is taken in
    `reduce_dtype`. The weight gradient is written as xᵀ · dy, not as (dyᵀ · x)ᵀ like autodiff does: dy comes from a
    chain of elementwise operations, which a CPU would recompute in transposed order.
    """
    return _project_forward(x, kernel, axes, out_dtype, reduce_dtype)[0]


def _project_forward(x, kernel, axes, out_dtype, reduce_dtype):
    weight = checkpoint_name(collectives.all_gather_weight(kernel.astype(x.dtype), axes), "-".join(axes))
    with exact_products(x.dtype):
        y = jax.lax.dot_general(x, weight, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=out_dtype)
    return y, (x, weight, jnp.zeros((0,), kernel.dtype))


def _project_backward(axes, out_dtype, reduce_dtype, saved, dy):
    x, weight, empty = saved
    dy = dy.astype(x.dtype)
    rows = tuple(range(x.ndim - 1))

    def partial_sum(x, dy):
        return jax.lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=empty.dtype)

    with exact_products(x.dtype):
        dx = jax.lax.dot_general(dy, weight, (((x.ndim - 1,), (1,)), ((), ())))
        return dx, collectives.reduce_scatter_grad(partial_sum, (x, dy), axes, reduce_dtype)


project.defvjp(_project_forward, _project_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def embedding_lookup(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], compute: Any, reduce_dtype: Any
) -> Float[Array, "B T D"]:
    """Token embeddings in dtype `compute`; the table's gradient is reduced like that of `project`."""
    rows = jnp.take(collectives.all_gather_weight(table.astype(compute), TOKEN_TABLE_AXES), tokens, axis=0)
    return nn.with_logical_constraint(rows, ("batch", "length", "activation"))


def _embedding_lookup_backward(compute, reduce_dtype, saved, drows):
    tokens, empty = saved

    def partial_sum(tokens, drows):
        return segment_sum(drows.astype(empty.dtype), tokens, empty.shape[1])

    return collectives.reduce_scatter_grad(partial_sum, (tokens, drows), TOKEN_TABLE_AXES, reduce_dtype), None


embedding_lookup.defvjp(
    lambda table, tokens, compute, reduce_dtype: (
        embedding_lookup(table, tokens, compute, reduce_dtype),
        (tokens, jnp.zeros((0, table.shape[0]), table.dtype)),
    ),
    _embedding_lookup_backward,
)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def add(
    rows: Float[Array, "B *rows D"], term: Float[Array, "*last D"], axes: collectives.Axes, reduce_dtype: Any
) -> Float[Array, "B *rows D"]:
    """Rows plus a parameter that is broadcast over the leading dimensions, in the dtype of the rows.

    The parameter's gradient is reduced like that of `project`: with bfloat16 rows, autodiff would also sum over rows
    and devices in bfloat16.
    """
    return rows + collectives.all_gather_weight(term.astype(rows.dtype), axes)


def _add_backward(axes, reduce_dtype, empty, drows):
    def partial_sum(drows):
        return jnp.sum(drows, axis=tuple(range(drows.ndim - empty.ndim)), dtype=empty.dtype)

    return drows, collectives.reduce_scatter_grad(partial_sum, (drows,), axes, reduce_dtype)


add.defvjp(
    lambda rows, term, axes, reduce_dtype: (
        add(rows, term, axes, reduce_dtype),
        jnp.zeros((0,) * term.ndim, term.dtype),
    ),
    _add_backward,
)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def scale(rows: Float[Array, "B *rows D"], gain: Float[Array, " D"], reduce_dtype: Any) -> Float[Array, "B *rows D"]:
    """Rows times the gain of a norm, in the dtype of the rows; its gradient is reduced like that of `project`."""
    return rows * collectives.all_gather_weight(gain.astype(rows.dtype), ("norm",))


def _scale_backward(reduce_dtype, saved, drows):
    rows, gain = saved

    def partial_sum(rows, drows):
        products = rows.astype(gain.dtype) * drows.astype(gain.dtype)
        return jnp.sum(products, axis=tuple(range(rows.ndim - 1)))

    return scale(drows, gain, reduce_dtype), collectives.reduce_scatter_grad(
        partial_sum, (rows, drows), ("norm",), reduce_dtype
    )


scale.defvjp(lambda rows, gain, reduce_dtype: (scale(rows, gain, reduce_dtype), (rows, gain)), _scale_backward)


@jax.custom_vjp
def gated_silu(gate: Float[Array, "*rows F"], up: Float[Array, "*rows F"]) -> Float[Array, "*rows F"]:
    """silu(gate) · up. The custom gradient rule saves only the two inputs and recomputes the sigmoid."""
    return nn.silu(gate) * up


def _gated_silu_backward(saved, dy):
    gate, up = saved
    sigmoid = nn.sigmoid(gate)
    return dy * up * sigmoid * (1 + gate * (1 - sigmoid)), dy * gate * sigmoid


gated_silu.defvjp(lambda gate, up: (gated_silu(gate, up), (gate, up)), _gated_silu_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def normalise(
    x: Float[Array, "*rows D"], eps: float, compute: Any
) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows"]]:
    """Returns n = x / rms(x) in dtype `compute`, statistics in float32, and zeros: the `grad_dot` of every row.

    With r = 1 / rms(x) and the gradient dn, dx = r · (dn - n · mean(dn · n)). Where only matrices consume n, as
    y = n · W, the sum of dn · n over the width is the sum of dy · y over all outputs, since both are n · W · dyᵀ. It is
    known before the products that make dn, so dx is fused into the matmul that makes dn, which saves two passes over
    all rows. Each consumer adds its dy · y to the cotangent of the zeros: by `with_grad_dot`, or in its own kernel.
    """
    return _normalise_forward(x, eps, compute)[0]


def _normalise_forward(x, eps, compute):
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True) + eps)
    normed = (x.astype(jnp.float32) * inverse).astype(compute)
    return (normed, jnp.zeros(x.shape[:-1], jnp.float32)), (x, inverse)


def _normalise_backward(eps, compute, saved, gradients):
    x, inverse = saved
    dnormed, dot = gradients
    mean = dot[..., None] / x.shape[-1]
    dx = inverse * (dnormed.astype(jnp.float32) - x.astype(jnp.float32) * (inverse * mean))
    return (dx.astype(x.dtype),)


normalise.defvjp(_normalise_forward, _normalise_backward)


@jax.custom_vjp
def with_grad_dot(outputs: tuple[Float[Array, "*rows D"], ...], grad_dot: Float[Array, "*rows"]) -> tuple[Array, ...]:
    """Identity on `outputs`; the cotangent of `grad_dot` is the sum of dy · y over all of them (see `normalise`)."""
    return outputs


with_grad_dot.defvjp(
    lambda outputs, grad_dot: (outputs, outputs),
    lambda outputs, gradients: (gradients, row_dot(outputs, gradients)),
)


def row_dot(outputs: Sequence[Float[Array, "*rows D"]], gradients: Sequence[Array]) -> Float[Array, "*rows"]:
    """sum(dy · y) over the last dimension of all arrays, float32, with one row reduction instead of one per array."""
    products = (y.astype(jnp.float32) * dy.astype(jnp.float32) for y, dy in zip(outputs, gradients))
    return jnp.sum(sum(products), axis=-1)
