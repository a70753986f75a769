"""What a run computes: task, optimiser, mesh and shardings, and the jitted functions over them.

The loop, the tests, the benchmarks and the ahead-of-time compile all build their step here.
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

from aimv2_jax.config import BatchShape, Config, ModelConfig
from aimv2_jax.errors import UserError
from aimv2_jax.parallel import rules
from aimv2_jax.parallel.chips import chip_kind
from aimv2_jax.parallel.mesh import build_mesh, check_batch
from aimv2_jax.train import guard
from aimv2_jax.train.optimizer import COSINE_PARTS, Schedule, adamlh, learning_rate
from aimv2_jax.train.step import TrainState, eval_step, fresh_state, init_state, train_step, with_average
from aimv2_jax.train.task import Batch, PretrainTask, abstract_key, build_task, run_key


@dataclasses.dataclass(frozen=True)
class Program:
    """A config on a mesh. Nothing is computed or compiled until asked."""

    config: Config
    task: PretrainTask
    optimizer: optax.GradientTransformation
    schedule: Schedule
    mesh: Mesh

    @property
    def batch_sharding(self) -> NamedSharding:
        return rules.batch_sharding(self.mesh)

    @cached_property
    def rng(self) -> jax.Array:
        """The run's key, whole on every device of the mesh."""
        # By a computation: `device_put` refuses keys where other processes have part of the mesh.
        return jax.jit(partial(run_key, self.config.seed), out_shardings=rules.replicated(self.mesh))()

    @cached_property
    def state_shardings(self) -> TrainState:
        """Shardings of the whole state, by the rule table."""
        abstract = self.task.abstract_params
        params = rules.param_shardings(self.task.logical_axes(), self.mesh)
        rules.check_divisible(abstract, params)
        opt_state = rules.opt_state_shardings(self.optimizer, abstract, params, self.mesh)
        whole = rules.replicated(self.mesh)
        guarded = jax.tree.map(lambda _: whole, jax.eval_shape(guard.fresh))
        state = TrainState(step=whole, params=params, opt_state=opt_state, guard=guarded)
        return with_average(state, params) if self.config.optimizer.ema_decay else state

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state, without its memory."""
        fresh = partial(fresh_state, optimizer=self.optimizer, ema_decay=self.config.optimizer.ema_decay)
        shapes = jax.eval_shape(fresh, self.task.abstract_params)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            self.state_shardings,
        )

    def abstract_batch(self, shape: BatchShape) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, types and shardings of a training batch (LAYOUT.md, "Batch")."""
        size, length = shape
        text = self.config.model.decoder.text_length
        shapes = {
            "patches": ((length, self.task.model.decoder.pixels), jnp.uint8),
            "coords": ((length, 2), jnp.int32),
            "valid": ((length,), jnp.bool_),
            "tokens": ((text,), jnp.int32),
            "token_valid": ((text,), jnp.bool_),
            "example_index": ((2,), jnp.uint32),
        }
        return {
            name: jax.ShapeDtypeStruct((size, *shape), dtype, sharding=self.batch_sharding)
            for name, (shape, dtype) in shapes.items()
        }

    def init(self) -> TrainState:
        """The state before step 0, laid out as the rules say; the same numbers on any mesh."""
        return self._init(self.rng)

    @cached_property
    def _init(self) -> Any:
        decay = self.config.optimizer.ema_decay
        run = partial(init_state, task=self.task, optimizer=self.optimizer, ema_decay=decay)
        return jax.jit(run, out_shardings=self.state_shardings)

    @cached_property
    def step(self) -> Any:
        """The jitted train step (state, batch, rng) -> (state, metrics); the old state's memory is reused."""
        settings = self.config.guard
        run = partial(
            train_step,
            task=self.task,
            optimizer=self.optimizer,
            schedule=self.schedule,
            microbatches=self.config.train.microbatches,
            grad_shardings=self.state_shardings.params,
            ema_decay=self.config.optimizer.ema_decay,
            skip_beyond=settings.spike_sigma if settings.spike == "skip" else None,
            writes_in_order=self.mesh.devices.flat[0].platform == "cpu",
        )
        whole = rules.replicated(self.mesh)
        return jax.jit(
            run,
            donate_argnums=0,
            in_shardings=(self.state_shardings, self.batch_sharding, whole),
            out_shardings=(self.state_shardings, whole),
        )

    def lower_step(self, shape: BatchShape) -> Any:
        """The train step, traced for batches of `shape`; the devices may be described ones."""
        key = abstract_key()
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=rules.replicated(self.mesh))
        step, state = self.step, self.abstract_state  # Before the scope: described devices compute nothing.
        with rules.scope(self.mesh):
            return step.lower(state, self.abstract_batch(shape), key)

    @property
    def compiler_options(self) -> dict[str, str]:
        """What the config asks of the compiler for the devices of the mesh."""
        device = self.mesh.devices.flat[0]
        chip = chip_kind(device)
        groups = ("all", chip.name) if chip and device.platform == "tpu" else ()
        wanted = self.config.train.tpu_compiler_options
        return {name: value for group in groups for name, value in wanted.get(group, {}).items()}

    def compile_step(self, shape: BatchShape) -> Any:
        """The train step, compiled for batches of `shape`: calling it never compiles again."""
        return self.lower_step(shape).compile(compiler_options=self.compiler_options or None)

    def eval_sums(self, params: Any, batch: Batch, prefix: Int[Array, " B"]) -> dict[str, tuple[float, int]]:
        """Sum and count of every loss of one held-out batch at the given prefix lengths, as numbers of the host."""
        with rules.scope(self.mesh):
            return jax.tree.map(np.asarray, jax.device_get(self._eval_step(params, batch, prefix)))

    @cached_property
    def _eval_step(self) -> Any:
        rows = self.batch_sharding
        return jax.jit(
            partial(eval_step, task=self.task),
            in_shardings=(self.state_shardings.params, rows, rows),
            out_shardings=rules.replicated(self.mesh),
        )


