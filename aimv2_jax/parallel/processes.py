"""A trainer that is one of several: how it joins the others, and what they agree on.

The processes of a run are started alike, one a host. Each is a pair: the one that was started keeps watch
(`supervisor.py`) over the trainer that it starts, and tells the other hosts' watchers when that ends (`links.py`). This
module is the trainer's side; a run of one process needs none of it. It imports jax in functions only, so that a watcher
stays small.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from aimv2_jax.config import ProcessesConfig
from aimv2_jax.errors import EXIT_BUG, UserError, last_words
from aimv2_jax.parallel.clusters import Place

_TRAINER = "AIMV2_JAX_TRAINER"  # Of the environment of a trainer that has a watcher: its `Place`, and its channel.
_STORE = "aimv2_jax"  # Above our keys in the coordination store.
_Value = TypeVar("_Value")
_channel: socket.socket | None = None  # To this trainer's watcher, if it has one.


def trainer_environment(place: Place, channel: int) -> dict[str, str]:
    """The environment of the trainer of `place`; `channel` is the descriptor by which it reaches its watcher."""
    mine = json.dumps({"place": dataclasses.asdict(place), "channel": channel, "watcher": os.getpid()})
    return os.environ | {_TRAINER: mine, "PYTHONUNBUFFERED": "1"}


def trainer() -> Trainer | None:
    """This process as a trainer that has a watcher, or None."""
    mine = os.environ.pop(_TRAINER, None)  # Not for data workers.
    if mine is None:
        return None
    known = json.loads(mine)
    fields = known["place"]
    local = fields["local_devices"]
    hosts = {int(index): host for index, host in fields["hosts"].items()}
    place = Place(**fields | {"local_devices": None if local is None else tuple(local), "hosts": hosts})
    _end_with(known["watcher"])
    global _channel
    _channel = socket.socket(fileno=known["channel"])
    _channel.set_inheritable(False)
    return Trainer(place, _channel)


def channel() -> int | None:
    """Descriptor of the channel to this trainer's watcher or parent, if it has one."""
    return None if _channel is None else _channel.fileno()


def tell_hung(code: int, text: str) -> None:
    """Tells this trainer's watcher or parent, if it has one, that it hangs, and will end with `code`."""
    if _channel is not None:
        _tell(_channel, {"code": code, "text": text, "hung": True})


def _tell(channel: socket.socket, end: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):
        channel.sendall(json.dumps(end).encode() + b"\n")


