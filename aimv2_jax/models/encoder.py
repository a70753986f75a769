"""The vision encoder: what people use afterwards. B batch, L patches, P pixels a patch, D width, N layers."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.models.attention import Reads, full_reads
from aimv2_jax.models.layers import (
    POSITION_AXES,
    Linear,
    Precision,
    RMSNorm,
    Run,
    Trunk,
    add,
    named,
    parameter,
    symmetric_uniform,
    xavier_uniform,
)
from aimv2_jax.models.positions import sincos_positions


class Encoder(nn.Module):
    """Patches to features by a pre-norm transformer (RECIPE.md §2).

    `position="learned"` adds a table with a row a patch and takes batches of just that grid, in raster order;
    `"sincos"` takes any grid, from the coordinates of each patch.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    num_patches: int
    eps: float = 1e-5
    position: Literal["learned", "sincos"] = "learned"
    precision: Precision = Precision()
    run: Run = Run()

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "B L P"],
        coords: Int[Array, "B L 2"],
        valid: Bool[Array, "B L"],
        prefix: Int[Array, " B"] | None = None,
        collect: bool = False,
    ) -> tuple[Float[Array, "B L D"], Float[Array, "N B L D"] | None]:
        """Features after the final norm, and the residual stream: before the first block and after each (`collect`).

        Args:
          patches: normalised pixels, (row, column, channel) within a patch.
          coords: row and column of each patch in its picture.
          valid: False on padding.
          prefix: patches that all may read, by example; None for full attention (inference).
          collect: also return [depth + 1, B, L, D].
        """
        compute, param = self.precision.compute, self.precision.param
        x = Linear(
            self.width,
            ("pixels", "embed"),
            self.precision,
            kernel_init=xavier_uniform,
            bias_init=symmetric_uniform(patches.shape[-1]),
            name="patch_embed",
        )(patches)
        x = RMSNorm(self.eps, self.precision, name="patch_norm")(x)
        if self.position == "learned":
            init = named(nn.initializers.normal(0.02), *POSITION_AXES)
            table = parameter(self, "position", init, (self.num_patches, self.width), param)
            if patches.shape[1] != self.num_patches:
                raise ValueError(
                    f"this encoder has learned positions for {self.num_patches} patches, got {patches.shape[1]}"
                )
            x = add(x, table, POSITION_AXES, self.precision.reduce)
        else:
            x += sincos_positions(coords, self.width).astype(compute)
        reads = full_reads(valid) if prefix is None else Reads(prefix, valid)
        features, every, _ = Trunk(
            self.depth, self.heads, self.hidden, self.eps, self.precision, self.run, name="trunk"
        )(x, reads, collect=collect)
        return features, jnp.concatenate([x[None], every]) if collect else None
