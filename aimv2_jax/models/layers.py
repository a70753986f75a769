"""The parts of a transformer block. B batch, S sequence, D width, H heads, E head dim, F hidden, N layers.

Every parameter carries logical axis names; `parallel/rules.py` says what they mean on a mesh. Matrices are [in, out].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from aimv2_jax.config import Remat
from aimv2_jax.models import placement
from aimv2_jax.models.attention import Implementation, Reads, attend, padded_rows, tell
from aimv2_jax.models.precision import exact_products

Initializer = Callable[..., jax.Array]
LayerRun = Literal["scan", "loop"]

# What a block keeps for the backward pass, besides its input, by the name of the policy. "none" keeps everything.
# Weights that are kept as gathered need not be gathered again beside the gradients that travel the other way. What
# attention makes is always computed again: jax rounds all that is kept (`reduce_precision`), and behind a kernel that
# is a pass of its own over all rows, dearer than the kernel.
_ATTENTION = ("query", "key", "value", "middle", "embed-heads", "attended-output")
REMAT: dict[str, tuple[str, ...]] = {
    "matmuls": (*_ATTENTION, "gate", "up"),  # Recomputes norms, the attention of q, k and v, and SwiGLU's product.
    "gate": (*_ATTENTION, "gate"),  # Recomputes up, too.
    "attention": _ATTENTION,  # Recomputes gate and up, too.
    "full": (),  # Recomputes the block.
}
TABLE_AXES = ("pieces", "output")  # Of the token table.
POSITION_AXES = ("positions", "position_embed")  # Of tables of learned positions.

xavier_uniform = nn.initializers.xavier_uniform()


def symmetric_uniform(fan_in: int) -> Initializer:
    """Uniform in ±1/sqrt(fan_in): torch's default for linear layers and their biases, which the reference keeps."""
    bound = 1 / math.sqrt(fan_in)
    return lambda rng, shape, dtype: jax.random.uniform(rng, shape, dtype, -bound, bound)


def named(init: Initializer, *axes: str) -> Initializer:
    """An initialiser whose parameter carries logical axis names."""
    return nn.with_logical_partitioning(init, axes)


class Precision(NamedTuple):
    """Type of activations and matrix products, of parameters, and of gradients on their way between devices."""

    compute: Any = jnp.float32
    param: Any = jnp.float32
    reduce: Any = jnp.float32


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def project(
    x: Float[Array, "B *rows I"], kernel: Float[Array, "I O"], axes: placement.Axes, out_dtype: Any, reduce_dtype: Any
) -> Float[Array, "B *rows O"]:
    """x · kernel, computed in x's type; the kernel's gradient leaves the matrix unit in the kernel's own type.

    So the sum over rows is float32 where parameters are, with bfloat16 operands; the one over devices is taken in
    `reduce_dtype`. And the weight gradient is written as xᵀ · dy, where differentiation would write (dyᵀ · x)ᵀ: dy
    comes out of a chain of elementwise operations, which a CPU would compute again in transposed order.
    """
    return _project_forward(x, kernel, axes, out_dtype, reduce_dtype)[0]


def _project_forward(x, kernel, axes, out_dtype, reduce_dtype):
    weight = checkpoint_name(placement.whole(kernel.astype(x.dtype), axes), "-".join(axes))
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
        return dx, placement.sum_over_batch(partial_sum, (x, dy), axes, reduce_dtype)


project.defvjp(_project_forward, _project_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def look_up(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], compute: Any, reduce_dtype: Any
) -> Float[Array, "B T D"]:
    """The table's rows of `tokens` in the type `compute`; the table's gradient is summed like that of a projection."""
    rows = jnp.take(placement.whole(table.astype(compute), TABLE_AXES), tokens, axis=0)
    return nn.with_logical_constraint(rows, ("batch", "length", "activation"))


def _look_up_backward(compute, reduce_dtype, saved, drows):
    tokens, empty = saved

    def partial_sum(tokens, drows):
        return jnp.zeros((empty.shape[1], drows.shape[-1]), empty.dtype).at[tokens].add(drows.astype(empty.dtype))

    return placement.sum_over_batch(partial_sum, (tokens, drows), TABLE_AXES, reduce_dtype), None


