"""Architecture of a model with an image encoder and a text tower, independent of the training config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import meta

from aimv2_jax.config.schema import Config
from aimv2_jax.models.dual_encoder import ContrastiveLoss, DualEncoder
from aimv2_jax.models.layers import Precision, TrunkOptions
from aimv2_jax.models.sizes import swiglu_hidden
from aimv2_jax.models.text_tower import TextTower
from aimv2_jax.pretrained.encoder_spec import EncoderSpec, encoder_spec_from_json, encoder_spec_of

_DEFAULT_OPTIONS, _FLOAT32 = TrunkOptions(), Precision()


@dataclasses.dataclass(frozen=True)
class TextSpec:
    """Sizes of a text tower and of its texts: at most `length` tokens, the first `end_id` among them ends a text."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    hidden: int
    length: int
    end_id: int
    norm_eps: float = 1e-5

    def tower(self, options: TrunkOptions = _DEFAULT_OPTIONS, precision: Precision = _FLOAT32) -> TextTower:
        """The module of the tree's `text` parameters."""
        return TextTower(
            self.vocab_size,
            self.width,
            self.depth,
            self.heads,
            self.hidden,
            self.length,
            self.norm_eps,
            precision,
            options,
        )


@dataclasses.dataclass(frozen=True)
class DualEncoderSpec:
    """Sizes of both towers and of their embeddings. `image` has a pooled head; `loss` decides about a logit bias."""

    image: EncoderSpec
    text: TextSpec
    embed_dim: int
    loss: ContrastiveLoss = "softmax"

    def model(self, options: TrunkOptions = _DEFAULT_OPTIONS, precision: Precision = _FLOAT32) -> DualEncoder:
        """The module of the whole tree."""
        encoder, text = self.image.encoder(options, precision), self.text.tower(options, precision)
        return DualEncoder(encoder, text, self.embed_dim, self.loss)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by its path, such as "text/trunk/norm/scale"."""
        abstract = jax.eval_shape(self.initial, jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")))
        return {name: leaf.shape for name, leaf in traverse_util.flatten_dict(abstract, sep="/").items()}

    def initial(self, rng: jax.Array) -> dict[str, Any]:
        """Newly initialised parameters."""
        image, (rows, columns) = self.image, self.image.grid
        patches = jnp.zeros((1, rows * columns, len(image.pixel_mean) * image.patch_size**2))
        coords, valid = jnp.zeros((1, rows * columns, 2), jnp.int32), jnp.ones((1, rows * columns), bool)
        tokens, end_index = jnp.zeros((1, self.text.length), jnp.int32), jnp.zeros(1, jnp.int32)
        return meta.unbox(self.model().init(rng, patches, coords, valid, tokens, end_index)["params"])

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON, for `dual_encoder_spec_from_json`."""
        return dataclasses.asdict(self)


def dual_encoder_spec_from_json(tree: Mapping[str, Any]) -> DualEncoderSpec:
    """The `DualEncoderSpec` that `as_json` wrote; raises `TypeError` or `KeyError` for anything else."""
    parts = {"image": encoder_spec_from_json(tree["image"]), "text": TextSpec(**tree["text"])}
    return DualEncoderSpec(**{**tree, **parts})


def dual_encoder_spec_of(config: Config, end_id: int) -> DualEncoderSpec:
    """The spec of a LiT run's towers; `end_id` is the tokenizer's."""
    lit, text = config.lit, config.lit.text
    text_spec = TextSpec(
        vocab_size=text.vocab_size,
        width=text.width,
        depth=text.depth,
        heads=text.heads,
        hidden=text.hidden or swiglu_hidden(text.width),
        length=text.text_length,
        end_id=end_id,
        norm_eps=config.model.norm_eps,
    )
    image = dataclasses.replace(encoder_spec_of(config), head=True)
    return DualEncoderSpec(image, text_spec, lit.embed_dim, lit.loss)
