"""Causal text tower of contrastive models. B batch, T text tokens, V vocabulary, D width, N layers."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.models import ops
from aimv2_jax.models.attention import causal_mask
from aimv2_jax.models.layers import Precision, Trunk, TrunkOptions, named, parameter


class TextTower(nn.Module):
    """Pre-norm transformer from tokens to features, causal, with learned positions.

    Structure and initialisation of ml-l3m's text encoder (configs/clip/001). What follows a token does not change its
    features, so padding after the end token needs no mask.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    hidden: int
    text_length: int
    eps: float = 1e-5
    precision: Precision = Precision()
    options: TrunkOptions = TrunkOptions()

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B T"], return_hidden_states: bool = False
    ) -> tuple[Float[Array, "B T D"], Float[Array, "N B T D"] | None]:
        """Returns the features after the final norm, and the residual stream before the first and after every block.

        The residual stream is returned with `return_hidden_states`. Texts may be shorter than `text_length`.
        """
        compute, param, reduce = self.precision
        if tokens.shape[1] > self.text_length:
            raise ValueError(f"this text tower has positions for {self.text_length} tokens, got {tokens.shape[1]}")
        init = named(nn.initializers.normal(0.02), *ops.TOKEN_TABLE_AXES)
        token_table = parameter(self, "token_table", init, (self.vocab_size, self.width), param)
        init = named(nn.initializers.normal(0.01), *ops.POSITION_AXES)
        positions = parameter(self, "position", init, (self.text_length, self.width), param)
        x = ops.embedding_lookup(token_table, tokens, compute, reduce)
        x = ops.add(x, positions[: tokens.shape[1]], ops.POSITION_AXES, reduce)
        mask_spec = causal_mask(jnp.ones(tokens.shape, bool))
        features, hidden_states, _ = Trunk(
            self.depth, self.heads, self.hidden, self.eps, self.precision, self.options, name="trunk"
        )(x, mask_spec, return_hidden_states=return_hidden_states)
        return features, jnp.concatenate([x[None], hidden_states]) if return_hidden_states else None


def first_index(is_end: Bool[Array, "B T"]) -> Int[Array, " B"]:
    """Position of the first end token of each text, given `tokens == end_id`; 0 for a text without one."""
    return jnp.argmax(is_end, axis=1)