look_up.defvjp(
    lambda table, tokens, compute, reduce_dtype: (
        look_up(table, tokens, compute, reduce_dtype),
        (tokens, jnp.zeros((0, table.shape[0]), table.dtype)),
    ),
    _look_up_backward,
)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def add(
    rows: Float[Array, "B *rows D"], term: Float[Array, "*last D"], axes: placement.Axes, reduce_dtype: Any
) -> Float[Array, "B *rows D"]:
    """Rows plus a parameter, a number for each of their last dimensions, in the type of the rows.

    The parameter's gradient is summed like that of a projection: where rows are bfloat16, so would be a sum over all of
    them, and over all devices, that differentiation makes.
    """
    return rows + placement.whole(term.astype(rows.dtype), axes)


def _add_backward(axes, reduce_dtype, empty, drows):
    def partial_sum(drows):
        return jnp.sum(drows, axis=tuple(range(drows.ndim - empty.ndim)), dtype=empty.dtype)

    return drows, placement.sum_over_batch(partial_sum, (drows,), axes, reduce_dtype)


add.defvjp(
    lambda rows, term, axes, reduce_dtype: (
        add(rows, term, axes, reduce_dtype),
        jnp.zeros((0,) * term.ndim, term.dtype),
    ),
    _add_backward,
)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def scale(rows: Float[Array, "B *rows D"], gain: Float[Array, " D"], reduce_dtype: Any) -> Float[Array, "B *rows D"]:
    """Rows times the gain of a norm, in the type of the rows; its gradient is summed like that of a projection."""
    return rows * placement.whole(gain.astype(rows.dtype), ("norm",))


def _scale_backward(reduce_dtype, saved, drows):
    rows, gain = saved

    def partial_sum(rows, drows):
        products = rows.astype(gain.dtype) * drows.astype(gain.dtype)
        return jnp.sum(products, axis=tuple(range(rows.ndim - 1)))

    return scale(drows, gain, reduce_dtype), placement.sum_over_batch(
        partial_sum, (rows, drows), ("norm",), reduce_dtype
    )


scale.defvjp(lambda rows, gain, reduce_dtype: (scale(rows, gain, reduce_dtype), (rows, gain)), _scale_backward)


