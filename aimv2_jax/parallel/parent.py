"""The parent of a trainer that is the only one of its run: how the trainer ended becomes the exit code.

A trainer that the system kills (want of memory, a fault in C), that is asked to end before it listens, or that is
killed because it hangs (train/heartbeat.py) cannot choose its code; launchers start a run again by code 75 alone.
The watcher of a trainer that is one of several (supervisor.py) does the same, and more.
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
from aimv2_jax.errors import EXIT_AGAIN, EXIT_HUNG, EXIT_INTERRUPTED
from aimv2_jax.parallel.clusters import Place
from aimv2_jax.parallel.kills import MAX_KILLS, count_kill_within
from aimv2_jax.parallel.processes import trainer_environment

_GOES_ON = "the same command goes on from the newest checkpoint, if there is one"


def run_trainer(command: Sequence[str], workdir: epath.PathLike) -> int:
    """Starts the trainer by `command`, hands signals on to it, and returns the exit code of this process."""
    mine, its = socket.socketpair()
    # In a session of its own, as a trainer that is one of several: Ctrl-C comes to it through this process, once.
    trainer = subprocess.Popen(
        command,
        env=trainer_environment(Place("", 1, 0), its.fileno()),
        pass_fds=[its.fileno()],
        start_new_session=True,
    )
    its.close()
    try:
        with signals_passed_on(trainer):
            code = _wait(trainer)
    finally:
        trainer.kill()
        trainer.wait()
    with mine:
        hung = _told(mine)
    if code >= 0:
        return code
    return _code_of_signal(signal.Signals(-code), workdir) if hung is None else hung


def _wait(trainer: subprocess.Popen) -> int:
    """How the trainer ended.

    With a time limit, `Popen.wait` looks every 50 ms at the latest. Without one it blocks in waitpid(2), and a signal
    that comes just before it does so is not handled before the next one comes.
    """
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return trainer.wait(timeout=60.0)


@contextlib.contextmanager
def signals_passed_on(trainer: subprocess.Popen) -> Iterator[None]:
    """Meanwhile SIGINT and SIGTERM go on to the trainer; so does SIGHUP (a terminal is closed), as a SIGTERM."""
    passed_on = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # As nohup has it.
        passed_on[signal.SIGHUP] = signal.SIGTERM

    def pass_on(number: int, _: object) -> None:
        trainer.send_signal(passed_on[signal.Signals(number)])

    before = {number: signal.signal(number, pass_on) for number in passed_on}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _told(channel: socket.socket) -> int | None:
    """The code with which the trainer was to end because it hung, if that is what was told of it."""
    channel.setblocking(False)
    data = b""
    with contextlib.suppress(OSError):  # No more is to come.
        while more := channel.recv(1 << 16):
            data += more
    ends = [json.loads(line) for line in data.splitlines()]
    return next((end["code"] for end in ends if end.get("hung")), None)


def _code_of_signal(number: signal.Signals, workdir: epath.PathLike) -> int:
    if number == signal.SIGINT:
        return EXIT_INTERRUPTED
    if number == signal.SIGTERM:
        print_line(f"stopped on request, while it started or ended; {_GOES_ON}", sys.stderr)
        return EXIT_AGAIN
    kills = count_kill_within(workdir)
    if kills < MAX_KILLS:
        print_line(f"error: the trainer was ended by {number.name}; {_GOES_ON}", sys.stderr)
        return EXIT_AGAIN
    often = f"as trainers were {kills} times since the newest checkpoint"
    remedy = "Look into the system's log: SIGKILL is mostly its want of memory"
    print_line(f"error: the trainer was ended by {number.name}, {often}. {remedy}", sys.stderr)
    return EXIT_HUNG
