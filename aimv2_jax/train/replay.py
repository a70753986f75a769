"""One step computed again, to look into it: `python -m aimv2_jax.main ... --replay STEP`. Writes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from aimv2_jax.config import Config
from aimv2_jax.data import pipeline
from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.errors import EXIT_FINISHED, UserError
from aimv2_jax.parallel import rules
from aimv2_jax.parallel.mesh import local_rows
from aimv2_jax.train.checkpoint import CheckpointReader
from aimv2_jax.train.course import Course
from aimv2_jax.train.data_check import continue_on, identify_data
from aimv2_jax.train.events import read_events
from aimv2_jax.train.loop import begin
from aimv2_jax.train.nonfinite import read_record
from aimv2_jax.train.program import Program, build_program
from aimv2_jax.train.resume import check_resumable
from aimv2_jax.train.step import gradients
from aimv2_jax.train.warm_start import Donor


def replay(
    config: Config,
    workdir: epath.PathLike,
    tokenizer: Tokenizer,
    step: int,
    donor: Callable[[], Donor] | None = None,
    accept_data: str | None = None,
) -> int:
    """Goes on from the newest checkpoint before `step` to that step, and prints its metrics and the norms of tensors.

    Args:
      donor: as of `loop.train`, for where there is no checkpoint before.
      accept_data: as of `loop.train`.

    Raises:
      UserError: where config, data or tokenizer are another run's, and where the run has not come to that step.
    """
    program, reader = build_program(config), CheckpointReader(workdir)
    _check_reached(step, workdir, reader, config)
    before = max((saved for saved in reader.steps() if saved < step), default=None)
    data = identify_data(config, tokenizer)
    if before is None:
        state, course = begin(program, donor, data)
    else:
        meta = reader.meta(before)
        check_resumable(meta["config"], config)
        state, course = reader.restore(before, program.abstract_state), Course.of_meta(meta)
    course = continue_on(course, data, accept_data)
    print(f"from step {course.step} on, to step {step}", flush=True)
    sharding, compiled = program.batch_sharding, {}
    steps = pipeline.training_plan(config, pipeline.open_sources(config.data.sources)).steps
    rows_of = partial(local_rows, sharding)
    with pipeline.training_batches(config, rows_of, course.step, tokenizer, course.skips) as batches:
        for number in range(course.step + 1, step + 1):
            host = next(batches)
            shape = steps.shape(host.step)
            batch = pipeline.to_devices(host.arrays, sharding, rows_of(shape.examples), shape.examples)
            batch = {name: array for name, array in batch.items() if name not in pipeline.BOOKKEEPING}
            if number == step:
                tensors = _look(program, state.params, batch)  # Before the step takes over the state's memory.
            if shape not in compiled:
                compiled[shape] = program.compile_step(shape)
            state, metrics = compiled[shape](state, batch, program.rng)
    first = steps.first_example(host.step)
    print(f"step {step}: batch {host.step}, examples {first} to {first + shape.examples - 1}, seed {config.seed}\n")
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    print("\n".join(f"{name:<24} {value:.9g}" for name, value in values.items()) + "\n")
    print(table(tensors))
    record = read_record(workdir, step)
    if record is not None:
        print(f"\n{compared(record, host.step, values)}")
    return EXIT_FINISHED


def _check_reached(step: int, workdir: epath.PathLike, reader: CheckpointReader, config: Config) -> None:
    """Refuses a step that the run never did: getting there would be training, of which nothing is kept."""
    began = 0 if config.cooldown is None else config.cooldown.start
    known = max([began, reader.latest_step() or 0, *(event.step for event in read_events(workdir))])
    reached = min(known + config.train.log_every, config.train.steps)  # A kill leaves no word of the last steps.
    if step > reached and read_record(workdir, step) is None:
        remedy = f"Give one up to {reached}, or train on first"
        raise UserError("--replay is of a step that the run has not come to", step, remedy)


def _look(program: Program, params: Any, batch: Mapping[str, jax.Array]) -> dict[str, dict[str, float]]:
    """For each tensor: norms of it and of its gradient, and how many entries of either are not finite."""

    def look(params: Any, batch: Mapping[str, jax.Array], rng: jax.Array) -> Any:
        *_, grads = gradients(params, batch, rng, None, program.task, program.config.train.microbatches)

        def figures(leaf: jax.Array, grad: jax.Array) -> dict[str, jax.Array]:
            return {
                "norm": optax.tree.norm(leaf),
                "grad_norm": optax.tree.norm(grad),
                "nonfinite": jnp.sum(~jnp.isfinite(leaf)),
                "grad_nonfinite": jnp.sum(~jnp.isfinite(grad)),
            }

        return jax.tree.map(figures, params, grads)

    shardings = (program.state_shardings.params, program.batch_sharding, rules.replicated(program.mesh))
    looked = jax.jit(look, in_shardings=shardings, out_shardings=rules.replicated(program.mesh))
    with rules.scope(program.mesh):
        tree = jax.device_get(looked(params, batch, program.rng))
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda node: isinstance(node, dict) and "grad_norm" in node)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): {name: np.asarray(x).item() for name, x in leaf.items()}
        for path, leaf in leaves
    }


def table(tensors: Mapping[str, Mapping[str, float]]) -> str:
    """A line a tensor; what isn't finite is counted."""
    width = max(map(len, tensors))
    lines = [f"{'tensor':<{width}} {'norm':>12} {'of gradient':>12}  not finite"]
    for name, figures in tensors.items():
        bad = [
            f"{int(figures[key]):,} {what}"
            for key, what in (("nonfinite", "entries"), ("grad_nonfinite", "of the gradient"))
            if figures[key]
        ]
        line = f"{name:<{width}} {figures['norm']:>12.5g} {figures['grad_norm']:>12.5g}  {', '.join(bad)}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def compared(record: Mapping[str, Any], batch: int, values: Mapping[str, float]) -> str:
    """Whether this is what the run saw, bit for bit."""
    if record["batch"] != batch:
        return f"the run had batch {record['batch']} in this step: it jumped over others since that checkpoint"
    differing = [name for name, value in record["metrics"].items() if name in values and not _same(value, values[name])]
    if differing:
        name = differing[0]
        return f"{name} was {record['metrics'][name]:.9g} in the run, and {len(differing) - 1} more figures differ"
    return "all figures are those that the run saw, bit for bit"


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))