class Linear(nn.Module):
    """x W (+ b), computed in the compute type. `axes` are the logical names of W's [in, out].

    A `gain` of the inputs (the norm before) is multiplied into W: on a mesh each device does so for its own rows of W,
    where multiplying x and summing the gain's gradient would be two passes over all activations.
    """

    features: int
    axes: tuple[str, str]
    precision: Precision
    kernel_init: Initializer = xavier_uniform
    bias_init: Initializer | None = None
    out_dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B *rows I"], gain: Float[Array, " I"] | None = None
    ) -> Float[Array, "B *rows O"]:
        compute, param, reduce = self.precision
        kernel = parameter(self, "kernel", named(self.kernel_init, *self.axes), (x.shape[-1], self.features), param)
        if gain is not None:
            kernel = kernel * gain[:, None]
        y = project(x.astype(compute), kernel, self.axes, self.out_dtype or compute, reduce)
        if self.bias_init is not None:
            bias = parameter(self, "bias", named(self.bias_init, "bias"), (self.features,), param)
            y = add(y, bias, ("bias",), reduce)
        return y


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def normalise(
    x: Float[Array, "*rows D"], eps: float, compute: Any
) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows"]]:
    """x / rms(x), statistics in float32, in the type `compute`; and zeros, to which `tell` adds a gradient.

    With n = x · r and its gradient dn, dx = r · (dn - n · mean(dn · n)). Where n goes into matrices only, the sum of
    dn · n over the width is that of dy · y over their outputs, and those are at hand before the products that make dn:
    so dx is computed where dn leaves the matrix unit, in place of two more passes over all rows.
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


class Normed(NamedTuple):
    """Rows over their rms, the gain that they still lack, and where to tell of what is made of them (`normalise`)."""

    rows: Float[Array, "B S D"]
    gain: Float[Array, " D"]
    told: Float[Array, "B S"]


class RMSNorm(nn.Module):
    """x / rms(x), statistics in float32, cast to the compute type, times a gain (RECIPE.md §2)."""

    eps: float
    precision: Precision

    def __call__(self, x: Float[Array, "B *rows D"]) -> Float[Array, "B *rows D"]:
        gain = self._gain(x.shape[-1])
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return scale(x.astype(self.precision.compute), gain, self.precision.reduce)

    def parts(self, x: Float[Array, "B S D"]) -> Normed:
        """The same in parts, for rows that go into `Linear` layers only; all their outputs must be told."""
        rows, told = normalise(x, self.eps, self.precision.compute)
        return Normed(rows, self._gain(x.shape[-1]), told)

    @nn.compact
    def _gain(self, width: int) -> Float[Array, " D"]:
        return parameter(self, "scale", named(nn.initializers.ones, "norm"), (width,), self.precision.param)


class Cache(NamedTuple):
    """Keys and values of the rows decoded so far, and where the next row goes (one number for the batch)."""

    key: Float[Array, "B S D"]
    value: Float[Array, "B S D"]
    index: jax.Array


class Attention(nn.Module):
    """Multi-head attention without biases; heads are contiguous slices of the width."""

    heads: int
    precision: Precision
    attention: Implementation

    @nn.compact
    def __call__(
        self, normed: Normed, reads: Reads, cache: Cache | None = None
    ) -> tuple[Float[Array, "B Q D"], Cache | None]:
        rows, gain, told = normed
        width = rows.shape[-1]
        if self.attention == "xla":  # One pass over the rows, where q, k and v would take three.
            ((rows,), told) = tell((rows,), told), None
        made = (
            checkpoint_name(Linear(width, ("embed", "heads"), self.precision, name=name)(rows, gain), name)
            for name in ("query", "key", "value")
        )
        q, k, v = made
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache.key, k, cache.index, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache.value, v, cache.index, axis=1)
            cache = Cache(k, v, cache.index + rows.shape[1])
        out = attend(q, k, v, reads, told, self.heads, self.attention)
        return Linear(width, ("attended", "output"), self.precision, name="out")(out), cache


@jax.custom_vjp
def gated_silu(gate: Float[Array, "*rows F"], up: Float[Array, "*rows F"]) -> Float[Array, "*rows F"]:
    """silu(gate) · up. Its own gradient rule keeps only the two inputs, and computes the sigmoid again from them."""
    return nn.silu(gate) * up


def _gated_silu_backward(saved, dy):
    gate, up = saved
    sigmoid = nn.sigmoid(gate)
    return dy * up * sigmoid * (1 + gate * (1 - sigmoid)), dy * gate * sigmoid


gated_silu.defvjp(lambda gate, up: (gated_silu(gate, up), (gate, up)), _gated_silu_backward)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), without biases."""

    hidden: int
    precision: Precision

    @nn.compact
    def __call__(self, normed: Normed) -> Float[Array, "B S D"]:
        made = (
            checkpoint_name(
                Linear(self.hidden, ("embed", "mlp"), self.precision, name=name)(normed.rows, normed.gain), name
            )
            for name in ("gate", "up")
        )
        hidden = gated_silu(*tell(tuple(made), normed.told))
        return Linear(normed.rows.shape[-1], ("hidden", "output"), self.precision, name="down")(hidden)


class Block(nn.Module):
    """x += attention(norm x); x += mlp(norm x)."""

    heads: int
    hidden: int
    eps: float
    precision: Precision
    attention: Implementation

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], reads: Reads, cache: Cache | None = None
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        x = nn.with_logical_constraint(x, ("batch", "length", "activation"))
        normed = RMSNorm(self.eps, self.precision, name="norm_1").parts(x)
        attended, cache = Attention(self.heads, self.precision, self.attention, name="attention")(normed, reads, cache)
        x = checkpoint_name(x + attended, "middle")
        normed = RMSNorm(self.eps, self.precision, name="norm_2").parts(x)
        return x + SwiGLU(self.hidden, self.precision, name="mlp")(normed), cache


