"""Vision encoder. B batch, L patches, P pixels a patch, D width, N layers."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.models import ops
from aimv2_jax.models.attention import MaskSpec, full_mask
from aimv2_jax.models.layers import (
    Linear,
    Precision,
    RMSNorm,
    Trunk,
    TrunkOptions,
    named,
    parameter,
    symmetric_uniform,
    xavier_uniform,
)
from aimv2_jax.models.position_embeddings import sincos_positions


class Encoder(nn.Module):
    """Pre-norm transformer from patches to features (RECIPE.md §2).

    `position="learned"` adds a table with one row per patch and accepts only that grid, in raster order; `"sincos"`
    accepts any grid, given the coordinates of each patch.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    num_patches: int
    eps: float = 1e-5
    position: Literal["learned", "sincos"] = "learned"
    precision: Precision = Precision()
    options: TrunkOptions = TrunkOptions()

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "B L P"],
        coords: Int[Array, "B L 2"],
        valid: Bool[Array, "B L"],
        prefix: Int[Array, " B"] | None = None,
        return_hidden_states: bool = False,
    ) -> tuple[Float[Array, "B L D"], Float[Array, "N B L D"] | None]:
        """Returns the features after the final norm, and the residual stream before the first and after every block.

        Args:
          patches: normalised pixels, (row, column, channel) within a patch.
          coords: row and column of each patch in its image.
          valid: False on padding.
          prefix: number of leading patches that all queries attend to, by example; None for full attention (inference).
          return_hidden_states: return the residual stream [depth + 1, B, L, D] instead of None.
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
            init = named(nn.initializers.normal(0.02), *ops.POSITION_AXES)
            table = parameter(self, "position", init, (self.num_patches, self.width), param)
            if patches.shape[1] != self.num_patches:
                raise ValueError(
                    f"this encoder has learned positions for {self.num_patches} patches, got {patches.shape[1]}"
                )
            x = ops.add(x, table, ops.POSITION_AXES, self.precision.reduce)
        else:
            x += sincos_positions(coords, self.width).astype(compute)
        mask_spec = full_mask(valid) if prefix is None else MaskSpec(prefix, valid)
        features, hidden_states, _ = Trunk(
            self.depth, self.heads, self.hidden, self.eps, self.precision, self.options, name="trunk"
        )(x, mask_spec, return_hidden_states=return_hidden_states)
        return features, jnp.concatenate([x[None], hidden_states]) if return_hidden_states else None