def build_program(config: Config, devices: list[jax.Device] | None = None) -> Program:
    """The program of a config on all devices, or on those given (described ones too).

    Raises:
      UserError: where mesh, batch or parameters don't fit the devices.
    """
    sizes = config.mesh
    mesh = build_mesh(sizes.slices, sizes.data, sizes.fsdp, sizes.tensor, devices)
    _check_heads(config.model, mesh)
    platform = mesh.devices.flat[0].platform
    if platform == "cpu" and config.train.reduce_dtype == "bfloat16" and mesh.size > 1:
        raise UserError(
            "config train.reduce_dtype cannot be had on several CPU devices, whose compiler dies of such sums",
            config.train.reduce_dtype,
            "Set train.reduce_dtype=float32",
        )
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
    return Program(config, build_task(config, platform), optimizer, schedule, mesh)


def _check_heads(model: ModelConfig, mesh: Mesh) -> None:
    """Raises UserError where `mesh.tensor` would cut an attention head in two."""
    devices = mesh.shape["tensor"]
    common = math.gcd(*(trunk.heads for trunk in model.attending.values()))
    for name, trunk in model.attending.items():
        if trunk.heads % devices:
            choices = [n for n in range(1, common + 1) if common % n == 0]
            raise UserError(
                f"config mesh.tensor does not divide model.{name}.heads",
                f"{devices} devices, {trunk.heads} heads",
                f"Set mesh.tensor to {' or '.join(map(str, choices))}",
            )


def _cooldown(config: Config) -> dict[str, Any]:
    """What `learning_rate` is to know of the run's cooldown."""
    if config.cooldown is None:
        return {}
    start, steps = config.cooldown.start, config.cooldown.steps
    return dict(cooldown_start=start, cooldown_steps=steps, cooldown_lr=config.optimizer.cooldown_lr)
