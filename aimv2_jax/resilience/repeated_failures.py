"""Records the steps at which a run hung or its devices failed; a second failure at the same step ends the restarts.

Each failure leaves `WORKDIR/hangs/STEP-PROCESS-WHAT.txt`. When a later state than that of the start is saved, the files
of the steps up to it are renamed and no longer count: two hangs at a start, weeks apart, are not a repeated hang.
"""

from __future__ import annotations

import contextlib
import re

from etils import epath

from aimv2_jax.errors import EXIT_HUNG, EXIT_RETRY
from aimv2_jax.storage.files import atomic_write, list_names, make_parent, read_bytes, remove

FOLDER = "hangs"
_FILE_NAME = re.compile(r"(\d+)-\d+-\w+\.txt")


class RepeatedFailures:
    """The failures of a run that count.

    Args:
      workdir: of the run.
      process_index: of this process; `record` writes its files.
    """

    def __init__(self, workdir: epath.PathLike, process_index: int):
        self.folder = epath.Path(workdir) / FOLDER
        self._process = process_index
        self._steps = {step for step, _ in self._counted()}

    def exit_code(self, step: int) -> int:
        """EXIT_RETRY the first time at `step`, then EXIT_HUNG."""
        return EXIT_HUNG if step in self._steps else EXIT_RETRY

    def file(self, step: int, what: str) -> epath.Path:
        """The file that records a failure of this process."""
        return self.folder / f"{step:08d}-{self._process:05d}-{what}.txt"

    def record(self, step: int, what: str, text: bytes) -> None:
        """Records that `what` hung or failed at `step`."""
        make_parent(self.file(step, what))
        atomic_write(self.file(step, what), text)

    def retire(self, saved: int) -> None:
        """Stops counting failures up to step `saved`; process 0 renames the files of all processes."""
        if all(step > saved for step in self._steps):
            return
        self._steps = {step for step in self._steps if step > saved}
        if self._process == 0:
            for step, file in self._counted():
                if step <= saved:
                    with contextlib.suppress(OSError):  # A file that stays counts once too often.
                        atomic_write(file.with_name(f"{file.stem}-before-{saved:08d}.txt"), read_bytes(file))
                        remove(file)

    def _counted(self) -> list[tuple[int, epath.Path]]:
        try:
            names = list_names(self.folder)
        except OSError:
            return []
        return [(int(match[1]), self.folder / match[0]) for match in map(_FILE_NAME.fullmatch, names) if match]
