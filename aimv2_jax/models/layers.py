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
from jaxtyping import Array, Bool, Float

from aimv2_jax.models.attention import attend

Initializer = Callable[..., jax.Array]
LayerRun = Literal["scan", "loop"]
Remat = Literal["none", "full"]

xavier_uniform = nn.initializers.xavier_uniform()


def symmetric_uniform(fan_in: int) -> Initializer:
    """Uniform in ±1/sqrt(fan_in): torch's default for linear layers and their biases, which the reference keeps."""
    bound = 1 / math.sqrt(fan_in)
    return lambda rng, shape, dtype: jax.random.uniform(rng, shape, dtype, -bound, bound)


def named(init: Initializer, *axes: str) -> Initializer:
    """An initialiser whose parameter carries logical axis names."""
    return nn.with_logical_partitioning(init, axes)


class Precision(NamedTuple):
    """Type of activations and matrix products, and of parameters."""

    compute: Any = jnp.float32
    param: Any = jnp.float32


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(x: Float[Array, "*rows I"], kernel: Float[Array, "I O"], out_dtype: Any) -> Float[Array, "*rows O"]:
    """x · kernel, computed in x's type; the kernel's gradient leaves the matrix unit in the kernel's own type.

    So the sum over rows, and the one over devices that follows, are float32 where parameters are, with bfloat16
    operands. And the weight gradient is written as xᵀ · dy, where differentiation would write (dyᵀ · x)ᵀ: dy comes out
    of a chain of elementwise operations, which a CPU would compute again in transposed order.
    """
    return jax.lax.dot_general(
        x, kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=out_dtype
    )


def _project_forward(x, kernel, out_dtype):
    return project(x, kernel, out_dtype), (x, kernel)


def _project_backward(out_dtype, saved, dy):
    x, kernel = saved
    dy = dy.astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    dx = jax.lax.dot_general(dy, kernel.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))
    dkernel = jax.lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=kernel.dtype)
    return dx, dkernel


project.defvjp(_project_forward, _project_backward)


class Linear(nn.Module):
    """x W (+ b), computed in the compute type. `axes` are the logical names of W's [in, out]."""

    features: int
    axes: tuple[str, str]
    precision: Precision
    kernel_init: Initializer = xavier_uniform
    bias_init: Initializer | None = None
    out_dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows O"]:
        compute, param = self.precision
        kernel = self.param("kernel", named(self.kernel_init, *self.axes), (x.shape[-1], self.features), param)
        y = project(x.astype(compute), kernel, self.out_dtype or compute)
        if self.bias_init is not None:
            bias = self.param("bias", named(self.bias_init, "bias"), (self.features,), param)
            y += bias.astype(y.dtype)
        return y


class RMSNorm(nn.Module):
    """x / rms(x), statistics in float32, cast to the compute type, times a gain (RECIPE.md §2)."""

    eps: float
    precision: Precision

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        compute, param = self.precision
        gain = self.param("scale", named(nn.initializers.ones, "norm"), (x.shape[-1],), param)
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return x.astype(compute) * gain.astype(compute)


class Cache(NamedTuple):
    """Keys and values of the rows decoded so far, and where the next row goes (one number for the batch)."""

    key: Float[Array, "B S D"]
    value: Float[Array, "B S D"]
    index: jax.Array


class Attention(nn.Module):
    """Multi-head attention without biases; heads are contiguous slices of the width."""

    heads: int
    precision: Precision

    @nn.compact
    def __call__(
        self, x: Float[Array, "B Q D"], mask: Bool[Array, "#B 1 #Q K"], cache: Cache | None = None
    ) -> tuple[Float[Array, "B Q D"], Cache | None]:
        width = x.shape[-1]
        q, k, v = (
            Linear(width, ("embed", "heads"), self.precision, name=name)(x) for name in ("query", "key", "value")
        )
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache.key, k, cache.index, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache.value, v, cache.index, axis=1)
            cache = Cache(k, v, cache.index + x.shape[1])
        split = lambda y: y.reshape(*y.shape[:-1], self.heads, -1)  # noqa: E731
        out = attend(split(q), split(k), split(v), mask).reshape(x.shape)
        return Linear(width, ("heads", "embed"), self.precision, name="out")(out), cache


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
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        gate = Linear(self.hidden, ("embed", "mlp"), self.precision, name="gate")(x)
        up = Linear(self.hidden, ("embed", "mlp"), self.precision, name="up")(x)
        return Linear(x.shape[-1], ("mlp", "embed"), self.precision, name="down")(gated_silu(gate, up))


class Block(nn.Module):
    """x += attention(norm x); x += mlp(norm x)."""

    heads: int
    hidden: int
    eps: float
    precision: Precision

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], mask: Bool[Array, "#B 1 #S K"], cache: Cache | None = None
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        x = nn.with_logical_constraint(x, ("batch", "length", "activation"))
        attended, cache = Attention(self.heads, self.precision, name="attention")(
            RMSNorm(self.eps, self.precision, name="norm_1")(x), mask, cache
        )
        x = x + attended
        x = x + SwiGLU(self.hidden, self.precision, name="mlp")(RMSNorm(self.eps, self.precision, name="norm_2")(x))
        return x, cache


class Trunk(nn.Module):
    """`depth` blocks and a final norm. The blocks' parameters are one tree, stacked over layers on the leading axis.

    `layers` says how they run over that tree: "scan" compiles one block, "loop" lets the compiler schedule across them.
    `remat="full"` keeps only the blocks' inputs for the backward pass.
    """

    depth: int
    heads: int
    hidden: int
    eps: float
    precision: Precision
    layers: LayerRun = "scan"
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        mask: Bool[Array, "#B 1 #S K"],
        cache: Cache | None = None,
        collect: bool = False,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "N B S D"] | None, Cache | None]:
        """Returns the normed rows, the residual stream after every block (if `collect`), and the grown cache.

        `cache` holds one cache a layer, stacked like the parameters.
        """
        block = Block(self.heads, self.hidden, self.eps, self.precision, parent=None)
        stacked = self.param("blocks", _init_stacked, block, self.depth, x[:1, :1], mask[:1, :, :1, :1])

        def run(x, layer):
            params, cache = layer
            x, cache = block.apply({"params": params}, x, mask, cache)
            return x, (x if collect else None, cache)

        if self.remat == "full":
            run = jax.checkpoint(run, prevent_cse=self.layers == "loop")
        x, (every, cache) = run_layers(run, x, (stacked, cache), self.depth, self.layers)
        return RMSNorm(self.eps, self.precision, name="norm")(x), every, cache


def _init_stacked(rng: jax.Array, block: Block, depth: int, x: jax.Array, mask: jax.Array) -> Any:
    """Parameters of `depth` blocks, each drawn with its own key, stacked on a leading axis named "layers"."""
    params = jax.vmap(lambda key: block.init(key, x, mask)["params"])(jax.random.split(rng, depth))
    return meta.add_axis(params, 0, {meta.PARTITION_NAME: "layers"})


def run_layers(run: Callable, x: Any, stacked: Any, depth: int, layers: LayerRun) -> tuple[Any, Any]:
    """Carries `x` through `run(x, layer) -> (x, y)` for every slice of `stacked`; returns x and the stacked y's."""
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
