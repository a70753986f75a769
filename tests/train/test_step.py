"""`writes_in_order`, the CPU's train step: equal results, and with layers in a loop no copies of the state."""

from __future__ import annotations

import re
from functools import partial

import jax
import numpy as np
import pytest

from aimv2_jax.train.builder import build_setup
from aimv2_jax.train.step import StepOptions, train_step
from experiments.benchmarks.step_time import synthetic_batch
from tests.helpers.tiny import tiny_config
from tests.helpers.trained_run import random_state

_COPY = re.compile(r"= f32\[(?P<shape>[0-9,]+)\]\S* copy\(")


@pytest.fixture(scope="module")
def train_setup():
    config = tiny_config(optimizer__ema_decay=0.9, model__layers="loop", model__decoder__depth=1)
    return build_setup(config, jax.devices()[:1])


@pytest.fixture(scope="module")
def steps(train_setup):
    """Compiled steps by `writes_in_order`: True is the run's own step."""
    unordered_step = partial(
        train_step,
        task=train_setup.task,
        optimizer=train_setup.optimizer,
        schedule=train_setup.schedule,
        options=StepOptions(ema_decay=train_setup.config.optimizer.ema_decay),
    )
    shape = train_setup.config.batch_shapes[0]
    shapes = train_setup.abstract_state, train_setup.abstract_batch(shape), train_setup.rng
    return {
        True: train_setup.compile_step(shape),
        False: jax.jit(unordered_step, donate_argnums=0).lower(*shapes).compile(),
    }


def copies(step, state) -> int:
    """Counts the full copies of matrices and stacked leaves of the state in a compiled step."""
    shapes = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(state) if leaf.ndim > 1 and leaf.size >= 1024}
    entry = step.as_text().partition("\nENTRY")[2]
    return sum(match["shape"] in shapes for match in _COPY.finditer(entry))


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="its CPU compiler drops the order and copies")
def test_state_when_written_in_order_then_not_copied(train_setup, steps):
    assert copies(steps[False], train_setup.abstract_state) > 10  # If it becomes 0, `writes_in_order` can be removed.
    assert copies(steps[True], train_setup.abstract_state) == 0


def test_state_when_written_in_order_then_the_same(train_setup, steps):
    """Three steps with and without the order give the same bits."""
    batch, states = synthetic_batch(train_setup), []
    for step in steps.values():
        state = random_state(train_setup)
        for _ in range(3):
            state, metrics = step(state, batch, train_setup.rng)
        states.append(jax.device_get((state, metrics)))
    jax.tree.map(np.testing.assert_array_equal, *states)
