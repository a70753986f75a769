"""Transformer layers. B batch, S sequence, D width, H heads, E head dim, F hidden, N layers.

Every parameter carries logical axis names; `parallel/rules.py` maps them to mesh axes. Matrices are [in, out].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from aimv2_jax.config.schema import Remat
from aimv2_jax.models import ops
from aimv2_jax.models.attention import (
    Implementation,
    MaskSpec,
    attend,
    collects_grad_dot,
    needs_valid_rows_first,
    padded_rows,
    valid_rows_first,
)

Initializer = Callable[..., jax.Array]
LayerRun = Literal["scan", "loop"]

# Activations that a block saves for the backward pass besides its input, by policy name. "none" saves everything.
# Gathered weights that are saved need no second all-gather, which would compete with the gradient reduce-scatter.
# The output of attention is always recomputed: jax rounds saved values (`reduce_precision`), and after a kernel that is
# a separate pass over all rows, which costs more than the kernel.
_ATTENTION = ("query", "key", "value", "middle", "embed-heads", "attended-output")
REMAT: dict[str, tuple[str, ...]] = {
    "matmuls": (*_ATTENTION, "gate", "up"),  # Recomputes norms, the attention of q, k and v, and the SwiGLU product.
    "gate": (*_ATTENTION, "gate"),  # Also recomputes up.
    "attention": _ATTENTION,  # Also recomputes gate and up.
    "full": (),  # Recomputes the block.
}

xavier_uniform = nn.initializers.xavier_uniform()


def symmetric_uniform(fan_in: int) -> Initializer:
    """Uniform in ±1/sqrt(fan_in): torch's default for linear layers and biases, used by the reference."""
    bound = 1 / math.sqrt(fan_in)
    return lambda rng, shape, dtype: jax.random.uniform(rng, shape, dtype, -bound, bound)


def named(init: Initializer, *axes: str) -> Initializer:
    """Adds logical axis names to the parameter of an initialiser."""
    return nn.with_logical_partitioning(init, axes)


class Precision(NamedTuple):
    """Dtypes of activations and matrix products, of parameters, and of gradient reductions between devices."""

    compute: Any = jnp.float32
    param: Any = jnp.float32
    reduce: Any = jnp.float32


class Linear(nn.Module):
    """x W (+ b), computed in the compute dtype. `axes` are the logical names of W's [in, out].

    A `gain` of the inputs (from the preceding norm) is multiplied into W: on a mesh each device does so for its own
    rows of W. Multiplying x and summing the gain's gradient would be two passes over all activations.
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
        y = ops.project(x.astype(compute), kernel, self.axes, self.out_dtype or compute, reduce)
        if self.bias_init is not None:
            bias = parameter(self, "bias", named(self.bias_init, "bias"), (self.features,), param)
            y = ops.add(y, bias, ("bias",), reduce)
        return y


class Normed(NamedTuple):
    """Normalised activations, the gain not yet applied, and the zeros for `grad_dot` (see `ops.normalise`)."""

    rows: Float[Array, "B S D"]
    gain: Float[Array, " D"]
    grad_dot: Float[Array, "B S"]


class RMSNorm(nn.Module):
    """x / rms(x), statistics in float32, cast to the compute dtype, times a gain (RECIPE.md §2)."""

    eps: float
    precision: Precision

    def __call__(self, x: Float[Array, "B *rows D"]) -> Float[Array, "B *rows D"]:
        gain = self._gain(x.shape[-1])
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return ops.scale(x.astype(self.precision.compute), gain, self.precision.reduce)

    def parts(self, x: Float[Array, "B S D"]) -> Normed:
        """Returns norm and gain separately, for `Linear` layers only; every consumer must feed `grad_dot`."""
        rows, grad_dot = ops.normalise(x, self.eps, self.precision.compute)
        return Normed(rows, self._gain(x.shape[-1]), grad_dot)

    @nn.compact
    def _gain(self, width: int) -> Float[Array, " D"]:
        return parameter(self, "scale", named(nn.initializers.ones, "norm"), (width,), self.precision.param)


class Cache(NamedTuple):
    """Keys and values of the rows decoded so far, and the index of the next row (one for the batch)."""

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
        self, normed: Normed, mask_spec: MaskSpec, cache: Cache | None = None
    ) -> tuple[Float[Array, "B Q D"], Cache | None]:
        rows, gain, grad_dot = normed
        width = rows.shape[-1]
        if not collects_grad_dot(self.attention):
            # Collecting on the input takes one pass; q, k and v would take three.
            (rows,) = ops.with_grad_dot((rows,), grad_dot)
            grad_dot = None
        q, k, v = (
            checkpoint_name(Linear(width, ("embed", "heads"), self.precision, name=name)(rows, gain), name)
            for name in ("query", "key", "value")
        )
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache.key, k, cache.index, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache.value, v, cache.index, axis=1)
            cache = Cache(k, v, cache.index + rows.shape[1])
        out = attend(q, k, v, mask_spec, grad_dot, self.heads, self.attention)
        return Linear(width, ("attended", "output"), self.precision, name="out")(out), cache


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), without biases."""

    hidden: int
    precision: Precision

    @nn.compact
    def __call__(self, normed: Normed) -> Float[Array, "B S D"]:
        gate_up = tuple(
            checkpoint_name(
                Linear(self.hidden, ("embed", "mlp"), self.precision, name=name)(normed.rows, normed.gain), name
            )
            for name in ("gate", "up")
        )
        hidden = ops.gated_silu(*ops.with_grad_dot(gate_up, normed.grad_dot))
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
        self, x: Float[Array, "B S D"], mask_spec: MaskSpec, cache: Cache | None = None
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        x = nn.with_logical_constraint(x, ("batch", "length", "activation"))
        normed = RMSNorm(self.eps, self.precision, name="norm_1").parts(x)
        attention = Attention(self.heads, self.precision, self.attention, name="attention")
        attended, cache = attention(normed, mask_spec, cache)
        x = checkpoint_name(x + attended, "middle")
        normed = RMSNorm(self.eps, self.precision, name="norm_2").parts(x)
        return x + SwiGLU(self.hidden, self.precision, name="mlp")(normed), cache


