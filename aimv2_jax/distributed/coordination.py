"""Initialisation, barriers, broadcasts and shutdown among the trainers of a run.

The processes of a run are started with the same command, one per host. Each is a pair: a supervisor (`supervisor.py`)
starts a trainer, watches it, and sends the other supervisors how it ended (`messages.py`). This module is the trainer's
side; a run of one process needs none of it. It imports jax in functions only, so that a supervisor stays small.
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

from aimv2_jax.config.schema import ProcessesConfig
from aimv2_jax.distributed.cluster import ProcessInfo
from aimv2_jax.errors import EXIT_BUG, UserError, describe_exit, first_line

_TRAINER = "AIMV2_JAX_TRAINER"  # Environment variable by which a trainer gets its `ProcessInfo` and its channel.
_STORE = "aimv2_jax"  # Prefix of this project's keys in the coordination store.
_Value = TypeVar("_Value")
_channel: socket.socket | None = None  # Channel to this trainer's supervisor or parent, if it has one.


def trainer_environment(process: ProcessInfo, channel: int) -> dict[str, str]:
    """Environment of the trainer of `process`; `channel` is its file descriptor for reaching its supervisor."""
    value = json.dumps({"process": dataclasses.asdict(process), "channel": channel, "supervisor": os.getpid()})
    return os.environ | {_TRAINER: value, "PYTHONUNBUFFERED": "1"}


def trainer() -> Trainer | None:
    """Returns this process as a `Trainer` if a supervisor or parent started it, else None."""
    value = os.environ.pop(_TRAINER, None)  # Data workers must not inherit it.
    if value is None:
        return None
    content = json.loads(value)
    fields = content["process"]
    local = fields["local_devices"]
    hosts = {int(index): host for index, host in fields["hosts"].items()}
    process = ProcessInfo(**fields | {"local_devices": None if local is None else tuple(local), "hosts": hosts})
    _die_with_parent(content["supervisor"])
    global _channel
    _channel = socket.socket(fileno=content["channel"])
    _channel.set_inheritable(False)
    return Trainer(process, _channel)


def channel() -> int | None:
    """File descriptor of the channel to this trainer's supervisor or parent, if it has one."""
    return None if _channel is None else _channel.fileno()


def report_hang(code: int, text: str) -> None:
    """Reports to this trainer's supervisor or parent, if any, that it hangs and will exit with `code`."""
    if _channel is not None:
        _send_report(_channel, {"code": code, "text": text, "hung": True})


def _send_report(channel: socket.socket, report: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):
        channel.sendall(json.dumps(report).encode() + b"\n")


