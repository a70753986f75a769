"""Distillation task: pre-training of a student that also learns from a frozen teacher.

Batch: see docs/architecture.md, "Batch". B batch, L patches, S patches of the teacher's grid, P pixels a patch,
E teacher width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from aimv2_jax.config.schema import Config, Output
from aimv2_jax.data.transforms.geometry import patch_coords
from aimv2_jax.models.aimv2 import AIMv2
from aimv2_jax.models.decoder import Predictions
from aimv2_jax.models.layers import Linear, xavier_uniform
from aimv2_jax.train import distill_losses, losses
from aimv2_jax.train.distill_losses import FeatureLoss
from aimv2_jax.train.modules import build_teacher
from aimv2_jax.train.pretrain_task import PretrainTask, build_pretrain_task
from aimv2_jax.train.task import Batch, ModelTask, Params, is_example, purpose_key

TEACHER = "teacher"
"""The entry of the parameters that holds the teacher."""


@dataclasses.dataclass(frozen=True)
class DistillTask(ModelTask):
    """Pre-training whose student also learns features, text logits or predicted patches of a frozen teacher.

    The parameters are the student's, as in pre-training, with `feature_map`, a linear map from its features to the
    teacher's, which starts as the identity where the widths are equal; and `teacher`, which is frozen. The student runs
    once for all losses. The teacher sees the same patches under the same prefix, or with a `teacher_grid` of its own
    the batch's `teacher_patches` under a prefix with the same share of them.

    Attributes:
      student: the student's own task.
      teacher: the teacher; its decoder is None if no loss needs it.
      weights: weight of each loss, by name: the student's own, and "features", "logits" and "pixels".
      outputs: what the student predicts.
      teacher_outputs: what the teacher predicts.
      feature_loss: distance of features.
      temperature: divides logits before the softmax.
      teacher_grid: rows and columns of the teacher's patches; None if it sees the student's.
      grid: rows and columns of the student's patches, to which the teacher's features are resized.
    """

    student: PretrainTask
    teacher: AIMv2
    weights: Mapping[str, float]
    outputs: tuple[Output, ...]
    teacher_outputs: tuple[Output, ...]
    feature_loss: FeatureLoss
    temperature: float
    grid: tuple[int, int]
    teacher_grid: tuple[int, int] | None = None

    frozen = (TEACHER,)

    @property
    def random_prefix(self) -> bool:
        return self.student.random_prefix

    @property
    def _feature_map(self) -> Linear:
        student, teacher = self.student.model.encoder, self.teacher.encoder
        kernel_init = _identity if student.width == teacher.width else xavier_uniform
        axes = ("features", "output")
        return Linear(teacher.width, axes, student.precision, kernel_init=kernel_init, out_dtype=jnp.float32)

    def _init_named(self, rng: jax.Array) -> Params:
        student, teacher = self.student.model.encoder, self.teacher.encoder
        features = jnp.zeros((1, 1, student.width))
        patches = jnp.zeros((1, teacher.num_patches, self.student.model.decoder.pixels))
        coords = jnp.zeros((1, teacher.num_patches, 2), jnp.int32)
        valid = jnp.ones((1, teacher.num_patches), bool)
        tokens, prefix = jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32)
        inputs = (patches, coords, valid, tokens, prefix, self.teacher_outputs)
        return {
            **self.student._init_named(rng),
            "feature_map": self._feature_map.init(purpose_key(rng, "feature map"), features)["params"],
            TEACHER: self.teacher.init(purpose_key(rng, "teacher"), *inputs)["params"],
        }

    def sample_prefix(self, rng: jax.Array, batch: Batch) -> Int[Array, " B"]:
        return self.student.sample_prefix(rng, batch)

    def sample_kept_tokens(self, rng: jax.Array, batch: Batch) -> dict[str, Int[Array, "B K"]]:
        """Samples the encoder rows that the student's decoder receives; the teacher's receives all."""
        return self.student.sample_kept_tokens(rng, batch)

    def counts(self, batch: Batch, prefix: Int[Array, " B"]) -> dict[str, Int[Array, ""]]:
        masks = self._loss_masks(batch, prefix)
        return self.student.counts(batch, prefix) | {name: jnp.sum(mask) for name, mask in masks.items()}

    def _loss_masks(self, batch: Batch, prefix: Int[Array, " B"]) -> dict[str, Bool[Array, "B _"]]:
        masks = {
            "features": batch["valid"],
            "logits": self.student.text_loss_mask(batch),
            "pixels": losses.image_loss_mask(prefix, batch["valid"]),
        }
        return {name: mask for name, mask in masks.items() if name in self.weights}

    def loss_sums(self, params: Params, batch: Batch, prefix: Int[Array, " B"]) -> dict[str, Float[Array, ""]]:
        """Computes the sum of every loss in `weights`; encoders attend fully within `prefix` patches."""
        features, predictions = self.student.model.apply(
            {"params": {name: params[name] for name in ("encoder", "decoder")}},
            self.student.normalise(batch),
            batch["coords"],
            batch["valid"],
            batch["tokens"],
            prefix,
            self.outputs,
            batch.get("kept"),
            method="features_and_predictions",
        )
        sums = self.student.sums_of(predictions, batch, prefix)
        with jax.named_scope(TEACHER):  # Predictions of a step count its operations apart.
            target_features, targets = self._targets(params[TEACHER], batch, prefix)
        masks = self._loss_masks(batch, prefix)
        if "features" in masks:
            mapped = self._feature_map.apply({"params": params["feature_map"]}, features)
            sums["features"] = distill_losses.feature_loss_sum(
                mapped, target_features, masks["features"], self.feature_loss
            )
        if "logits" in masks:
            sums["logits"] = distill_losses.logit_loss_sum(
                predictions.logits, targets.logits, masks["logits"], self.temperature
            )
        if "pixels" in masks:
            sums["pixels"] = distill_losses.pixel_loss_sum(predictions.pixels, targets.pixels, masks["pixels"])
        return sums

    def _targets(
        self, params: Params, batch: Batch, prefix: Int[Array, " B"]
    ) -> tuple[Float[Array, "B L E"], Predictions]:
        """The teacher's features on the student's grid, and its predictions, without gradients."""
        length = batch["valid"].shape[1]
        if self.teacher_grid is not None:
            prefix = distill_losses.resize_prefix(prefix, length, batch["teacher_patches"].shape[1])
            batch = {**batch, **_teacher_arrays(batch, self.teacher_grid)}
        features, predictions = self.teacher.apply(
            {"params": jax.lax.stop_gradient(params)},
            self.student.normalise(batch),
            batch["coords"],
            batch["valid"],
            batch["tokens"],
            prefix,
            self.teacher_outputs,
            method="features_and_predictions",
        )
        if self.teacher_grid is not None:
            features = distill_losses.resize_features(features, self.teacher_grid, self.grid)
        return jax.lax.stop_gradient((features, predictions))


def _teacher_arrays(batch: Batch, grid: tuple[int, int]) -> dict[str, Array]:
    """Arrays of the teacher's whole crops; rows of padding have none."""
    patches = batch["teacher_patches"]
    size, length = patches.shape[:2]
    return {
        "patches": patches,
        "coords": jnp.broadcast_to(patch_coords(grid), (size, length, 2)),
        "valid": jnp.broadcast_to(is_example(batch)[:, None], (size, length)),
    }


def _identity(rng: jax.Array, shape: tuple[int, int], dtype: jnp.dtype) -> Float[Array, "E E"]:
    del rng
    return jnp.eye(*shape, dtype=dtype)


def build_distill_task(config: Config, platform: str = "cpu") -> DistillTask:
    """Builds the distillation task of a config for devices of a platform; raises as `build_model`."""
    distill = config.distill
    against_teacher = {"features": distill.features, "logits": distill.logits, "pixels": distill.pixels}
    student = build_pretrain_task(config, platform)
    return DistillTask(
        student=student,
        teacher=build_teacher(config, platform),
        weights={**student.weights, **{name: weight for name, weight in against_teacher.items() if weight}},
        outputs=config.outputs,
        teacher_outputs=config.teacher_outputs,
        feature_loss=distill.feature_loss,
        temperature=distill.temperature,
        grid=config.grid,
        teacher_grid=None if config.teacher_image_size is None else config.teacher_grid,
    )
