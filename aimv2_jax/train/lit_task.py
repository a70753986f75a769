"""LiT: a text tower is aligned with a frozen image encoder by a contrastive loss (arXiv 2111.07991; the paper's §4).

Batch: see docs/architecture.md, "Batch". B batch, L patches, P pixels a patch, T text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aimv2_jax.config.schema import LIT_TRAINABLE, Config
from aimv2_jax.models.dual_encoder import DualEncoder
from aimv2_jax.models.sizes import swiglu_hidden
from aimv2_jax.models.text_tower import TextTower
from aimv2_jax.train import contrastive, losses
from aimv2_jax.train.modules import build_encoder, precision, trunk_options
from aimv2_jax.train.task import Batch, ModelTask, Params, is_example

LOSS = "contrastive"


@dataclasses.dataclass(frozen=True)
class LitTask(ModelTask):
    """Contrastive loss over the whole batch, a mean over its pairs; the encoder attends fully."""

    model: DualEncoder
    chunks: int
    patch_pixels: int
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    frozen: tuple[str, ...] = ("encoder",)

    @property
    def weights(self) -> Mapping[str, float]:
        return {LOSS: 1.0}

    def _init_named(self, rng: jax.Array) -> Params:
        encoder = self.model.encoder
        return self.model.init(
            rng,
            jnp.zeros((1, encoder.num_patches, self.patch_pixels)),
            jnp.zeros((1, encoder.num_patches, 2), jnp.int32),
            jnp.ones((1, encoder.num_patches), bool),
            jnp.zeros((1, self.model.text.text_length), jnp.int32),
            jnp.zeros((1,), jnp.int32),
        )["params"]

    def counts(self, batch: Batch, prefix: Int[Array, " B"]) -> dict[str, Int[Array, ""]]:
        return {LOSS: jnp.sum(is_example(batch))}

    def loss_sums(self, params: Params, batch: Batch, prefix: Int[Array, " B"]) -> dict[str, Float[Array, ""]]:
        pixels = losses.normalise_pixels(batch["patches"], batch["valid"], self.pixel_mean, self.pixel_std)
        embeddings = self.model.apply(
            {"params": params}, pixels, batch["coords"], batch["valid"], batch["tokens"], end_index(batch)
        )
        pairs = (embeddings.image, embeddings.text, embeddings.scale)
        if self.model.loss == "softmax":
            return {LOSS: contrastive.softmax_sums(*pairs, is_example(batch), self.chunks).loss}
        return {LOSS: contrastive.sigmoid_sums(*pairs, embeddings.bias, is_example(batch), self.chunks).loss}


def end_index(batch: Batch) -> Int[Array, " B"]:
    """Position of the first end token, which follows everything that is `token_valid`."""
    return jnp.minimum(jnp.sum(batch["token_valid"], axis=1), batch["tokens"].shape[1] - 1)


def build_lit_task(config: Config, platform: str = "cpu") -> LitTask:
    """Builds the task of a config with task "lit" for devices of a platform; raises as `build_encoder`."""
    lit, text = config.lit, config.lit.text
    tower = TextTower(
        vocab_size=text.vocab_size,
        width=text.width,
        depth=text.depth,
        heads=text.heads,
        hidden=text.hidden or swiglu_hidden(text.width),
        text_length=text.text_length,
        eps=config.model.norm_eps,
        precision=precision(config),
        options=trunk_options(config.model, text, platform, config.model.remat),
    )
    return LitTask(
        model=DualEncoder(build_encoder(config, platform), tower, lit.embed_dim, lit.loss),
        chunks=lit.chunks,
        patch_pixels=config.patch_pixels,
        pixel_mean=config.model.pixel_mean,
        pixel_std=config.model.pixel_std,
        frozen=("encoder", *(name for name in LIT_TRAINABLE if name not in lit.trainable)),
    )