class Run(NamedTuple):
    """How the blocks of a trunk are run; none of it changes a number but by rounding.

    layers: "scan" compiles one block, "loop" lets the compiler schedule across them.
    remat: which activations the backward pass finds saved (`REMAT`); the others are computed again.
    attention: XLA's, or our kernels.
    """

    layers: LayerRun = "scan"
    remat: Remat = "none"
    attention: Implementation = "xla"


class Trunk(nn.Module):
    """`depth` blocks and a final norm. The blocks' parameters are one tree, stacked over layers on the leading axis."""

    depth: int
    heads: int
    hidden: int
    eps: float
    precision: Precision
    run: Run = Run()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        reads: Reads,
        cache: Cache | None = None,
        collect: bool = False,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "N B S D"] | None, Cache | None]:
        """Returns the normed rows, the residual stream after every block (if `collect`), and the grown cache.

        `cache` holds one cache a layer, stacked like the parameters. Initialisation computes neither of the last two.
        """
        layers, remat, attention = self.run
        if cache is not None:
            attention = "xla"  # The kernels read whole sequences of whole tiles.
        block = Block(self.heads, self.hidden, self.eps, self.precision, attention, parent=None)
        norm = RMSNorm(self.eps, self.precision, name="norm")
        one_row = Reads(reads.prefix[:1], reads.readable[:1, :1])
        plain = block.clone(attention="xla")
        stacked = parameter(self, "blocks", init_stacked, plain, self.depth, x[:1, :1], one_row)
        if self.is_initializing():  # Blocks keep the shape of their rows: no more of them is needed.
            return norm(x), None, None
        length = x.shape[1]
        x, reads = _pad_rows(x, reads, padded_rows(length, attention))

        def run(x, layer):
            params, cache = layer
            x, cache = block.apply({"params": params}, x, reads, cache)
            return x, (x if collect else None, cache)

        x, (every, cache) = run_layers(run, x, (stacked, cache), self.depth, layers, remat)
        every = every[:, :, :length] if collect else None
        return norm(x[:, :length]), every, cache


def _pad_rows(x: Float[Array, "B S D"], reads: Reads, length: int) -> tuple[Float[Array, "B R D"], Reads]:
    """`length` rows: those of `x`, and rows of zeros that nobody reads."""
    missing = length - x.shape[1]
    if not missing:
        return x, reads
    rows = ((0, 0), (0, missing))
    return jnp.pad(x, (*rows, (0, 0))), reads._replace(readable=jnp.pad(reads.readable, rows))


def parameter(module: nn.Module, name: str, init: Callable, *args: Any) -> Any:
    """`module.param`, which traces `init` at every use to compare shapes: a quarter of what tracing a step took."""
    if module.is_initializing() or not module.has_variable("params", name):
        return module.param(name, init, *args)
    return meta.unbox(module.get_variable("params", name))


def init_stacked(rng: jax.Array, block: nn.Module, depth: int, *inputs: Any) -> Any:
    """Parameters of `depth` blocks, each drawn with its own key, stacked on a leading axis named "layers"."""
    params = jax.vmap(lambda key: block.init(key, *inputs)["params"])(jax.random.split(rng, depth))
    return meta.add_axis(params, 0, {meta.PARTITION_NAME: "layers"})


def run_layers(run: Callable, x: Any, stacked: Any, depth: int, layers: LayerRun, remat: Remat) -> tuple[Any, Any]:
    """Carries `x` through `run(x, layer) -> (x, y)` for every slice of `stacked`; returns x and the stacked y's."""
    if remat != "none":
        saved = jax.checkpoint_policies.save_only_these_names(*REMAT[remat])
        run = jax.checkpoint(run, prevent_cse=layers == "loop", policy=saved)
    if layers == "scan":
        return jax.lax.scan(run, x, stacked, length=depth)
    ys = []
    for layer in unstack(stacked, depth):
        x, y = run(x, layer)
        ys.append(y)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)


def unstack(tree: Any, depth: int) -> list[Any]:
    """The `depth` slices of every leaf. One split a leaf: its transpose is one concatenation, not `depth` additions."""
    leaves, treedef = jax.tree.flatten(tree)
    slices = [jax.lax.split(leaf, [1] * depth) for leaf in leaves]
    return [jax.tree.unflatten(treedef, [jnp.squeeze(parts[i], 0) for parts in slices]) for i in range(depth)]
