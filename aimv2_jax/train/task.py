"""What a stage optimises: the pre-training task, from a batch to sums and counts.

Batch: see LAYOUT.md, "Batch". B batch, L patches, P pixels a patch, T text.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.config import AttentionMask, Config, DecoderConfig, EncoderConfig, ModelConfig, Remat
from aimv2_jax.errors import UserError
from aimv2_jax.models.aimv2 import AIMv2
from aimv2_jax.models.attention import choose_attention
from aimv2_jax.models.decoder import Decoder, Predictions
from aimv2_jax.models.encoder import Encoder
from aimv2_jax.models.layers import Precision, Run
from aimv2_jax.models.patch_mlp import PatchMLP
from aimv2_jax.models.separate import SeparateDecoders
from aimv2_jax.models.sizes import kept_rows, swiglu_hidden
from aimv2_jax.train import losses

Batch = Mapping[str, jax.Array]
Params = Any


class SumCount(NamedTuple):
    """A loss before division: its sum and the number of terms, both over the rows that were given."""

    sum: Float[Array, ""]
    count: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class PretrainTask:
    """Next patch and next token (RECIPE.md §4): total = Σ weights[name] · sum / count.

    A name that is missing from `weights` is not computed at all. In training the encoder reads by `attention_mask`, and
    the decoder is given the share `keep_rows` of its rows; an evaluation gives all rows, and its own prefixes.
    """

    model: AIMv2
    weights: Mapping[str, float]
    predict_eos: bool
    target_eps: float
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    attention_mask: AttentionMask = "prefix"
    keep_rows: float = 1.0

    def init(self, rng: jax.Array) -> Params:
        """Fresh parameters, a function of `rng` alone."""
        return meta.unbox(self._init_named(rng))

    def logical_axes(self) -> Any:
        """The logical axis names of every parameter, as a tree of PartitionSpecs shaped like the parameters."""
        return nn.get_partition_spec(self.abstract_named)

    @cached_property
    def abstract_named(self) -> Any:
        """Shapes and types of the parameters, boxed with the logical names of their axes."""
        return jax.eval_shape(self._init_named, abstract_key())

    @property
    def abstract_params(self) -> Params:
        """Shapes and types of the parameters."""
        return jax.eval_shape(meta.unbox, self.abstract_named)  # Traced, since it constrains layouts on a mesh.

    def _init_named(self, rng: jax.Array) -> Params:
        num_patches, pixels = self.model.encoder.num_patches, self.model.decoder.pixels
        return self.model.init(
            rng,
            jnp.zeros((1, num_patches, pixels)),
            jnp.zeros((1, num_patches, 2), jnp.int32),
            jnp.ones((1, num_patches), bool),
            jnp.zeros((1, 1), jnp.int32),
            jnp.ones((1,), jnp.int32),
        )["params"]

    def draw_prefix(self, rng: jax.Array, batch: Batch) -> Int[Array, " B"]:
        """Prefix lengths of a batch, functions of (run key, example number); all patches where attention is full."""
        if self.attention_mask == "full":
            return jnp.full(batch["valid"].shape[:1], batch["valid"].shape[1], jnp.int32)
        return losses.draw_prefix(purpose_key(rng, "prefix"), batch["example_index"], batch["valid"])

    def draw_kept(self, rng: jax.Array, batch: Batch) -> dict[str, Int[Array, "B K"]]:
        """What a training batch has besides: `kept`, the rows given to the decoder; nothing where that is all."""
        if self.keep_rows == 1:
            return {}
        valid = batch["valid"]
        count = kept_rows(self.keep_rows, valid.shape[1])
        return {"kept": losses.draw_rows(purpose_key(rng, "kept rows"), batch["example_index"], valid, count)}

    def counts(self, batch: Batch, prefix: Int[Array, " B"]) -> dict[str, Int[Array, ""]]:
        """How many terms each loss will have: known before any forward pass, so that parts can be weighted."""
        counts = {}
        if "image" in self.weights:
            counts["image"] = jnp.sum(losses.counted_patches(prefix, batch["valid"]))
        if "text" in self.weights:
            counts["text"] = jnp.sum(self._counted_tokens(batch))
        return counts

    def _counted_tokens(self, batch: Batch) -> Bool[Array, "B T"]:
        is_example = jnp.any(batch["valid"], axis=1)
        return losses.counted_tokens(batch["token_valid"], is_example, self.predict_eos)

    def normalise(self, batch: Batch) -> Float[Array, "B L P"]:
        """The batch's pixels as the model reads them."""
        return losses.normalise_pixels(batch["patches"], batch["valid"], self.pixel_mean, self.pixel_std)

    def predict(self, params: Params, batch: Batch, prefix: Int[Array, " B"] | None) -> Predictions:
        """The model's predictions, of what `weights` asks for."""
        outputs = [output for name, output in (("image", "pixels"), ("text", "logits")) if name in self.weights]
        return self.model.apply(
            {"params": params},
            self.normalise(batch),
            batch["coords"],
            batch["valid"],
            batch["tokens"],
            prefix,
            tuple(outputs),
            batch.get("kept"),
        )

    def loss(self, params: Params, batch: Batch, prefix: Int[Array, " B"]) -> dict[str, SumCount]:
        """Sum and count of every loss in `weights`, with the encoder reading the first `prefix` patches freely."""
        predictions = self.predict(params, batch, prefix)
        counts = self.counts(batch, prefix)
        sums = {}
        if predictions.pixels is not None:
            targets = losses.patch_targets(self.normalise(batch), self.target_eps)
            counted = losses.counted_patches(prefix, batch["valid"])
            sums["image"] = losses.image_loss_sum(predictions.pixels, targets, counted)
        if predictions.logits is not None:
            sums["text"] = losses.text_loss_sum(predictions.logits, batch["tokens"], self._counted_tokens(batch))
        return {name: SumCount(total, counts[name]) for name, total in sums.items()}

    def total(self, sums: Mapping[str, jax.Array], counts: Mapping[str, jax.Array]) -> Float[Array, ""]:
        """The objective, from sums over some rows and counts over the whole batch."""
        return sum(weight * losses.divide(sums[name], counts[name]) for name, weight in self.weights.items())


