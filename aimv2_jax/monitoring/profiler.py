"""XProf traces of selected steps in `WORKDIR/profile`; view them with `xprof --logdir WORKDIR/profile`."""

from __future__ import annotations

import collections
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

from aimv2_jax.distributed import coordination
from aimv2_jax.storage.files import atomic_write, is_remote, make_parent


class Profiler:
    """Traces the steps first to end - 1; every process writes its own file to one session folder.

    Args:
      steps: (first, end), or None for no trace.
      workdir: the run's folder.
    """

    def __init__(self, steps: tuple[int, int] | None, workdir: epath.PathLike):
        self._first, self._end = steps or (0, 0)
        self._folder = epath.Path(workdir) / "profile"
        self._running = False

    def due(self, step: int) -> bool:
        """Whether `before(step)` starts or ends the trace; if so, wait for the previous step first."""
        return self._running != (self._first <= step < self._end)

    def before(self, step: int) -> None:
        """Starts or ends the trace if due; call it before `step` is dispatched, with no step in progress."""
        if not self.due(step):
            return
        if self._running:
            self.close()
            return
        options = jax.profiler.ProfileOptions()
        # Equal on all hosts, so that XProf shows them as one session.
        options.session_id = f"steps_{step}_to_{self._end - 1}"
        self._scratch = contextlib.ExitStack()
        self._local = self._scratch.enter_context(self._local_folder())
        jax.profiler.start_trace(str(self._local), profiler_options=options)
        self._running = True

    def close(self) -> None:
        """Ends a trace in progress."""
        if not self._running:
            return
        self._running = False
        with self._scratch:
            jax.profiler.stop_trace()
            if is_remote(self._folder):
                _upload(self._local, self._folder / self._process_folder())

    @contextlib.contextmanager
    def _local_folder(self) -> Iterator[Path]:
        """The local folder to write to."""
        if is_remote(self._folder):
            with tempfile.TemporaryDirectory(prefix="profile-") as folder:
                yield Path(folder)
        else:
            yield Path(self._folder / self._process_folder())

    @staticmethod
    def _process_folder() -> str:
        """Subfolder of this process: XProf names files by host, so processes on one host need separate folders."""
        hosts = collections.Counter(coordination.hosts().values())
        return f"process_{jax.process_index():05d}" if hosts and max(hosts.values()) > 1 else "."


def _upload(folder: Path, to: epath.Path) -> None:
    """Copies all files below `folder` to `to`."""
    for path in folder.rglob("*"):
        if path.is_file():
            target = to / path.relative_to(folder)
            make_parent(target)
            atomic_write(target, path.read_bytes())
