"""Checks that all processes of a run have the same data and tokenizer, and that they are those of the steps before.

Paths may change when a run is continued, and hosts may read copies on their own disks: so the content is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aimv2_jax.config import Config
from aimv2_jax.data import identity, pipeline
from aimv2_jax.data.storage import patience_s
from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.errors import UserError
from aimv2_jax.parallel import processes
from aimv2_jax.train.course import Course
from aimv2_jax.train.events import Events
from aimv2_jax.train.run import say


def identify_data(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """Identifies the training data and the tokenizer (`data.identity`), and compares them between the processes.

    Raises:
      UserError: where they differ, or held-out sets do; with the hosts, and what each has.
    """
    limit_s = patience_s(config.watch.data_s)
    training, held_out = (
        identity.identify(pipeline.open_sources(sources, limit_s), tokenizer.digest)
        for sources in (config.data.sources, config.eval.sources)
    )
    mine = {"training": training, "evaluation": held_out}
    hosts = processes.hosts()
    everyone = processes.gather("data", mine, config.processes.barrier_timeout_s)
    differing: dict[str, list[str]] = {}
    for index, theirs in everyone.items():
        for purpose, data in theirs.items():
            for what, first, other in identity.differences(everyone[0][purpose], data):
                found = differing.setdefault(f"{what} of the {purpose}", [f"{first} on process 0 ({hosts[0]})"])
                found.append(f"{other} on process {index} ({hosts[index]})")
    for what, found in differing.items():
        remedy = "Copy it from one host to the others, so that all read the same"
        raise UserError(f"{what} differs between the processes", "; ".join(found), remedy)
    return training


def continue_on(course: Course, data: Mapping[str, Any], accepted: str | None, events: Events | None = None) -> Course:
    """Compares `data`, which is there now, with that of the steps before; the course with `data` from here on.

    Args:
      course: of a checkpoint, or of a run that begins, with which everything agrees.
      data: as `identify_data` gives it.
      accepted: the digest of data that may differ; a change is logged, written to `events`, and kept in the course.
      events: of the run.

    Raises:
      UserError: for the first difference that is not accepted, with both sides.
    """
    if course.data is None:
        if course.step:
            say(
                f"the checkpoint of step {course.step} is of an older version and does not record its data and "
                "tokenizer: nothing can be compared with those that are there now. Examples come in another order since"
            )
        return course.on_data(data)
    found, digest = list(identity.differences(course.data, data)), identity.digest(data)
    if found and digest != accepted:
        what, before, now = found[0]
        raise UserError(
            f"{what} is not that of the steps up to {course.step}",
            f"{before} before, {now} now",
            f"Restore it, give another --workdir, or go on with the new one by --accept_data={digest}",
        )
    changes = [f"{what}: {before} before, {now} now" for what, before, now in found]
    for change in changes:
        say(f"from step {course.step} on with other data, as --accept_data allows: {change}")
    if changes and events is not None:
        events.write("data_changed", course.step, what=changes)
    return course.on_data(data, changes)