def _end_with(watcher: int) -> None:
    """Lets the system kill this process when its watcher is, by kill -9 too."""
    with contextlib.suppress(OSError, AttributeError):  # Linux's alone.
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != watcher:  # It died before.
        os._exit(EXIT_BUG)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The process that trains."""

    place: Place
    channel: socket.socket

    def run(self, work: Callable[[], int], settings: ProcessesConfig) -> int:
        """Joins the others, and does `work`, whose code it returns.

        What ends it otherwise is told to the watcher, who knows whether it was the others' end; then this process ends
        at once: jax would wait for processes that don't end, and the watchers see to those.

        The only one of its run has nobody to join, and its parent (parent.py) leaves it to say how it ended.
        """
        if self.place.count == 1:
            return work()
        try:
            join(self.place, settings)
            code = work()
            leave()
            return code
        except BaseException as error:
            words = last_words(error)
            code, text = (EXIT_BUG, traceback.format_exc()) if words is None else words
            _tell(self.channel, {"code": code, "text": text})
            for output in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):  # Nobody reads it any more.
                    output.flush()
            os._exit(code)


def join(place: Place, settings: ProcessesConfig) -> None:
    """Makes the devices of all processes this one's jax, and leaves its host in the coordination store.

    Raises:
      UserError: if the others cannot be reached in time.
    """
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.index,
            local_device_ids=place.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=settings.startup_timeout_s,
            # The watchers are to find out first, and to name who it is. This one is for when they cannot.
            heartbeat_timeout_seconds=2 * settings.heartbeat_timeout_s,
            shutdown_timeout_seconds=settings.barrier_timeout_s,
            coordinator_bind_address=place.bind_address,
        )
    except RuntimeError as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        remedy = "See that the hosts reach that port of process 0, and that nothing else listens there"
        raise UserError(f"the processes cannot meet at {place.coordinator}", said, remedy) from error
    _client().key_value_set(f"{_STORE}/host/{place.index}", socket.gethostname())
    meet("hosts", settings.startup_timeout_s)


def leave() -> None:
    """Waits for all processes to come here, and ends what `join` began."""
    import jax

    jax.distributed.shutdown()


def hosts() -> dict[int, str]:
    """process -> host, of all that have joined; empty in a run of one process."""
    client = _client()
    if client is None:
        return {}
    found = client.key_value_dir_get(f"{_STORE}/host/")
    return {int(key.rpartition("/")[2]): host for key, host in sorted(found)}


def agree(name: str, value: _Value, timeout_s: int) -> _Value:
    """What process 0 gave as `value`, which is JSON; every process asks once for each `name`, and waits for process 0.

    Decisions that follow from what lies in a folder are taken so: hosts may see it at different moments.
    """
    client = _client()
    if client is None:
        return value
    key = f"{_STORE}/agreed/{name}"
    import jax

    if jax.process_index() == 0:
        client.key_value_set(key, json.dumps(value))
    try:
        return json.loads(client.blocking_key_value_get(key, timeout_s * 1000))
    except RuntimeError as error:
        raise _late({0: hosts()[0]}, name, timeout_s) from error


def gather(name: str, value: _Value, timeout_s: int) -> dict[int, _Value]:
    """What all processes gave as `value`, which is JSON, by their index; once for each `name`.

    Process 0, in which the store lives, returns last: what each does next may be to end.
    """
    client = _client()
    if client is None:
        return {0: value}
    import jax

    post(f"gathered/{name}", value)
    meet(name, timeout_s)
    found = posted(f"gathered/{name}")
    post(f"seen/{name}", True)
    for other in found if jax.process_index() == 0 else ():
        try:
            client.blocking_key_value_get(f"{_STORE}/posted/seen/{name}/{other}", timeout_s * 1000)
        except RuntimeError as error:
            raise _late({other: hosts()[other]}, name, timeout_s) from error
    return dict(sorted(found.items()))


def meet(name: str, timeout_s: int) -> None:
    """Waits until all processes have come here, once for each `name`.

    Raises:
      UserError: after `timeout_s`, naming those that have not.
    """
    client = _client()
    if client is None:
        return
    import jax

    key = f"{_STORE}/met/{name}"
    client.key_value_set(f"{key}/{jax.process_index()}", "here")
    try:
        client.wait_at_barrier(key, timeout_s * 1000)
    except RuntimeError as error:
        here = {int(one.rpartition("/")[2]) for one, _ in client.key_value_dir_get(f"{key}/")}
        raise _late({i: host for i, host in hosts().items() if i not in here}, name, timeout_s) from error


def post(name: str, value: Any) -> None:
    """Stores `value`, which is JSON, under `name` for the other processes; waits for none of them."""
    client = _client()
    if client is not None:
        import jax

        client.key_value_set(f"{_STORE}/posted/{name}/{jax.process_index()}", json.dumps(value))


def posted(name: str) -> dict[int, Any]:
    """What processes have posted under `name` so far, by process index."""
    client = _client()
    found = [] if client is None else client.key_value_dir_get(f"{_STORE}/posted/{name}/")
    return {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}


def withdraw(name: str) -> None:
    """Deletes what all processes have posted under `name` and under names that begin with `name`/."""
    client = _client()
    if client is not None:
        client.key_value_delete(f"{_STORE}/posted/{name}/")


def _late(late: Mapping[int, str], name: str, timeout_s: int) -> UserError:
    who = ", ".join(f"process {index} on {host}" for index, host in late.items())
    remedy = "Look into their logs, or raise processes.barrier_timeout_s"
    return UserError(f"others have waited {timeout_s} s for the {name} of", who, remedy)


def _client() -> Any:
    """jax's client of the coordination store, or None in a run of one process."""
    from jax._src import distributed

    return distributed.global_state.client
