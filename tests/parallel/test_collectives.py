"""`map_local` on meshes of every kind."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aimv2_jax.parallel import collectives, rules
from aimv2_jax.parallel.mesh import build_mesh


@pytest.mark.parametrize(
    ("sizes", "part"),
    [((1, 2, 2, 2), (2, 3, 4)), ((1, 8, 1, 1), (1, 3, 8)), ((1, 1, 1, 2), (8, 3, 4)), ((1, 1, 1, 1), (8, 3, 8))],
    ids=["all axes", "data", "tensor alone", "one device"],
)
def test_kernel_when_on_a_mesh_then_runs_on_each_part(sizes, part):
    """A TPU kernel cannot be partitioned by the compiler, so it must see only local shards."""
    mesh, shapes = build_mesh(*sizes, jax.devices()[: np.prod(sizes)]), []
    axes = ("batch", "length", "heads")

    def run(x):
        shapes.append(x.shape)
        return x + 1

    x = jnp.arange(8 * 3 * 8.0).reshape(8, 3, 8)
    with rules.scope(mesh):
        out = jax.jit(lambda x: collectives.map_local(run, ((x, axes),), axes))(x)
    np.testing.assert_array_equal(out, x + 1)
    assert shapes == [part]
