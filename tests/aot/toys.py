"""Compiles small programs for described chips: `python toys.py FOLDER` writes each compiled module to NAME.txt.

It runs in its own process: libtpu's environment must be set before jax starts, and the tests' jax has fake CPU devices.
"""

from __future__ import annotations

import sys
from pathlib import Path

from aimv2_jax.aot.topology import described_devices, parse_topology

SIDE = 8192  # Side of the single matmul.
TRIPS = 7  # Length of the scan.
BATCHED = (6, 320, 5, 128)  # Rows, queries, heads, channels of a product that the compiler writes with dilation.
ROWS, WIDTH = 4096, 1024  # Shape of the array in the collectives, bfloat16.
KERNEL_FLOPS, KERNEL_BYTES = 12_345_678, 87_654_321  # Declared cost of the toy kernel.
HIDDEN = 2048  # Hidden size of the toy layer; its weights are split over fsdp.


def main(folder: Path) -> None:
    square = described_devices(parse_topology("v5e:4x4"))
    cube = described_devices(parse_topology("v5p:2x2x1"))
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import pallas as pl
    from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

    mesh = Mesh(np.array(square).reshape(4, 4), ("data", "fsdp"))
    bf16 = jnp.bfloat16

    def on_device(device, *shape, dtype=bf16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    def split(*shape, spec, dtype=bf16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def write(name, function, *arguments, **options):
        (folder / f"{name}.txt").write_text(jax.jit(function, **options).lower(*arguments).compile().as_text())

    for chip, device in (("v5e", square[0]), ("v5p", cube[0])):
        write(f"matmul_{chip}", jnp.matmul, on_device(device, SIDE, SIDE), on_device(device, SIDE, SIDE))

    def scores(q, k):
        return jnp.einsum("bqhe,bkhe->bhqk", q, k)

    heads = on_device(square[0], *BATCHED)
    write("batched", scores, heads, heads)

    def scan(x, weights):
        return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0]

    write("scan", scan, on_device(square[0], 512, 512), on_device(square[0], TRIPS, 512, 512))

    def communicate(x):
        gathered = jax.lax.all_gather(x, "fsdp", tiled=True)
        scattered = jax.lax.psum_scatter(x, "data", scatter_dimension=1, tiled=True)
        moved = jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
        return gathered, scattered, moved

    specs = (PartitionSpec(), PartitionSpec("fsdp", "data"), PartitionSpec("fsdp"))
    communicate = jax.shard_map(
        communicate, mesh=mesh, in_specs=PartitionSpec("fsdp"), out_specs=specs, check_vma=False
    )
    write("collectives", communicate, split(ROWS, WIDTH, spec=("fsdp",)))

    def double(x_ref, y_ref):
        y_ref[...] = x_ref[...] * 2

    cost = pl.CostEstimate(flops=KERNEL_FLOPS, bytes_accessed=KERNEL_BYTES, transcendentals=0)
    kernel = pl.pallas_call(
        double,
        out_shape=jax.ShapeDtypeStruct((512, 512), bf16),
        grid=(8,),
        in_specs=[pl.BlockSpec((64, 512), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((64, 512), lambda i: (i, 0)),
        cost_estimate=cost,
        name="toy",
    )
    write("kernel", kernel, on_device(square[0], 512, 512))

    def update(state, x, spec):
        """Takes a gradient descent step with the gradient sharded by `spec`."""

        def loss(weight):
            return jnp.sum(jnp.square(jnp.dot(x, weight.astype(bf16), preferred_element_type=jnp.float32)))

        gradient = jax.grad(loss)(state["weight"])
        gradient = jax.lax.with_sharding_constraint(gradient, NamedSharding(mesh, PartitionSpec(*spec)))
        return {"weight": state["weight"] - 0.1 * jnp.tanh(gradient)}

    weight = split(WIDTH, HIDDEN, spec=("fsdp",), dtype=jnp.float32)
    batch = split(ROWS, WIDTH, spec=(("data", "fsdp"),))
    for name, spec in (("split", ("fsdp",)), ("whole", ())):
        write(
            f"gradient_{name}",
            lambda state, x, spec=spec: update(state, x, spec),
            {"weight": weight},
            batch,
            out_shardings={"weight": weight.sharding},
        )

    def spread(x, weight):
        """Replicates the whole batch's activations on every device."""
        everywhere = NamedSharding(mesh, PartitionSpec())
        hidden = jax.lax.with_sharding_constraint(jnp.tanh(x @ weight.astype(bf16)), everywhere)
        return hidden @ hidden.T

    write("activation_whole", spread, batch, weight, out_shardings=NamedSharding(mesh, PartitionSpec("data")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
