"""Kills its parent process, a trainer, when the watchdog's heartbeat stops: `-m aimv2_jax.resilience.heartbeat`.

The watchdog is a thread and needs the GIL. C code that never releases the GIL stops all threads; from inside, only
faulthandler's timer can end such a process, always with code 1, and also when the process was merely suspended for as
long. So the watchdog sends a line after each of its checks (`Heartbeat`), and this process measures the time without
one. Time in which the trainer is stopped, or in which this process was suspended as well, does not count.

On a timeout this process reports the hang to the trainer's parent by a channel (the argument: a descriptor, or -1), has
the stacks written (SIGUSR1, for which faulthandler needs no GIL), records the hang, and kills the trainer. The
trainer's parent turns that into an exit code (distributed/parent.py, distributed/supervisor.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_TICK_S = 0.2
_MAX_TICK_DELAY_S = 1.0  # A longer delay than this on a busy machine means that this process was suspended.
_STACKS_S = 1.5  # Time for this trainer, and for others that wait for it, to write their stacks.
_RECORD_TIMEOUT_S = 5.0  # Timeout for the record of the hang: the disk itself may hang.


@dataclasses.dataclass(frozen=True)
class Heartbeat:
    """A message of the watchdog: how long it may be silent from now on, and what hangs if it is silent for longer.

    Args:
      limit_s: seconds without another message; 0 for no limit.
      code: the trainer's exit code after a hang.
      text: the message about the hang.
      file: the record of the hang.
    """

    limit_s: float
    code: int = 0
    text: str = ""
    file: str = ""


class HeartbeatMonitor:
    """Starts the monitoring process, and sends it heartbeats.

    Args:
      channel: descriptor of the channel to the trainer's parent (distributed/coordination.py), or None.
    """

    def __init__(self, channel: int | None):
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "aimv2_jax.resilience.heartbeat", str(-1 if channel is None else channel)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
            pass_fds=[] if channel is None else [channel],
        )
        # The process may be suspended, and the watchdog must not wait.
        os.set_blocking(self._process.stdin.fileno(), False)

    def send(self, beat: Heartbeat) -> None:
        line = json.dumps(dataclasses.asdict(beat)).encode() + b"\n"
        with contextlib.suppress(OSError):  # The process was killed, or is suspended.
            os.write(self._process.stdin.fileno(), line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.kill()  # A suspended process would not see the end of its input.
        self._process.wait()


def _monitor(trainer: int, channel: int) -> None:
    """Reads heartbeats until the trainer ends or is killed."""
    beat = Heartbeat(0)
    silent_s = 0.0
    tick_s = time.monotonic()
    partial_line = b""
    while True:
        ready, _, _ = select.select([0], [], [], _TICK_S)
        now_s = time.monotonic()
        passed_s = now_s - tick_s
        tick_s = now_s
        if ready:
            data = os.read(0, 1 << 16)
            if not data:
                return
            *lines, partial_line = (partial_line + data).split(b"\n")
            if lines:
                beat = Heartbeat(**json.loads(lines[-1]))
                silent_s = 0.0
        elif passed_s < _TICK_S + _MAX_TICK_DELAY_S and not _is_stopped(trainer):
            silent_s += passed_s
            if beat.limit_s and silent_s > beat.limit_s:
                return _kill_trainer(trainer, channel, beat)


def _is_stopped(process: int) -> bool:
    """Whether a process is suspended by a signal or stopped by a debugger (proc(5): states T and t)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def _kill_trainer(trainer: int, channel: int, beat: Heartbeat) -> None:
    message = f"{beat.text}; some C code keeps Python's lock"
    with contextlib.suppress(OSError):
        if channel >= 0:
            os.write(channel, json.dumps({"code": beat.code, "text": message, "hung": True}).encode() + b"\n")
        os.write(2, f"{message}\n".encode())
    if os.getppid() != trainer:
        return
    os.kill(trainer, signal.SIGUSR1)
    time.sleep(_STACKS_S)
    record = threading.Thread(target=_record, args=(beat.file, f"{message}; the stacks are in the log\n"), daemon=True)
    record.start()
    record.join(_RECORD_TIMEOUT_S)
    if os.getppid() == trainer:
        os.kill(trainer, signal.SIGKILL)


def _record(file: str, text: str) -> None:
    from aimv2_jax.storage.files import atomic_write, make_parent

    with contextlib.suppress(OSError):
        make_parent(file)
        atomic_write(file, text.encode())


def main() -> None:
    # These signals are meant for the trainer; this process ends with it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _monitor(os.getppid(), int(sys.argv[1]))


if __name__ == "__main__":
    main()
