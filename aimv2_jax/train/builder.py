"""Training setup: task, optimiser, mesh, shardings and the jitted functions over them.

The loop, the tests, the benchmarks and the ahead-of-time compile all build their train step here.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int

from aimv2_jax.config.schema import BatchShape, Config
from aimv2_jax.errors import UserError
from aimv2_jax.parallel import rules
from aimv2_jax.parallel.hardware import chip_kind
from aimv2_jax.parallel.mesh import build_mesh, check_batch, local_rows
from aimv2_jax.train import anomaly
from aimv2_jax.train.optimizer import COSINE_PARTS, Schedule, adamlh, learning_rate
from aimv2_jax.train.step import StepOptions, TrainState, eval_step, init_state, initial_state, train_step
from aimv2_jax.train.task import Batch, ModelTask, abstract_key, merge, run_key
from aimv2_jax.train.tasks import build_task

# XLA's options with which a program on a GPU gives the same bits each time it runs; the second implies the first.
_REPEATABLE = ("xla_gpu_exclude_nondeterministic_ops", "xla_gpu_deterministic_ops")


@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """A config on a mesh. Computes and compiles lazily."""

    config: Config
    task: ModelTask
    optimizer: optax.GradientTransformation
    schedule: Schedule
    mesh: Mesh

    @property
    def batch_sharding(self) -> NamedSharding:
        """Sharding of the rows of a batch."""
        return rules.batch_sharding(self.mesh)

    def local_rows(self, size: int) -> np.ndarray:
        """Returns the rows of a global batch of `size` that this process holds, ascending."""
        return local_rows(self.batch_sharding, size)

    @cached_property
    def rng(self) -> jax.Array:
        """The run's key, replicated over the mesh."""
        # Jitted, because `device_put` rejects keys if other processes have part of the mesh.
        return jax.jit(partial(run_key, self.config.seed), out_shardings=rules.replicated(self.mesh))()

    @cached_property
    def state_shardings(self) -> TrainState:
        """Shardings of the state by the rule table."""
        abstract = self.task.abstract_params
        all_params = rules.param_shardings(self.task.logical_axes(), self.mesh)
        rules.check_divisible(abstract, all_params)
        params, frozen = self.task.split(all_params)
        trained, _ = self.task.split(abstract)
        opt_state = rules.opt_state_shardings(self.optimizer, trained, params, self.mesh)
        replicated = rules.replicated(self.mesh)
        anomaly_state = jax.tree.map(lambda _: replicated, jax.eval_shape(anomaly.initial_state))
        ema_params = params if self.config.optimizer.ema_decay else None
        return TrainState(replicated, params, opt_state, anomaly_state, ema_params, frozen)

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state, without allocating it."""
        decay = self.config.optimizer.ema_decay
        init = partial(initial_state, task=self.task, optimizer=self.optimizer, ema_decay=decay)
        shapes = jax.eval_shape(init, self.task.abstract_params)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            self.state_shardings,
        )

    def abstract_batch(self, shape: BatchShape) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, types and shardings of a training batch (docs/architecture.md, "Batch")."""
        size, length = shape
        text = self.config.text.text_length
        shapes = {
            "patches": ((length, self.config.patch_pixels), jnp.uint8),
            "coords": ((length, 2), jnp.int32),
            "valid": ((length,), jnp.bool_),
            "tokens": ((text,), jnp.int32),
            "token_valid": ((text,), jnp.bool_),
            "example_index": ((2,), jnp.uint32),
        }
        if self.config.teacher_image_size is not None:
            shapes["teacher_patches"] = ((math.prod(self.config.teacher_grid), self.config.patch_pixels), jnp.uint8)
        return {
            name: jax.ShapeDtypeStruct((size, *shape), dtype, sharding=self.batch_sharding)
            for name, (shape, dtype) in shapes.items()
        }

    def init(self) -> TrainState:
        """Initialises the state before step 0, sharded by the rules; the values do not depend on the mesh."""
        return self._init(self.rng)

    @cached_property
    def _init(self) -> Any:
        decay = self.config.optimizer.ema_decay
        init = partial(init_state, task=self.task, optimizer=self.optimizer, ema_decay=decay)
        return jax.jit(init, out_shardings=self.state_shardings)

    @cached_property
    def step(self) -> Any:
        """The jitted train step (state, batch, rng) -> (state, metrics); donates the old state."""
        guard = self.config.guard
        options = StepOptions(
            microbatches=self.config.train.microbatches,
            grad_shardings=self.state_shardings.params,
            ema_decay=self.config.optimizer.ema_decay,
            skip_sigma=guard.spike_sigma if guard.spike == "skip" else None,
            writes_in_order=self.mesh.devices.flat[0].platform == "cpu",
        )
        step = partial(train_step, task=self.task, optimizer=self.optimizer, schedule=self.schedule, options=options)
        replicated = rules.replicated(self.mesh)
        return jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(self.state_shardings, self.batch_sharding, replicated),
            out_shardings=(self.state_shardings, replicated),
        )

    def lower_step(self, shape: BatchShape) -> Any:
        """Traces the train step for batches of `shape`; also for a mesh of described (absent) devices."""
        key = abstract_key()
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=rules.replicated(self.mesh))
        # Built outside the scope, because described devices cannot compute.
        step, state = self.step, self.abstract_state
        with rules.scope(self.mesh):
            return step.lower(state, self.abstract_batch(shape), key)

    @property
    def compiler_options(self) -> dict[str, str | bool]:
        """Compiler options of the config for the devices of the mesh."""
        device = self.mesh.devices.flat[0]
        if device.platform == "gpu":
            options = self.config.train.gpu_compiler_options
            # XLA refuses "true" and "false" for booleans, which libtpu takes.
            return {name: {"true": True, "false": False}.get(value, value) for name, value in options.items()}
        chip = chip_kind(device)
        groups = ("all", chip.name) if chip and device.platform == "tpu" else ()
        options = self.config.train.tpu_compiler_options
        return {name: value for group in groups for name, value in options.get(group, {}).items()}

    def compile_step(self, shape: BatchShape) -> Any:
        """Compiles the train step for batches of `shape`; calling the result never recompiles."""
        return self.lower_step(shape).compile(compiler_options=self.compiler_options or None)

    def eval_sums(self, params: Any, batch: Batch, prefix: Int[Array, " B"]) -> dict[str, tuple[float, int]]:
        """Computes sum and count of every loss of one held-out batch at the given prefix lengths, on the host.

        `params` is the whole tree of parameters (`merge`).
        """
        with rules.scope(self.mesh):
            return jax.tree.map(np.asarray, jax.device_get(self._eval_step(params, batch, prefix)))

    @cached_property
    def _eval_step(self) -> Any:
        rows = self.batch_sharding
        shardings = self.state_shardings
        return jax.jit(
            partial(eval_step, task=self.task),
            in_shardings=(merge(shardings.params, shardings.frozen), rows, rows),
            out_shardings=rules.replicated(self.mesh),
        )


