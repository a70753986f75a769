"""Trains the head of a dense probe on the features of a frozen encoder, which are computed as they are needed."""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array
from tqdm import tqdm

from aimv2_jax.errors import UserError
from aimv2_jax.eval.dense.augment import random_colours
from aimv2_jax.eval.dense.dataset import DenseDataset
from aimv2_jax.eval.dense.features import DenseEncoder
from aimv2_jax.eval.dense.heads import DenseHead, depths_from, loss_from, on_canvas, pixel_sums
from aimv2_jax.eval.dense.optimizer import Moments, adamw, initial_moments
from aimv2_jax.eval.dense.settings import DEPTH, DenseConfig
from aimv2_jax.eval.dense.views import canvas_of, train_batches
from aimv2_jax.parallel import rules

_LOG_EVERY = 50  # Steps between readings of the loss, which wait for the devices.


@dataclasses.dataclass(frozen=True)
class TrainedHead:
    """A head and its variables; `losses` has the loss of every 50th step and of the last one, `seconds` the time."""

    head: DenseHead
    variables: Any
    losses: dict[int, float]
    seconds: float


def train_head(dataset: DenseDataset, encoder: DenseEncoder, num_outputs: int, config: DenseConfig) -> TrainedHead:
    """Trains a head with `num_outputs` outputs a patch (the classes, or the bins of depth).

    Raises:
      UserError: if the loss is not finite.
    """
    mesh, canvas = encoder.encoder.mesh, canvas_of(encoder, dataset.sizes)
    head = DenseHead(num_outputs, config.dropout)
    key = jax.random.key(config.seed)
    variables = head.init(key, jnp.zeros((1, 1, encoder.width)), jnp.ones((1, 1), bool))
    params, statistics = variables["params"], variables["batch_stats"]
    state = jax.device_put((params, statistics, initial_moments(params)), rules.replicated(mesh))
    rows = padded_rows(config.batch_size, mesh)
    step_fn = _step_of(encoder, head, canvas, config)
    losses: dict[int, float] = {}
    start = time.perf_counter()
    batches = train_batches(dataset, encoder, config, rows)
    for step, batch in enumerate(tqdm(batches, total=config.steps, desc="train", unit="step")):
        on_devices = jax.device_put(batch, rules.batch_sharding(mesh))
        state, loss = step_fn(state, encoder.params, jnp.int32(step), key, on_devices)
        if step % _LOG_EVERY == 0 or step == config.steps - 1:
            losses[step] = float(loss)
            if not jnp.isfinite(loss):
                what = f"the loss of step {step} is not finite"
                raise UserError(what, float(loss), "Give a smaller --rate, or check the encoder")
    params, statistics, _ = state
    variables = {"params": params, "batch_stats": statistics}
    return TrainedHead(head, variables, losses, time.perf_counter() - start)


def padded_rows(count: int, mesh: Mesh) -> int:
    """Rows of a batch: a multiple of the number of devices."""
    return -(-count // mesh.size) * mesh.size


def patch_outputs(outputs: Array, config: DenseConfig) -> Array:
    """What is interpolated between patches: logits, or depths in metres."""
    return depths_from(outputs, config.depths) if config.task == DEPTH else outputs


def _step_of(encoder: DenseEncoder, head: DenseHead, canvas: tuple[int, int], config: DenseConfig) -> Any:
    compact, patch_size = encoder.area is not None, encoder.encoder.spec.patch_size

    @partial(jax.jit, donate_argnums=0)
    def step_fn(
        state: tuple[Any, Any, Moments], encoder_params: Any, step: Array, key: Array, batch: dict[str, Any]
    ) -> tuple[tuple[Any, Any, Moments], Array]:
        params, statistics, moments = state
        colour_key, dropout_key = jax.random.split(jax.random.fold_in(key, step))
        patches = random_colours(colour_key, encoder.patches(batch), config.colours)
        features = encoder.features(encoder_params, patches, batch["coords"], batch["valid"])
        features = jax.lax.stop_gradient(features)

        def loss_of(params: Any) -> tuple[Array, Any]:
            outputs, changed = head.apply(
                {"params": params, "batch_stats": statistics},
                features,
                batch["valid"],
                True,
                rngs={"dropout": dropout_key},
                mutable=["batch_stats"],
            )
            values = on_canvas(patch_outputs(outputs, config), batch["grids"], canvas, compact)
            sums = pixel_sums(values, batch["grids"], batch["truth"], patch_size, config)
            return loss_from(sums, step, config), changed["batch_stats"]

        (loss, statistics), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        params, moments = adamw(step, params, gradients, moments, config)
        return (params, statistics, moments), loss

    return step_fn
