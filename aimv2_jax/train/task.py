"""Pre-training task: maps parameters and a batch to loss sums and counts.

Batch: see docs/architecture.md, "Batch". B batch, L patches, P pixels a patch, T text.
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

from aimv2_jax.config.schema import AttentionMask, Config, DecoderConfig, EncoderConfig, ModelConfig, Remat
from aimv2_jax.errors import UserError
from aimv2_jax.models.aimv2 import AIMv2
from aimv2_jax.models.attention import choose_attention
from aimv2_jax.models.baselines import SeparateDecoders
from aimv2_jax.models.decoder import Decoder, Predictions
from aimv2_jax.models.encoder import Encoder
from aimv2_jax.models.layers import Precision, TrunkOptions
from aimv2_jax.models.patch_mlp import PatchMLP
from aimv2_jax.models.sizes import num_kept_tokens, swiglu_hidden
from aimv2_jax.train import losses

Batch = Mapping[str, jax.Array]
Params = Any


class SumCount(NamedTuple):
    """An undivided loss: its sum and its number of terms, both over the given rows."""

    sum: Float[Array, ""]
    count: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class PretrainTask:
    """Next-patch and next-token prediction (RECIPE.md §4): total = Σ weights[name] · sum / count.

    A loss that is missing from `weights` is not computed. In training the encoder uses `attention_mask`, and the
    decoder receives the share `token_keep_rate` of its rows; evaluation uses all rows and its own prefixes.
    """

    model: AIMv2
    weights: Mapping[str, float]
    predict_eos: bool
    target_eps: float
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    attention_mask: AttentionMask = "prefix"
    token_keep_rate: float = 1.0

    def init(self, rng: jax.Array) -> Params:
        """Initialises the parameters, as a function of `rng` only."""
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
        return jax.eval_shape(meta.unbox, self.abstract_named)  # Traced, because unboxing constrains layouts on a mesh.

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

    def sample_prefix(self, rng: jax.Array, batch: Batch) -> Int[Array, " B"]:
        """Samples prefix lengths by (run key, example index); with full attention, all patches."""
        if self.attention_mask == "full":
            return jnp.full(batch["valid"].shape[:1], batch["valid"].shape[1], jnp.int32)
        return losses.sample_prefix(purpose_key(rng, "prefix"), batch["example_index"], batch["valid"])

    def sample_kept_tokens(self, rng: jax.Array, batch: Batch) -> dict[str, Int[Array, "B K"]]:
        """Samples `kept`, the encoder rows that the decoder receives in training; empty if it receives all."""
        if self.token_keep_rate == 1:
            return {}
        valid = batch["valid"]
        count = num_kept_tokens(self.token_keep_rate, valid.shape[1])
        return {"kept": losses.sample_rows(purpose_key(rng, "kept rows"), batch["example_index"], valid, count)}

    def counts(self, batch: Batch, prefix: Int[Array, " B"]) -> dict[str, Int[Array, ""]]:
        """Number of terms of each loss, known before the forward pass, so that microbatches can be weighted."""
        counts = {}
        if "image" in self.weights:
            counts["image"] = jnp.sum(losses.image_loss_mask(prefix, batch["valid"]))
        if "text" in self.weights:
            counts["text"] = jnp.sum(self._text_loss_mask(batch))
        return counts

    def _text_loss_mask(self, batch: Batch) -> Bool[Array, "B T"]:
        is_example = jnp.any(batch["valid"], axis=1)
        return losses.text_loss_mask(batch["token_valid"], is_example, self.predict_eos)

    def normalise(self, batch: Batch) -> Float[Array, "B L P"]:
        """Normalises the batch's pixels to the model's inputs."""
        return losses.normalise_pixels(batch["patches"], batch["valid"], self.pixel_mean, self.pixel_std)

    def predict(self, params: Params, batch: Batch, prefix: Int[Array, " B"] | None) -> Predictions:
        """Computes the model's predictions for the losses in `weights`."""
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
        """Computes sum and count of every loss in `weights`."""
        counts = self.counts(batch, prefix)
        sums = self.loss_sums(params, batch, prefix)
        return {name: SumCount(total, counts[name]) for name, total in sums.items()}

    def loss_sums(self, params: Params, batch: Batch, prefix: Int[Array, " B"]) -> dict[str, Float[Array, ""]]:
        """Computes the sum of every loss in `weights`; the encoder attends fully within `prefix` patches."""
        predictions = self.predict(params, batch, prefix)
        sums = {}
        if predictions.pixels is not None:
            targets = losses.patch_targets(self.normalise(batch), self.target_eps)
            loss_mask = losses.image_loss_mask(prefix, batch["valid"])
            sums["image"] = losses.image_loss_sum(predictions.pixels, targets, loss_mask)
        if predictions.logits is not None:
            sums["text"] = losses.text_loss_sum(predictions.logits, batch["tokens"], self._text_loss_mask(batch))
        return sums

    def total(self, sums: Mapping[str, jax.Array], counts: Mapping[str, jax.Array]) -> Float[Array, ""]:
        """Computes the objective from sums over some rows and counts over the whole batch."""
        return sum(weight * losses.safe_divide(sums[name], counts[name]) for name, weight in self.weights.items())


