"""Rollback of a run to a checkpoint before a spike; resilience/rewind.py decides which."""

from __future__ import annotations

import jax

from aimv2_jax.distributed import coordination
from aimv2_jax.errors import TrainingAborted
from aimv2_jax.monitoring.events import EventKind
from aimv2_jax.monitoring.log import logger
from aimv2_jax.resilience.progress import TrainProgress
from aimv2_jax.resilience.rewind import Spike, plan_rewind
from aimv2_jax.train.builder import TrainSetup
from aimv2_jax.train.resources import Resources
from aimv2_jax.train.step import TrainState


def rewind(
    spike: Spike, progress: TrainProgress, setup: TrainSetup, resources: Resources
) -> tuple[TrainState, TrainProgress]:
    """Restores a state before a spike; the returned progress skips the batches that led to it.

    Raises:
      TrainingAborted: where the run was rewound `guard.max_rewinds` times already.
    """
    config = setup.config
    settings = config.guard
    checkpointer = resources.checkpointer
    watchdog = resources.watchdog
    attempt = progress.rewinds + 1
    if attempt > settings.max_rewinds:
        raise TrainingAborted(
            f"{spike.message}; the run was rewound {progress.rewinds} times already, the limit of guard.max_rewinds"
        )
    with watchdog.watching("save", spike.step):
        checkpointer.settle()
    with watchdog.watching("start", spike.step), jax.transfer_guard("allow"):
        timeout_s = config.processes.barrier_timeout_s
        saved = coordination.broadcast(f"steps before rewind {attempt}", checkpointer.steps(), timeout_s)
        initial = None if saved else resources.initial_state()
        plan = plan_rewind(spike, saved or [initial[1].step], progress.skips, settings.rewind_batches)
        logger.info(
            f"spike: {spike.message}; rewinding to step {plan.step}, skipping batches {plan.first:,} to "
            f"{plan.end - 1:,} ({attempt} of {settings.max_rewinds})"
        )
        checkpointer.set_aside_newer(plan.step, "rewound")
        state = initial[0] if initial else checkpointer.restore(plan.step, setup.abstract_state)
    events = resources.events
    events.write(EventKind.PROGRESS, spike.step, **resources.time_accounting.seconds())
    events.write(EventKind.REWIND, spike.step, from_step=spike.step, to_step=plan.step, a=plan.first, b=plan.end)
    return state, progress.rewound(plan.step, progress.skips.adding(plan.first, plan.end))