def build_setup(config: Config, devices: list[jax.Device] | None = None) -> TrainSetup:
    """Builds the setup of a config on all devices or on `devices`, which may be described (absent) ones.

    Raises:
      UserError: if mesh, batch or attention heads do not fit the devices, or if their results would not repeat where
        the config compares them.
    """
    axes = config.mesh
    mesh = build_mesh(axes.slices, axes.data, axes.fsdp, axes.tensor, devices)
    _check_heads(config, mesh)
    platform = mesh.devices.flat[0].platform
    if platform == "cpu" and config.train.reduce_dtype == "bfloat16" and mesh.size > 1:
        raise UserError(
            "config train.reduce_dtype is not supported on several CPU devices, because XLA's CPU compiler crashes",
            config.train.reduce_dtype,
            "Set train.reduce_dtype=float32",
        )
    _check_repeatable(config, platform)
    for shape in config.batch_shapes:
        key = f"data.batch_size (at {shape.patches} patches)" if config.data.areas else "data.batch_size"
        check_batch(shape.examples, mesh, key, config.train.microbatches)
    if config.eval.sources:
        check_batch(config.eval.batch_size, mesh, "eval.batch_size")
    settings = config.optimizer
    schedule = learning_rate(
        start_lr=settings.start_lr,
        peak_lr=settings.peak_lr,
        end_lr=settings.end_lr,
        warmup_steps=settings.warmup_steps,
        schedule_steps=settings.schedule_steps,
        cosine_part=COSINE_PARTS[settings.schedule],
        **_cooldown(config),
    )
    optimizer = adamlh(
        schedule,
        peak_lr=settings.peak_lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
    )
    return TrainSetup(config, build_task(config, platform), optimizer, schedule, mesh)


def _check_heads(config: Config, mesh: Mesh) -> None:
    """Raises UserError if `mesh.tensor` would split an attention head."""
    devices = mesh.shape["tensor"]
    common_heads = math.gcd(*(trunk.heads for trunk in config.attention_trunks.values()))
    for key, trunk in config.attention_trunks.items():
        if trunk.heads % devices:
            choices = [n for n in range(1, common_heads + 1) if common_heads % n == 0]
            raise UserError(
                f"config mesh.tensor does not divide {key}.heads",
                f"{devices} devices, {trunk.heads} heads",
                f"Set mesh.tensor to {' or '.join(map(str, choices))}",
            )


def _check_repeatable(config: Config, platform: str) -> None:
    """Raises UserError if the SDC check would take a GPU's own differences between two runs of a step for a fault."""
    options = config.train.gpu_compiler_options
    if config.guard.sdc_check_every and platform == "gpu" and not {options.get(key) for key in _REPEATABLE} & {"true"}:
        raise UserError(
            "config guard.sdc_check_every compares steps bit for bit, and no GPU option makes them repeat",
            ", ".join(f"{key}={value}" for key, value in options.items()) or "no train.gpu_compiler_options",
            f"Set train.gpu_compiler_options.{_REPEATABLE[0]}=true, or guard.sdc_check_every=0",
        )


def _cooldown(config: Config) -> dict[str, Any]:
    """Cooldown arguments of `learning_rate`."""
    if config.cooldown is None:
        return {}
    return dict(
        cooldown_start=config.cooldown.start,
        cooldown_steps=config.cooldown.steps,
        cooldown_lr=config.optimizer.cooldown_lr,
    )