def run_key(seed: int) -> jax.Array:
    """The key of a run. The generator is named, whatever jax's default is."""
    return jax.random.key(seed, impl="threefry2x32")


def abstract_key() -> jax.ShapeDtypeStruct:
    """Shape and type of a run's key: for tracing, also where the devices are only described."""
    return jax.eval_shape(lambda: run_key(0))


def purpose_key(rng: jax.Array, purpose: str) -> jax.Array:
    """A key for one use of randomness, so that no two uses share numbers."""
    return jax.random.fold_in(rng, zlib.crc32(purpose.encode()))


def build_task(config: Config, platform: str = "cpu") -> PretrainTask:
    """The task a config describes, for devices of a platform: where the config and the model meet.

    Raises:
      UserError: where attention is to run in kernels that the platform or the heads rule out.
    """
    model, loss = config.model, config.loss
    dtypes = (model.compute_dtype, model.param_dtype, config.train.reduce_dtype)
    shared = dict(eps=model.norm_eps, precision=Precision(*map(jnp.dtype, dtypes)))

    _check_kernels(model, platform)

    def run(trunk: EncoderConfig | DecoderConfig, remat: Remat) -> Run:
        return Run(model.layers, remat, choose_attention(model.attention, trunk.width // trunk.heads, platform))

    encoder = Encoder(
        width=model.encoder.width,
        depth=model.encoder.depth,
        heads=model.encoder.heads,
        hidden=model.encoder.hidden or swiglu_hidden(model.encoder.width),
        num_patches=config.num_patches,
        position=model.encoder.position,
        run=run(model.encoder, model.remat),
        **shared,
    )
    shared |= dict(
        width=model.decoder.width,
        depth=model.decoder.depth,
        hidden=model.decoder.hidden or swiglu_hidden(model.decoder.width),
        pixels=model.patch_size**2 * len(model.pixel_mean),
        run=run(model.decoder, model.decoder.remat or model.remat),
    )

    def decoder(reads_text: bool = True) -> Decoder:
        return Decoder(
            heads=model.decoder.heads,
            encoder_width=model.encoder.width,
            vocab_size=model.decoder.vocab_size,
            text_length=model.decoder.text_length,
            reads_text=reads_text,
            **shared,
        )

    decoders = {
        "joint": decoder,
        "separate": lambda: SeparateDecoders(image=decoder(reads_text=False), text=decoder()),
        "mlp": lambda: PatchMLP(**shared),
    }
    return PretrainTask(
        model=AIMv2(encoder, decoders[model.decoder.kind]()),
        weights={
            name: weight for name, on, weight in (("image", loss.image, loss.alpha), ("text", loss.text, 1.0)) if on
        },
        predict_eos=loss.predict_eos,
        target_eps=loss.target_eps,
        pixel_mean=model.pixel_mean,
        pixel_std=model.pixel_std,
        attention_mask=model.encoder.attention_mask,
        keep_rows=model.decoder.keep_rows,
    )


def _check_kernels(model: ModelConfig, platform: str) -> None:
    """Raises UserError where our kernels are asked for by name and could not run as they were tested."""
    if model.attention != "pallas" or platform == "cpu":  # A CPU interprets them, for tests.
        return
    if platform != "tpu":
        raise UserError(
            "config model.attention=pallas asks for kernels that run on TPUs only",
            f"the devices are of platform {platform}",
            "Set model.attention=auto",
        )
    for name, trunk in model.attending.items():
        channels = trunk.width // trunk.heads
        if channels % 128:
            raise UserError(
                f"config model.attention=pallas needs a multiple of 128 channels a head, model.{name} has others",
                f"width {trunk.width}, {trunk.heads} heads, {channels} channels a head",
                f"Set model.attention=auto, or change model.{name}.heads",
            )