def run_key(seed: int) -> jax.Array:
    """Returns the key of a run. The generator is explicit, independent of jax's default."""
    return jax.random.key(seed, impl="threefry2x32")


def abstract_key() -> jax.ShapeDtypeStruct:
    """Shape and type of a run's key, for tracing without real devices."""
    return jax.eval_shape(lambda: run_key(0))


def purpose_key(rng: jax.Array, purpose: str) -> jax.Array:
    """Derives the key for one purpose, so that no two purposes share random numbers."""
    return jax.random.fold_in(rng, zlib.crc32(purpose.encode()))


def build_task(config: Config, platform: str = "cpu") -> PretrainTask:
    """Builds the task of a config for devices of a platform.

    Raises:
      UserError: if the config requests attention kernels that the platform or the head size does not support.
    """
    model, loss = config.model, config.loss
    dtypes = (model.compute_dtype, model.param_dtype, config.train.reduce_dtype)
    shared = dict(eps=model.norm_eps, precision=Precision(*map(jnp.dtype, dtypes)))

    _check_kernels(model, platform)

    def trunk_options(trunk: EncoderConfig | DecoderConfig, remat: Remat) -> TrunkOptions:
        attention = choose_attention(model.attention, trunk.width // trunk.heads, platform)
        return TrunkOptions(model.layers, remat, attention)

    encoder = Encoder(
        width=model.encoder.width,
        depth=model.encoder.depth,
        heads=model.encoder.heads,
        hidden=model.encoder.hidden or swiglu_hidden(model.encoder.width),
        num_patches=config.num_patches,
        position=model.encoder.position,
        options=trunk_options(model.encoder, model.remat),
        **shared,
    )
    shared |= dict(
        width=model.decoder.width,
        depth=model.decoder.depth,
        hidden=model.decoder.hidden or swiglu_hidden(model.decoder.width),
        pixels=model.patch_size**2 * len(model.pixel_mean),
        options=trunk_options(model.decoder, model.decoder.remat or model.remat),
    )

    def decoder(has_text: bool = True) -> Decoder:
        return Decoder(
            heads=model.decoder.heads,
            encoder_width=model.encoder.width,
            vocab_size=model.decoder.vocab_size,
            text_length=model.decoder.text_length,
            has_text=has_text,
            **shared,
        )

    decoders = {
        "joint": decoder,
        "separate": lambda: SeparateDecoders(image=decoder(has_text=False), text=decoder()),
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
        token_keep_rate=model.decoder.token_keep_rate,
    )


def _check_kernels(model: ModelConfig, platform: str) -> None:
    """Raises UserError if the config requests the Pallas kernels on an unsupported platform or head size."""
    if model.attention != "pallas" or platform == "cpu":  # A CPU interprets the kernels, for tests.
        return
    if platform != "tpu":
        raise UserError(
            "config model.attention=pallas selects kernels that run on TPUs only",
            f"the devices are of platform {platform}",
            "Set model.attention=auto",
        )
    for name, trunk in model.attention_trunks.items():
        channels = trunk.width // trunk.heads
        if channels % 128:
            raise UserError(
                f"config model.attention=pallas needs a multiple of 128 channels per head in model.{name}",
                f"width {trunk.width}, {trunk.heads} heads, {channels} channels per head",
                f"Set model.attention=auto, or change model.{name}.heads",
            )
