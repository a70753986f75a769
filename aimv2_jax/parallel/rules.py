"""Sharding rules: the table that maps logical axis names to mesh axes.

A mesh has four axes: `slice` and `data` split the batch, `fsdp` the batch and the parameters, `tensor` heads, hidden
units and vocabulary. Slices are connected by a slow network: each slice holds all parameters, and only sums of
gradients and of losses cross it. B batch, L length, D width, F hidden, V vocabulary, P pixels a patch, N layers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aimv2_jax.errors import UserError

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    # Activations.
    ("batch", ("slice", "data", "fsdp")),  # B of every batch array and of [B, L, D]
    ("length", None),  # L of [B, L, D]
    ("activation", None),  # D of [B, L, D]
    # Parameters. Matrices are split by rows, because a sixteenth of 1024 columns would fill half a tile of 128.
    ("embed", "fsdp"),  # D rows of q, k, v, gate, up and of both heads; columns of the patch embedding [P, D]
    ("heads", "tensor"),  # columns of q, k, v [D, H·E], the query of attention pooling [H·E]
    ("attended", ("fsdp", "tensor")),  # rows of attention's out [H·E, D]
    ("mlp", "tensor"),  # columns of gate, up [D, F]
    ("hidden", ("fsdp", "tensor")),  # rows of down [F, D]
    ("features", "fsdp"),  # rows of the image projection [C, D] and of projections to a shared space
    ("vocab_in", ("fsdp", "tensor")),  # rows of the token table [V, D]
    ("vocab", "tensor"),  # columns of the text head [D, V]
    ("output", None),  # D columns of out, down, image projection, token table
    ("pixels", None),  # P of patch embedding [P, D] and pixel head [D, P]
    ("layers", None),  # N, the stack of blocks
    ("positions", None),  # rows of position tables
    ("position_embed", "fsdp"),  # D of position tables and of the begin vector
    ("norm", "fsdp"),  # gains [D], multiplied into matrix rows
    ("bias", None),  # biases [D]
)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of batch rows over slice, data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(dict(RULES)["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Fully replicated sharding."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(logical_axes: Any, mesh: Mesh) -> Any:
    """Resolves the tree of logical axis names to shardings of the parameters."""
    rule_names = {name for name, _ in RULES}
    for path, names in jax.tree.leaves_with_path(logical_axes, is_leaf=lambda x: isinstance(x, PartitionSpec)):
        assert set(names) <= rule_names, f"{jax.tree_util.keystr(path)} has an axis without a rule: {names}"
    return nn.logical_to_mesh_sharding(logical_axes, mesh, RULES)


def opt_state_shardings(
    optimizer: optax.GradientTransformation, abstract_params: Any, param_shardings: Any, mesh: Mesh
) -> Any:
    """Shards optimiser moments like their parameters; replicates counters."""
    return optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, abstract_params),
        param_shardings,
        transform_non_params=lambda _: replicated(mesh),
    )


def check_divisible(abstract_params: Any, shardings: Any) -> None:
    """Raises UserError for the first parameter that the mesh cannot split evenly."""
    leaves = jax.tree.leaves_with_path(abstract_params)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings)):
        for size, axes in zip(leaf.shape, sharding.spec):
            names = (axes,) if isinstance(axes, str) else axes or ()
            parts = math.prod(sharding.mesh.shape[name] for name in names)
            if size % parts:
                keys = " x ".join(f"mesh.{name}" for name in names)
                raise UserError(
                    f"parameter {'/'.join(key.key for key in path)} cannot be split over {keys}",
                    f"{size} entries, {parts} devices",
                    "Choose sizes of mesh.fsdp and mesh.tensor that divide widths, hidden units and vocabulary",
                )


@contextlib.contextmanager
def scope(mesh: Mesh) -> Iterator[None]:
    """Context for tracing models: binds logical axis constraints to this mesh."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield
