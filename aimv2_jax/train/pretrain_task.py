"""Pre-training task: next-patch and next-token prediction.

Batch: see docs/architecture.md, "Batch". B batch, L patches, P pixels a patch, T text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.config.schema import LOSS_OUTPUTS, AttentionMask, Config
from aimv2_jax.models.aimv2 import AIMv2
from aimv2_jax.models.decoder import Predictions
from aimv2_jax.models.sizes import num_kept_tokens
from aimv2_jax.train import losses
from aimv2_jax.train.modules import build_model
from aimv2_jax.train.task import Batch, ModelTask, Params, is_example, purpose_key


@dataclasses.dataclass(frozen=True)
class PretrainTask(ModelTask):
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

    @property
    def random_prefix(self) -> bool:
        return self.attention_mask == "prefix"

    def sample_prefix(self, rng: jax.Array, batch: Batch) -> Int[Array, " B"]:
        """Samples prefix lengths by (run key, example index); with full attention, all patches."""
        if not self.random_prefix:
            return super().sample_prefix(rng, batch)
        return losses.sample_prefix(purpose_key(rng, "prefix"), batch["example_index"], batch["valid"])

    def sample_kept_tokens(self, rng: jax.Array, batch: Batch) -> dict[str, Int[Array, "B K"]]:
        """Samples `kept`, the encoder rows that the decoder receives in training; empty if it receives all."""
        if self.token_keep_rate == 1:
            return {}
        valid = batch["valid"]
        count = num_kept_tokens(self.token_keep_rate, valid.shape[1])
        return {"kept": losses.sample_rows(purpose_key(rng, "kept rows"), batch["example_index"], valid, count)}

    def counts(self, batch: Batch, prefix: Int[Array, " B"]) -> dict[str, Int[Array, ""]]:
        counts = {}
        if "image" in self.weights:
            counts["image"] = jnp.sum(losses.image_loss_mask(prefix, batch["valid"]))
        if "text" in self.weights:
            counts["text"] = jnp.sum(self.text_loss_mask(batch))
        return counts

    def text_loss_mask(self, batch: Batch) -> Bool[Array, "B T"]:
        """Mask of the tokens whose prediction is scored."""
        return losses.text_loss_mask(batch["token_valid"], is_example(batch), self.predict_eos)

    def normalise(self, batch: Batch) -> Float[Array, "B L P"]:
        """Normalises the batch's pixels to the model's inputs."""
        return losses.normalise_pixels(batch["patches"], batch["valid"], self.pixel_mean, self.pixel_std)

    def predict(self, params: Params, batch: Batch, prefix: Int[Array, " B"] | None) -> Predictions:
        """Computes the model's predictions for the losses in `weights`."""
        outputs = tuple(output for name, output in LOSS_OUTPUTS.items() if name in self.weights)
        return self.model.apply(
            {"params": params},
            self.normalise(batch),
            batch["coords"],
            batch["valid"],
            batch["tokens"],
            prefix,
            outputs,
            batch.get("kept"),
        )

    def loss_sums(self, params: Params, batch: Batch, prefix: Int[Array, " B"]) -> dict[str, Float[Array, ""]]:
        """Computes the sum of every loss in `weights`; the encoder attends fully within `prefix` patches."""
        return self.sums_of(self.predict(params, batch, prefix), batch, prefix)

    def sums_of(self, predictions: Predictions, batch: Batch, prefix: Int[Array, " B"]) -> dict[str, Float[Array, ""]]:
        """The sum of every loss in `weights` of given predictions."""
        sums = {}
        if "image" in self.weights:
            targets = losses.patch_targets(self.normalise(batch), self.target_eps)
            loss_mask = losses.image_loss_mask(prefix, batch["valid"])
            sums["image"] = losses.image_loss_sum(predictions.pixels, targets, loss_mask)
        if "text" in self.weights:
            sums["text"] = losses.text_loss_sum(predictions.logits, batch["tokens"], self.text_loss_mask(batch))
        return sums


def build_pretrain_task(config: Config, platform: str = "cpu") -> PretrainTask:
    """Builds the pre-training task of a config for devices of a platform; raises as `build_model`."""
    model, loss = config.model, config.loss
    return PretrainTask(
        model=build_model(config, platform),
        weights=config.own_losses,
        predict_eos=loss.predict_eos,
        target_eps=loss.target_eps,
        pixel_mean=model.pixel_mean,
        pixel_std=model.pixel_std,
        attention_mask=model.encoder.attention_mask,
        token_keep_rate=model.decoder.token_keep_rate,
    )
