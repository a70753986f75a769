"""Recomputes one step for inspection: `python -m aimv2_jax.main ... --replay STEP`. Writes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from aimv2_jax.checkpoint.checkpointer import CheckpointReader
from aimv2_jax.config.schema import Config
from aimv2_jax.data import pipeline
from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.errors import EXIT_FINISHED, UserError
from aimv2_jax.monitoring.events import read_events
from aimv2_jax.monitoring.log import logger
from aimv2_jax.monitoring.nonfinite import read_record
from aimv2_jax.parallel import rules
from aimv2_jax.train.builder import TrainSetup, build_setup
from aimv2_jax.train.compiled_step import compile_step
from aimv2_jax.train.data_check import check_data, identify_data
from aimv2_jax.train.init_from import WeightSource
from aimv2_jax.train.resume import check_resumable
from aimv2_jax.train.step import TrainState, gradients
from aimv2_jax.train.trainer import initial_state, restore_state


def replay(
    config: Config,
    workdir: epath.PathLike,
    tokenizer: Tokenizer,
    step: int,
    open_weights: Callable[[], WeightSource] | None = None,
    accept_data: str | None = None,
    sources: pipeline.Sources | None = None,
    open_teacher: Callable[[], WeightSource] | None = None,
) -> int:
    """Trains from the newest checkpoint before `step` to that step, and prints its metrics and the norms of tensors.

    Args:
      open_weights: as for `trainer.train`; used where there is no checkpoint before, and so is `open_teacher`.
      accept_data: as for `trainer.train`.
      sources: as for `trainer.train`.

    Raises:
      UserError: where config, data or tokenizer are another run's, and where the run has not reached that step.
    """
    sources = sources or pipeline.open_sources(config)
    setup = build_setup(config)
    reader = CheckpointReader(workdir)
    _check_reached(step, workdir, reader, config)
    before = max((saved for saved in reader.steps() if saved < step), default=None)
    data = identify_data(config, sources, tokenizer)
    if before is None:
        state, progress = initial_state(setup, open_weights, data, open_teacher)
    else:
        check_resumable(reader.meta(before)["config"], config)
        state, progress = restore_state(reader, before, setup)
    progress = check_data(progress, data, accept_data)
    logger.info(f"training from step {progress.step} to step {step}")
    program = cache(partial(compile_step, setup))
    schedule = pipeline.training_sampler(config, sources.training).schedule
    with pipeline.training_batches(
        config, setup.local_rows, progress.step, tokenizer, progress.skips, sources=sources.training
    ) as batches:
        for number in range(progress.step + 1, step + 1):
            host = next(batches)
            shape = schedule.shape(host.step)
            batch, _ = program(shape).transfer(host)
            if number == step:
                tensors = _tensor_norms(setup, state, batch)  # The step donates the state's memory.
            state, metrics = program(shape).run(state, batch, setup.rng)
    first = schedule.first_example(host.step)
    examples = f"{first} to {first + shape.examples - 1}"
    logger.info(f"step {step}: batch {host.step}, examples {examples}, seed {config.seed}\n")
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    logger.info("\n".join(f"{name:<24} {value:.9g}" for name, value in values.items()) + "\n")
    logger.info(table(tensors))
    record = read_record(workdir, step)
    if record is not None:
        logger.info(f"\n{compare(record, host.step, values)}")
    return EXIT_FINISHED


def _check_reached(step: int, workdir: epath.PathLike, reader: CheckpointReader, config: Config) -> None:
    """Raises UserError for a step that the run never reached: replaying it would be training without saving."""
    first = 0 if config.cooldown is None else config.cooldown.start
    known = max([first, reader.latest_step() or 0, *(event.step for event in read_events(workdir))])
    # A killed run has logged nothing of up to log_every steps.
    reached = min(known + config.train.log_every, config.train.steps)
    if step > reached and read_record(workdir, step) is None:
        remedy = f"Give a step up to {reached}, or train further first"
        raise UserError("--replay is a step that the run has not reached", step, remedy)


def _tensor_norms(setup: TrainSetup, state: TrainState, batch: Mapping[str, jax.Array]) -> dict[str, dict[str, float]]:
    """Norms of each trained tensor and of its gradient, and the numbers of their non-finite entries."""

    def norms(params: Any, frozen: Any, batch: Mapping[str, jax.Array], rng: jax.Array) -> Any:
        *_, grads = gradients(params, batch, rng, None, setup.task, setup.config.train.microbatches, frozen)

        def leaf_norms(leaf: jax.Array, grad: jax.Array) -> dict[str, jax.Array]:
            return {
                "norm": optax.tree.norm(leaf),
                "grad_norm": optax.tree.norm(grad),
                "nonfinite": jnp.sum(~jnp.isfinite(leaf)),
                "grad_nonfinite": jnp.sum(~jnp.isfinite(grad)),
            }

        return jax.tree.map(leaf_norms, params, grads)

    states = setup.state_shardings
    shardings = (states.params, states.frozen, setup.batch_sharding, rules.replicated(setup.mesh))
    compiled = jax.jit(norms, in_shardings=shardings, out_shardings=rules.replicated(setup.mesh))
    with rules.scope(setup.mesh):
        tree = jax.device_get(compiled(state.params, state.frozen, batch, setup.rng))
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda node: isinstance(node, dict) and "grad_norm" in node)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): {name: np.asarray(x).item() for name, x in leaf.items()}
        for path, leaf in leaves
    }


def table(tensors: Mapping[str, Mapping[str, float]]) -> str:
    """A text table with one line per tensor; it counts non-finite entries."""
    width = max(map(len, tensors))
    lines = [f"{'tensor':<{width}} {'norm':>12} {'grad norm':>12}  non-finite"]
    for name, norms in tensors.items():
        bad = [
            f"{int(norms[key]):,} {what}"
            for key, what in (("nonfinite", "entries"), ("grad_nonfinite", "of the gradient"))
            if norms[key]
        ]
        line = f"{name:<{width}} {norms['norm']:>12.5g} {norms['grad_norm']:>12.5g}  {', '.join(bad)}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def compare(record: Mapping[str, Any], batch: int, values: Mapping[str, float]) -> str:
    """A sentence that says whether the metrics are those of the run, bit for bit."""
    if record["batch"] != batch:
        return f"the run had batch {record['batch']} in this step. It has skipped other batches since that checkpoint"
    differing = [name for name, value in record["metrics"].items() if name in values and not _same(value, values[name])]
    if differing:
        name = differing[0]
        return f"{name} was {record['metrics'][name]:.9g} in the run, and {len(differing) - 1} more metrics differ"
    return "all metrics are those of the run, bit for bit"


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))
