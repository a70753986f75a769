"""AIMv1's pixel head: predicts each patch from one feature row by MLP blocks without attention.

B batch, L patches, M = L - 1, D width, C encoder width, P pixels a patch, T text.
"""

from __future__ import annotations

from collections.abc import Collection

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.config.schema import Output
from aimv2_jax.models.decoder import Predictions
from aimv2_jax.models.layers import (
    Linear,
    Precision,
    RMSNorm,
    SwiGLU,
    TrunkOptions,
    init_stacked,
    parameter,
    run_layers,
)
from aimv2_jax.models.position_embeddings import sincos_positions


class MLPBlock(nn.Module):
    """x += norm x; x += mlp(norm x): a block whose attention is the identity, as in AIMv1's code."""

    hidden: int
    eps: float
    precision: Precision

    @nn.compact
    def __call__(self, x: Float[Array, "B M D"]) -> Float[Array, "B M D"]:
        x = nn.with_logical_constraint(x, ("batch", "length", "activation"))
        x += RMSNorm(self.eps, self.precision, name="norm_1")(x)
        normed = RMSNorm(self.eps, self.precision, name="norm_2").parts(x)
        return x + SwiGLU(self.hidden, self.precision, name="mlp")(normed)


class PatchMLP(nn.Module):
    """Features, a linear layer, fixed sin-cos positions, `depth` blocks, a norm, a linear layer (REFERENCE.md §11).

    The structure and the Xavier initialisation are AIMv1's [R]. Norm and MLP are those of our blocks instead of AIMv1's
    LayerNorm and GELU, so that a comparison measures the objectives only. Biases start at 0 [O].
    """

    width: int
    depth: int
    hidden: int
    pixels: int
    eps: float = 1e-5
    precision: Precision = Precision()
    options: TrunkOptions = TrunkOptions()

    @nn.compact
    def predict(
        self,
        features: Float[Array, "B L C"],
        coords: Int[Array, "B L 2"],
        valid: Bool[Array, "B L"],
        tokens: Int[Array, "B T"],
        outputs: Collection[Output],
    ) -> Predictions:
        """Predicts patches 1 … L-1, float32, row i from feature i only; logits are always None."""
        del valid, tokens, outputs  # Rows are independent, so padding needs no mask.
        zeros = nn.initializers.zeros
        x = Linear(self.width, ("features", "output"), self.precision, bias_init=zeros, name="embed")(features[:, :-1])
        x += sincos_positions(coords[:, :-1], self.width).astype(self.precision.compute)
        block = MLPBlock(self.hidden, self.eps, self.precision, parent=None)
        stacked = parameter(self, "blocks", init_stacked, block, self.depth, x[:1, :1])
        x, _ = run_layers(
            lambda x, params: (block.apply({"params": params}, x), None),
            x,
            stacked,
            self.depth,
            self.options.layers,
            self.options.remat,
        )
        x = RMSNorm(self.eps, self.precision, name="norm")(x)
        head = Linear(
            self.pixels, ("embed", "pixels"), self.precision, bias_init=zeros, out_dtype=jnp.float32, name="pixel_head"
        )
        return Predictions(head(x), None)
