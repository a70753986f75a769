"""A process that ends its parent, a trainer, when the watchdog's heartbeat stops: `... -m aimv2_jax.train.heartbeat`.

The watchdog is a thread and needs Python's lock. A piece of C that never gives it back stops all threads; from inside,
only faulthandler's timer can end such a process, always with code 1, and also when the process was merely suspended for
as long. So the watchdog writes a line whenever it has looked (`Heartbeat`), and this process counts the time without
one. Time in which the trainer is stopped, or in which this process was suspended as well, does not count.

What it does then: tells the trainer's parent by a channel (the argument: a descriptor, or -1), has the stacks written
(SIGUSR1, for which faulthandler needs no lock), records the hang, and kills the trainer. The trainer's parent makes an
exit code of that (parallel/parent.py, parallel/supervisor.py).
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
_LATE_S = 1.0  # By which a tick may be late on a busy machine, and still count.
_STACKS_S = 1.5  # For the stacks of this trainer, and of others that wait for it.
_RECORDED_S = 5.0  # For the record of the hang: the disk may be what hangs.


@dataclasses.dataclass(frozen=True)
class Heartbeat:
    """A line of the watchdog: how long it may be silent from now on (0: for ever), and what it is then that hung.

    Args:
      limit_s: seconds.
      code: the trainer is to end with.
      text: says what hung.
      file: where the hang is recorded.
    """

    limit_s: float
    code: int = 0
    text: str = ""
    file: str = ""


class HeartbeatMonitor:
    """Starts the process, and sends it heartbeats.

    Args:
      channel: descriptor by which the trainer's parent is told (parallel/processes.py), or None.
    """

    def __init__(self, channel: int | None):
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "aimv2_jax.train.heartbeat", str(-1 if channel is None else channel)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
            pass_fds=[] if channel is None else [channel],
        )
        os.set_blocking(self._process.stdin.fileno(), False)  # It may be suspended, and the watchdog must not wait.

    def send(self, beat: Heartbeat) -> None:
        line = json.dumps(dataclasses.asdict(beat)).encode() + b"\n"
        with contextlib.suppress(OSError):  # It was killed, or is suspended: then nobody listens.
            os.write(self._process.stdin.fileno(), line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.kill()  # It may be suspended.
        self._process.wait()


def _look(trainer: int, channel: int) -> None:
    """Returns when the trainer has ended, by itself or by this."""
    beat, silent_s, looked_s, half = Heartbeat(0), 0.0, time.monotonic(), b""
    while True:
        ready, _, _ = select.select([0], [], [], _TICK_S)
        now_s = time.monotonic()
        passed_s, looked_s = now_s - looked_s, now_s
        if ready:
            data = os.read(0, 1 << 16)
            if not data:
                return
            *lines, half = (half + data).split(b"\n")
            if lines:
                beat, silent_s = Heartbeat(**json.loads(lines[-1])), 0.0
        elif passed_s < _TICK_S + _LATE_S and not _is_stopped(trainer):
            silent_s += passed_s
            if beat.limit_s and silent_s > beat.limit_s:
                return _end(trainer, channel, beat)


def _is_stopped(process: int) -> bool:
    """Whether it is suspended by a signal or held by a debugger (proc(5): states T and t)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def _end(trainer: int, channel: int, beat: Heartbeat) -> None:
    said = f"{beat.text}; some C code keeps Python's lock"
    with contextlib.suppress(OSError):
        if channel >= 0:
            os.write(channel, json.dumps({"code": beat.code, "text": said, "hung": True}).encode() + b"\n")
        os.write(2, f"{said}\n".encode())
    if os.getppid() != trainer:
        return
    os.kill(trainer, signal.SIGUSR1)
    time.sleep(_STACKS_S)
    record = threading.Thread(target=_record, args=(beat.file, f"{said}; the stacks are in the log\n"), daemon=True)
    record.start()
    record.join(_RECORDED_S)
    if os.getppid() == trainer:
        os.kill(trainer, signal.SIGKILL)


def _record(file: str, text: str) -> None:
    from etils import epath

    from aimv2_jax.files import write_whole

    with contextlib.suppress(Exception):  # Of a bucket, TensorFlow's and fsspec's own kinds.
        epath.Path(file).parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, text.encode())


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # Meant for the trainer, whose end is seen here.
        signal.signal(number, signal.SIG_IGN)
    _look(os.getppid(), int(sys.argv[1]))


if __name__ == "__main__":
    main()
