"""Parent of a run's only trainer: translates how the trainer ended into the exit code.

A trainer cannot choose its exit code when the system kills it (out of memory, a fault in C), when it is asked to stop
before it handles signals, or when it is killed because it hangs (resilience/heartbeat.py). Launchers restart a run on
code 75 only. The supervisor of one of several trainers (supervisor.py) does the same, and more.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence

from etils import epath

from aimv2_jax.console import print_line
from aimv2_jax.distributed.cluster import ProcessInfo
from aimv2_jax.distributed.coordination import trainer_environment
from aimv2_jax.distributed.crash_count import MAX_KILLS, count_kill_within
from aimv2_jax.errors import EXIT_HUNG, EXIT_INTERRUPTED, EXIT_RETRY

_RESUME_HINT = "run the same command to resume from the newest checkpoint, if there is one"


def run_trainer(command: Sequence[str], workdir: epath.PathLike) -> int:
    """Starts the trainer by `command`, forwards signals to it and returns the exit code of this process."""
    own_socket, trainer_socket = socket.socketpair()
    # The trainer gets its own session, like one of several trainers: Ctrl-C reaches it once, through this process.
    trainer = subprocess.Popen(
        command,
        env=trainer_environment(ProcessInfo("", 1, 0), trainer_socket.fileno()),
        pass_fds=[trainer_socket.fileno()],
        start_new_session=True,
    )
    trainer_socket.close()
    try:
        with signals_passed_on(trainer):
            code = _wait(trainer)
    finally:
        trainer.kill()
        trainer.wait()
    with own_socket:
        hang_code = _hang_code(own_socket)
    if code >= 0:
        return code
    return _code_of_signal(signal.Signals(-code), workdir) if hang_code is None else hang_code


def _wait(trainer: subprocess.Popen) -> int:
    """Waits for the trainer and returns its return code.

    With a timeout, `Popen.wait` polls at least every 50 ms. Without one it blocks in waitpid(2), and a signal that
    arrives just before that call is not handled until the next signal arrives.
    """
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return trainer.wait(timeout=60.0)


@contextlib.contextmanager
def signals_passed_on(trainer: subprocess.Popen) -> Iterator[None]:
    """Forwards SIGINT and SIGTERM to the trainer, and SIGHUP (a closed terminal) as SIGTERM."""
    passed_on = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores SIGHUP.
        passed_on[signal.SIGHUP] = signal.SIGTERM

    def pass_on(number: int, _: object) -> None:
        trainer.send_signal(passed_on[signal.Signals(number)])

    before = {number: signal.signal(number, pass_on) for number in passed_on}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _hang_code(channel: socket.socket) -> int | None:
    """Exit code that the trainer reported for a hang, or None if it reported no hang."""
    channel.setblocking(False)
    data = b""
    with contextlib.suppress(OSError):  # The channel is empty.
        while more := channel.recv(1 << 16):
            data += more
    reports = [json.loads(line) for line in data.splitlines()]
    return next((report["code"] for report in reports if report.get("hung")), None)


def _code_of_signal(number: signal.Signals, workdir: epath.PathLike) -> int:
    if number == signal.SIGINT:
        return EXIT_INTERRUPTED
    if number == signal.SIGTERM:
        print_line(f"stopped on request during startup or shutdown; {_RESUME_HINT}", sys.stderr)
        return EXIT_RETRY
    kills = count_kill_within(workdir)
    if kills < MAX_KILLS:
        print_line(f"error: the trainer was ended by {number.name}; {_RESUME_HINT}", sys.stderr)
        return EXIT_RETRY
    repeated = f"trainers were killed {kills} times since the newest checkpoint"
    remedy = "Check the system log: SIGKILL usually means the OOM killer"
    print_line(f"error: the trainer was ended by {number.name}; {repeated}. {remedy}", sys.stderr)
    return EXIT_HUNG
