"""The step that is told to write in order, as on a CPU: the same numbers, and, of layers in a loop, no copied state."""

from __future__ import annotations

import re
from functools import partial

import jax
import numpy as np
import pytest
from tiny import tiny_config

from aimv2_jax.train.program import build_program
from aimv2_jax.train.step import train_step
from experiments.benchmarks.step_time import synthetic_batch

_COPY = re.compile(r"= f32\[(?P<shape>[0-9,]+)\]\S* copy\(")


@pytest.fixture(scope="module")
def program():
    return build_program(tiny_config(optimizer__ema_decay=0.9, model__layers="loop"), jax.devices()[:1])


@pytest.fixture(scope="module")
def steps(program):
    """The compiled step, by whether it is told to write in order: the run's own, and one that is not."""
    run = partial(
        train_step,
        task=program.task,
        optimizer=program.optimizer,
        schedule=program.schedule,
        ema_decay=program.config.optimizer.ema_decay,
        writes_in_order=False,
    )
    shape = program.config.batch_shapes[0]
    shapes = program.abstract_state, program.abstract_batch(shape), program.rng
    return {True: program.compile_step(shape), False: jax.jit(run, donate_argnums=0).lower(*shapes).compile()}


def copies(step, state) -> int:
    """Whole copies of leaves of the state that a compiled step makes, those of its matrices and stacked ones."""
    shapes = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(state) if leaf.ndim > 1 and leaf.size >= 1024}
    entry = step.as_text().partition("\nENTRY")[2]
    return sum(match["shape"] in shapes for match in _COPY.finditer(entry))


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="whose CPU compiler drops the order, and copies")
def test_state_when_written_in_order_then_not_copied(program, steps):
    assert copies(steps[False], program.abstract_state) > 10  # Once it is 0, this may go.
    assert copies(steps[True], program.abstract_state) == 0


def test_state_when_written_in_order_then_the_same(program, steps):
    """Three steps, bit for bit."""
    batch, states = synthetic_batch(program), []
    for step in steps.values():
        state = program.init()
        for _ in range(3):
            state, metrics = step(state, batch, program.rng)
        states.append(jax.device_get((state, metrics)))
    jax.tree.map(np.testing.assert_array_equal, *states)
