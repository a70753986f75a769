"""Checks that all processes of a run have the same data and tokenizer, which must be those of the steps before.

Paths may change when a run is resumed, and hosts may read copies on their own disks, so contents are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aimv2_jax.config.schema import Config
from aimv2_jax.data import identity, pipeline
from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.distributed import coordination
from aimv2_jax.errors import UserError
from aimv2_jax.monitoring.events import EventKind, EventLog
from aimv2_jax.monitoring.log import logger
from aimv2_jax.resilience.progress import TrainProgress


def identify_data(config: Config, sources: pipeline.Sources, tokenizer: Tokenizer) -> dict[str, Any]:
    """Identifies the training data and the tokenizer (`data.identity`), and compares them between the processes.

    Raises:
      UserError: where they or the held-out datasets differ; it names the hosts, and what each has.
    """
    training = identity.identify(sources.training, tokenizer.digest)
    held_out = identity.identify(sources.held_out, tokenizer.digest)
    mine = {"training": training, "evaluation": held_out}
    hosts = coordination.hosts()
    identities = coordination.all_gather("data", mine, config.processes.barrier_timeout_s)
    differing: dict[str, list[str]] = {}
    for index, other_process in identities.items():
        for purpose, data in other_process.items():
            for what, first, other in identity.differences(identities[0][purpose], data):
                values = differing.setdefault(f"{what} of the {purpose}", [f"{first} on process 0 ({hosts[0]})"])
                values.append(f"{other} on process {index} ({hosts[index]})")
    for what, values in differing.items():
        remedy = "Copy it from one host to the others, so that all read the same"
        raise UserError(f"{what} differs between the processes", "; ".join(values), remedy)
    return training


def check_data(
    progress: TrainProgress, data: Mapping[str, Any], accepted: str | None, events: EventLog | None = None
) -> TrainProgress:
    """Compares the current `data` with that of the steps before, and returns the progress with `data` from here on.

    Args:
      progress: of a checkpoint, or of a new run, which accepts any data.
      data: the result of `identify_data`.
      accepted: the digest of data that may differ. A change is logged, written to `events` and stored in the progress.
      events: the event log of the run.

    Raises:
      UserError: for the first difference that is not accepted, with both sides.
    """
    if progress.data is None:
        if progress.step:
            logger.info(
                f"the checkpoint of step {progress.step} is of an older version and does not record its data and "
                "tokenizer. They cannot be compared with the current ones. The order of examples has changed since"
            )
        return progress.with_data(data)
    differences = list(identity.differences(progress.data, data))
    digest = identity.digest(data)
    if differences and digest != accepted:
        what, before, now = differences[0]
        raise UserError(
            f"{what} is not that of the steps up to {progress.step}",
            f"{before} before, {now} now",
            f"Restore it, give another --workdir, or continue with the new one by --accept_data={digest}",
        )
    changes = [f"{what}: {before} before, {now} now" for what, before, now in differences]
    for change in changes:
        logger.info(f"the data changes from step {progress.step} on, as --accept_data allows: {change}")
    if changes and events is not None:
        events.write(EventKind.DATA_CHANGED, progress.step, what=changes)
    return progress.with_data(data, changes)