class TrunkOptions(NamedTuple):
    """Execution options of a trunk; they change results by rounding only.

    layers: "scan" compiles one block, "loop" lets the compiler schedule across blocks.
    remat: name of the activations saved for the backward pass (`REMAT`); the others are recomputed.
    attention: XLA's attention, the Pallas kernels or cuDNN's.
    """

    layers: LayerRun = "scan"
    remat: Remat = "none"
    attention: Implementation = "xla"


class Trunk(nn.Module):
    """`depth` blocks and a final norm. The parameters of the blocks are one tree, stacked on a leading layer axis."""

    depth: int
    heads: int
    hidden: int
    eps: float
    precision: Precision
    options: TrunkOptions = TrunkOptions()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        mask_spec: MaskSpec,
        cache: Cache | None = None,
        return_hidden_states: bool = False,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "N B S D"] | None, Cache | None]:
        """Returns the normed rows, the residual stream after every block (or None), and the updated cache.

        The residual stream is returned with `return_hidden_states`. `cache` holds one cache per layer, stacked like the
        parameters. Initialisation computes neither of the last two.
        """
        layers, remat, attention = self.options
        if cache is not None:
            attention = "xla"  # The others need whole sequences.
        block = Block(self.heads, self.hidden, self.eps, self.precision, attention, parent=None)
        norm = RMSNorm(self.eps, self.precision, name="norm")
        one_row_mask = MaskSpec(mask_spec.prefix[:1], mask_spec.key_valid[:1, :1])
        init_block = block.clone(attention="xla")
        stacked = parameter(self, "blocks", init_stacked, init_block, self.depth, x[:1, :1], one_row_mask)
        if self.is_initializing():  # Blocks keep the shape of x, so they need not run.
            return norm(x), None, None
        length = x.shape[1]
        x, mask_spec = _pad_rows(x, mask_spec, padded_rows(length, attention))
        row_order = None
        if needs_valid_rows_first(attention):
            row_order, mask_spec = valid_rows_first(mask_spec)
            x = row_order.apply(x)

        def run_block(x, layer):
            params, cache = layer
            x, cache = block.apply({"params": params}, x, mask_spec, cache)
            hidden_state = x if row_order is None or not return_hidden_states else row_order.undo(x)
            return x, (hidden_state if return_hidden_states else None, cache)

        x, (hidden_states, cache) = run_layers(run_block, x, (stacked, cache), self.depth, layers, remat)
        if row_order is not None:
            x = row_order.undo(x)
        hidden_states = hidden_states[:, :, :length] if return_hidden_states else None
        return norm(x[:, :length]), hidden_states, cache


def _pad_rows(x: Float[Array, "B S D"], mask_spec: MaskSpec, length: int) -> tuple[Float[Array, "B R D"], MaskSpec]:
    """Pads `x` to `length` with rows of zeros that are not valid as keys."""
    num_padding = length - x.shape[1]
    if not num_padding:
        return x, mask_spec
    padding = ((0, 0), (0, num_padding))
    key_valid = jnp.pad(mask_spec.key_valid, padding)
    return jnp.pad(x, (*padding, (0, 0))), mask_spec._replace(key_valid=key_valid)


def parameter(module: nn.Module, name: str, init: Callable, *args: Any) -> Any:
    """`module.param` without tracing `init` at every use, which took a quarter of the time to trace a step."""
    if module.is_initializing() or not module.has_variable("params", name):
        return module.param(name, init, *args)
    return meta.unbox(module.get_variable("params", name))


def init_stacked(rng: jax.Array, block: nn.Module, depth: int, *inputs: Any) -> Any:
    """Initialises `depth` blocks, each with its own key, stacked on a leading axis named "layers"."""
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
    """Splits every leaf into `depth` slices; the transpose is one concatenation instead of `depth` additions."""
    leaves, treedef = jax.tree.flatten(tree)
    slices = [jax.lax.split(leaf, [1] * depth) for leaf in leaves]
    return [jax.tree.unflatten(treedef, [jnp.squeeze(parts[i], 0) for parts in slices]) for i in range(depth)]
