"""XProf's trace of some steps, in `WORKDIR/profile`: `xprof --logdir WORKDIR/profile` shows it."""

from __future__ import annotations

import collections
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

from aimv2_jax.files import is_remote
from aimv2_jax.parallel import processes


class Profiler:
    """Traces the steps first to end - 1; every process writes its own file, the names of all in one folder.

    Args:
      steps: (first, end), or None: nothing is traced.
      workdir: the run's folder.
    """

    def __init__(self, steps: tuple[int, int] | None, workdir: epath.PathLike):
        self._first, self._end = steps or (0, 0)
        self._folder = epath.Path(workdir) / "profile"
        self._running = False

    def due(self, step: int) -> bool:
        """Whether `before(step)` has anything to do: the step before is then to be waited for."""
        return self._running != (self._first <= step < self._end)

    def before(self, step: int) -> None:
        """Called before `step` is dispatched, with nothing under way: starts or ends the trace where that is due."""
        if not self.due(step):
            return
        if self._running:
            self.close()
            return
        options = jax.profiler.ProfileOptions()
        options.session_id = (
            f"steps_{step}_to_{self._end - 1}"  # The same on all hosts, so that XProf shows them as one.
        )
        self._scratch = contextlib.ExitStack()
        self._local = self._scratch.enter_context(self._place())
        jax.profiler.start_trace(str(self._local), profiler_options=options)
        self._running = True

    def close(self) -> None:
        """Ends a trace that is under way."""
        if not self._running:
            return
        self._running = False
        with self._scratch:
            jax.profiler.stop_trace()
            if is_remote(self._folder):
                _upload(self._local, self._folder / self._own_name())

    @contextlib.contextmanager
    def _place(self) -> Iterator[Path]:
        """The local folder to write to."""
        if is_remote(self._folder):
            with tempfile.TemporaryDirectory(prefix="profile-") as folder:
                yield Path(folder)
        else:
            yield Path(self._folder / self._own_name())

    @staticmethod
    def _own_name() -> str:
        """XProf calls files by their hosts: processes that share one, as in tests, need folders of their own."""
        hosts = collections.Counter(processes.hosts().values())
        return f"process_{jax.process_index():05d}" if hosts and max(hosts.values()) > 1 else "."


def _upload(folder: Path, to: epath.Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            target = to / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