def _die_with_parent(parent: int) -> None:
    """Makes the kernel kill this process when its parent ends, even by kill -9."""
    with contextlib.suppress(OSError, AttributeError):  # prctl exists on Linux only.
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # The parent died before prctl.
        os._exit(EXIT_BUG)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The process that trains."""

    process: ProcessInfo
    channel: socket.socket

    def run(self, work: Callable[[], int], settings: ProcessesConfig) -> int:
        """Joins the other processes, calls `work` and returns its exit code.

        An exception is reported to the supervisor, which knows whether another process caused it. Then this process
        exits at once: jax would wait for processes that do not end, and the supervisors handle those.

        The only trainer of a run joins nothing and reports its own exit (see parent.py).
        """
        if self.process.count == 1:
            return work()
        try:
            initialize(self.process, settings)
            code = work()
            shutdown()
            return code
        except BaseException as error:
            described = describe_exit(error)
            code, text = (EXIT_BUG, traceback.format_exc()) if described is None else described
            _send_report(self.channel, {"code": code, "text": text})
            for output in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):  # The reader may be gone.
                    output.flush()
            os._exit(code)


def initialize(process: ProcessInfo, settings: ProcessesConfig) -> None:
    """Initialises jax.distributed and publishes this process' host in the coordination store.

    Raises:
      UserError: if the other processes cannot be reached in time.
    """
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            process.coordinator,
            process.count,
            process.index,
            local_device_ids=process.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=settings.startup_timeout_s,
            # The supervisors should detect and name a missing process first; jax's heartbeat is the fallback.
            heartbeat_timeout_seconds=2 * settings.heartbeat_timeout_s,
            shutdown_timeout_seconds=settings.barrier_timeout_s,
            coordinator_bind_address=process.bind_address,
        )
    except RuntimeError as error:
        remedy = "Check that the hosts can reach that port of process 0, and that no other program listens there"
        what = f"the processes cannot connect at {process.coordinator}"
        raise UserError(what, first_line(error), remedy) from error
    _client().key_value_set(f"{_STORE}/host/{process.index}", socket.gethostname())
    barrier("hosts", settings.startup_timeout_s)


def shutdown() -> None:
    """Waits until all processes call this, then shuts down jax.distributed."""
    import jax

    jax.distributed.shutdown()


def hosts() -> dict[int, str]:
    """process -> host of all processes that have joined; empty in a run of one process."""
    client = _client()
    if client is None:
        return {}
    entries = client.key_value_dir_get(f"{_STORE}/host/")
    return {int(key.rpartition("/")[2]): host for key, host in sorted(entries)}


def broadcast(name: str, value: _Value, timeout_s: int) -> _Value:
    """Returns process 0's `value` (JSON) on every process; each calls this once per `name` and waits for process 0.

    Decisions that depend on the content of a folder are made this way, because hosts may see it at different times.
    """
    client = _client()
    if client is None:
        return value
    key = f"{_STORE}/broadcast/{name}"
    import jax

    if jax.process_index() == 0:
        client.key_value_set(key, json.dumps(value))
    try:
        return json.loads(client.blocking_key_value_get(key, timeout_s * 1000))
    except RuntimeError as error:
        raise _timeout_error({0: hosts()[0]}, name, timeout_s) from error


def all_gather(name: str, value: _Value, timeout_s: int) -> dict[int, _Value]:
    """Returns the `value` (JSON) of every process, by process index; each calls this once per `name`.

    Process 0, which holds the store, returns last, because a process may exit after this call.
    """
    client = _client()
    if client is None:
        return {0: value}
    import jax

    publish(f"gathered/{name}", value)
    barrier(name, timeout_s)
    values = published(f"gathered/{name}")
    publish(f"seen/{name}", True)
    for other in values if jax.process_index() == 0 else ():
        try:
            client.blocking_key_value_get(f"{_STORE}/published/seen/{name}/{other}", timeout_s * 1000)
        except RuntimeError as error:
            raise _timeout_error({other: hosts()[other]}, name, timeout_s) from error
    return dict(sorted(values.items()))


def barrier(name: str, timeout_s: int) -> None:
    """Waits until all processes have called this, once per `name`.

    Raises:
      UserError: after `timeout_s`, naming the processes that have not.
    """
    client = _client()
    if client is None:
        return
    import jax

    key = f"{_STORE}/barrier/{name}"
    client.key_value_set(f"{key}/{jax.process_index()}", "arrived")
    try:
        client.wait_at_barrier(key, timeout_s * 1000)
    except RuntimeError as error:
        arrived = {int(entry.rpartition("/")[2]) for entry, _ in client.key_value_dir_get(f"{key}/")}
        raise _timeout_error({i: host for i, host in hosts().items() if i not in arrived}, name, timeout_s) from error


def publish(name: str, value: Any) -> None:
    """Stores `value` (JSON) under `name` for the other processes, without waiting for them."""
    client = _client()
    if client is not None:
        import jax

        client.key_value_set(f"{_STORE}/published/{name}/{jax.process_index()}", json.dumps(value))


def published(name: str) -> dict[int, Any]:
    """Returns the values published under `name` so far, by process index."""
    client = _client()
    entries = [] if client is None else client.key_value_dir_get(f"{_STORE}/published/{name}/")
    return {int(key.rpartition("/")[2]): json.loads(value) for key, value in entries}


def unpublish(name: str) -> None:
    """Deletes what all processes have published under `name` and under names that begin with `name`/."""
    client = _client()
    if client is not None:
        client.key_value_delete(f"{_STORE}/published/{name}/")


def _timeout_error(late: Mapping[int, str], name: str, timeout_s: int) -> UserError:
    processes = ", ".join(f"process {index} on {host}" for index, host in late.items())
    remedy = "Check their logs, or raise processes.barrier_timeout_s"
    return UserError(f"waited {timeout_s} s for the {name} of", processes, remedy)


def _client() -> Any:
    """jax's client of the coordination store, or None in a run of one process."""
    from jax._src import distributed

    return distributed.global_state.client
